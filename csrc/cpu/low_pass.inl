// Gaussian low-pass of one plane, for gaussian_low_pass.inl and fuse_frequencies.inl.

#pragma once

#include "low_pass.h"

namespace sage_fast::SAGE_ISA {
namespace {

constexpr int64_t kStrip = SAGE_VECTOR_BYTES == 64 ? 4 : 2;  // vectors a row whose sums stay in registers
constexpr int64_t kChunk = 16;                               // rows of an image that are read at a time

template <class T, int64_t V>
using Sums = typename Vector<T>::type[kBandRows][V];

// sums[r][v] += over t of a(t, r) * b(t)[v], V vectors wide.
template <class T, int64_t V, class A, class B>
inline void multiply(int64_t count, A a, B b, Sums<T, V>& sums) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t t = 0; t < count; ++t) {
    const T* p = b(t);
    typename Vector<T>::type values[V];
    for (int64_t v = 0; v < V; ++v) values[v] = load(p + v * lanes);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kBandRows; ++r) {
      const T weight = a(t, r);
      for (int64_t v = 0; v < V; ++v) sums[r][v] += weight * values[v];
    }
  }
}

// V vectors of the four outputs of weights [count, 4]; x(t) is the place of input t. The block has `rows` rows.
template <class T, int64_t V, class X>
inline void rows_strip(const T* weights, int64_t count, X x, const T* base, bool again, int64_t rows, T* y,
                       int64_t y_step) {
  constexpr int64_t lanes = Vector<T>::lanes;
  Sums<T, V> sums = {};
  if (again) {
    for (int64_t r = 0; r < kBandRows; ++r) {
      for (int64_t v = 0; v < V; ++v) sums[r][v] = load(y + r * y_step + v * lanes);
    }
  }
  multiply<T, V>(count, [=](int64_t t, int64_t r) { return weights[t * kBandRows + r]; }, x, sums);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = r * y_step + v * lanes;
      store<T>(base ? load(base + at) + sums[r][v] : sums[r][v], y + at);
    }
  }
}

// Adds the share of inputs `row` to `row + count`, x [count, w], to y [n_out, w]; rows of both have room for whole
// vectors, y also for a whole block of rows. `next` [blocks] is where each block stands in band.index.
template <class T>
void rows_product_of(const BandBlocks<T>& band, int64_t row, int64_t count, const T* x, int64_t x_step, int64_t w,
                     int64_t* next, T* y, int64_t y_step) {
  constexpr int64_t lanes = Vector<T>::lanes, strip = kStrip * lanes;
  for (int64_t block = 0; block < band.blocks; ++block) {
    const int64_t begin = next[block];
    while (next[block] < band.begin[block + 1] && band.index[next[block]] < row + count) ++next[block];
    const int64_t n = next[block] - begin;
    if (n == 0) continue;
    const int64_t* index = band.index + begin;
    const T* weights = band.weights + begin * kBandRows;
    T* out = y + block * kBandRows * y_step;
    int64_t col = 0;
    const auto at = [&](int64_t t) { return x + (index[t] - row) * x_step + col; };
    for (; col + strip <= w; col += strip) {
      rows_strip<T, kStrip>(weights, n, at, static_cast<const T*>(nullptr), true, kBandRows, out + col, y_step);
    }
    for (; col < w; col += lanes) {
      rows_strip<T, 1>(weights, n, at, static_cast<const T*>(nullptr), true, kBandRows, out + col, y_step);
    }
  }
}

// band [n_out, n_in] times x [n_in, w], plus base [n_out, w] which may be null -> y [n_out, w]; w at least one vector.
template <class T>
void rows_product(const BandBlocks<T>& band, const T* x, int64_t x_step, int64_t w, const T* base, T* y,
                  int64_t y_step) {
  constexpr int64_t lanes = Vector<T>::lanes, strip = kStrip * lanes;
  for (int64_t block = 0; block < band.blocks; ++block) {
    const int64_t begin = band.begin[block], n = band.begin[block + 1] - begin, *index = band.index + begin;
    const int64_t rows = std::min(kBandRows, band.n_out - block * kBandRows);
    const T* weights = band.weights + begin * kBandRows;
    int64_t col = 0;
    const auto at = [&](int64_t t) { return x + index[t] * x_step + col; };
    const auto place = [&](auto* image) { return image ? image + block * kBandRows * y_step + col : nullptr; };
    for (; col + strip <= w; col += strip) {
      rows_strip<T, kStrip>(weights, n, at, place(base), false, rows, place(y), y_step);
    }
    for (int64_t rest = col; rest < w; rest += lanes) {  // the last vector may take some columns a second time
      col = std::min(rest, w - lanes);
      rows_strip<T, 1>(weights, n, at, place(base), false, rows, place(y), y_step);
    }
  }
}

// x [h, n_in] times band [n_out, n_in] transposed -> y [h, n_out], whose rows have room for whole blocks.
template <class T>
void cols_product(const BandBlocks<T>& band, const T* x, int64_t x_step, int64_t h, T* y, int64_t y_step) {
  constexpr int64_t lanes = Vector<T>::lanes, block_size = kBandCols<T>, wide = 2 * lanes;
  for (int64_t row = 0; row < h; row += kBandRows) {
    const T* in[kBandRows];
    for (int64_t r = 0; r < kBandRows; ++r) in[r] = x + std::min(row + r, h - 1) * x_step;
    for (int64_t block = 0; block < band.blocks; ++block) {
      const int64_t begin = band.begin[block], *index = band.index + begin;
      for (int64_t col = 0; col < block_size; col += wide) {
        const T* weights = band.weights + begin * block_size + col;
        Sums<T, 2> sums = {};
        multiply<T, 2>(
            band.begin[block + 1] - begin, [&](int64_t t, int64_t r) { return in[r][index[t]]; },
            [=](int64_t t) { return weights + t * block_size; }, sums);
        for (int64_t r = 0; r < kBandRows && row + r < h; ++r) {
          T* out = y + (row + r) * y_step + block * block_size + col;
          for (int64_t v = 0; v < 2; ++v) store<T>(sums[r][v], out + v * lanes);
        }
      }
    }
  }
}

// Low-pass of one plane after another, in memory of its own.
template <class T>
class LowPassOfPlane {
 public:
  explicit LowPassOfPlane(const LowPass<T>& plan)
      : plan_(plan), step_(room(plan.w)), coarse_step_(room(plan.cols_down.n_out)) {
    const int64_t rows = plan.rows_down.n_out ? plan.rows_down.blocks * kBandRows : plan.h;
    chunk_.assign(kChunk * step_);
    next_.assign(plan.rows_down.blocks);
    down_.assign(plan.rows_down.n_out ? rows * step_ : 0);
    coarse_.assign(plan.cols_down.n_out ? rows * coarse_step_ : 0);
    wide_.assign(rows * step_);
    if (plan.w < Vector<T>::lanes) narrow_.assign(2 * plan.h * step_);
  }

  // y [h, w] = low-pass + base, which may be null. rows(first, count, into, step) writes rows of the image.
  template <class Rows>
  void operator()(Rows&& rows, const T* base, T* y) {
    const int64_t h = plan_.h, w = plan_.w, lanes = Vector<T>::lanes;
    int64_t height = h;
    if (plan_.rows_down.n_out) {
      height = plan_.rows_down.n_out;
      std::copy_n(plan_.rows_down.begin, next_.size(), next_.data());
      std::fill_n(down_.data(), down_.size(), T(0));
      for (int64_t row = 0; row < h; row += kChunk) {
        const int64_t count = std::min(kChunk, h - row);
        rows(row, count, chunk_.data(), step_);
        rows_product_of(plan_.rows_down, row, count, chunk_.data(), step_, w, next_.data(), down_.data(), step_);
      }
      columns(down_.data(), height, wide_.data());
    } else {
      for (int64_t row = 0; row < h; row += kChunk) {
        const int64_t count = std::min(kChunk, h - row);
        rows(row, count, chunk_.data(), step_);
        columns(chunk_.data(), count, wide_.data() + row * step_);
      }
    }
    if (w >= lanes) return rows_product(plan_.rows_up, wide_.data(), step_, w, base, y, w);
    T *in = narrow_.data(), *out = in + h * step_;  // rows shorter than a vector
    for (int64_t i = 0; base && i < h; ++i) std::copy_n(base + i * w, w, in + i * step_);
    rows_product(plan_.rows_up, wide_.data(), step_, lanes, base ? in : nullptr, out, step_);
    for (int64_t i = 0; i < h; ++i) std::copy_n(out + i * step_, w, y + i * w);
  }

 private:
  // Whole blocks, and a cache line more, so that the rows of an image 1024 pixels wide fall into different sets.
  static int64_t room(int64_t n) { return (n + kBandCols<T> - 1) / kBandCols<T> * kBandCols<T> + 64 / sizeof(T); }

  void columns(const T* x, int64_t h, T* y) {
    if (plan_.cols_down.n_out) {
      cols_product(plan_.cols_down, x, step_, h, coarse_.data(), coarse_step_);
      cols_product(plan_.cols_up, coarse_.data(), coarse_step_, h, y, step_);
    } else {
      cols_product(plan_.cols_up, x, step_, h, y, step_);
    }
  }

  const LowPass<T>& plan_;
  int64_t step_, coarse_step_;
  Buffer<int64_t> next_;
  Buffer<T> chunk_, down_, coarse_, wide_, narrow_;
};

}  // namespace
}  // namespace sage_fast::SAGE_ISA
