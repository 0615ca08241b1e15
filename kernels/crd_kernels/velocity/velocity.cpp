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
// One vectorised loop a pass, on operands as they lie in memory or on tiles of them (latents.h); no target,
// reference or residual ever exists in memory. fp32 throughout, fp64 when an operand is.
//
// Each sample is cut into chunks of fixed size; a chunk's sums go to its own slot and the slots are added
// in order. The result does not depend on the number of threads or on the other samples of the batch.
//
// Compiled by build.py without any header of torch, called through ctypes.

#include <cmath>
#include <iterator>

#include "latents.h"

namespace {

constexpr int SUMS = 7;
constexpr double SCALE_FLOOR = 1e-5;

enum Reference { NONE, CONDITIONAL, GUIDED };

// The loops take their pointers as locals: gcc does not vectorise loops that read them from a struct.

template <class T, Reference R, bool MIX, class S>
void add_sums(const Views<S>& v, int64_t count, T w, T mix, double* sums) {
  const S *policies = v.policy, *olds = v.old, *conds = v.ref_cond, *unconds = v.ref_uncond;
  const S *x0s = v.x0, *noises = v.noise;
  T policy_square = 0, policy_abs = 0, old_square = 0, old_abs = 0, kl = 0, old_kl = 0, deviation = 0;
#pragma omp simd reduction(+ : policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation)
  for (int64_t i = 0; i < count; ++i) {
    T policy = T(policies[i]), old = T(olds[i]), target = T(noises[i]) - T(x0s[i]);
    T policy_error = (MIX ? (1 - mix) * old + mix * policy : policy) - target;
    T old_error = (MIX ? (1 + mix) * old - mix * policy : old) - target;
    T moved = policy - old;
    policy_square += policy_error * policy_error;
    policy_abs += std::fabs(policy_error);
    old_square += old_error * old_error;
    old_abs += std::fabs(old_error);
    deviation += moved * moved;
    if (R != NONE) {
      T base = R == GUIDED ? T(unconds[i]) : T(conds[i]);
      T reference = R == GUIDED ? base + w * (T(conds[i]) - base) : base;
      T policy_drift = policy - reference, old_drift = old - reference;
      kl += policy_drift * policy_drift;
      old_kl += old_drift * old_drift;
    }
  }
  const T part[SUMS] = {policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation};
  for (int k = 0; k < SUMS; ++k) sums[k] += part[k];
}

template <class T, Reference R, bool OLD, class S>
void write_gradient(const Views<S>& v, int64_t count, T w, T c1, T c2, T c3) {
  const S *policies = v.policy, *olds = v.old, *conds = v.ref_cond, *unconds = v.ref_uncond;
  const S *x0s = v.x0, *noises = v.noise;
  S* out = v.out;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T policy = T(policies[i]), target = T(noises[i]) - T(x0s[i]);
    T gradient = c1 * (policy - target);
    if (R != NONE) {
      T base = R == GUIDED ? T(unconds[i]) : T(conds[i]);
      T reference = R == GUIDED ? base + w * (T(conds[i]) - base) : base;
      gradient += c2 * (policy - reference);
    }
    if (OLD) gradient += c3 * (policy - T(olds[i]));
    put(out[i], gradient);
  }
}

template <class T, Reference R, bool MIX>
void measure(const Problem& p, double w, double mix, double* partial, int threads) {
  const int64_t direct = direct_dtype(p);
  for_each_chunk(p, threads, [&](int64_t item, int64_t b, int64_t begin, int64_t end) {
    double sums[SUMS] = {};
    for_each_view<T>(p, direct, b, begin, end, [&](const auto& views, int64_t count) {
      add_sums<T, R, MIX>(views, count, T(w), T(mix), sums);
    });
    for (int k = 0; k < SUMS; ++k) partial[item * SUMS + k] = sums[k];
  });
}

template <class T, Reference R, bool OLD>
void gradient(const Problem& p, double w, const double* c1, const double* c2, const double* c3, int threads) {
  const int64_t direct = direct_dtype(p);
  for_each_chunk(p, threads, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    for_each_view<T>(p, direct, b, begin, end, [&](const auto& views, int64_t count) {
      write_gradient<T, R, OLD>(views, count, T(w), T(c1[b]), T(c2[b]), OLD ? T(c3[b]) : T(0));
    });
  });
}

// From each sample's partial sums, added in order, to the rows of the table of statistics (Stats in stats.py).
// In double to the last step: the reward is a small difference of two numbers near one.
template <class T>
void summarize(const Problem& p, const double* partial, bool adaptive_weighting, T* table) {
  const int64_t chunks = (p.numel + CHUNK - 1) / CHUNK;
  for (int64_t b = 0; b < p.batch; ++b) {
    double mean[SUMS] = {};
    for (int64_t c = 0; c < chunks; ++c)
      for (int k = 0; k < SUMS; ++k) mean[k] += partial[(b * chunks + c) * SUMS + k];
    for (double& value : mean) value /= double(p.numel);
    const auto [policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation] = mean;
    // written so that NaN stays NaN
    const double policy_scale = !adaptive_weighting ? 1 : policy_abs < SCALE_FLOOR ? SCALE_FLOOR : policy_abs;
    const double old_scale = !adaptive_weighting ? 1 : old_abs < SCALE_FLOOR ? SCALE_FLOOR : old_abs;
    const double reward = old_square / old_scale - policy_square / policy_scale;  // equals give +0, not -0
    const double rows[] = {reward, policy_scale, old_scale, policy_square,          old_square,
                           kl,     old_kl,       deviation, double(!!p.ref_cond.data)};
    for (int row = 0; row < int(std::size(rows)); ++row) table[row * p.batch + b] = T(rows[row]);
  }
}

template <class T, bool MIX>
void measure_any(const Problem& p, double w, double mix, double* partial, int threads) {
  if (!p.ref_cond.data) return measure<T, NONE, MIX>(p, w, mix, partial, threads);
  if (!p.ref_uncond.data) return measure<T, CONDITIONAL, MIX>(p, w, mix, partial, threads);
  return measure<T, GUIDED, MIX>(p, w, mix, partial, threads);
}

template <class T, bool OLD>
void gradient_any(const Problem& p, double w, const double* c1, const double* c2, const double* c3,
                  int threads) {
  if (!p.ref_cond.data) return gradient<T, NONE, OLD>(p, w, c1, c2, c3, threads);
  if (!p.ref_uncond.data) return gradient<T, CONDITIONAL, OLD>(p, w, c1, c2, c3, threads);
  return gradient<T, GUIDED, OLD>(p, w, c1, c2, c3, threads);
}

}  // namespace

extern "C" int64_t crd_chunk() { return CHUNK; }

// table: (9, batch), float, or double with use_double. partial: (batch, ceil(numel / CHUNK), 7) double, scratch.
// mix 0: policy and old as they are.
extern "C" void crd_measure(const Problem* p, double w, double mix, int64_t adaptive_weighting, int64_t use_double,
                            double* partial, void* table, int64_t threads) {
  auto run = use_double ? (mix != 0 ? measure_any<double, true> : measure_any<double, false>)
                        : (mix != 0 ? measure_any<float, true> : measure_any<float, false>);
  run(*p, w, mix, partial, int(threads));
  if (use_double)
    summarize(*p, partial, adaptive_weighting, static_cast<double*>(table));
  else
    summarize(*p, partial, adaptive_weighting, static_cast<float*>(table));
}

// c1, c2: (batch,) double; c3 the same, or null, which leaves `old` unread.
extern "C" void crd_gradient(const Problem* p, double w, int64_t use_double, const double* c1, const double* c2,
                             const double* c3, int64_t threads) {
  auto run = use_double ? (c3 ? gradient_any<double, true> : gradient_any<double, false>)
                        : (c3 ? gradient_any<float, true> : gradient_any<float, false>);
  run(*p, w, c1, c2, c3, int(threads));
}
