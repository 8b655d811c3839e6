// Gaussian low-pass along the two axes of an image, as products with banded matrices.
//
// A Gaussian of s pixels is two of s / sqrt(2), one after the other, and what lies between them is so smooth that a
// grid of about s / 2 pixels holds it. So an axis is brought down to that grid and up again, about 15 products a pixel
// each way however wide the blur is; a full kernel takes 11 s. A narrow blur is one band from pixels to pixels.
//
// Beyond its ends an axis goes on with a period: of n pixels ("circular"), or of 2 n - 2 and mirrored about the
// outermost pixels ("reflect"). Positions on that endless line are called places here; `at` folds them onto the n
// pixels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "contract.h"

namespace sage_fast {

struct LowPassParams {
  double sigma;
  bool reflect;  // at the borders; else circular
  bool pixels;   // sigma is a standard deviation in pixels; else cycles per image of the pass band
};

// An axis of n pixels, endless.
struct Line {
  int64_t n = 0;
  bool reflect = false;

  int64_t period() const { return reflect ? std::max<int64_t>(2 * n - 2, 1) : n; }
  int64_t at(int64_t place) const {
    const int64_t inside = ((place % period()) + period()) % period();
    return inside < n ? inside : period() - inside;
  }
};

// A matrix [rows, from.n]: row i weighs the `width` places from first[i] on. Rows sum to one, so a constant stays.
struct Band {
  Line from;
  int64_t width = 0;
  std::vector<int64_t> first;   // [rows]
  std::vector<double> weights;  // [rows, width]

  int64_t rows() const { return static_cast<int64_t>(first.size()); }
};

// y = up (down x) along one axis; `down` has no rows where `up` does it alone.
struct LowPassAxis {
  Band down, up;
};

// weight(distance) of every place within `reach` of rows * step; what is farther than a period is added where it falls.
template <class F>
Band band(Line from, int64_t rows, double from_step, double step, double reach, F&& weight) {
  Band made{from, 0, {}, {}};
  const int64_t places = 2 * static_cast<int64_t>(std::floor(reach / from_step)) + 2;
  made.width = std::min(places, from.period());
  made.weights.assign(rows * made.width, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = static_cast<int64_t>(std::ceil((double(i) * step - reach) / from_step));
    double* row = made.weights.data() + i * made.width;
    double sum = 0;
    for (int64_t j = 0; j < places; ++j) {
      const double distance = double(first + j) * from_step - double(i) * step;
      if (std::abs(distance) > reach) continue;
      row[j % made.width] += weight(distance);
      sum += weight(distance);
    }
    for (int64_t j = 0; j < made.width; ++j) row[j] /= sum;
    made.first.push_back(first);
  }
  return made;
}

// Taps [radius + 1] of the kernel on a circle of n pixels whose response at k cycles is exp(-k^2 / (2 sigma^2)):
//   g[x] = (1/n) * sum over the n frequencies k of exp(-k^2 / (2 sigma^2)) cos(2 pi k x / n).
// Those beyond the radius are below `tolerance`.
inline std::vector<double> circle_taps(int64_t n, double sigma, double tolerance) {
  std::vector<double> response(n / 2 + 1), cosine(n), taps(n / 2 + 1);
  for (int64_t k = 0; k <= n / 2; ++k) {
    const bool twice = k > 0 && 2 * k < n;  // k and -k; 0 and the Nyquist frequency stand alone
    response[k] = (twice ? 2.0 : 1.0) * std::exp(-0.5 * (double(k) / sigma) * (double(k) / sigma)) / double(n);
  }
  const double turn = 2 * std::acos(-1.0) / double(n);
  for (int64_t i = 0; i < n; ++i) cosine[i] = std::cos(turn * double(i));
  for (int64_t x = 0; x <= n / 2; ++x) {
    for (int64_t k = 0; k <= n / 2 && response[k] > 1e-300; ++k) taps[x] += response[k] * cosine[(k * x) % n];
  }
  while (taps.size() > 1 && std::abs(taps.back()) < tolerance) taps.pop_back();
  if (n % 2 == 0 && static_cast<int64_t>(taps.size()) == n / 2 + 1 && n > 1)
    taps.back() /= 2;  // reached from both sides
  return taps;
}

// `error`: what may be lost, as a share of the range of values.
inline LowPassAxis low_pass_axis(int64_t n, const LowPassParams& p, double error) {
  const Line line{n, p.reflect};
  const double period = double(line.period()), pi = std::acos(-1.0);
  // Beyond twice the period only the mean is left.
  const double s = std::min(p.pixels ? p.sigma : double(n) / (2 * pi * p.sigma), 2 * period);
  const auto gaussian = [](double s) { return [=](double d) { return std::exp(-0.5 * (d / s) * (d / s)); }; };
  const double deviations = std::sqrt(-2 * std::log(error));  // at which a Gaussian has fallen to `error`
  LowPassAxis axis;

  // On a grid of step g a wave of f cycles a pixel is mistaken for one of 1/g - f; both Gaussians together leave it
  // exp(-2 pi^2 s^2 f^2) at most at f = 1/(2 g).
  const double widest = pi * s / deviations;
  const int64_t closed = p.reflect ? 1 : 0;  // a mirrored grid has a place on both ends
  const int64_t m = widest < 2 ? n : static_cast<int64_t>(std::ceil(double(n - closed) / widest)) + closed;
  if (m > closed && 2 * m <= n + 1) {
    const double step = p.reflect ? double(n - 1) / double(m - 1) : double(n) / double(m), half = s / std::sqrt(2.0);
    axis.down = band(line, m, 1.0, step, deviations * half, gaussian(half));
    axis.up = band({m, p.reflect}, n, step, 1.0, deviations * half, gaussian(half));
    return axis;
  }
  if (p.pixels) {
    axis.up = band(line, n, 1.0, 1.0, std::max(deviations * s, 0.5), gaussian(s));
    return axis;
  }
  // cycles per image of n pixels are this many per period
  const std::vector<double> taps = circle_taps(line.period(), p.sigma * period / double(n), error / 32);
  const auto tap = [&](double d) { return taps[static_cast<size_t>(std::abs(d))]; };
  axis.up = band(line, n, 1.0, 1.0, double(taps.size()) - 1, tap);
  return axis;
}

// Plan(h, w, p), one of the last few or a new one: a call often comes again.
template <class Plan>
std::shared_ptr<const Plan> recent_plan(int64_t h, int64_t w, const LowPassParams& p) {
  struct Kept {
    int64_t h, w;
    LowPassParams p;
    std::shared_ptr<const Plan> plan;
  };
  static std::mutex mutex;
  static std::list<Kept> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find_if(kept.begin(), kept.end(), [&](const Kept& k) {
    return k.h == h && k.w == w && k.p.sigma == p.sigma && k.p.reflect == p.reflect && k.p.pixels == p.pixels;
  });
  if (found != kept.end()) {
    kept.splice(kept.begin(), kept, found);
  } else {
    kept.push_front({h, w, p, std::make_shared<const Plan>(h, w, p)});
    if (kept.size() > 8) kept.pop_back();
  }
  return kept.front().plan;
}

// What may be lost in a dtype, as a share of the range of values.
template <class T>
constexpr double kLowPassError = sizeof(T) == 4 ? 3e-8 : 1e-16;

}  // namespace sage_fast
