// The two passes over the latents, for CPUs: per-sample sums, and the gradient.
//
//   target    = noise - x0
//   reference = ref_uncond + w (ref_cond - ref_uncond)          (or ref_cond, or none)
//   measure:    sums over the elements of each sample of
//               (policy - target)^2, |policy - target|, (old - target)^2, |old - target|,
//               (policy - reference)^2, (old - reference)^2, (policy - old)^2
//               where with a mix m the first four are of (1 - m) old + m policy and (1 + m) old - m policy
//   gradient:   c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)
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

template <class T, Reference R, bool MIX>
void measure_tile(const Tiles<T>& t, int64_t count, T w, T mix, double* sums) {
  T policy_square = 0, policy_abs = 0, old_square = 0, old_abs = 0, kl = 0, old_kl = 0, deviation = 0;
#pragma omp simd reduction(+ : policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation)
  for (int64_t i = 0; i < count; ++i) {
    T target = t.noise[i] - t.x0[i];
    T first = MIX ? (1 - mix) * t.old[i] + mix * t.policy[i] : t.policy[i];
    T second = MIX ? (1 + mix) * t.old[i] - mix * t.policy[i] : t.old[i];
    T policy_error = first - target;
    T old_error = second - target;
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
void gradient_tile(Tiles<T>& t, int64_t count, T w, T c1, T c2, T c3, bool with_old) {
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
  if (!with_old) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.out[i] += c3 * (t.policy[i] - t.old[i]);
}

template <class T, Reference R, bool MIX>
void measure(const Problem& p, double w, double mix, double* partial, int threads) {
  for_each_chunk(p, threads, [&](int64_t item, int64_t b, int64_t begin, int64_t end) {
    Tiles<T> tiles;
    double sums[SUMS] = {};
    for (int64_t at = begin; at < end; at += TILE) {
      const int64_t count = end - at < TILE ? end - at : TILE;
      load_all(p, b, at, count, tiles);
      measure_tile<T, R, MIX>(tiles, count, T(w), T(mix), sums);
    }
    for (int k = 0; k < SUMS; ++k) partial[item * SUMS + k] = sums[k];
  });
}

template <class T, Reference R>
void gradient(const Problem& p, double w, const double* c1, const double* c2, const double* c3, int threads) {
  for_each_chunk(p, threads, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    Tiles<T> tiles;
    for (int64_t at = begin; at < end; at += TILE) {
      const int64_t count = end - at < TILE ? end - at : TILE;
      load_all(p, b, at, count, tiles);
      gradient_tile<T, R>(tiles, count, T(w), T(c1[b]), T(c2[b]), c3 ? T(c3[b]) : T(0), c3 != nullptr);
      store(p.out, p.sizes, b, at, count, tiles.out);
    }
  });
}

template <class T, bool MIX>
void measure_any(const Problem& p, double w, double mix, double* partial, int threads) {
  if (!p.ref_cond.data) return measure<T, NONE, MIX>(p, w, mix, partial, threads);
  if (!p.ref_uncond.data) return measure<T, CONDITIONAL, MIX>(p, w, mix, partial, threads);
  return measure<T, GUIDED, MIX>(p, w, mix, partial, threads);
}

template <class T>
void gradient_any(const Problem& p, double w, const double* c1, const double* c2, const double* c3, int threads) {
  if (!p.ref_cond.data) return gradient<T, NONE>(p, w, c1, c2, c3, threads);
  if (!p.ref_uncond.data) return gradient<T, CONDITIONAL>(p, w, c1, c2, c3, threads);
  return gradient<T, GUIDED>(p, w, c1, c2, c3, threads);
}

}  // namespace

extern "C" int64_t crd_chunk() { return CHUNK; }

// partial: (batch, ceil(numel / CHUNK), 7) double, written in full. mix 0: policy and old as they are.
extern "C" void crd_measure(const Problem* p, double w, double mix, int64_t use_double, double* partial,
                            int64_t threads) {
  auto run = use_double ? (mix != 0 ? measure_any<double, true> : measure_any<double, false>)
                        : (mix != 0 ? measure_any<float, true> : measure_any<float, false>);
  run(*p, w, mix, partial, int(threads));
}

// c1, c2: (batch,) double; c3 the same, or null, which leaves `old` unread.
extern "C" void crd_gradient(const Problem* p, double w, int64_t use_double, const double* c1, const double* c2,
                             const double* c3, int64_t threads) {
  auto run = use_double ? gradient_any<double> : gradient_any<float>;
  run(*p, w, c1, c2, c3, int(threads));
}
