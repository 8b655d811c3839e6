#include "../bias_act.h"

#include "tensor.h"

namespace sage_fast {
namespace {

// One run of `n` values with one bias. Branch-free, so that the compiler vectorises it.
template <class T>
void forward_run(const T* __restrict x, T b, T slope, T gain, T limit, T* __restrict y, int64_t n) {
  const T low = slope * gain;
  for (int64_t i = 0; i < n; ++i) {
    T v = x[i] + b;
    v = v * (v > 0 ? gain : low);
    v = v > limit ? limit : v;  // NaN passes: every comparison with it is false
    y[i] = v < -limit ? -limit : v;
  }
}

template <class T>
void forward(const T* x, const T* b, const BiasActParams& p, T* y) {
  const T limit = p.clamp < 0 ? std::numeric_limits<T>::infinity() : T(p.clamp);
  if (p.inner == 1) {  // bias along the last axis: one row at a time
    parallel(p.outer, 1 + 16384 / (p.channels + 1), [=](int64_t begin, int64_t end) {
      const T low = T(p.slope * p.gain), gain = T(p.gain);
      for (int64_t row = begin; row < end; ++row) {
        const T* in = x + row * p.channels;
        T* out = y + row * p.channels;
        for (int64_t i = 0; i < p.channels; ++i) {
          T v = in[i] + (b ? b[i] : T(0));
          v = v * (v > 0 ? gain : low);
          v = v > limit ? limit : v;
          out[i] = v < -limit ? -limit : v;
        }
      }
    });
    return;
  }
  parallel(p.outer * p.channels, 1 + 16384 / (p.inner + 1), [=](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      forward_run(x + run * p.inner, b ? b[run % p.channels] : T(0), T(p.slope), T(p.gain), limit, y + run * p.inner,
                  p.inner);
    }
  });
}

// The sign of x + b is the sign of y, since gain > 0; a clamped value has no slope.
template <class T>
void backward(const T* grad, const T* y, int64_t n, double slope, double gain, double clamp, T* out) {
  const T high = T(gain), low = T(slope * gain);
  const T limit = clamp < 0 ? std::numeric_limits<T>::infinity() : T(clamp);
  parallel(n, 16384, [=](int64_t begin, int64_t end) {
    const T* __restrict g = grad;
    const T* __restrict v = y;
    T* __restrict o = out;
    for (int64_t i = begin; i < end; ++i) {
      T factor = v[i] > 0 ? high : low;
      factor = (v[i] >= limit || v[i] <= -limit) ? T(0) : factor;
      o[i] = g[i] * factor;
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
  grad = torch::stable::contiguous(grad);
  y = torch::stable::contiguous(y);
  Tensor out = torch::stable::empty_like(grad);
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(data<T>(grad), data<T>(y), grad.numel(), slope, gain, clamp, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
}

}  // namespace sage_fast
