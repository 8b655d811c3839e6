// Circular Gaussian filter whose response at d cycles per image is exp(-d^2 / (2 sigma^2)).
//
// On a row of n pixels that response belongs to the kernel
//   g[x] = (1/n) * sum over the n frequencies k of exp(-k^2 / (2 sigma^2)) cos(2 pi k x / n),
// so two circular convolutions (rows, columns) do what the FFT does. Taps beyond `radius` are below `tolerance` of the
// sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "contract.h"

namespace sage_fast {

struct Taps {  // of a symmetric kernel
  int64_t radius;
  const double* taps;  // [radius + 1], taps[|x|]
};

struct LowPassKernel {
  int64_t radius;
  std::vector<double> taps;  // [radius + 1], taps[|x|]; the full circle counts each pixel once

  Taps view() const { return {radius, taps.data()}; }
};

inline LowPassKernel low_pass_kernel(int64_t n, double sigma, double tolerance) {
  require(sigma > 0, "gaussian_low_pass: sigma must be positive");
  std::vector<double> response(n / 2 + 1);
  for (int64_t k = 0; k <= n / 2; ++k) {
    bool twice = k > 0 && 2 * k < n;  // k and -k; 0 and the Nyquist frequency stand alone
    response[k] = (twice ? 2.0 : 1.0) * std::exp(-0.5 * double(k) * double(k) / (sigma * sigma)) / double(n);
  }
  const double turn = 2 * std::acos(-1.0) / double(n);
  std::vector<double> cosine(n), taps(n / 2 + 1);
  for (int64_t i = 0; i < n; ++i) cosine[i] = std::cos(turn * double(i));
  for (int64_t x = 0; x <= n / 2; ++x) {
    double sum = 0;
    for (int64_t k = 0; k <= n / 2 && response[k] > 1e-300; ++k) sum += response[k] * cosine[(k * x) % n];
    taps[x] = sum;
  }
  int64_t radius = n / 2;
  while (radius > 0 && std::abs(taps[radius]) < tolerance) --radius;
  taps.resize(radius + 1);
  if (2 * radius == n) taps[radius] /= 2;  // the pixel opposite is reached from both sides
  double sum = taps[0];                    // the mean is kept exactly: what was cut off goes back in proportion
  for (int64_t x = 1; x <= radius; ++x) sum += 2 * taps[x];
  for (double& tap : taps) tap /= sum;
  return {radius, taps};
}

}  // namespace sage_fast
