// Standard normal numbers as a pure function of (seed, stream, sample, position): no state, so neither the batch nor
// the order of the calls nor the device changes them. For the CUDA kernel and, compiled by any C++ compiler, for a
// test.
#pragma once

#include <cmath>

#include "contract.h"

namespace sage_fast {

struct Words {
  uint32_t v[4];
};

// Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
SAGE_FAST_HD Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.v[0], b = uint64_t{0xCD9E8D57u} * counter.v[2];
    counter = Words{
        {uint32_t(b >> 32) ^ counter.v[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ counter.v[3] ^ key1, uint32_t(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Words of positions 4 block to 4 block + 3.
SAGE_FAST_HD Words normal_words(uint64_t seed, uint32_t stream, uint64_t sample, uint32_t block) {
  const Words counter{{block, stream, uint32_t(sample), uint32_t(sample >> 32)}};
  return philox(counter, uint32_t(seed), uint32_t(seed >> 32));
}

// sqrt(-2 ln u), u = (word + 1/2) / 2^32. Polynomials and not the libraries' functions: they must not lose digits near
// u = 1 nor under fast math. ln u = e ln 2 + ln(1 + x), |x| < 0.42; near 1, x is taken from the distance to 1, exactly.
SAGE_FAST_HD float box_muller_radius(uint32_t word) {
  int e = 0;
  float x = -(float(~word) + .5f) * 2.3283064365386963e-10f;  // 2^-32
  if (word < 0xB504F334u) {                                   // u < sqrt(1/2)
    float mantissa = frexpf(float(word) + .5f, &e);
    e -= 32;
    if (mantissa < .70710678f) {
      mantissa += mantissa;
      --e;
    }
    x = mantissa - 1;
  }
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float xx = x * x, log1p = x + (p * x * xx - .5f * xx);
  const float square = -2 * (log1p + float(e) * .69314718056f);
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(square);
#else
  return std::sqrt(square);
#endif
}

// cos and sin of 2 pi (word + 1/2) / 2^32: the nearest quarter turn from the top bits, the rest by polynomials.
SAGE_FAST_HD void box_muller_turn(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float t = (float(int32_t(word - (quarter << 30))) + .5f) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  const float tt = t * t;
  float s = -1.9515295891e-4f;
  s = s * tt + 8.3321608736e-3f;
  s = s * tt - 1.6666654611e-1f;
  s = s * tt * t + t;
  float c = 2.443315711809948e-5f;
  c = c * tt - 1.388731625493765e-3f;
  c = c * tt + 4.166664568298827e-2f;
  c = c * tt * tt - .5f * tt + 1.f;
  cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
  sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
}

// Box and Muller: words 0 and 1 make numbers 0 and 1, words 2 and 3 make numbers 2 and 3.
SAGE_FAST_HD void normals(const Words& words, float (&out)[4]) {
  for (int i = 0; i < 4; i += 2) {
    const float radius = box_muller_radius(words.v[i]);
    float c, s;
    box_muller_turn(words.v[i + 1], c, s);
    out[i] = radius * c;
    out[i + 1] = radius * s;
  }
}

}  // namespace sage_fast
