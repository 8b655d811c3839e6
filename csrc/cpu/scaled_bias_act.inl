#include "../scaled_bias_act.h"

namespace sage_fast::SAGE_ISA {
namespace {

// Pixels that are summed by themselves: it depends on the shape alone, so sums do not change with the threads.
inline int64_t pixels_together(const ScaledBiasActParams& p) { return std::max<int64_t>(1, 16384 / p.channels); }

template <class T>
void scale_and_activate(const T* x, const typename Accumulator<T>::type* scale,
                        const typename Accumulator<T>::type* noise, const typename Accumulator<T>::type* strength,
                        const typename Accumulator<T>::type* b, const ScaledBiasActParams& p, T* y) {
  typedef typename Accumulator<T>::type A;
  const A slope = A(p.slope), gain = A(p.gain), limit = A(p.upper_limit()), weight = strength ? *strength : A(1);
  parallel(p.n * p.pixels, 1 + 16384 / p.channels, [=](int64_t begin, int64_t end) {
    const auto finish = [slope, gain, limit](Of<A> u) {
      u = (u > 0 ? u : u * slope) * gain;
      return at_least<A>(at_most<A>(u, limit), -limit);
    };
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t n = pixel / p.pixels, at_pixel = pixel * p.channels;
      const A level = noise ? weight * noise[p.shared_noise ? pixel - n * p.pixels : pixel] : A(0);
      const T* const from = x + at_pixel;
      each_vector<A>(p.channels, y + at_pixel, [&](auto at) {
        Of<A> u = at(from);
        if (scale) u = u * at(scale + n * p.channels);
        return finish(b ? u + (at(b) + level) : u + level);
      });
    }
  });
}

// kVectors of channels of `pixels` pixels of an image: their gradient, and the sums over the pixels in `of_scale` and
// `of_b`; returns that of the noise. `rest`: of the only vector, when it is not whole; else 0.
template <int kVectors, bool kScaled, class T, class A>
Of<A> channels_backward(const T* grad, const T* x, const T* y, const A* scale, const A* noise, int64_t pixels,
                        int64_t stride, int64_t rest, const ScaledBiasActParams& p, T* out, A* of_scale, A* of_b) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const A above = A(p.gain), below = A(p.gain * p.slope), dead = A(p.dead_above());
  Of<A> factors[kVectors], sums[kVectors] = {}, products[kVectors] = {}, of_noise = {};
  const auto get = [rest](const auto* from) {
    return kVectors == 1 && rest ? load_first<A>(from, rest) : load_as<A>(from);
  };
  for (int v = 0; kScaled && v < kVectors; ++v) factors[v] = get(scale + v * lanes);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, grad += stride, x += stride, y += stride, out += stride) {
    Of<A> together = {};
    for (int v = 0; v < kVectors; ++v) {  // steps from pixel to pixel are too long for the processor to foresee
      __builtin_prefetch(y + 8 * stride + v * lanes);
      __builtin_prefetch(grad + 8 * stride + v * lanes);
      if (kScaled) __builtin_prefetch(x + 8 * stride + v * lanes);
      __builtin_prefetch(out + 8 * stride + v * lanes, 1);
      const Of<A> value = get(y + v * lanes);
      Of<A> g = get(grad + v * lanes) * (value > 0 ? splat(above) : splat(below));
      g = (value >= dead) | (value <= -dead) ? splat(A(0)) : g;
      sums[v] += g;
      together += g;
      if (kScaled) {
        products[v] += g * get(x + v * lanes);
        g = g * factors[v];
      }
      if (kVectors == 1 && rest) {
        store_first<A>(g, out, rest);
      } else {
        store_as<A>(g, out + v * lanes);
      }
    }
    if (noise) of_noise += together * noise[pixel];
  }
  for (int v = 0; v < kVectors; ++v) {
    store<A>(sums[v], of_b + v * lanes);
    if (kScaled) store<A>(products[v], of_scale + v * lanes);
  }
  return of_noise;
}

template <bool kScaled, class T>
void scaled_backward(const T* grad, const T* x, const T* y, const typename Accumulator<T>::type* scale,
                     const typename Accumulator<T>::type* noise, const ScaledBiasActParams& p, T* out,
                     typename Accumulator<T>::type* of_scale, typename Accumulator<T>::type* of_b,
                     typename Accumulator<T>::type* of_strength) {
  typedef typename Accumulator<T>::type A;
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr int kMost = 4;
  const int64_t together = pixels_together(p), chunks = (p.pixels + together - 1) / together;
  const int64_t width = round_up(p.channels, lanes), row = 2 * width + lanes;  // sums of scale, b and noise
  Scratch<A> parts(p.n * chunks * row);
  A* const all = parts.data();
  const int64_t chunk = std::min(together, p.pixels) * p.channels;
  parallel(p.n * chunks, 1 + 16384 / chunk, [=](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t n = part / chunks, first = part % chunks * together, pixels = std::min(together, p.pixels - first);
      const int64_t start = (n * p.pixels + first) * p.channels;
      const A* const map = noise ? noise + (p.shared_noise ? 0 : n * p.pixels) + first : nullptr;
      A* const sums = all + part * row;
      Of<A> of_noise = {};
      for (int64_t c = 0; c < p.channels;) {
        const int64_t left = p.channels - c, at = start + c;
        const auto some = [&](auto count, int64_t rest) {
          of_noise += channels_backward<decltype(count)::value, kScaled>(
              grad + at, x + (kScaled ? at : 0), y + at, scale + (kScaled ? n * p.channels + c : 0), map, pixels,
              p.channels, rest, p, out + at, sums + c, sums + width + c);
          c += decltype(count)::value * lanes;
        };
        if (left >= kMost * lanes) {
          some(std::integral_constant<int, kMost>(), 0);
        } else {
          some(std::integral_constant<int, 1>(), left >= lanes ? 0 : left);
        }
      }
      store<A>(of_noise, sums + 2 * width);
    }
  });
  const auto add = [](A* to, const A* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  };
  A of_noise[lanes] = {};
  for (int64_t part = 0; part < p.n * chunks; ++part) {
    const A* const sums = all + part * row;
    if (kScaled) add(of_scale + part / chunks * p.channels, sums, p.channels);
    add(of_b, sums + width, p.channels);
    add(of_noise, sums + 2 * width, lanes);
  }
  for (A lane : of_noise) *of_strength += lane;
}

}  // namespace

// x [n, pixels, channels], scale [n, channels] or null, noise [n or 1, pixels] or null, strength [1] or null, b
// [channels] -> y
void scaled_bias_act(const void* x, const void* scale, const void* noise, const void* strength, const void* b,
                     const ScaledBiasActParams& p, Dtype dtype, void* y) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    typedef typename Accumulator<T>::type A;
    scale_and_activate(static_cast<const T*>(x), static_cast<const A*>(scale), static_cast<const A*>(noise),
                       static_cast<const A*>(strength), static_cast<const A*>(b), p, static_cast<T*>(y));
  });
}

// grad, y as x, which is null without scale -> out, of_scale [n, channels], of_b [channels], of_strength [1]: the sum
// over noise; sums are added to zeros
void scaled_bias_act_backward(const void* grad, const void* x, const void* y, const void* scale, const void* noise,
                              const ScaledBiasActParams& p, Dtype dtype, void* out, void* of_scale, void* of_b,
                              void* of_strength) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    typedef typename Accumulator<T>::type A;
    const auto run = [&](auto scaled) {
      scaled_backward<decltype(scaled)::value>(
          static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(y), static_cast<const A*>(scale),
          static_cast<const A*>(noise), p, static_cast<T*>(out), static_cast<A*>(of_scale), static_cast<A*>(of_b),
          static_cast<A*>(of_strength));
    };
    scale ? run(std::true_type()) : run(std::false_type());
  });
}

}  // namespace sage_fast::SAGE_ISA
