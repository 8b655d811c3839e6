#include "../fuse_pixels.h"

namespace sage_fast::SAGE_ISA {
namespace {

// Places in the images; `low` may be null.
template <class T>
struct Sources {
  const T *real, *inverted, *edited, *low;

  Sources moved(int64_t by) const { return {real + by, inverted + by, edited + by, low ? low + by : nullptr}; }
};

// A vector of a row, or a row that is shorter.
template <class T>
struct Whole {
  typename Vector<T>::type get(const T* p) const { return load(p); }
  void put(typename Vector<T>::type v, T* p) const { store<T>(v, p); }
};
template <class T>
struct Short {
  int64_t n;
  typename Vector<T>::type get(const T* p) const { return load_first<T>(p, n); }
  void put(typename Vector<T>::type v, T* p) const { store_first<T>(v, p, n); }
};

// A band of rows of images with C channels, any number where C is 0. What the edits of one source share is made once
// and kept: half the norm of what inversion lost, and what the blend adds.
template <class T, bool kLow, int64_t C>
class PixelBand {
  using V = typename Vector<T>::type;
  static constexpr int64_t lanes = Vector<T>::lanes;

 public:
  PixelBand(const FusePixelsParams& p, int64_t rows)
      : p_(p),
        step_(round_up(p.w, lanes)),
        lost_((rows + 2) * step_),
        added_((rows + 2) * p.c * step_),
        sharp_(3 * step_),
        line_(step_ + 2 * lanes) {}

  // Rows first - 1 to last of the source, as far as there are such.
  void take_source(const T* real, const T* inverted, int64_t first, int64_t last) {
    top_ = first - 1;
    for (int64_t i = std::max<int64_t>(top_, 0); i < std::min(last + 1, p_.h); ++i) {
      p_.blend == Blend::residual ? take_row<true>(real + i * p_.w, inverted + i * p_.w, i)
                                  : take_row<false>(real + i * p_.w, inverted + i * p_.w, i);
    }
  }

  // Rows first to last - 1 of one edit -> y [c, h, w].
  void fuse(const Sources<T>& from, int64_t first, int64_t last, T* y) {
    for (int64_t i = first > 0 ? first - 1 : 0; i <= first; ++i) read(from.moved(i * p_.w), i, y + i * p_.w);
    for (int64_t i = first; i < last; ++i) {
      if (i + 1 < p_.h) read(from.moved((i + 1) * p_.w), i + 1, y + (i + 1) * p_.w);
      p_.blend == Blend::convex ? blend<true>(from.moved(i * p_.w), i, y + i * p_.w)
                                : blend<false>(from.moved(i * p_.w), i, y + i * p_.w);
    }
  }

 private:
  // f(x, part) for the vectors of a row, the last of which may take some pixels a second time. f has copies of what it
  // needs: for all that the compiler knows, a store might change the rest.
  template <class F>
  void each(F f) const {
    const int64_t w = p_.w;
    int64_t x = 0;
    for (; x + lanes <= w; x += lanes) f(x, Whole<T>());
    if (x < w) w < lanes ? f(0, Short<T>{w}) : f(w - lanes, Whole<T>());
  }

  // The edited values, with their low frequencies changed and in [-1, 1] again where `kLow`. NaN stays: every
  // comparison with it is false.
  template <class Part>
  static V value(const Sources<T>& from, int64_t at, Part part) {
    V e = part.get(from.edited + at);
    if constexpr (kLow) {
      const V one = V{} + T(1);
      e += part.get(from.low + at);
      e = e < -one ? -one : e;
      e = e > one ? one : e;
    }
    return e;
  }

  template <bool kResidual>
  void take_row(const T* real, const T* inverted, int64_t i) {
    const int64_t plane = p_.h * p_.w, c = channels(), step = step_;
    const V more = V{} + T(p_.blend == Blend::printed);
    T* __restrict lost = lost_.data() + (i - top_) * step;
    T* __restrict added = added_.data() + (i - top_) * c * step;
    each([=](int64_t x, auto part) {
      V sum{};
      for (int64_t k = 0; k < c; ++k) {
        const V r = part.get(real + k * plane + x), d = r - part.get(inverted + k * plane + x);
        sum += d * d;
        store<T>(kResidual ? d : r + more, added + k * step + x);
      }
      store<T>(sum, lost + x);
    });
    for (int64_t x = 0; x < step; ++x) lost[x] = T(0.5) * std::sqrt(lost[x]);  // as of images in [0, 1]
  }

  // Row i of the mask before its blur. Many short rows are read and written at once, more than the processor foresees;
  // so those two rows ahead are fetched here.
  void read(const Sources<T> from, int64_t i, const T* y) {
    const int64_t plane = p_.h * p_.w, c = channels(), step = step_, ahead = i + 2 < p_.h ? 2 * p_.w : 0;
    T* __restrict out = sharp(i);
    each([=](int64_t x, auto part) {
      V sum{};
      for (int64_t k = 0; k < c; ++k) {
        __builtin_prefetch(from.edited + k * plane + x + ahead);
        __builtin_prefetch(y + k * plane + x + ahead, 1);
        const V d = value(from, k * plane + x, part) - part.get(from.inverted + k * plane + x);
        sum += d * d;
      }
      store<T>(sum, out + x);
    });
    const T weight = T(0.5 * p_.beta);
    const T* __restrict lost = lost_.data() + (i - top_) * step;
    for (int64_t x = 0; x < step; ++x) out[x] = lost[x] - weight * std::sqrt(out[x]);
  }

  // Row i of the mask, blurred across rows; beyond its borders the mask is mirrored about the outermost pixels.
  const T* blur(int64_t i) {
    const int64_t w = p_.w, inside = p_.h > 1, step = step_;
    const T* __restrict over = sharp(i > 0 ? i - 1 : inside), * __restrict at = sharp(i);
    const T* __restrict under = sharp(i + 1 < p_.h ? i + 1 : i - inside);
    const T side = T(p_.side), middle = T(p_.middle);
    T* __restrict line = line_.data() + lanes;
    for (int64_t x = 0; x < step; ++x) line[x] = middle * at[x] + side * (over[x] + under[x]);
    line[-1] = line[w > 1 ? 1 : 0];
    line[w] = line[w > 1 ? w - 2 : 0];
    return line;
  }

  template <bool kConvex>
  void blend(const Sources<T> from, int64_t i, T* y) {
    const int64_t plane = p_.h * p_.w, c = channels(), step = step_;
    const T *line = blur(i), *added = added_.data() + (i - top_) * c * step;
    const V zero{}, one = zero + T(1), side = zero + T(p_.side), middle = zero + T(p_.middle);
    each([=](int64_t x, auto part) {
      V m = middle * load(line + x) + side * (load(line + x - 1) + load(line + x + 1));
      m = m < zero ? zero : m;
      m = m > one ? one : m;
      for (int64_t k = 0; k < c; ++k) {
        const V e = value(from, k * plane + x, part), a = load(added + k * step + x);
        part.put(e + m * (kConvex ? a - e : a), y + k * plane + x);
      }
    });
  }

  int64_t channels() const { return C ? C : p_.c; }
  T* sharp(int64_t i) const { return sharp_.data() + i % 3 * step_; }

  const FusePixelsParams& p_;
  const int64_t step_;
  int64_t top_ = 0;  // the first row that is kept
  Scratch<T> lost_, added_, sharp_, line_;
};

template <bool kLow, int64_t C, class T>
void fuse_pixels_of(const Sources<T>& images, const FusePixelsParams& p, T* y) {
  // What a band keeps stays in the L2 cache; it makes the rows of the mask before and behind it once more.
  constexpr int64_t kept = 65536;  // values
  const int64_t run = std::clamp<int64_t>(kept / ((p.c + 1) * p.w), 4, 64);
  const int64_t runs = (p.h + run - 1) / run, size = p.c * p.h * p.w;
  const bool shared = p.real_step == 0 && p.inverted_step == 0;
  parallel(p.n * runs, 1 + 16384 / (p.c * run * p.w + 1), [&](int64_t begin, int64_t end) {
    PixelBand<T, kLow, C> band(p, run);
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = shared ? task % p.n : task / runs, first = (shared ? task / p.n : task % runs) * run;
      const int64_t last = std::min(p.h, first + run);
      const Sources<T> from{images.real + n * p.real_step, images.inverted + n * p.inverted_step,
                            images.edited + n * size, kLow ? images.low + n * p.low_step : nullptr};
      if (!shared || held != first) band.take_source(from.real, from.inverted, first, last);
      held = first;
      band.fuse(from, first, last, y + n * size);
    }
  });
}

}  // namespace

// real, inverted, low [n or 1, c, h, w], edited [n, c, h, w] -> y, in bands of rows.
template <class T>
void fuse_pixels(const T* real, const T* inverted, const T* edited, const T* low, const FusePixelsParams& p, T* y) {
  const Sources<T> images{real, inverted, edited, low};
  if (low) {
    p.c == 3 ? fuse_pixels_of<true, 3>(images, p, y) : fuse_pixels_of<true, 0>(images, p, y);
  } else {
    p.c == 3 ? fuse_pixels_of<false, 3>(images, p, y) : fuse_pixels_of<false, 0>(images, p, y);
  }
}

template void fuse_pixels(const float*, const float*, const float*, const float*, const FusePixelsParams&, float*);
template void fuse_pixels(const double*, const double*, const double*, const double*, const FusePixelsParams&, double*);

}  // namespace sage_fast::SAGE_ISA
