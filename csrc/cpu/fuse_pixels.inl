#include "../fuse_pixels.h"

namespace sage_fast::SAGE_ISA {
namespace {

// The three rows of the mask before its blur that a row of an image needs, and what is made of them.
template <class T>
class MaskRows {
 public:
  explicit MaskRows(const FusePixelsParams& p)
      : p_(p), sums_(2 * p.w), sharp_(3 * p.w), blurred_(p.w + 2), mask_(p.w) {}

  // Row i before the blur; the rows i - 1 and i - 2 stay.
  void make(const T* real, const T* inverted, const T* edited, int64_t i) {
    T* __restrict lost = sums_.data(), * __restrict changed = lost + p_.w;
    for (int64_t c = 0; c < p_.c; ++c) {
      const int64_t row = (c * p_.h + i) * p_.w;
      const T* __restrict a = real + row, * __restrict b = inverted + row, * __restrict e = edited + row;
      const T keep = c > 0;
      for (int64_t x = 0; x < p_.w; ++x) {
        const T l = a[x] - b[x], d = e[x] - b[x];
        lost[x] = (keep ? lost[x] : T(0)) + l * l;
        changed[x] = (keep ? changed[x] : T(0)) + d * d;
      }
    }
    const T beta = T(p_.beta);
    T* __restrict out = sharp(i);  // images in [0, 1] differ by half as much as in [-1, 1]
    for (int64_t x = 0; x < p_.w; ++x) out[x] = T(0.5) * (std::sqrt(lost[x]) - beta * std::sqrt(changed[x]));
  }

  // The mask of row i [w]; beyond its borders the mask is mirrored about the outermost pixels.
  const T* blur(int64_t i) {
    const int64_t w = p_.w, inside = p_.h > 1;
    const T* __restrict over = sharp(i > 0 ? i - 1 : inside), * __restrict at = sharp(i);
    const T* __restrict under = sharp(i + 1 < p_.h ? i + 1 : i - inside);
    const T side = T(p_.side), middle = T(p_.middle);
    T* __restrict line = blurred_.data() + 1;
    for (int64_t x = 0; x < w; ++x) line[x] = middle * at[x] + side * (over[x] + under[x]);
    line[-1] = line[w > 1 ? 1 : 0];
    line[w] = line[w > 1 ? w - 2 : 0];
    T* __restrict mask = mask_.data();
    for (int64_t x = 0; x < w; ++x) {
      T m = middle * line[x] + side * (line[x - 1] + line[x + 1]);
      m = m < 0 ? T(0) : m;  // NaN stays: every comparison with it is false
      mask[x] = m > 1 ? T(1) : m;
    }
    return mask;
  }

 private:
  T* sharp(int64_t i) { return sharp_.data() + i % 3 * p_.w; }

  const FusePixelsParams& p_;
  Buffer<T> sums_, sharp_, blurred_, mask_;
};

template <class T>
void blend_row(Blend blend, const T* __restrict mask, const T* __restrict real, const T* __restrict inverted,
               const T* __restrict edited, int64_t w, T* __restrict y) {
  if (blend == Blend::residual) {
    for (int64_t x = 0; x < w; ++x) y[x] = edited[x] + mask[x] * (real[x] - inverted[x]);
  } else if (blend == Blend::convex) {
    for (int64_t x = 0; x < w; ++x) y[x] = edited[x] + mask[x] * (real[x] - edited[x]);
  } else {
    for (int64_t x = 0; x < w; ++x) y[x] = edited[x] + mask[x] * (real[x] + 1);
  }
}

}  // namespace

// real, inverted [n or 1, c, h, w], edited [n, c, h, w] -> y, in runs of rows: each image is read once.
template <class T>
void fuse_pixels(const T* real, const T* inverted, const T* edited, const FusePixelsParams& p, T* y) {
  constexpr int64_t run = 64;  // rows; a run makes the row of the mask before and behind it once more
  const int64_t runs = (p.h + run - 1) / run, size = p.c * p.h * p.w;
  parallel(p.n * runs, 1 + 16384 / (p.c * run * p.w + 1), [&](int64_t begin, int64_t end) {
    MaskRows<T> rows(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / runs, first = task % runs * run, last = std::min(p.h, first + run);
      const T *a = real + image * p.real_step, *b = inverted + image * p.inverted_step, *e = edited + image * size;
      T* out = y + image * size;
      for (int64_t i = std::max<int64_t>(first - 1, 0); i <= first; ++i) rows.make(a, b, e, i);
      for (int64_t i = first; i < last; ++i) {
        if (i + 1 < p.h) rows.make(a, b, e, i + 1);
        const T* mask = rows.blur(i);
        for (int64_t c = 0; c < p.c; ++c) {
          const int64_t row = (c * p.h + i) * p.w;
          blend_row(p.blend, mask, a + row, b + row, e + row, p.w, out + row);
        }
      }
    }
  });
}

template void fuse_pixels(const float*, const float*, const float*, const FusePixelsParams&, float*);
template void fuse_pixels(const double*, const double*, const double*, const FusePixelsParams&, double*);

}  // namespace sage_fast::SAGE_ISA
