// Noise by seed: Philox 4x32-10 and Box-Muller.
//
// Element e of a sample takes word e % 4 of philox(key = the sample's 64-bit seed, counter = e / 4):
//   u = ((word >> 8) + 0.5) 2^-24                                    in (0, 1]
//   (normal_0, normal_1) = sqrt(-2 ln u_0) (cos 2 pi u_1, sin 2 pi u_1), and the same of words 2 and 3.
// The same integers as crd_kernels/noise/reference.py and triton.py, so the same normals to float rounding.
// ln, cos and sin are polynomials: the loops then vectorise, which library calls would prevent.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline float uniform(uint32_t word) { return (float(word >> 8) + 0.5f) * 0x1p-24f; }

// ln u for u in (0, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m + 1)).
inline float log_of(float u) {
  uint32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;
  bits -= uint32_t(exponent) << 23;
  float m;
  std::memcpy(&m, &bits, 4);
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series = q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9))));
  return float(exponent) * 0.69314718056f + 2.0f * (s + s * series);
}

// cos and sin of 2 pi u for u in [0, 1]: reduced to an eighth of a turn, then Taylor's series.
inline void cos_sin_of(float u, float& cosine, float& sine) {
  const int32_t quadrant = int32_t(u * 4.0f + 0.5f);
  const float x = (u - float(quadrant) * 0.25f) * 6.28318530718f, q = x * x;
  const float s = x * (1.0f + q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880)))));
  const float c = 1.0f + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320))));
  const bool swap = quadrant & 1;
  const float a = swap ? s : c, b = swap ? c : s;
  cosine = ((quadrant + 1) & 2) ? -a : a;
  sine = (quadrant & 2) ? -b : b;
}

template <int64_t LANES>
void box_muller(const uint32_t* first, const uint32_t* second, float* cosines, float* sines) {
#pragma omp simd
  for (int64_t i = 0; i < LANES; ++i) {
    const float radius = std::sqrt(-2.0f * log_of(uniform(first[i])));
    float cosine, sine;
    cos_sin_of(uniform(second[i]), cosine, sine);
    cosines[i] = radius * cosine;
    sines[i] = radius * sine;
  }
}

// The normals of elements [begin, begin + count); begin is a multiple of 4.
template <class T>
void philox_normal(int64_t seed, int64_t begin, int64_t count, T* out) {
  constexpr int64_t LANES = 64;  // counters worked on at a time, one array per word so that loops vectorise
  const uint32_t low = uint32_t(uint64_t(seed)), high = uint32_t(uint64_t(seed) >> 32);
  alignas(64) uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
  alignas(64) float normal[4][LANES];
  for (int64_t first = 0; first < count; first += 4 * LANES) {
    const uint64_t counter = uint64_t(begin + first) / 4;
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) {
      c0[i] = uint32_t(counter + i);
      c1[i] = uint32_t((counter + i) >> 32);
      c2[i] = c3[i] = 0;
    }
    uint32_t k0 = low, k1 = high;
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
#pragma omp simd
      for (int64_t i = 0; i < LANES; ++i) {
        const uint64_t a = uint64_t(0xD2511F53u) * c0[i], b = uint64_t(0xCD9E8D57u) * c2[i];
        c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
        c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
        c1[i] = uint32_t(b);
        c3[i] = uint32_t(a);
      }
    }
    box_muller<LANES>(c0, c1, normal[0], normal[1]);
    box_muller<LANES>(c2, c3, normal[2], normal[3]);
    const int64_t length = count - first < 4 * LANES ? count - first : 4 * LANES;
    for (int64_t i = 0; i < length; ++i) out[first + i] = T(normal[i % 4][i / 4]);
  }
}

}  // namespace
