// x_sigma = (1 - sigma) x0 + sigma noise, one read of x0 (and of noise, or none with a seed), one write.
// Compiled into the same library as velocity.cpp.

#include <type_traits>

#include "latents.h"

namespace {

template <class T>
void interpolate(const Problem& p, const double* sigma, int64_t threads) {
  const int64_t direct = direct_dtype(p);
  for_each_chunk(p, threads, false, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    const T level = T(sigma[b]), rest = T(1) - level;
    for_each_view<T>(p, direct, b, begin, end, [&](const auto& v, int64_t count) {
      using S = std::remove_pointer_t<decltype(v.out)>;
      const S *x0s = v.x0, *noises = v.noise;
      S* out = v.out;
      const T a = rest, b = level;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) put(out[i], a * T(x0s[i]) + b * T(noises[i]));
    });
  });
}

}  // namespace

// sigma: (batch,) double.
extern "C" void crd_interpolate(const Problem* p, const double* sigma, int64_t use_double, int64_t threads) {
  use_double ? interpolate<double>(*p, sigma, threads) : interpolate<float>(*p, sigma, threads);
}
