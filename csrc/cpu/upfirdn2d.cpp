#include "../upfirdn2d.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tensor.h"

namespace sage_fast {
namespace {

// y[i] += t * x[i], the one loop that all the time goes into.
template <class T>
inline void axpy(T t, const T* __restrict x, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += t * x[i];
}

// Filters one row: out[o] += sum_k taps[k] * upsampled(in)[o * down + k - left]. Correlation taps.
// Up 2 goes through one buffer per phase, down 2 through one per input phase, so that axpy always runs over neighbours.
template <class T>
struct RowFilter {
  int64_t w, out_w, k, up, down, left;
  mutable std::vector<T> even, odd;

  void operator()(const T* in, const T* taps, T* out) const {
    if (up == 1 && down == 1) return plain(in, w, taps, 1, 0, out, out_w);
    if (up == 2 && down == 1) return up2(in, taps, out);
    if (up == 1 && down == 2) return down2(in, taps, out);
    for (int64_t o = 0; o < out_w; ++o) {
      for (int64_t j = 0; j < k; ++j) {
        int64_t at = o * down + j - left;
        if (at >= 0 && at % up == 0 && at / up < w) out[o] += taps[j] * in[at / up];
      }
    }
  }

 private:
  // out[o] += taps[j] * in[o + shift(j)] for every stride-th tap from `first`
  void plain(const T* in, int64_t n, const T* taps, int64_t stride, int64_t first, T* out, int64_t n_out) const {
    for (int64_t j = first; j < k; j += stride) {
      int64_t shift = floor_div(j - left, stride);
      int64_t begin = std::max<int64_t>(0, -shift), end = std::min(n_out, n - shift);
      if (begin < end) axpy(taps[j], in + begin + shift, out + begin, end - begin);
    }
  }

  void up2(const T* in, const T* taps, T* out) const {
    int64_t n_even = (out_w + 1) / 2, n_odd = out_w / 2;
    even.assign(n_even, T(0));
    odd.assign(n_odd, T(0));
    for (int64_t j = 0; j < k; ++j) {  // output o sees input (o + j - left) / 2 where that is whole
      int64_t phase = ((left - j) % 2 + 2) % 2, shift = (phase + j - left) / 2;
      std::vector<T>& part = phase ? odd : even;
      int64_t begin = std::max<int64_t>(0, -shift), end = std::min<int64_t>(part.size(), w - shift);
      if (begin < end) axpy(taps[j], in + begin + shift, part.data() + begin, end - begin);
    }
    for (int64_t i = 0; i < n_odd; ++i) {
      out[2 * i] += even[i];
      out[2 * i + 1] += odd[i];
    }
    if (n_even > n_odd) out[2 * n_odd] += even[n_odd];
  }

  void down2(const T* in, const T* taps, T* out) const {
    int64_t n_even = (w + 1) / 2, n_odd = w / 2;
    even.resize(n_even);
    odd.resize(n_odd);
    for (int64_t i = 0; i < n_odd; ++i) {
      even[i] = in[2 * i];
      odd[i] = in[2 * i + 1];
    }
    if (n_even > n_odd) even[n_odd] = in[2 * n_odd];
    for (int64_t j = 0; j < k; ++j) {  // output o sees input 2 o + j - left
      int64_t phase = ((j - left) % 2 + 2) % 2, shift = (j - left - phase) / 2;
      const std::vector<T>& part = phase ? odd : even;
      int64_t begin = std::max<int64_t>(0, -shift), end = std::min<int64_t>(out_w, int64_t(part.size()) - shift);
      if (begin < end) axpy(taps[j], part.data() + begin + shift, out + begin, end - begin);
    }
  }
};

// col x row = f to within `tolerance` of its largest tap, when f has rank one (every filter that StyleGAN2 uses); false
// otherwise.
bool separate(const std::vector<double>& f, int64_t kh, int64_t kw, double tolerance, std::vector<double>& col,
              std::vector<double>& row) {
  int64_t pivot = 0;
  double largest = 0;
  for (int64_t i = 0; i < kh * kw; ++i) {
    if (std::abs(f[i]) > largest) largest = std::abs(f[pivot = i]);
  }
  if (!(largest > 0) || std::isinf(largest)) return false;
  for (int64_t i = 0; i < kh; ++i) col[i] = f[i * kw + pivot % kw] / f[pivot];
  for (int64_t j = 0; j < kw; ++j) row[j] = f[(pivot / kw) * kw + j];
  for (int64_t i = 0; i < kh * kw; ++i) {
    if (!(std::abs(f[i] - col[i / kw] * row[i % kw]) <= tolerance * largest)) return false;
  }
  return true;
}

// x [planes, h, w], f [kh, kw] -> y [planes, out_h, out_w]
template <class T>
void run(const T* x, const std::vector<double>& filter, const UpfirdnParams& p, T* y) {
  const int64_t out_h = p.out_h(), out_w = p.out_w();
  std::vector<double> f(filter), col(p.kh), row(p.kw);
  if (!p.flip) std::reverse(f.begin(), f.end());  // to correlation taps
  for (double& tap : f) tap *= p.gain;
  const double tolerance = 4 * std::numeric_limits<T>::epsilon();  // an outer product, rounded to T, passes
  const bool separable = p.kh * p.kw > 1 && separate(f, p.kh, p.kw, tolerance, col, row);
  const std::vector<T> taps(f.begin(), f.end()), col_taps(col.begin(), col.end()), row_taps(row.begin(), row.end());

  parallel(p.planes, 1 + 16384 / (out_h * out_w + 1), [&](int64_t first, int64_t last) {
    RowFilter<T> filter_row{p.w, out_w, p.kw, p.up, p.down, p.left, {}, {}};
    std::vector<T> rows(separable ? p.h * out_w : 0);
    for (int64_t plane = first; plane < last; ++plane) {
      const T* in = x + plane * p.h * p.w;
      T* out = y + plane * out_h * out_w;
      if (separable) {
        std::fill(rows.begin(), rows.end(), T(0));
        for (int64_t i = 0; i < p.h; ++i) filter_row(in + i * p.w, row_taps.data(), rows.data() + i * out_w);
      }
      for (int64_t o = 0; o < out_h; ++o) {
        std::fill(out + o * out_w, out + (o + 1) * out_w, T(0));
        for (int64_t j = 0; j < p.kh; ++j) {
          int64_t at = o * p.down + j - p.top;
          if (at < 0 || at % p.up || at / p.up >= p.h) continue;
          if (separable) {
            axpy(col_taps[j], rows.data() + at / p.up * out_w, out + o * out_w, out_w);
          } else {
            filter_row(in + at / p.up * p.w, taps.data() + j * p.kw, out + o * out_w);
          }
        }
      }
    }
  });
}

Tensor upfirdn2d(Tensor x, Tensor f, int64_t up, int64_t down, int64_t left, int64_t right, int64_t top, int64_t bottom,
                 bool flip_filter, double gain) {
  require(x.dim() == 4 && f.dim() == 2, "upfirdn2d: x must be [N, C, H, W] and f [kh, kw]");
  UpfirdnParams p{x.size(0) * x.size(1), x.size(2), x.size(3), f.size(0), f.size(1), up, down, left, right, top, bottom,
                  flip_filter,           gain};
  check(p);
  x = torch::stable::contiguous(x);
  f = torch::stable::contiguous(f);
  std::vector<double> taps(p.kh * p.kw);
  dispatch(f, [&](auto zero) {
    using T = decltype(zero);
    std::copy_n(data<T>(f), taps.size(), taps.begin());
  });
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), p.out_h(), p.out_w()});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    run<T>(data<T>(x), taps, p, mutable_data<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace sage_fast
