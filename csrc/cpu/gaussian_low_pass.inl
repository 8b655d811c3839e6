#include "low_pass.h"

namespace sage_fast::SAGE_ISA {
namespace {

constexpr int64_t kStrip = SAGE_VECTOR_BYTES == 64 ? 4 : 2;  // vectors a row whose sums stay in registers

// sums[r][v] = over t of a(t, r) * b(t)[v], V vectors wide.
template <class T, int64_t V, class A, class B>
inline void multiply(int64_t count, A a, B b, typename Vector<T>::type (&sums)[kBandRows][V]) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t r = 0; r < kBandRows; ++r) {
    for (int64_t v = 0; v < V; ++v) sums[r][v] = typename Vector<T>::type{};
  }
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

// Columns col to col + V vectors of one block of rows; `base` (may be null, laid out as y) is added.
template <class T, int64_t V>
inline void rows_strip(const BandBlocks<T>& band, int64_t block, const T* x, int64_t x_step, int64_t col,
                       const T* base, T* y, int64_t y_step) {
  constexpr int64_t lanes = Vector<T>::lanes;
  const int64_t begin = band.begin[block], *index = band.index + begin;
  const T* weights = band.weights + begin * kBandRows;
  typename Vector<T>::type sums[kBandRows][V];
  multiply<T, V>(
      band.begin[block + 1] - begin, [=](int64_t t, int64_t r) { return weights[t * kBandRows + r]; },
      [=](int64_t t) { return x + index[t] * x_step + col; }, sums);
  const int64_t first = block * kBandRows;
  for (int64_t r = 0; r < kBandRows && first + r < band.n_out; ++r) {
    const int64_t at = (first + r) * y_step + col;
    for (int64_t v = 0; v < V; ++v) {
      store<T>(base ? load(base + at + v * lanes) + sums[r][v] : sums[r][v], y + at + v * lanes);
    }
  }
}

// band [n_out, n_in] times x [n_in, w] (plus base [n_out, w]) -> y [n_out, w]; w at least one vector.
template <class T>
void rows_product(const BandBlocks<T>& band, const T* x, int64_t x_step, int64_t w, const T* base, T* y,
                  int64_t y_step) {
  constexpr int64_t lanes = Vector<T>::lanes, strip = kStrip * lanes;
  for (int64_t block = 0; block < band.blocks; ++block) {
    int64_t col = 0;
    for (; col + strip <= w; col += strip) rows_strip<T, kStrip>(band, block, x, x_step, col, base, y, y_step);
    for (; col < w; col += lanes) {  // the last vector may take some columns a second time
      rows_strip<T, 1>(band, block, x, x_step, std::min(col, w - lanes), base, y, y_step);
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
        typename Vector<T>::type sums[kBandRows][2];
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
  explicit LowPassOfPlane(const LowPass<T>& plan) : plan_(plan), narrow_(plan.w < Vector<T>::lanes) {
    step_ = room(plan.w);
    coarse_step_ = room(plan.cols_down.n_out);
    down_.assign(plan.rows_down.n_out * step_);
    coarse_.assign((plan.rows_down.n_out ? plan.rows_down.n_out : plan.h) * coarse_step_);
    wide_.assign((plan.rows_down.n_out ? plan.rows_down.n_out : plan.h) * step_);
    if (narrow_) padded_.assign(3 * plan.h * step_);
  }

  // x [h, w] -> y [h, w] = low-pass + base, which may be null.
  void operator()(const T* x, const T* base, T* y) {
    const int64_t h = plan_.h, w = plan_.w;
    if (!narrow_) return run(x, w, w, base, y, w);
    T *px = padded_.data(), *pbase = px + h * step_, *py = pbase + h * step_;  // rows shorter than a vector
    for (int64_t i = 0; i < h; ++i) {
      std::copy_n(x + i * w, w, px + i * step_);
      if (base) std::copy_n(base + i * w, w, pbase + i * step_);
    }
    run(px, step_, Vector<T>::lanes, base ? pbase : nullptr, py, step_);
    for (int64_t i = 0; i < h; ++i) std::copy_n(py + i * step_, w, y + i * w);
  }

 private:
  // Whole blocks, and a cache line more, so that the rows of an image 1024 pixels wide fall into different sets.
  static int64_t room(int64_t n) { return (n + kBandCols<T> - 1) / kBandCols<T> * kBandCols<T> + 64 / sizeof(T); }

  void run(const T* x, int64_t x_step, int64_t w, const T* base, T* y, int64_t y_step) {
    int64_t h = plan_.h;
    if (plan_.rows_down.n_out) {
      rows_product(plan_.rows_down, x, x_step, w, static_cast<const T*>(nullptr), down_.data(), step_);
      x = down_.data(), x_step = step_, h = plan_.rows_down.n_out;
    }
    if (plan_.cols_down.n_out) {
      cols_product(plan_.cols_down, x, x_step, h, coarse_.data(), coarse_step_);
      x = coarse_.data(), x_step = coarse_step_;
    }
    cols_product(plan_.cols_up, x, x_step, h, wide_.data(), step_);
    rows_product(plan_.rows_up, wide_.data(), step_, w, base, y, y_step);
  }

  const LowPass<T>& plan_;
  bool narrow_;
  int64_t step_, coarse_step_;
  Buffer<T> down_, coarse_, wide_, padded_;
};

}  // namespace

// x [planes, h, w] -> y
template <class T>
void gaussian_low_pass(const LowPass<T>& plan, const T* x, int64_t planes, T* y) {
  const int64_t size = plan.h * plan.w;
  parallel(planes, 1 + 16384 / (size + 1), [&](int64_t begin, int64_t end) {
    LowPassOfPlane<T> low_pass(plan);
    for (int64_t i = begin; i < end; ++i) low_pass(x + i * size, nullptr, y + i * size);
  });
}

template void gaussian_low_pass(const LowPass<float>&, const float*, int64_t, float*);
template void gaussian_low_pass(const LowPass<double>&, const double*, int64_t, double*);

}  // namespace sage_fast::SAGE_ISA
