#include "../fuse_pixels.h"
#include "low_pass.inl"

namespace sage_fast::SAGE_ISA {
namespace {

// Places in the images; `low` may be null.
template <class T>
struct Sources {
  const T *real, *inverted, *edited, *low;

  Sources moved(int64_t by) const { return {real + by, inverted + by, edited + by, low ? low + by : nullptr}; }
};

// The edited value, with its low frequencies changed and in [-1, 1] again where `kLow`. NaN stays: every comparison
// with it is false.
template <bool kLow, class T>
inline T edited_value(const T* edited, const T* low, int64_t x) {
  if constexpr (!kLow) return edited[x];
  T e = edited[x] + low[x];
  e = e < -1 ? T(-1) : e;
  return e > 1 ? T(1) : e;
}

// The last rows of images that came by: the mask before its blur, and what the blend will need. Images of 256 pixels
// lie a multiple of 4096 bytes apart and push one another out of the caches; so each is read once and kept here.
template <class T, bool kLow>
class PixelRows {
 public:
  explicit PixelRows(const FusePixelsParams& p)
      : p_(p), sums_(2 * p.w), sharp_(3 * p.w), line_(p.w + 2), mask_(p.w), kept_(4 * p.c * p.w) {}

  // Reads row i; of the mask the rows i - 1 and i - 2 stay, of the images row i - 1.
  void read(const Sources<T>& images, int64_t i) {
    const int64_t w = p_.w;
    const bool residual = p_.blend == Blend::residual;
    const T more = p_.blend == Blend::printed;
    T* __restrict lost = sums_.data(), * __restrict changed = lost + w;
    for (int64_t x = 0; x < 2 * w; ++x) lost[x] = 0;
    for (int64_t c = 0; c < p_.c; ++c) {
      const Sources<T> at = images.moved((c * p_.h + i) * w);
      const T* __restrict real = at.real, * __restrict inverted = at.inverted;
      const T* __restrict edited = at.edited, * __restrict low = at.low;
      T* __restrict first = base(i, c), * __restrict second = added(i, c);
      for (int64_t x = 0; x < w; ++x) {
        const T value = edited_value<kLow>(edited, low, x);
        const T from_real = real[x] - inverted[x], from_edited = value - inverted[x];
        first[x] = value;
        second[x] = residual ? from_real : real[x] + more;
        lost[x] += from_real * from_real;
        changed[x] += from_edited * from_edited;
      }
    }
    // images in [0, 1] differ by half as much as in [-1, 1]
    const T half = T(0.5), weight = T(0.5 * p_.beta);
    T* __restrict out = sharp(i);
    for (int64_t x = 0; x < w; ++x) out[x] = half * std::sqrt(lost[x]) - weight * std::sqrt(changed[x]);
  }

  // Row i of channel c under its mask -> y [w].
  void blend(int64_t i, int64_t c, const T* __restrict mask, T* __restrict y) {
    const T* __restrict first = base(i, c), * __restrict second = added(i, c);
    if (p_.blend == Blend::convex) {
      for (int64_t x = 0; x < p_.w; ++x) y[x] = first[x] + mask[x] * (second[x] - first[x]);
    } else {
      for (int64_t x = 0; x < p_.w; ++x) y[x] = first[x] + mask[x] * second[x];
    }
  }

  // The mask of row i [w]; beyond its borders the mask is mirrored about the outermost pixels.
  const T* blur(int64_t i) {
    const int64_t w = p_.w, inside = p_.h > 1;
    const T* __restrict over = sharp(i > 0 ? i - 1 : inside), * __restrict at = sharp(i);
    const T* __restrict under = sharp(i + 1 < p_.h ? i + 1 : i - inside);
    const T side = T(p_.side), middle = T(p_.middle);
    T* __restrict line = line_.data() + 1;
    for (int64_t x = 0; x < w; ++x) line[x] = middle * at[x] + side * (over[x] + under[x]);
    line[-1] = line[w > 1 ? 1 : 0];
    line[w] = line[w > 1 ? w - 2 : 0];
    T* __restrict mask = mask_.data();
    for (int64_t x = 0; x < w; ++x) {
      T m = middle * line[x] + side * (line[x - 1] + line[x + 1]);
      m = m < 0 ? T(0) : m;
      mask[x] = m > 1 ? T(1) : m;
    }
    return mask;
  }

 private:
  T* sharp(int64_t i) { return sharp_.data() + i % 3 * p_.w; }
  T* base(int64_t i, int64_t c) { return kept_.data() + (i % 2 * 2 * p_.c + c) * p_.w; }
  T* added(int64_t i, int64_t c) { return base(i, c) + p_.c * p_.w; }

  const FusePixelsParams& p_;
  Buffer<T> sums_, sharp_, line_, mask_, kept_;
};

template <bool kLow, class T>
void fuse_pixels_of(const Sources<T>& images, const FusePixelsParams& p, T* y) {
  constexpr int64_t run = 64;  // rows; a run makes the row of the mask before and behind it once more
  const int64_t runs = (p.h + run - 1) / run, size = p.c * p.h * p.w;
  parallel(p.n * runs, 1 + 16384 / (p.c * run * p.w + 1), [&](int64_t begin, int64_t end) {
    PixelRows<T, kLow> rows(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / runs, first = task % runs * run, last = std::min(p.h, first + run);
      const Sources<T> from{images.real + n * p.real_step, images.inverted + n * p.inverted_step,
                            images.edited + n * size, kLow ? images.low + n * p.low_step : nullptr};
      for (int64_t i = first > 0 ? first - 1 : 0; i <= first; ++i) rows.read(from, i);
      for (int64_t i = first; i < last; ++i) {
        if (i + 1 < p.h) rows.read(from, i + 1);
        const T* mask = rows.blur(i);
        for (int64_t c = 0; c < p.c; ++c) rows.blend(i, c, mask, y + n * size + (c * p.h + i) * p.w);
      }
    }
  });
}

}  // namespace

// real, inverted, low [n or 1, c, h, w], edited [n, c, h, w] -> y, in runs of rows: each image is read once.
template <class T>
void fuse_pixels(const T* real, const T* inverted, const T* edited, const T* low, const FusePixelsParams& p, T* y) {
  const Sources<T> images{real, inverted, edited, low};
  low ? fuse_pixels_of<true>(images, p, y) : fuse_pixels_of<false>(images, p, y);
}

template void fuse_pixels(const float*, const float*, const float*, const float*, const FusePixelsParams&, float*);
template void fuse_pixels(const double*, const double*, const double*, const double*, const FusePixelsParams&, double*);

}  // namespace sage_fast::SAGE_ISA
