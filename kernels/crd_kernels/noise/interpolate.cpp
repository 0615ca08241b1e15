// x_sigma = (1 - sigma) x0 + sigma noise, one read of x0 (and of noise, or none with a seed), one write.
// Compiled into the same library as velocity.cpp.

#include "latents.h"

namespace {

template <class T>
void interpolate(const Problem& p, const double* sigma, int threads) {
  for_each_chunk(p, threads, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
    Tiles<T> t;
    const T level = T(sigma[b]), rest = T(1) - level;
    for (int64_t at = begin; at < end; at += TILE) {
      const int64_t count = end - at < TILE ? end - at : TILE;
      load_all(p, b, at, count, t);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) t.out[i] = rest * t.x0[i] + level * t.noise[i];
      store(p.out, p.sizes, b, at, count, t.out);
    }
  });
}

}  // namespace

// sigma: (batch,) double.
extern "C" void crd_interpolate(const Problem* p, const double* sigma, int64_t use_double, int64_t threads) {
  use_double ? interpolate<double>(*p, sigma, int(threads)) : interpolate<float>(*p, sigma, int(threads));
}
