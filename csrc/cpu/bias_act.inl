#include "../bias_act.h"

namespace sage_fast::SAGE_ISA {
namespace {

// Branch-free, so that the compiler vectorises the loops over it. NaN passes: every comparison with it is false.
template <class T>
struct Activation {
  T high, low, floor, limit;

  explicit Activation(const BiasActParams& p)
      : high(T(p.gain)), low(T(p.slope * p.gain)), floor(T(p.floor())), limit(T(p.upper_limit())) {}

  T operator()(T v) const {
    v = v < floor ? floor : v;
    v = v * (v > 0 ? high : low);
    v = v > limit ? limit : v;
    return v < -limit ? -limit : v;
  }
};

}  // namespace

// x [outer, channels, inner], b [channels] -> y
template <class T>
void bias_act(const T* x, const T* b, const BiasActParams& p, T* y) {
  const Activation<T> act(p);
  if (p.inner == 1) {  // bias along the last axis: one row at a time
    parallel(p.outer, 1 + 16384 / (p.channels + 1), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* __restrict in = x + row * p.channels;
        T* __restrict out = y + row * p.channels;
        for (int64_t i = 0; i < p.channels; ++i) out[i] = act(in[i] + (b ? b[i] : T(0)));
      }
    });
    return;
  }
  parallel(p.outer * p.channels, 1 + 16384 / (p.inner + 1), [=](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {  // a run has one bias
      const T* __restrict in = x + run * p.inner;
      T* __restrict out = y + run * p.inner;
      const T bias = b ? b[run % p.channels] : T(0);
      for (int64_t i = 0; i < p.inner; ++i) out[i] = act(in[i] + bias);
    }
  });
}

// The sign of x + b is the sign of y, since gain > 0 and slope >= 0; a clamped value has no slope.
template <class T>
void bias_act_backward(const T* grad, const T* y, int64_t n, const BiasActParams& p, T* out) {
  const T high = T(p.gain), low = T(p.slope * p.gain), top = T(p.dead_above()), bottom = T(p.dead_below());
  parallel(n, 16384, [=](int64_t begin, int64_t end) {
    const T* __restrict g = grad;
    const T* __restrict v = y;
    T* __restrict o = out;
    for (int64_t i = begin; i < end; ++i) {
      T slope = v[i] > 0 ? high : low;
      o[i] = (v[i] >= top) | (v[i] <= bottom) ? T(0) : g[i] * slope;
    }
  });
}

template void bias_act(const float*, const float*, const BiasActParams&, float*);
template void bias_act(const double*, const double*, const BiasActParams&, double*);
template void bias_act_backward(const float*, const float*, int64_t, const BiasActParams&, float*);
template void bias_act_backward(const double*, const double*, int64_t, const BiasActParams&, double*);

}  // namespace sage_fast::SAGE_ISA
