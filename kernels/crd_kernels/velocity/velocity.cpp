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
// in a buffer that stays in the L1 cache (latents.h), so that any mix of dtypes and strides runs through one
// vectorised loop and no target, reference or residual ever exists in memory.
//
// Each sample is cut into chunks of fixed size; a chunk's sums go to its own slot and the slots are added
// in order. The result does not depend on the number of threads or on the other samples of the batch.
//
// Compiled by build.py without any header of torch, called through ctypes.

#include <cmath>

#include "latents.h"

namespace {

constexpr int SUMS = 7;

enum Reference { NONE, CONDITIONAL, GUIDED };

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
    t.out[i] = gradient;
  }
}

template <class T, Reference R>
void measure(const Problem& p, double w, double* partial, int threads) {
  for_each_chunk(p, threads, [&](int64_t item, int64_t b, int64_t begin, int64_t end) {
    Tiles<T> tiles;
    double sums[SUMS] = {};
    for (int64_t at = begin; at < end; at += TILE) {
      const int64_t count = end - at < TILE ? end - at : TILE;
      load_all(p, b, at, count, tiles);
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
      load_all(p, b, at, count, tiles);
      gradient_tile<T, R>(tiles, count, T(w), T(c1[b]), T(c2[b]));
      store(p.out, p.sizes, b, at, count, tiles.out);
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
