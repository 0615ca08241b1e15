// The two passes over the latents, for CPUs: per-sample sums, and the gradient.
//
//   target    = noise - x0
//   reference = ref_uncond + w (ref_cond - ref_uncond)          (or ref_cond, or none)
//   measure:    sums over the elements of each sample of
//               (policy - target)^2, |policy - target|, (old - target)^2, |old - target|,
//               (policy - reference)^2, (old - reference)^2, (policy - old)^2
//   gradient:   c1 (policy - target) + c2 (policy - reference)
//
// A tile of every operand is converted to the compute type (float, or double when an operand is double)
// in a buffer that stays in the L1 cache, so that any mix of dtypes and strides runs through one
// vectorised loop and no target, reference or residual ever exists in memory.
//
// Each sample is cut into chunks of fixed size; a chunk's sums go to its own slot and the slots are added
// in order. The result does not depend on the number of threads or on the other samples of the batch.
//
// Compiled by build.py without any header of torch, called through ctypes.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t TILE = 1024;         // elements converted at a time: six float buffers are 24 KB
constexpr int64_t CHUNK = 16 * TILE;   // elements of one task and of one partial sum
constexpr int DIMS = 4;                // dimensions of a sample after collapsing
constexpr int SUMS = 7;

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

enum Reference { NONE, CONDITIONAL, GUIDED };

template <class T>
struct Tiles {
  alignas(64) T policy[TILE], old[TILE], ref_cond[TILE], ref_uncond[TILE], x0[TILE], noise[TILE];
};

template <class T, Reference R>
void measure_tile(const Tiles<T>& t, int64_t count, T w, double* sums) {
  T policy_square = 0, policy_abs = 0, old_square = 0, old_abs = 0, kl = 0, old_kl = 0, deviation = 0;
#pragma omp simd reduction(+ : policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation)
  for (int64_t i = 0; i < count; ++i) {
    T target = t.noise[i] - t.x0[i];
    T policy_error = t.policy[i] - target;
    T old_error = t.old[i] - target;
    policy_square += policy_error * policy_error;
    policy_abs += std::fabs(policy_error);
    old_square += old_error * old_error;
    old_abs += std::fabs(old_error);
    T moved = t.policy[i] - t.old[i];
    deviation += moved * moved;
    if (R != NONE) {
      T reference =
          R == GUIDED ? t.ref_uncond[i] + w * (t.ref_cond[i] - t.ref_uncond[i]) : t.ref_cond[i];
      T policy_drift = t.policy[i] - reference;
      T old_drift = t.old[i] - reference;
      kl += policy_drift * policy_drift;
      old_kl += old_drift * old_drift;
    }
  }
  const T tile_sums[SUMS] = {policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation};
  for (int k = 0; k < SUMS; ++k) sums[k] += tile_sums[k];
}

template <class T, Reference R>
void gradient_tile(Tiles<T>& t, int64_t count, T w, T c1, T c2) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T target = t.noise[i] - t.x0[i];
    T gradient = c1 * (t.policy[i] - target);
    if (R != NONE) {
      T reference =
          R == GUIDED ? t.ref_uncond[i] + w * (t.ref_cond[i] - t.ref_uncond[i]) : t.ref_cond[i];
      gradient += c2 * (t.policy[i] - reference);
    }
    t.old[i] = gradient;  // `old` is not read by this pass: its tile carries the result
  }
}

struct Problem {
  Operand policy, old, ref_cond, ref_uncond, x0, noise, gradient;
  int64_t batch, sizes[DIMS], numel;
};

template <class T>
void load_all(const Problem& p, int64_t b, int64_t begin, int64_t count, bool with_old, Tiles<T>& t) {
  load(p.policy, p.sizes, b, begin, count, t.policy);
  if (with_old) load(p.old, p.sizes, b, begin, count, t.old);
  if (p.ref_cond.data) load(p.ref_cond, p.sizes, b, begin, count, t.ref_cond);
  if (p.ref_uncond.data) load(p.ref_uncond, p.sizes, b, begin, count, t.ref_uncond);
  load(p.x0, p.sizes, b, begin, count, t.x0);
  load(p.noise, p.sizes, b, begin, count, t.noise);
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

template <class T, Reference R>
void measure(const Problem& p, double w, double* partial, int threads) {
  for_each_chunk(p, threads, [&](int64_t item, int64_t b, int64_t begin, int64_t end) {
    Tiles<T> tiles;
    double sums[SUMS] = {};
    for (int64_t at = begin; at < end; at += TILE) {
      const int64_t count = end - at < TILE ? end - at : TILE;
      load_all(p, b, at, count, true, tiles);
      measure_tile<T, R>(tiles, count, T(w), sums);
    }
    for (int k = 0; k < SUMS; ++k) partial[item * SUMS + k] = sums[k];
  });
}

template <class T, Reference R>
void gradient(const Problem& p, double w, const double* c1, const double* c2, int threads) {
  for_each_chunk(p, threads, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    Tiles<T> tiles;
    for (int64_t at = begin; at < end; at += TILE) {
      const int64_t count = end - at < TILE ? end - at : TILE;
      load_all(p, b, at, count, false, tiles);
      gradient_tile<T, R>(tiles, count, T(w), T(c1[b]), T(c2[b]));
      store(p.gradient, p.sizes, b, at, count, tiles.old);
    }
  });
}

template <class T>
void measure_any(const Problem& p, double w, double* partial, int threads) {
  if (!p.ref_cond.data) return measure<T, NONE>(p, w, partial, threads);
  if (!p.ref_uncond.data) return measure<T, CONDITIONAL>(p, w, partial, threads);
  return measure<T, GUIDED>(p, w, partial, threads);
}

template <class T>
void gradient_any(const Problem& p, double w, const double* c1, const double* c2, int threads) {
  if (!p.ref_cond.data) return gradient<T, NONE>(p, w, c1, c2, threads);
  if (!p.ref_uncond.data) return gradient<T, CONDITIONAL>(p, w, c1, c2, threads);
  return gradient<T, GUIDED>(p, w, c1, c2, threads);
}

}  // namespace

extern "C" int64_t crd_chunk() { return CHUNK; }

// partial: (batch, ceil(numel / CHUNK), 7) double, written in full.
extern "C" void crd_measure(const Problem* p, double w, int64_t use_double, double* partial, int64_t threads) {
  use_double ? measure_any<double>(*p, w, partial, int(threads)) : measure_any<float>(*p, w, partial, int(threads));
}

// c1, c2: (batch,) double.
extern "C" void crd_gradient(const Problem* p, double w, int64_t use_double, const double* c1, const double* c2,
                             int64_t threads) {
  use_double ? gradient_any<double>(*p, w, c1, c2, int(threads))
             : gradient_any<float>(*p, w, c1, c2, int(threads));
}
