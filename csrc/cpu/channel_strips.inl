// upfirdn2d of 4 x 4 taps on images whose channels come last: a strip some outputs wide and a vector of channels deep
// goes down the image. Each pixel is loaded once for all outputs of its row; the sums of the rows stay in registers.
#pragma once

#include "../upfirdn2d.h"

namespace sage_fast::SAGE_ISA {
namespace {

template <class T, int64_t Down>
class ChannelStrips {
  typedef typename Accumulator<T>::type A;
  typedef typename Vector<A>::type V;

 public:
  static constexpr int64_t lanes = Vector<A>::lanes, taps = 4;
  // Rows of a band. In an image 256 pixels wide of 64 channels the rows of a strip share the sets of the caches: with
  // more of them than a set has ways, the next strip's pixels would be gone before their turn.
  static constexpr int64_t band = 64 / sizeof(T) / Down;
  static constexpr int64_t width = 4;                           // outputs whose sums fit the registers
  static constexpr int64_t pixels = (width - 1) * Down + taps;  // that meet them in a row

  ChannelStrips(const UpfirdnParams& params, const A* column_taps, const A* row_taps)
      : p_(params), out_h_(p_.out_h()), out_w_(p_.out_w()) {
    std::copy_n(column_taps, taps, col_);
    std::copy_n(row_taps, taps, row_);
  }

  // Output rows from `top` on, a band of them, of the plane `in`.
  void operator()(const T* in, int64_t top, T* out) const {
    const int64_t bottom = std::min(top + band, out_h_);
    for (int64_t x = 0; x < out_w_; x += width) {
      const int64_t a = x * Down - p_.left;
      const bool inside = a >= 0 && a + pixels <= p_.w && x + width <= out_w_;
      int64_t c = 0;
      for (; inside && c + lanes <= p_.inner; c += lanes) strip<true>(in, top, bottom, x, c, out);
      for (; c < p_.inner; c += lanes) strip<false>(in, top, bottom, x, c, out);
    }
  }

 private:
  // Whole: the pixels lie inside, the outputs too, and the channels fill a vector.
  template <bool Whole>
  void strip(const T* in, int64_t top, int64_t bottom, int64_t x, int64_t c, T* out) const {
    const ChannelStrips own = *this;                // a copy whose numbers stay in registers: no store can reach it
    V sums[taps / Down - (Down == 1)][width] = {};  // of the outputs below, nearest first
    if constexpr (Down == 1) {
      for (int64_t o = top - 3; o < bottom; ++o) {  // row o - p.top + 3 is the last of output o
        V h[width], y[width];
        own.template along_row<Whole>(in, o - own.p_.top + 3, x, c, h);
        for (int64_t k = 0; k < width; ++k) {
          y[k] = sums[0][k] + own.col_[3] * h[k];
          sums[0][k] = sums[1][k] + own.col_[2] * h[k];
          sums[1][k] = sums[2][k] + own.col_[1] * h[k];
          sums[2][k] = own.col_[0] * h[k];
        }
        if (o >= top) own.template put<Whole>(y, o, x, c, out);
      }
    } else {
      for (int64_t o = top - 1; o < bottom; ++o) {  // two rows end output o and begin the next
        V h[width], g[width], y[width];
        own.template along_row<Whole>(in, 2 * o - own.p_.top + 2, x, c, h);
        own.template along_row<Whole>(in, 2 * o - own.p_.top + 3, x, c, g);
        for (int64_t k = 0; k < width; ++k) {
          y[k] = sums[0][k] + own.col_[2] * h[k] + own.col_[3] * g[k];
          sums[0][k] = own.col_[0] * h[k] + own.col_[1] * g[k];
        }
        if (o >= top) own.template put<Whole>(y, o, x, c, out);
      }
    }
  }

  template <bool Whole>
  [[gnu::always_inline]] inline void along_row(const T* in, int64_t i, int64_t x, int64_t c, V* h) const {
    if (i < 0 || i >= p_.h) {
      for (int64_t k = 0; k < width; ++k) h[k] = V{};
      return;
    }
    const int64_t a = x * Down - p_.left;
    const T* const row = in + i * p_.w * p_.inner + c;
    V v[pixels];
    for (int64_t j = 0; j < pixels; ++j) {
      if constexpr (Whole) {
        v[j] = load_as<A>(row + (a + j) * p_.inner);
        // the next strip's pixels: the processor does not see rows that lie far apart coming
        if (j < width * Down) __builtin_prefetch(row + (a + j + pixels) * p_.inner);
      } else {
        const bool there = a + j >= 0 && a + j < p_.w;
        v[j] = there ? load_first<A>(row + (a + j) * p_.inner, std::min(lanes, p_.inner - c)) : V{};
      }
    }
    for (int64_t k = 0; k < width; ++k) {
      const V* const from = v + k * Down;
      h[k] = row_[0] * from[0] + row_[1] * from[1] + row_[2] * from[2] + row_[3] * from[3];
    }
  }

  template <bool Whole>
  [[gnu::always_inline]] inline void put(const V* y, int64_t o, int64_t x, int64_t c, T* out) const {
    T* const to = out + (o * out_w_ + x) * p_.inner + c;
    for (int64_t k = 0; k < (Whole ? width : std::min(width, out_w_ - x)); ++k) {
      if constexpr (Whole) {
        store_as<A>(y[k], to + k * p_.inner);
      } else {
        store_first<A>(y[k], to + k * p_.inner, std::min(lanes, p_.inner - c));
      }
    }
  }

  const UpfirdnParams p_;
  const int64_t out_h_, out_w_;
  A col_[taps], row_[taps];
};

// Where the strips were measured ahead of PlaneFilter: 16 bits, whose loads cost more, and long rows. They need the
// registers and the masks of AVX-512.
template <class T>
inline bool strips_are_ahead(const UpfirdnParams& p) {
  constexpr int64_t lanes = Vector<typename Accumulator<T>::type>::lanes;
  if (SAGE_VECTOR_BYTES < 64 || p.inner < lanes || p.up > 1 || p.down > 2 || p.kh != 4 || p.kw != 4) return false;
  return sizeof(T) == 2 || (sizeof(T) == 4 && p.down == 1 && p.w >= 128);
}

template <int64_t Down, class T, class A>
void filter_strips(const T* x, const UpfirdnParams& p, const A* col, const A* row, T* y) {
  const ChannelStrips<T, Down> strips(p, col, row);
  const int64_t size = p.h * p.w * p.inner, out_h = p.out_h(), out_size = out_h * p.out_w() * p.inner;
  const int64_t bands = ceil_div(out_h, strips.band);
  parallel(p.planes * bands, 1 + 16384 / (out_size / bands + 1), [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      strips(x + job / bands * size, job % bands * strips.band, y + job / bands * out_size);
    }
  });
}

}  // namespace
}  // namespace sage_fast::SAGE_ISA
