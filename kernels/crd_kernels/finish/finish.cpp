// What comes after the sums, for CPUs: the formulas of centering/reference.py and losses/scalars.py in one pass
// over B scalars, where some forty small torch ops would take longer than both passes over the latents of a
// small model.

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <vector>

#include "latents.h"

namespace {

enum Method { MEASURE, REWARD, CRD, NFT, AWM, DPO, FLOW_MATCHING };
enum Weighting { UNIFORM, TIME, TIME_SQUARED, HUBER, GENERALIZED_HUBER };
enum Row { R, POLICY_SCALE, OLD_SCALE, POLICY_ERROR, OLD_ERROR, KL, OLD_KL, DEVIATION, ANCHORED, ELEMENTS };

struct Numbers {
  double beta, kl_beta, kl_min, clip, temperature, ratio_low, ratio_high, old_kl_beta, samples;
};

// One entry a sample, of any dtype; data == nullptr where it was not given.
struct Vector {
  const void* data;
  int64_t dtype;

  double operator[](int64_t i) const {
    switch (dtype) {
      case BFLOAT16: return static_cast<const BFloat16*>(data)[i];
      case FLOAT16: return double(static_cast<const Float16*>(data)[i]);
      case FLOAT32: return static_cast<const float*>(data)[i];
      default: return static_cast<const double*>(data)[i];
    }
  }

  int64_t integer(int64_t i) const {
    switch (dtype) {
      case UINT8: return static_cast<const uint8_t*>(data)[i];
      case INT8: return static_cast<const int8_t*>(data)[i];
      case INT16: return static_cast<const int16_t*>(data)[i];
      case INT32: return static_cast<const int32_t*>(data)[i];
      default: return static_cast<const int64_t*>(data)[i];
    }
  }
};

// As finish/cpu.py packs it.
struct Call {
  int64_t method, adaptive, adaptive_kl, bce, one_group, uncentered, tempered, off_policy, clipped, old_term, weighting;
  int64_t batch, use_double;
  Vector advantage, group, sigma, kl_weight, old_error;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// -log sigmoid(x)
double softplus(double x) { return std::max(-x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// Bounds that keep NaN.
double bounded(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

double unit_interval(const Numbers& s, double advantage) {
  return bounded(bounded(advantage, -s.clip, s.clip) / (2 * s.clip) + 0.5, 0, 1);
}

struct Sums {
  double top = -std::numeric_limits<double>::infinity(), weight = 0, reward = 0, a = 0;
};

// Adds one direction's share of the policy loss, and of its derivatives with respect to the rewards.
// tilt: weights are the softmax of tilt a / T over each group; 0 makes them uniform.
double add_direction(const Numbers& s, const Call& call, double tilt, double share, const std::vector<double>& reward,
                     const std::vector<double>& a, const std::vector<int64_t>& group, int64_t groups,
                     std::vector<double>& slope) {
  const int64_t batch = call.batch;
  const bool select = s.temperature == 0;  // what is positive, in one direction; the other has nothing to select
  std::vector<Sums> sums(groups);
  if (tilt != 0)
    for (int64_t i = 0; i < batch; ++i) sums[group[i]].top = std::max(sums[group[i]].top, tilt * a[i]);
  for (int64_t i = 0; i < batch; ++i) {
    Sums& sum = sums[group[i]];
    double weight = 1;
    if (tilt != 0 && !select) weight = std::exp((tilt * a[i] - sum.top) / s.temperature);
    if (tilt > 0 && select && sum.top > 0) weight = a[i] > 0 ? std::exp(a[i] - sum.top) : a[i] * 0;
    sum.weight += weight;
    sum.reward += weight * reward[i];
    sum.a += weight * a[i];
  }
  if (call.uncentered) sums.assign(1, {0, 1, 0, 0});
  double loss = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const Sums& sum = sums[group[i]];
    const double r_centered = reward[i] - sum.reward / sum.weight, a_centered = a[i] - sum.a / sum.weight;
    if (call.bce) {
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

// The policy loss of centered reward distillation; slope becomes its derivative with respect to each reward.
double center(const Numbers& s, const Call& call, const std::vector<double>& reward, const std::vector<double>& a,
              std::vector<double>& slope) {
  std::vector<int64_t> group(call.batch, 0);
  int64_t groups = 1;
  if (!call.one_group && !call.uncentered) {  // numbered from 0 in order of appearance
    std::unordered_map<int64_t, int64_t> numbers;
    for (int64_t i = 0; i < call.batch; ++i)
      group[i] = numbers.try_emplace(call.group.integer(i), numbers.size()).first->second;
    groups = int64_t(numbers.size());
  }
  const double share = s.clip / s.beta / s.samples;
  if (!call.tempered) return add_direction(s, call, 0, share, reward, a, group, groups, slope);
  double loss = 0;
  for (double tilt : {1.0, -1.0})
    loss += add_direction(s, call, tilt, share / 2, reward, a, group, groups, slope);
  return loss;
}

// AWM's weighed matching error g(e, t), and its derivative with respect to e.
double matching(int64_t weighting, double error, double t, double& slope) {
  switch (weighting) {
    case UNIFORM: slope = 1; return error;
    case TIME: slope = t; return t * error;
    case TIME_SQUARED: slope = t * t; return t * t * error;
    case HUBER: {
      const double root = std::sqrt(error + 1e-10);
      slope = t / (2 * root);
      return t * (root - 1e-5);
    }
    default: {
      const double base = error + 1e-10, root = std::sqrt(std::sqrt(base));
      slope = t * root / base;
      return 4 * t * (root - std::sqrt(std::sqrt(1e-10)));
    }
  }
}

template <class T>
void finish(const Numbers& s, const Call& call, T* table, T* loss, T* outcome) {
  const int64_t batch = call.batch;
  auto row = [&](Row name) { return table + int64_t(name) * batch; };
  std::vector<double> reward, a, slope;
  double policy_loss = 0, kl_loss = 0;
  if (call.method == CRD || call.method == NFT) {
    a.resize(batch);
    for (int64_t i = 0; i < batch; ++i) a[i] = unit_interval(s, call.advantage[i]);
  }
  if (call.method == CRD) {
    reward.assign(row(R), row(R) + batch);
    slope.assign(batch, 0.0);
    policy_loss = center(s, call, reward, a, slope);
  }
  for (int64_t i = 0; i < batch; ++i) {
    const double elements = row(ELEMENTS)[i], error = row(POLICY_ERROR)[i], old_error = row(OLD_ERROR)[i];
    double k = s.kl_beta, c1 = 0;
    switch (call.method) {
      case REWARD:
        c1 = -2 / elements / row(POLICY_SCALE)[i];
        loss[i] = row(R)[i];
        break;
      case CRD:
        c1 = -2 / elements * slope[i] / row(POLICY_SCALE)[i];
        if (call.adaptive_kl) k = s.kl_min + a[i] * (s.kl_beta - s.kl_min);
        break;
      case NFT: {
        const double level = call.sigma[i], floor = 1e-5 / level;
        double positive = level * level, negative = level * level;
        if (call.adaptive) {
          positive = level / std::max(double(row(POLICY_SCALE)[i]), floor);
          negative = level / std::max(double(row(OLD_SCALE)[i]), floor);
        }
        const double share = s.clip / s.beta / s.samples;
        positive *= share * a[i];
        negative *= share * (1 - a[i]);
        policy_loss += positive * error + negative * old_error;
        const double step = 2 * s.beta / elements;
        c1 = step * (positive - negative);
        outcome[2 * batch + i] = T(step * ((1 + s.beta) * negative - (1 - s.beta) * positive));
        // from the two branches the policy's own error, as in losses/scalars.py
        const double own = ((1 + s.beta) * error - (1 - s.beta) * old_error) / (2 * s.beta);
        row(POLICY_ERROR)[i] = T(own + (1 - s.beta * s.beta) * row(DEVIATION)[i]);
        break;
      }
      case AWM: {
        const double weight = bounded(call.advantage[i], -s.clip, s.clip), t = call.sigma.data ? call.sigma[i] : 1;
        double derivative = 0, unused = 0, factor = weight;
        const double matched = matching(call.weighting, error, t, derivative);
        if (call.off_policy) {
          const double before = call.old_error.data ? call.old_error[i] : old_error;
          const double ratio = std::exp(matching(call.weighting, before, t, unused) - matched);
          double gain = weight * ratio;
          factor = gain;
          if (call.clipped) {
            const double cut = weight * bounded(ratio, s.ratio_low, s.ratio_high);
            if (cut < gain) gain = cut, factor = 0;
          }
          policy_loss -= gain / s.samples;
        } else {
          policy_loss += weight * matched / s.samples;
        }
        c1 = 2 / elements / s.samples * factor * derivative;
        if (call.old_term) {
          kl_loss += s.old_kl_beta * row(DEVIATION)[i] / s.samples;
          outcome[2 * batch + i] = T(s.old_kl_beta * 2 / elements / s.samples);
        }
        break;
      }
      case DPO: {
        const int64_t pairs = batch / 2;
        const bool preferred = i < pairs;
        const int64_t other = preferred ? i + pairs : i - pairs;
        const double gap = error - old_error, rival = double(row(POLICY_ERROR)[other]) - row(OLD_ERROR)[other];
        const double logit = -s.beta / 2 * (preferred ? gap - rival : rival - gap);
        if (preferred) policy_loss += softplus(logit) / s.samples;
        c1 = (preferred ? 2 : -2) / elements * s.beta / 2 / s.samples * sigmoid(-logit);
        break;
      }
      default: {
        const double weight = call.advantage.data ? call.advantage[i] : 1;
        policy_loss += weight * error / s.samples;
        c1 = 2 / elements / s.samples * weight;
      }
    }
    if (call.kl_weight.data) k *= call.kl_weight[i];
    kl_loss += k * row(KL)[i] / s.samples;
    outcome[i] = T(c1);
    outcome[batch + i] = T(2 / elements / s.samples * k * row(ANCHORED)[i]);
  }
  if (call.method != REWARD) loss[0] = T(policy_loss + kl_loss);
  if (!call.old_term) std::fill_n(outcome + 2 * batch, batch, T(0));
  std::fill_n(outcome + 3 * batch, batch, T(policy_loss));
  std::fill_n(outcome + 4 * batch, batch, T(kl_loss));
}

}  // namespace

// table: (10, batch); loss: one, or (batch,) for REWARD; outcome: c1, c2, c3, and a row of each of the two parts of
// the loss, (5, batch). All float, or double with use_double.
extern "C" void crd_finish(const double* numbers, const int64_t* words, void* table, void* loss, void* outcome) {
  const Numbers& s = *reinterpret_cast<const Numbers*>(numbers);
  const Call& call = *reinterpret_cast<const Call*>(words);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    finish<T>(s, call, static_cast<T*>(table), static_cast<T*>(loss), static_cast<T*>(outcome));
  };
  call.use_double ? run(double(0)) : run(float(0));
}
