#include "../bias_act.h"

namespace sage_fast::SAGE_ISA {
namespace {

template <class A>
using Of = typename Vector<A>::type;

template <class A>
inline Of<A> splat(A value) {
  return Of<A>{} + value;
}

// The steps below are inlined by force: GCC makes functions of them, through memory, whose calls take twice their time.
#define SAGE_INLINE [[gnu::always_inline]] inline

// Limits that let NaN pass; GCC makes a comparison and a choice of the general form.
template <class A>
SAGE_INLINE Of<A> at_least(Of<A> v, A bound) {
#if SAGE_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return (Of<A>)_mm512_maskz_max_ps(0xffff, (__m512)splat(bound), (__m512)v);
  if constexpr (sizeof(A) == 8) return (Of<A>)_mm512_maskz_max_pd(0xff, (__m512d)splat(bound), (__m512d)v);
#else
  return v < bound ? splat(bound) : v;
#endif
}
template <class A>
SAGE_INLINE Of<A> at_most(Of<A> v, A bound) {
#if SAGE_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return (Of<A>)_mm512_maskz_min_ps(0xffff, (__m512)splat(bound), (__m512)v);
  if constexpr (sizeof(A) == 8) return (Of<A>)_mm512_maskz_min_pd(0xff, (__m512d)splat(bound), (__m512d)v);
#else
  return v > bound ? splat(bound) : v;
#endif
}

SAGE_INLINE Floats minus_absolute(Floats v) { return (Floats)((Words)v | 0x80000000); }

// v * 2^n for whole n from -280 to 0, subnormal results included.
SAGE_INLINE Floats scaled(Floats v, Floats n) {
#if SAGE_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n);
#else
  typedef Vector<int32_t>::type Ints;
  const Floats magic = splat(12582912.0f);
  const Ints k = (Ints)(n + magic) - (Ints)magic, half = k >> 1;
  return v * (Floats)((half + 127) << 23) * (Floats)((k - half + 127) << 23);
#endif
}

// exp(x) = (1 + p) * 2^n for x <= 0, to about 1 ulp, subnormal results included; NaN stays.
struct Power {
  Floats p, n;

  SAGE_INLINE explicit Power(Floats x) {
    x = at_least<float>(x, -150.0f);
    const Floats magic = splat(12582912.0f);
    n = (x * 1.44269504f + magic) - magic;  // round(x / log 2)
    Floats r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    const Floats r2 = r * r;
    // (e^r - 1 - r) / r^2 up to log(2) / 2, by equal errors: 5e-9 of e^r
    const Floats high = r2 * 1.394865e-3f + (r * 8.367864e-3f + 4.166624e-2f);
    p = (high * r2 + (r * 1.666653e-1f + 0.5f)) * r2 + r;
  }
  SAGE_INLINE Floats exp() const { return scaled(p + 1.0f, n); }
  SAGE_INLINE Floats expm1() const {
    const Floats s = scaled(splat(1.0f), n);
    return p * s + (s - 1.0f);
  }
};

// log(1 + e) for e from 0 to 1: 2 artanh(s) with s = e / (2 + e) <= 1/3
SAGE_INLINE Floats log1p(Floats e) {
  const Floats s = e / (e + 2.0f), z = s * s;
  Floats q = z * (2.0f / 15) + 2.0f / 13;
  q = q * z + 2.0f / 11;
  q = q * z + 2.0f / 9;
  q = q * z + 2.0f / 7;
  q = q * z + 2.0f / 5;
  q = q * z + 2.0f / 3;
  return q * z * s + s * 2.0f;
}

// 1 / v for v from 1 to 2; NaN stays.
SAGE_INLINE Floats reciprocal(Floats v) {
#if SAGE_VECTOR_BYTES == 64  // from 14 digits to 28: the division waits for its unit
  const Floats r = (Floats)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}

SAGE_INLINE Floats sigmoid(Floats u) {
  const Floats e = Power(minus_absolute(u)).exp(), r = reciprocal(e + 1.0f);
  return u > 0 ? r : e * r;
}

// value(u): the activation. slope(r): its derivative, r being its value, or u for swish. Both without gain and clamp.
template <class A, Act act>
struct Activation {
  const A alpha, floor;

  explicit Activation(const BiasActParams& p) : alpha(A(p.slope)), floor(A(p.floor())) {}

  SAGE_INLINE Of<A> value(Of<A> u) const {
    if constexpr (act == Act::leaky) {
      u = at_least<A>(u, floor);
      return u > 0 ? u : u * alpha;
    }
    if constexpr (act == Act::tanh) {
      const Floats m = Power(minus_absolute(u) * 2.0f).expm1();
      return (Floats)((Words)(-m / (m + 2.0f)) | ((Words)u & 0x80000000));
    }
    if constexpr (act == Act::elu) return u > 0 ? u : Power(u > 0 ? splat(0.0f) : u).expm1() * alpha;
    if constexpr (act == Act::selu) {
      const Floats below = Power(u > 0 ? splat(0.0f) : u).expm1() * float(kSeluScale * kSeluAlpha);
      return u > 0 ? u * float(kSeluScale) : below;
    }
    if constexpr (act == Act::softplus) {
      return (u > 0 ? u : splat(0.0f)) + log1p(Power(minus_absolute(u)).exp());
    }
    if constexpr (act == Act::sigmoid) return sigmoid(u);
    if constexpr (act == Act::swish) return u * sigmoid(u);
  }

  SAGE_INLINE Of<A> slope(Of<A> r) const {
    if constexpr (act == Act::leaky) return r > 0 ? splat(A(1)) : splat(alpha);
    if constexpr (act == Act::tanh) return 1.0f - r * r;
    if constexpr (act == Act::elu) return r > 0 ? splat(1.0f) : r + alpha;
    if constexpr (act == Act::selu) return r > 0 ? splat(float(kSeluScale)) : r + float(kSeluScale * kSeluAlpha);
    if constexpr (act == Act::softplus) return -Power(-r).expm1();
    if constexpr (act == Act::sigmoid) return r - r * r;
    if constexpr (act == Act::swish) {
      const Floats s = sigmoid(r);
      return s + r * s * (1.0f - s);
    }
  }
};

// A vector at `at` of what an operand has: all lanes, or the first n.
template <class A, class T, class F>
inline void each_vector(int64_t n, T* out, F&& f) {
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_as<A>(f([i](const auto* p) { return load_as<A>(p + i); }), out + i);
  const int64_t rest = n - i;
  if (rest) store_first<A>(f([=](const auto* p) { return load_first<A>(p + i, rest); }), out + i, rest);
}

template <class T, Act act>
void forward(const T* x, const void* bias, bool wide_bias, const BiasActParams& p, T* y) {
  typedef typename Accumulator<T>::type A;
  const Activation<A, act> activation(p);
  const A gain = A(p.gain), limit = A(p.upper_limit());
  const auto finish = [=](Of<A> u) { return at_least<A>(at_most<A>(activation.value(u) * gain, limit), -limit); };
  // the bias in the type of the sums, `repeats` times when it runs along the last axis and is short
  const int64_t repeats = p.inner == 1 && p.channels < 128 ? 128 / p.channels + 1 : 1;
  const bool as_it_is = bias && repeats == 1 && (wide_bias || sizeof(T) == sizeof(A));
  Buffer<A> own(as_it_is ? 0 : p.channels * repeats);
  for (int64_t i = 0; bias && i < own.size(); i += p.channels) {
    if (wide_bias || sizeof(T) == sizeof(A)) {
      std::copy_n(static_cast<const A*>(bias), p.channels, own.data() + i);
    } else {
      each_vector<A>(p.channels, own.data() + i, [&](auto at) { return at(static_cast<const T*>(bias)); });
    }
  }
  const A* const biases = as_it_is ? static_cast<const A*>(bias) : own.data();
  if (p.inner == 1) {
    const int64_t length = p.channels * repeats, n = p.outer * p.channels;
    parallel((n + length - 1) / length, 1 + 16384 / length, [=](int64_t begin, int64_t end) {
      const auto local = finish;  // a copy whose constants stay in registers: no store can reach it
      for (int64_t row = begin; row < end; ++row) {
        const T* in = x + row * length;
        each_vector<A>(std::min(length, n - row * length), y + row * length,
                       [&](auto at) { return local(at(in) + at(biases)); });
      }
    });
    return;
  }
  parallel(p.outer * p.channels, 1 + 16384 / (p.inner + 1), [=](int64_t begin, int64_t end) {
    const auto local = finish;
    for (int64_t run = begin; run < end; ++run) {  // a run has one bias
      const T* in = x + run * p.inner;
      const Of<A> one = splat(biases[run % p.channels]);
      each_vector<A>(p.inner, y + run * p.inner, [&](auto at) { return local(at(in) + one); });
    }
  });
}

// y: the output, or x + b for swish. A value at the clamp has no slope. For leaky the sign of x + b is the sign of y,
// since gain > 0 and slope >= 0.
template <class T, Act act>
void backward(const T* grad, const T* y, int64_t n, const BiasActParams& p, T* out) {
  typedef typename Accumulator<T>::type A;
  const Activation<A, act> activation(p);
  const A gain = A(p.gain), over = A(1 / p.gain);
  const A top = A(p.dead_above()), bottom = A(p.dead_below());
  const auto gradient = [=](Of<A> g, Of<A> y) {
    constexpr bool as_it_is = act == Act::leaky || act == Act::swish;
    const Of<A> slope = activation.slope(as_it_is ? y : y * over) * gain;
    if constexpr (act == Act::swish) y = activation.value(y) * gain;
    return (y >= top) | (y <= bottom) ? splat(A(0)) : g * slope;
  };
  parallel(n, 16384, [=](int64_t begin, int64_t end) {
    const auto local = gradient;
    each_vector<A>(end - begin, out + begin, [&](auto at) { return local(at(grad + begin), at(y + begin)); });
  });
}

// Calls f(T(), constant of the activation); the smooth ones are there in float sums only.
template <class F>
void with_act(Dtype dtype, Act act, F&& f) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (act == Act::leaky) f(zero, std::integral_constant<Act, Act::leaky>());
    if constexpr (sizeof(T) < 8) {
      if (act == Act::tanh) f(zero, std::integral_constant<Act, Act::tanh>());
      if (act == Act::elu) f(zero, std::integral_constant<Act, Act::elu>());
      if (act == Act::selu) f(zero, std::integral_constant<Act, Act::selu>());
      if (act == Act::softplus) f(zero, std::integral_constant<Act, Act::softplus>());
      if (act == Act::sigmoid) f(zero, std::integral_constant<Act, Act::sigmoid>());
      if (act == Act::swish) f(zero, std::integral_constant<Act, Act::swish>());
    }
  });
}

}  // namespace

// x [outer, channels, inner], b [channels] -> y; b in the dtype of x or, when wide_bias, of its sums
void bias_act(const void* x, const void* b, bool wide_bias, const BiasActParams& p, Dtype dtype, void* y) {
  with_act(dtype, p.act, [&](auto zero, auto act) {
    using T = decltype(zero);
    forward<T, decltype(act)::value>(static_cast<const T*>(x), b, wide_bias, p, static_cast<T*>(y));
  });
}

// grad [n], y [n] -> out [n]
void bias_act_backward(const void* grad, const void* y, int64_t n, const BiasActParams& p, Dtype dtype, void* out) {
  with_act(dtype, p.act, [&](auto zero, auto act) {
    using T = decltype(zero);
    backward<T, decltype(act)::value>(static_cast<const T*>(grad), static_cast<const T*>(y), n, p,
                                      static_cast<T*>(out));
  });
}

}  // namespace sage_fast::SAGE_ISA
