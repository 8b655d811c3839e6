#include "../upfirdn2d.h"

namespace sage_fast::SAGE_ISA {
namespace {

// out[i] (+)= sum_k taps[k] * rows[k][i], the one loop that all the time goes into: `Wide` vectors at a time, whose
// sums stay in registers over all taps.
template <class T, int64_t Wide>
int64_t weighted_sum_from(int64_t i, const T* const* rows, const T* taps, int64_t count, bool add, T* out, int64_t n) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (; i + Wide * lanes <= n; i += Wide * lanes) {
    typename Vector<T>::type sum[Wide] = {};
    for (int64_t v = 0; add && v < Wide; ++v) sum[v] = load(out + i + v * lanes);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t v = 0; v < Wide; ++v) sum[v] += taps[k] * load(rows[k] + i + v * lanes);
    }
    for (int64_t v = 0; v < Wide; ++v) store<T>(sum[v], out + i + v * lanes);
  }
  return i;
}

template <class T>
void weighted_sum(const T* const* rows, const T* taps, int64_t count, bool add, T* out, int64_t n) {
  int64_t i = weighted_sum_from<T, 4>(0, rows, taps, count, add, out, n);
  i = weighted_sum_from<T, 2>(i, rows, taps, count, add, out, n);
  i = weighted_sum_from<T, 1>(i, rows, taps, count, add, out, n);
  for (; i < n; ++i) {
    T sum = add ? out[i] : T(0);
    for (int64_t k = 0; k < count; ++k) sum += taps[k] * rows[k][i];
    out[i] = sum;
  }
}

// Filters one row: out[o] (+)= sum_j taps[j] * upsampled(in)[o * down + j - left]. Correlation taps.
// The row is copied between zeros, with down 2 its even and odd pixels apart, so that each tap meets neighbours; with
// up 2 the even and odd outputs are made apart, from every second tap each.
template <class T>
class RowFilter {
 public:
  RowFilter(const UpfirdnParams& p)
      : w_(p.w), out_w_(p.out_w()), k_(p.kw), up_(p.up), down_(p.down), left_(p.left), half_((p.out_w() + 1) / 2) {
    if (up_ > 2 || down_ > 2 || up_ * down_ > 2) return;
    const int64_t step = up_ * down_;  // taps and pixels per neighbour
    before_ = std::max<int64_t>(0, left_ / step + 1);
    const int64_t length = ceil_div(w_, down_), last = (up_ == 2 ? half_ : out_w_) - 1 + (k_ - left_) / step + 1;
    for (int64_t part = 0; part < down_; ++part) line_[part].assign(before_ + std::max(length, last + 1), T(0));
    for (int64_t phase = 0; up_ == 2 && phase < 2; ++phase) sums_[phase].assign(half_);
    // where each tap starts to read; divisions cost more than the sums of a short row, so they are made once
    for (int64_t j = 0; j < k_; ++j) {
      const int64_t shift = up_ == 2 ? ceil_div(j - left_, 2) : floor_div(j - left_, down_);
      tap_reads_[j] = line_[down_ == 2 ? j - left_ - shift * 2 : 0].data() + before_ + shift;
    }
  }

  RowFilter(const RowFilter&) = delete;  // tap_reads_ points into line_
  RowFilter& operator=(const RowFilter&) = delete;

  void operator()(const T* in, const T* taps, bool add, T* out) {
    if (line_[0].size() == 0) return any(in, taps, add, out);
    copy(in);
    if (up_ == 2) return up2(taps, add, out);
    weighted_sum(tap_reads_, taps, k_, add, out, out_w_);  // output o meets pixel down * o + j - left
  }

 private:
  void copy(const T* in) {
    T *even = line_[0].data() + before_, *odd = line_[1].data() + before_;
    if (down_ == 1) {
      std::copy_n(in, w_, even);
      return;
    }
    for (int64_t i = 0; i < w_ / 2; ++i) {
      even[i] = in[2 * i];
      odd[i] = in[2 * i + 1];
    }
    if (w_ % 2) even[w_ / 2] = in[w_ - 1];
  }

  void up2(const T* taps, bool add, T* out) {
    for (int64_t phase = 0; phase < 2; ++phase) {
      int64_t count = 0;
      for (int64_t j = ((left_ - phase) % 2 + 2) % 2; j < k_; j += 2) {  // output o meets pixel (o + j - left) / 2
        phase_reads_[count] = tap_reads_[j];
        phase_taps_[count++] = taps[j];
      }
      weighted_sum(phase_reads_, phase_taps_, count, false, sums_[phase].data(), half_);
    }
    const T *even = sums_[0].data(), *odd = sums_[1].data();
    if (!add) std::fill_n(out, out_w_, T(0));
    for (int64_t i = 0; i < out_w_ / 2; ++i) {
      out[2 * i] += even[i];
      out[2 * i + 1] += odd[i];
    }
    if (out_w_ % 2) out[out_w_ - 1] += even[half_ - 1];
  }

  void any(const T* in, const T* taps, bool add, T* out) const {
    for (int64_t o = 0; o < out_w_; ++o) {
      T sum = add ? out[o] : T(0);
      for (int64_t j = 0; j < k_; ++j) {
        const int64_t at = o * down_ + j - left_;
        if (at >= 0 && at % up_ == 0 && at / up_ < w_) sum += taps[j] * in[at / up_];
      }
      out[o] = sum;
    }
  }

  int64_t w_, out_w_, k_, up_, down_, left_, half_, before_ = 0;
  Buffer<T> line_[2], sums_[2];
  const T *tap_reads_[32], *phase_reads_[32];
  T phase_taps_[32];
};

// col x row = f to within `tolerance` of its largest tap, when f has rank one (every filter that StyleGAN2 uses); false
// otherwise.
bool separate(const double* f, int64_t kh, int64_t kw, double tolerance, double* col, double* row) {
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

}  // namespace

// x [planes, h, w], f [kh, kw] -> y [planes, out_h, out_w]
template <class T>
void upfirdn2d(const T* x, const double* filter, const UpfirdnParams& p, T* y) {
  const int64_t out_h = p.out_h(), out_w = p.out_w();
  const int64_t n_taps = p.kh * p.kw;
  double f[32 * 32], col[32], row[32];
  T taps[32 * 32], col_taps[32], row_taps[32];
  for (int64_t i = 0; i < n_taps; ++i) f[i] = filter[p.flip ? i : n_taps - 1 - i] * p.gain;  // correlation taps
  const double tolerance = 4 * std::numeric_limits<T>::epsilon();  // an outer product, rounded to T, passes
  const bool separable = n_taps > 1 && separate(f, p.kh, p.kw, tolerance, col, row);
  for (int64_t i = 0; i < n_taps; ++i) taps[i] = T(f[i]);
  for (int64_t i = 0; separable && i < p.kh; ++i) col_taps[i] = T(col[i]);
  for (int64_t i = 0; separable && i < p.kw; ++i) row_taps[i] = T(row[i]);

  struct Meeting {
    int64_t tap, row;
  };
  Buffer<Meeting> meetings(out_h * p.kh);  // of all output rows; those of row o lie from first_of[o] to first_of[o + 1]
  Buffer<int64_t> first_of(out_h + 1);
  int64_t n_meetings = 0;
  for (int64_t o = 0; o < out_h; ++o) {
    for (int64_t j = 0; j < p.kh; ++j) {
      const int64_t at = o * p.down + j - p.top;
      if (at >= 0 && at % p.up == 0 && at / p.up < p.h) meetings[n_meetings++] = {j, at / p.up};
    }
    first_of[o + 1] = n_meetings;
  }

  parallel(p.planes, 1 + 16384 / (out_h * out_w + 1), [&](int64_t first, int64_t last) {
    RowFilter<T> filter_row(p);
    // rows filtered along themselves, between rows of zeros that stand for the padding
    const int64_t above = std::max<int64_t>(0, p.top), rows_needed = above + std::max(p.h, out_h + p.kh - 1 - p.top);
    Buffer<T> rows(separable ? rows_needed * out_w : 0);
    T* const top_row = rows.data() + above * out_w;
    const T* near[32];
    T near_taps[32];
    for (int64_t plane = first; plane < last; ++plane) {
      const T* in = x + plane * p.h * p.w;
      for (int64_t i = 0; separable && i < p.h; ++i) {
        filter_row(in + i * p.w, row_taps, false, top_row + i * out_w);
      }
      if (separable && p.up == 1 && p.down == 1) {  // neighbours in a column lie at one distance: the plane is one sum
        for (int64_t j = 0; j < p.kh; ++j) near[j] = top_row + (j - p.top) * out_w;
        weighted_sum(near, col_taps, p.kh, false, y + plane * out_h * out_w, out_h * out_w);
        continue;
      }
      for (int64_t o = 0; o < out_h; ++o) {
        T* out = y + (plane * out_h + o) * out_w;
        int64_t count = 0;
        for (int64_t m = first_of[o]; m < first_of[o + 1]; ++m, ++count) {
          const auto [tap, row_met] = meetings[m];
          if (separable) {
            near[count] = top_row + row_met * out_w;
            near_taps[count] = col_taps[tap];
          } else {
            filter_row(in + row_met * p.w, taps + tap * p.kw, count > 0, out);
          }
        }
        if (separable || count == 0) weighted_sum(near, near_taps, count, false, out, out_w);
      }
    }
  });
}

template void upfirdn2d(const float*, const double*, const UpfirdnParams&, float*);
template void upfirdn2d(const double*, const double*, const UpfirdnParams&, double*);

}  // namespace sage_fast::SAGE_ISA
