// Centering on the CPU: centering/reference.py's formulas in one pass over B scalars, where some forty small
// torch ops would take longer than both passes over the latents of a small model.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

namespace {

struct Settings {
  double beta, kl_beta, kl_min, clip, temperature, samples, numel;
  int64_t reward_adaptive_kl, bce;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Group of each sample, numbered from 0 in order of appearance.
std::vector<int64_t> numbered(const int64_t* ids, int64_t batch, int64_t& count) {
  std::unordered_map<int64_t, int64_t> numbers;
  std::vector<int64_t> group(batch);
  for (int64_t i = 0; i < batch; ++i) group[i] = numbers.try_emplace(ids[i], numbers.size()).first->second;
  count = int64_t(numbers.size());
  return group;
}

struct Sums {
  double largest = -std::numeric_limits<double>::infinity(), weight = 0, reward = 0, a = 0;
};

// Adds one direction's share of the policy loss and of its derivatives with respect to the rewards.
// tilt: weights are the softmax of tilt * a over each group; 0 makes them uniform.
template <class T>
double add_direction(const Settings& s, double tilt, double share, int64_t batch, const T* reward, const double* a,
                     const std::vector<int64_t>& group, int64_t groups, double* slope) {
  std::vector<Sums> sums(groups);
  for (int64_t i = 0; i < batch; ++i) {
    double& largest = sums[group[i]].largest;
    largest = std::max(largest, tilt * a[i]);
  }
  for (int64_t i = 0; i < batch; ++i) {
    Sums& sum = sums[group[i]];
    const double weight = std::exp(tilt * a[i] - sum.largest);
    sum.weight += weight;
    sum.reward += weight * reward[i];
    sum.a += weight * a[i];
  }
  double loss = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const Sums& sum = sums[group[i]];
    const double r_centered = reward[i] - sum.reward / sum.weight, a_centered = a[i] - sum.a / sum.weight;
    if (s.bce) {
      const double logit = s.beta * r_centered, label = sigmoid(a_centered);
      loss += std::max(logit, 0.0) - logit * label + std::log1p(std::exp(-std::fabs(logit)));
      slope[i] += share * s.beta * (sigmoid(logit) - label);
    } else {
      const double delta = s.beta * r_centered - a_centered;
      loss += delta * delta;
      slope[i] += share * 2 * s.beta * delta;
    }
  }
  return share * loss;
}

template <class T>
void center(const Settings& s, int64_t batch, const T* reward, const T* policy_scale, const T* kl,
            const T* anchored, const double* advantage, const int64_t* ids, const double* kl_weight, T* losses,
            T* coefficients) {
  std::vector<double> a(batch), slope(batch, 0.0);
  for (int64_t i = 0; i < batch; ++i)
    a[i] = std::clamp(std::clamp(advantage[i], -s.clip, s.clip) / (2 * s.clip) + 0.5, 0.0, 1.0);
  int64_t groups = 0;
  const std::vector<int64_t> group = numbered(ids, batch, groups);

  double policy_loss = 0;
  const double share = s.clip / s.beta / s.samples;
  if (std::isinf(s.temperature)) {
    policy_loss = add_direction(s, 0, share, batch, reward, a.data(), group, groups, slope.data());
  } else {
    for (double tilt : {1 / s.temperature, -1 / s.temperature})
      policy_loss += add_direction(s, tilt, share / 2, batch, reward, a.data(), group, groups, slope.data());
  }

  double kl_loss = 0;
  for (int64_t i = 0; i < batch; ++i) {
    double k = s.reward_adaptive_kl ? s.kl_min + a[i] * (s.kl_beta - s.kl_min) : s.kl_beta;
    if (kl_weight) k *= kl_weight[i];
    kl_loss += k * kl[i] / s.samples;
    coefficients[i] = T(-2 / s.numel * slope[i] / policy_scale[i]);
    coefficients[batch + i] = T(2 / s.numel / s.samples * k * anchored[i]);
  }
  losses[0] = T(policy_loss + kl_loss);
  losses[1] = T(policy_loss);
  losses[2] = T(kl_loss);
}

}  // namespace

// The rows of statistics, losses (3,) and coefficients (2, batch) are float, or double with use_double.
extern "C" void crd_center(const double* reals, const int64_t* words, const void* const* pointers) {
  const Settings s{reals[0], reals[1], reals[2], reals[3], reals[4], reals[5], reals[6], words[0], words[1]};
  const int64_t batch = words[2];
  auto run = [&](auto zero) {
    using T = decltype(zero);
    auto row = [&](int i) { return static_cast<const T*>(pointers[i]); };
    center<T>(s, batch, row(0), row(1), row(2), row(3), static_cast<const double*>(pointers[4]),
              static_cast<const int64_t*>(pointers[5]), static_cast<const double*>(pointers[6]),
              const_cast<T*>(row(7)), const_cast<T*>(row(8)));
  };
  words[3] ? run(double(0)) : run(float(0));
}
