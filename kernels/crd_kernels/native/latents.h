// How the C++ passes read and write latents: any strides, any mix of four dtypes.
//
// Operands of one dtype that are contiguous inside a sample are handed to the loop as they are, and converted in
// registers. Everything else, and noise by seed, goes through tiles: small buffers of the compute type.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "philox.h"

namespace {

constexpr int64_t RUN = 4096;         // elements that one float sum covers before it goes to a double
constexpr int64_t TILE = 256;         // elements of a buffer; larger ones were slower, they crowd the L1 cache
constexpr int64_t CHUNK = 16 * 1024;  // elements of one task and of one partial sum
constexpr int DIMS = 7;               // dimensions of a sample after collapsing, padded with 1 in front

// As native/problem.py numbers them; a mask may be BOOL or UINT8, what is one entry a sample any of them.
enum Dtype : int64_t { BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8, INT8, INT16, INT32, INT64, BOOL };

// One tensor of shape (batch, sizes...); strides are in elements. native/problem.py packs the same words.
struct Operand {
  char* data;
  int64_t dtype;
  int64_t batch_stride;
  int64_t strides[DIMS];
};

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

using Float16 = _Float16;

template <class S, class T>
inline void put(S& to, T value) {
  to = S(value);
}

// The nearest bfloat16 (ties to even; NaN stays NaN) in the upper half of a word, whose lower half is rubbish.
inline uint32_t round_to_bfloat16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return value == value ? wide + 0x7fff + ((wide >> 16) & 1) : 0x7fc00000;
}

// Writes the member: gcc does not vectorise copies of the struct.
template <class T>
inline void put(BFloat16& to, T value) {
  to.bits = uint16_t(round_to_bfloat16(float(value)) >> 16);
}

// What a loop takes from memory at a time: one element, or two of bfloat16. These are the halves of a word, which
// a shift and a mask widen and join, where vectors of single ones have to be shuffled apart.
// Static functions of plain numbers: gcc does not vectorise loops with objects of a class in them.
template <class S>
struct Pack {
  using Word = S;
  static constexpr int SIZE = 1;

  static Word load(const S* from, int64_t i) { return from[i]; }
  static S get(Word word, int) { return word; }
  template <class T>
  static Word join(Word, int, T value) {
    return S(value);
  }
  static void store(S* to, int64_t i, Word word) { to[i] = word; }
};

template <>
struct Pack<BFloat16> {
  using Word = uint32_t;
  static constexpr int SIZE = 2;

  static Word load(const BFloat16* from, int64_t i) {
    Word word;
    std::memcpy(&word, from + SIZE * i, sizeof word);
    return word;
  }
  static float get(Word word, int half) {
    const uint32_t wide = half == 0 ? word << 16 : word & 0xffff0000;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  template <class T>
  static Word join(Word word, int half, T value) {  // word with one half, which is 0, set to value
    const uint32_t rounded = round_to_bfloat16(float(value));
    return word | (half == 0 ? rounded >> 16 : rounded & 0xffff0000);
  }
  static void store(BFloat16* to, int64_t i, Word word) { std::memcpy(to + SIZE * i, &word, sizeof word); }
};

// Visits the elements [begin, begin + count) of sample b as runs along the innermost dimension.
template <class Visit>
inline void for_each_run(const Operand& x, const int64_t* sizes, int64_t b, int64_t begin, int64_t count,
                         Visit visit) {
  int64_t done = 0;
  while (done < count) {
    int64_t rest = begin + done, offset = b * x.batch_stride;
    const int64_t inner = rest % sizes[DIMS - 1];
    for (int d = DIMS - 1; d >= 0 && rest > 0; --d) {
      offset += (rest % sizes[d]) * x.strides[d];
      rest /= sizes[d];
    }
    int64_t length = sizes[DIMS - 1] - inner;
    if (length > count - done) length = count - done;
    visit(offset, done, length);
    done += length;
  }
}

template <class S, class T>
void load_as(const Operand& x, const int64_t* sizes, int64_t b, int64_t begin, int64_t count, T* tile) {
  const S* data = reinterpret_cast<const S*>(x.data);
  const int64_t step = x.strides[DIMS - 1];
  for_each_run(x, sizes, b, begin, count, [&](int64_t offset, int64_t at, int64_t length) {
    const S* from = data + offset;
    T* to = tile + at;
    if (step == 1) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) to[i] = T(from[i]);
    } else {
      for (int64_t i = 0; i < length; ++i) to[i] = T(from[i * step]);
    }
  });
}

template <class T>
void load(const Operand& x, const int64_t* sizes, int64_t b, int64_t begin, int64_t count, T* tile) {
  switch (x.dtype) {
    case BFLOAT16: return load_as<BFloat16>(x, sizes, b, begin, count, tile);
    case FLOAT16: return load_as<Float16>(x, sizes, b, begin, count, tile);
    case FLOAT32: return load_as<float>(x, sizes, b, begin, count, tile);
    case BOOL:
    case UINT8: return load_as<uint8_t>(x, sizes, b, begin, count, tile);
    default: return load_as<double>(x, sizes, b, begin, count, tile);
  }
}

template <class S, class T>
void store_as(const Operand& x, const int64_t* sizes, int64_t b, int64_t begin, int64_t count, const T* tile) {
  S* data = reinterpret_cast<S*>(x.data);
  const int64_t step = x.strides[DIMS - 1];
  for_each_run(x, sizes, b, begin, count, [&](int64_t offset, int64_t at, int64_t length) {
    S* to = data + offset;
    const T* from = tile + at;
    if (step == 1) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) put(to[i], from[i]);
    } else {
      for (int64_t i = 0; i < length; ++i) put(to[i * step], from[i]);
    }
  });
}

template <class T>
void store(const Operand& x, const int64_t* sizes, int64_t b, int64_t begin, int64_t count, const T* tile) {
  switch (x.dtype) {
    case BFLOAT16: return store_as<BFloat16>(x, sizes, b, begin, count, tile);
    case FLOAT16: return store_as<Float16>(x, sizes, b, begin, count, tile);
    case FLOAT32: return store_as<float>(x, sizes, b, begin, count, tile);
    default: return store_as<double>(x, sizes, b, begin, count, tile);
  }
}

// The tensors of one call: absent ones have data == nullptr. `seed` stands in for `noise` when it is given.
struct Problem {
  Operand policy, old, ref_cond, ref_uncond, x0, noise, mask, out;
  const int64_t* seed;  // (batch,)
  int64_t batch, sizes[DIMS], numel;
};

// What a loop works on: `count` elements of every operand. S is the stored type, or the compute type for tiles.
template <class S>
struct Views {
  const S *policy, *old, *ref_cond, *ref_uncond, *x0, *noise, *mask;
  S* out;
};

template <class T>
struct Tiles {
  alignas(64) T policy[TILE], old[TILE], ref_cond[TILE], ref_uncond[TILE], x0[TILE], noise[TILE], mask[TILE], out[TILE];
};

// The dtype of all operands when the loop can work on them in place, in whole packs, else -1.
inline int64_t direct_dtype(const Problem& p) {
  int64_t dtype = -1;
  if (p.seed || p.mask.data || p.sizes[DIMS - 1] != p.numel || p.numel % Pack<BFloat16>::SIZE) return -1;
  for (const Operand* x : {&p.policy, &p.old, &p.ref_cond, &p.ref_uncond, &p.x0, &p.noise, &p.out}) {
    if (!x->data) continue;
    if (x->strides[DIMS - 1] != 1 || (dtype >= 0 && dtype != x->dtype)) return -1;
    dtype = x->dtype;
  }
  return dtype;
}

template <class S, class Body>
void in_place(const Problem& p, int64_t b, int64_t begin, int64_t end, Body body) {
  auto at = [&](const Operand& x, int64_t from) {
    return x.data ? reinterpret_cast<S*>(x.data) + b * x.batch_stride + from : nullptr;
  };
  for (int64_t from = begin; from < end; from += RUN) {
    Views<S> v{at(p.policy, from), at(p.old, from), at(p.ref_cond, from), at(p.ref_uncond, from),
               at(p.x0, from),     at(p.noise, from), nullptr,                at(p.out, from)};
    body(v, end - from < RUN ? end - from : RUN);
  }
}

template <class T, class Body>
void through_tiles(const Problem& p, int64_t b, int64_t begin, int64_t end, Body body) {
  Tiles<T> t;
  const Views<T> v{t.policy, t.old, t.ref_cond, t.ref_uncond, t.x0, t.noise, p.mask.data ? t.mask : nullptr, t.out};
  for (int64_t from = begin; from < end; from += TILE) {
    const int64_t count = end - from < TILE ? end - from : TILE;
    if (p.policy.data) load(p.policy, p.sizes, b, from, count, t.policy);
    if (p.old.data) load(p.old, p.sizes, b, from, count, t.old);
    if (p.ref_cond.data) load(p.ref_cond, p.sizes, b, from, count, t.ref_cond);
    if (p.ref_uncond.data) load(p.ref_uncond, p.sizes, b, from, count, t.ref_uncond);
    if (p.x0.data) load(p.x0, p.sizes, b, from, count, t.x0);
    if (p.mask.data) load(p.mask, p.sizes, b, from, count, t.mask);
    if (p.seed) {
      philox_normal(p.seed[b], from, count, t.noise);
    } else {
      load(p.noise, p.sizes, b, from, count, t.noise);
    }
    body(v, count);
    if (p.out.data) store(p.out, p.sizes, b, from, count, t.out);
  }
}

// Calls body(views, count) until the elements [begin, end) of sample b are done; T is the compute type.
template <class T, class Body>
void for_each_view(const Problem& p, int64_t direct, int64_t b, int64_t begin, int64_t end, Body body) {
  if constexpr (sizeof(T) == sizeof(double)) {
    if (direct == FLOAT64) return in_place<double>(p, b, begin, end, body);
  } else {
    if (direct == BFLOAT16) return in_place<BFloat16>(p, b, begin, end, body);
    if (direct == FLOAT16) return in_place<Float16>(p, b, begin, end, body);
    if (direct == FLOAT32) return in_place<float>(p, b, begin, end, body);
  }
  through_tiles<T>(p, b, begin, end, body);
}

inline int64_t chunks_of(const Problem& p) { return (p.numel + CHUNK - 1) / CHUNK; }

// Calls task(item, sample, begin, end) for every chunk. Each thread has a run of chunks of its own, the same in both
// passes; `backwards` it starts with the last, which the pass before has left in its cache.
template <class Task>
void for_each_chunk(const Problem& p, int64_t threads, bool backwards, Task task) {
  const int64_t chunks = chunks_of(p), items = p.batch * chunks;
  const int64_t parts = threads < items ? threads : items;
#pragma omp parallel for schedule(static, 1) num_threads(int(parts)) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = items * part / parts, last = items * (part + 1) / parts - 1;
    for (int64_t at = first; at <= last; ++at) {
      const int64_t item = backwards ? first + last - at : at, begin = item % chunks * CHUNK;
      task(item, item / chunks, begin, begin + CHUNK < p.numel ? begin + CHUNK : p.numel);
    }
  }
}

}  // namespace
