// The two passes over the latents, for CPUs: per-sample sums, and the gradient.
//
//   target    = noise - x0
//   reference = ref_uncond + w (ref_cond - ref_uncond)          (or ref_cond, or none)
//   measure:    sums over the elements of each sample of
//               (policy - target)^2, |policy - target|, (old - target)^2, |old - target|,
//               (policy - reference)^2, (old - reference)^2, (policy - old)^2, and the mask
//               where with a mix m the first four are of (1 - m) old + m policy and (1 + m) old - m policy
//   gradient:   c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)
//   both weighted by the mask where there is one: an element of weight 0 is not looked at, be it NaN
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
#include <type_traits>
#include <vector>

#include "latents.h"

namespace {

constexpr int SUMS = 8;
constexpr double SCALE_FLOOR = 1e-5;

enum Reference { NONE, CONDITIONAL, GUIDED };

// Which sums a loss needs: all of them; all, of the mixes; the policy's squares alone (and without `old`); the
// squares of policy and old. The others stay 0.
enum Needed { FULL, MIXED, ALONE, PAIR };

// Of what the mask leaves out nothing is seen, be it NaN.
template <class T>
inline T masked(T weight, T x) {
  return weight != T(0) ? weight * x : T(0);
}

// The loops go over packs (latents.h). They take their pointers as locals: gcc does not vectorise loops that read them
// from a struct. What is absent is read as the policy once more, and not used. A mask comes in packs of one.

template <class T, Reference R, Needed N, bool MASK, class S>
void add_sums(const Views<S>& v, int64_t count, T w, T mix, double* sums) {
  using P = Pack<S>;
  const S *policies = v.policy, *x0s = v.x0, *noises = v.noise, *olds = N == ALONE ? v.policy : v.old;
  const S *conds = R == NONE ? v.policy : v.ref_cond, *unconds = R == GUIDED ? v.ref_uncond : v.policy;
  const S* masks = MASK ? v.mask : v.policy;
  T policy_square = 0, policy_abs = 0, old_square = 0, old_abs = 0, kl = 0, old_kl = 0, deviation = 0, weights = 0;
#pragma omp simd reduction(+ : policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation, weights)
  for (int64_t i = 0; i < count / P::SIZE; ++i) {
    const auto policy_word = P::load(policies, i), old_word = P::load(olds, i), cond_word = P::load(conds, i),
               uncond_word = P::load(unconds, i), x0_word = P::load(x0s, i), noise_word = P::load(noises, i),
               mask_word = P::load(masks, i);
    for (int k = 0; k < P::SIZE; ++k) {
      const T weight = MASK ? T(P::get(mask_word, k)) : T(1);
      auto seen = [weight](T x) { return MASK ? masked(weight, x) : x; };
      const T policy = T(P::get(policy_word, k)), old = T(P::get(old_word, k));
      const T target = T(P::get(noise_word, k)) - T(P::get(x0_word, k));
      const T policy_error = (N == MIXED ? (1 - mix) * old + mix * policy : policy) - target;
      policy_square += seen(policy_error * policy_error);
      if (N != ALONE) {
        const T old_error = (N == MIXED ? (1 + mix) * old - mix * policy : old) - target;
        const T moved = policy - old;
        old_square += seen(old_error * old_error);
        deviation += seen(moved * moved);
        if (N != PAIR) {
          policy_abs += seen(std::fabs(policy_error));
          old_abs += seen(std::fabs(old_error));
        }
      }
      if (R != NONE) {
        const T cond = T(P::get(cond_word, k)), base = R == GUIDED ? T(P::get(uncond_word, k)) : cond;
        const T reference = R == GUIDED ? base + w * (cond - base) : base;
        const T policy_drift = policy - reference;
        kl += seen(policy_drift * policy_drift);
        if (N == FULL) {
          const T old_drift = old - reference;
          old_kl += seen(old_drift * old_drift);
        }
      }
      if (MASK) weights += weight;
    }
  }
  const T part[SUMS] = {policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation, weights};
  for (int k = 0; k < SUMS; ++k) sums[k] += part[k];
}

// One sample's factors of the gradient.
template <class T>
struct Factors {
  T c1, c2, c3;
};

template <class T, Reference R, bool OLD, bool MASK, class S>
void write_gradient(const Views<S>& v, int64_t count, T w, Factors<T> factors) {
  using P = Pack<S>;
  const S *policies = v.policy, *x0s = v.x0, *noises = v.noise, *olds = OLD ? v.old : v.policy;
  const S *conds = R == NONE ? v.policy : v.ref_cond, *unconds = R == GUIDED ? v.ref_uncond : v.policy;
  const S* masks = v.mask;
  S* out = v.out;
  const T c1 = factors.c1, c2 = factors.c2, c3 = factors.c3;
#pragma omp simd
  for (int64_t i = 0; i < count / P::SIZE; ++i) {
    const auto policy_word = P::load(policies, i), old_word = P::load(olds, i), cond_word = P::load(conds, i),
               uncond_word = P::load(unconds, i), x0_word = P::load(x0s, i), noise_word = P::load(noises, i);
    typename P::Word written = 0;
    for (int k = 0; k < P::SIZE; ++k) {
      const T policy = T(P::get(policy_word, k)), target = T(P::get(noise_word, k)) - T(P::get(x0_word, k));
      T gradient = c1 * (policy - target);
      if (R != NONE) {
        const T cond = T(P::get(cond_word, k)), base = R == GUIDED ? T(P::get(uncond_word, k)) : cond;
        const T reference = R == GUIDED ? base + w * (cond - base) : base;
        gradient += c2 * (policy - reference);
      }
      if (OLD) gradient += c3 * (policy - T(P::get(old_word, k)));
      written = P::join(written, k, gradient);
    }
    if constexpr (MASK) written = masked(masks[i], written);
    P::store(out, i, written);
  }
}

template <class T, Reference R, Needed N>
void measure(const Problem& p, double w, double mix, double* partial, int64_t threads) {
  const int64_t direct = direct_dtype(p);
  for_each_chunk(p, threads, false, [&](int64_t item, int64_t b, int64_t begin, int64_t end) {
    double sums[SUMS] = {};
    for_each_view<T>(p, direct, b, begin, end, [&](const auto& views, int64_t count) {
      using S = std::remove_pointer_t<decltype(views.out)>;
      if constexpr (std::is_same_v<S, T>) {  // a mask always goes through tiles of the compute type
        if (views.mask) return add_sums<T, R, N, true>(views, count, T(w), T(mix), sums);
      }
      add_sums<T, R, N, false>(views, count, T(w), T(mix), sums);
    });
    for (int k = 0; k < SUMS; ++k) partial[item * SUMS + k] = sums[k];
  });
}

// What a call of the gradient pass brings beside the latents: all of the compute type, (batch,) each, c2 and c3
// or null; upstream, or null for 1, is one number where its stride is 0.
struct Scales {
  const void *c1, *c2, *c3, *upstream;
  int64_t stride;
};

template <class T, Reference R, bool OLD>
void gradient(const Problem& p, double w, const Scales& scales, int64_t threads) {
  const int64_t direct = direct_dtype(p);
  auto at = [](const void* c, int64_t i, T otherwise) { return c ? static_cast<const T*>(c)[i] : otherwise; };
  for_each_chunk(p, threads, true, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    const T upstream = at(scales.upstream, b * scales.stride, T(1));
    const Factors<T> factors{at(scales.c1, b, T(0)) * upstream, at(scales.c2, b, T(0)) * upstream,
                             at(scales.c3, b, T(0)) * upstream};
    for_each_view<T>(p, direct, b, begin, end, [&](const auto& views, int64_t count) {
      using S = std::remove_pointer_t<decltype(views.out)>;
      if constexpr (std::is_same_v<S, T>) {
        if (views.mask) return write_gradient<T, R, OLD, true>(views, count, T(w), factors);
      }
      write_gradient<T, R, OLD, false>(views, count, T(w), factors);
    });
  });
}

// From each sample's partial sums, added in order, to the rows of the table of statistics (Stats in stats.py).
// In double to the last step: the reward is a small difference of two numbers near one.
template <class T>
void summarize(const Problem& p, const double* partial, bool adaptive_weighting, T* table) {
  const int64_t chunks = chunks_of(p);
  for (int64_t b = 0; b < p.batch; ++b) {
    double mean[SUMS] = {};
    for (int64_t c = 0; c < chunks; ++c)
      for (int k = 0; k < SUMS; ++k) mean[k] += partial[(b * chunks + c) * SUMS + k];
    const double elements = p.mask.data ? mean[SUMS - 1] : double(p.numel);
    for (double& value : mean) value /= elements;
    const auto [policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation, unused] = mean;
    // written so that NaN stays NaN
    const double policy_scale = !adaptive_weighting ? 1 : policy_abs < SCALE_FLOOR ? SCALE_FLOOR : policy_abs;
    const double old_scale = !adaptive_weighting ? 1 : old_abs < SCALE_FLOOR ? SCALE_FLOOR : old_abs;
    const double reward = old_square / old_scale - policy_square / policy_scale;  // equals give +0, not -0
    const double rows[] = {reward, policy_scale, old_scale, policy_square,           old_square,
                           kl,     old_kl,       deviation, double(!!p.ref_cond.data), elements};
    for (int row = 0; row < int(std::size(rows)); ++row) table[row * p.batch + b] = T(rows[row]);
  }
}

template <class T, Needed N>
void measure_any(const Problem& p, double w, double mix, double* partial, int64_t threads) {
  if (!p.ref_cond.data) return measure<T, NONE, N>(p, w, mix, partial, threads);
  if (!p.ref_uncond.data) return measure<T, CONDITIONAL, N>(p, w, mix, partial, threads);
  return measure<T, GUIDED, N>(p, w, mix, partial, threads);
}

template <class T>
void measure_needed(int64_t needed, const Problem& p, double w, double mix, double* partial, int64_t threads) {
  switch (needed) {
    case FULL: return measure_any<T, FULL>(p, w, mix, partial, threads);
    case MIXED: return measure_any<T, MIXED>(p, w, mix, partial, threads);
    case ALONE: return measure_any<T, ALONE>(p, w, mix, partial, threads);
    default: return measure_any<T, PAIR>(p, w, mix, partial, threads);
  }
}

template <class T, bool OLD>
void gradient_any(const Problem& p, double w, const Scales& scales, int64_t threads) {
  if (!p.ref_cond.data) return gradient<T, NONE, OLD>(p, w, scales, threads);
  if (!p.ref_uncond.data) return gradient<T, CONDITIONAL, OLD>(p, w, scales, threads);
  return gradient<T, GUIDED, OLD>(p, w, scales, threads);
}

}  // namespace

// table: (10, batch), float, or double with use_double.
extern "C" void crd_measure(const Problem* p, double w, double mix, int64_t needed, int64_t adaptive_weighting,
                            int64_t use_double, void* table, int64_t threads) {
  std::vector<double> partial(p->batch * chunks_of(*p) * SUMS);
  if (use_double) {
    measure_needed<double>(needed, *p, w, mix, partial.data(), threads);
    summarize(*p, partial.data(), adaptive_weighting, static_cast<double*>(table));
  } else {
    measure_needed<float>(needed, *p, w, mix, partial.data(), threads);
    summarize(*p, partial.data(), adaptive_weighting, static_cast<float*>(table));
  }
}

// c1, c2, c3, upstream: see Scales. Without c3 `old` is not read.
extern "C" void crd_gradient(const Problem* p, double w, int64_t use_double, const void* c1, const void* c2,
                             const void* c3, const void* upstream, int64_t stride, int64_t threads) {
  const Scales scales{c1, c2, c3, upstream, stride};
  auto run = use_double ? (c3 ? gradient_any<double, true> : gradient_any<double, false>)
                        : (c3 ? gradient_any<float, true> : gradient_any<float, false>);
  run(*p, w, scales, threads);
}
