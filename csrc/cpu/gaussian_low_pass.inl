#include "../gaussian_low_pass.h"

namespace sage_fast::SAGE_ISA {
namespace {

// out[i] = taps[0] * rows[0][i] + sum_k taps[k] * (rows[2 k - 1][i] + rows[2 k][i]): pixels at the same distance share
// a tap. `Wide` neighbours at a time, whose sums stay in registers over all taps.
template <class T, int64_t Wide>
int64_t combine_from(int64_t i, const Buffer<T>& taps, const T* const* rows, T* out, int64_t n) {
  constexpr int64_t lanes = Vector<T>::lanes;
  const int64_t radius = int64_t(taps.size()) - 1;
  for (; i + Wide * lanes <= n; i += Wide * lanes) {
    typename Vector<T>::type sum[Wide];
    for (int64_t v = 0; v < Wide; ++v) sum[v] = taps[0] * load(rows[0] + i + v * lanes);
    for (int64_t k = 1; k <= radius; ++k) {
      const T *a = rows[2 * k - 1] + i, *b = rows[2 * k] + i;
      for (int64_t v = 0; v < Wide; ++v) sum[v] += taps[k] * (load(a + v * lanes) + load(b + v * lanes));
    }
    for (int64_t v = 0; v < Wide; ++v) store<T>(sum[v], out + i + v * lanes);
  }
  return i;
}

template <class T>
void combine(const Buffer<T>& taps, const T* const* rows, T* out, int64_t n) {
  int64_t i = combine_from<T, 8>(0, taps, rows, out, n);
  i = combine_from<T, 4>(i, taps, rows, out, n);
  i = combine_from<T, 1>(i, taps, rows, out, n);
  for (; i < n; ++i) {
    T sum = taps[0] * rows[0][i];
    for (int64_t k = 1; k < taps.size(); ++k) sum += taps[k] * (rows[2 * k - 1][i] + rows[2 * k][i]);
    out[i] = sum;
  }
}

}  // namespace

// x [planes, h, w] -> y: columns first, whole rows at a time, then each row behind and before a copy of its ends.
template <class T>
void gaussian_low_pass(const T* x, int64_t planes, int64_t h, int64_t w, Taps rows, Taps cols, T* y) {
  Buffer<T> row_taps(rows.radius + 1), col_taps(cols.radius + 1);
  std::copy_n(rows.taps, row_taps.size(), row_taps.data());
  std::copy_n(cols.taps, col_taps.size(), col_taps.data());
  parallel(planes, 1 + 16384 / (h * w + 1), [&](int64_t begin, int64_t end) {
    const int64_t reach = cols.radius;
    Buffer<T> wide(w + 2 * reach);
    T* middle = wide.data() + reach;
    Buffer<const T*> near(2 * rows.radius + 1), beside(2 * reach + 1, middle);
    for (int64_t k = 1; k <= reach; ++k) {
      beside[2 * k - 1] = middle - k;
      beside[2 * k] = middle + k;
    }
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* in = x + plane * h * w;
      T* out = y + plane * h * w;
      for (int64_t i = 0; i < h; ++i) {
        near[0] = in + i * w;
        for (int64_t k = 1; k <= rows.radius; ++k) {
          near[2 * k - 1] = in + (i < k ? i + h - k : i - k) * w;
          near[2 * k] = in + (i + k < h ? i + k : i + k - h) * w;
        }
        combine(row_taps, near.data(), middle, w);
        for (int64_t k = 0; k < reach; ++k) {
          middle[-1 - k] = middle[w - 1 - k];
          middle[w + k] = middle[k];
        }
        combine(col_taps, beside.data(), out + i * w, w);
      }
    }
  });
}

template void gaussian_low_pass(const float*, int64_t, int64_t, int64_t, Taps, Taps, float*);
template void gaussian_low_pass(const double*, int64_t, int64_t, int64_t, Taps, Taps, double*);

}  // namespace sage_fast::SAGE_ISA
