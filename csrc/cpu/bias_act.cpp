#include "../bias_act.h"

#include "parallel.h"

namespace sage_fast {
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

// x [outer, channels, inner], b [channels] -> y
template <class T>
void forward(const T* x, const T* b, const BiasActParams& p, T* y) {
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
void backward(const T* grad, const T* y, int64_t n, const BiasActParams& p, T* out) {
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

Tensor bias_act(Tensor x, std::optional<Tensor> b, int64_t dim, double slope, double gain, double clamp) {
  require(dim >= 0 && (dim < x.dim() || !b), "bias_act: dim must be an axis of x");
  x = torch::stable::contiguous(x);
  BiasActParams p{1, 1, x.numel(), slope, gain, clamp};
  if (b) {
    b = torch::stable::contiguous(*b);
    require(b->scalar_type() == x.scalar_type(), "bias_act: b must have the dtype of x");
    p.inner = 1;
    for (int64_t i = 0; i < x.dim(); ++i) (i < dim ? p.outer : i == dim ? p.channels : p.inner) *= x.size(i);
  }
  check(p, b ? b->numel() : -1);
  Tensor y = torch::stable::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    if (x.numel()) forward<T>(data<T>(x), b ? data<T>(*b) : nullptr, p, mutable_data<T>(y));
  });
  return y;
}

Tensor bias_act_backward(Tensor grad, Tensor y, double slope, double gain, double clamp) {
  require(grad.numel() == y.numel() && grad.scalar_type() == y.scalar_type(), "bias_act_backward: grad must match y");
  BiasActParams p{1, 1, grad.numel(), slope, gain, clamp};
  check(p, -1);
  grad = torch::stable::contiguous(grad);
  y = torch::stable::contiguous(y);
  Tensor out = torch::stable::empty_like(grad);
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(data<T>(grad), data<T>(y), grad.numel(), p, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
}

}  // namespace sage_fast
