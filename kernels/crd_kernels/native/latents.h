// How the C++ passes read and write latents: any strides, any of four dtypes, a tile at a time.

#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace {

constexpr int64_t TILE = 1024;         // elements converted at a time: six float buffers are 24 KB
constexpr int64_t CHUNK = 16 * TILE;   // elements of one task and of one partial sum
constexpr int DIMS = 4;                // dimensions of a sample after collapsing

enum Dtype : int64_t { BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2, FLOAT64 = 3 };

// One tensor of shape (batch, sizes[0..3]); strides are in elements. build.py packs the same eight words.
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
  explicit BFloat16(float value) {  // round to nearest even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    bits = uint16_t((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
  explicit BFloat16(double value) : BFloat16(float(value)) {}
};

using Float16 = _Float16;

// Visits the elements [begin, begin + count) of sample b as runs along the innermost dimension.
template <class Visit>
inline void for_each_run(const Operand& x, const int64_t* sizes, int64_t b, int64_t begin, int64_t count,
                         Visit visit) {
  int64_t done = 0;
  while (done < count) {
    int64_t rest = begin + done, offset = b * x.batch_stride, inner = 0;
    for (int d = DIMS - 1; d >= 0; --d) {
      int64_t index = rest % sizes[d];
      if (d == DIMS - 1) inner = index;
      offset += index * x.strides[d];
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
      for (int64_t i = 0; i < length; ++i) to[i] = S(from[i]);
    } else {
      for (int64_t i = 0; i < length; ++i) to[i * step] = S(from[i]);
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
  Operand policy, old, ref_cond, ref_uncond, x0, noise, out;
  const int64_t* seed;  // (batch,)
  int64_t batch, sizes[DIMS], numel;
};

template <class T>
struct Tiles {
  alignas(64) T policy[TILE], old[TILE], ref_cond[TILE], ref_uncond[TILE], x0[TILE], noise[TILE], out[TILE];
};

template <class T>
void load_all(const Problem& p, int64_t b, int64_t begin, int64_t count, Tiles<T>& t) {
  if (p.policy.data) load(p.policy, p.sizes, b, begin, count, t.policy);
  if (p.old.data) load(p.old, p.sizes, b, begin, count, t.old);
  if (p.ref_cond.data) load(p.ref_cond, p.sizes, b, begin, count, t.ref_cond);
  if (p.ref_uncond.data) load(p.ref_uncond, p.sizes, b, begin, count, t.ref_uncond);
  if (p.x0.data) load(p.x0, p.sizes, b, begin, count, t.x0);
  if (p.seed) {
    philox_normal(p.seed[b], begin, count, t.noise);
  } else {
    load(p.noise, p.sizes, b, begin, count, t.noise);
  }
}

template <class Task>
void for_each_chunk(const Problem& p, int threads, Task task) {
  const int64_t chunks = (p.numel + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < p.batch * chunks; ++item) {
    const int64_t begin = (item % chunks) * CHUNK;
    const int64_t end = begin + CHUNK < p.numel ? begin + CHUNK : p.numel;
    task(item, item / chunks, begin, end);
  }
}

}  // namespace
