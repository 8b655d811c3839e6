#include "../bias_act.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;

// x [outer, channels, inner] -> y; one thread a value, neighbours read neighbours
template <class T>
__global__ void forward(const T* __restrict__ x, const T* __restrict__ b, BiasActParams p, T floor, T limit,
                        T* __restrict__ y) {
  const T high = T(p.gain), low = T(p.slope * p.gain);
  SAGE_FAST_GRID_STRIDE(i, p.outer * p.channels * p.inner) {
    T v = x[i] + (b ? b[(i / p.inner) % p.channels] : T(0));
    v = v < floor ? floor : v;
    v *= v > 0 ? high : low;
    v = v > limit ? limit : v;
    y[i] = v < -limit ? -limit : v;
  }
}

template <class T>
__global__ void backward(const T* __restrict__ grad, const T* __restrict__ y, int64_t n, T low, T high, T top, T bottom,
                         T* __restrict__ out) {
  SAGE_FAST_GRID_STRIDE(i, n) {
    T v = y[i], slope = v > 0 ? high : low;
    out[i] = v >= top || v <= bottom ? T(0) : grad[i] * slope;
  }
}

Tensor bias_act(Tensor x, std::optional<Tensor> b, int64_t dim, double slope, double gain, double clamp) {
  require(dim >= 0 && (dim < x.dim() || !b), "bias_act: dim must be an axis of x");
  require(x.is_cuda(), "bias_act: x must be on the device of b");
  Scope stream(x);
  x = torch::stable::contiguous(x);
  BiasActParams p{1, 1, x.numel(), slope, gain, clamp};
  if (b) {
    require(b->scalar_type() == x.scalar_type() && b->is_cuda(), "bias_act: b must have the dtype and device of x");
    b = torch::stable::contiguous(*b);
    p.inner = 1;
    for (int64_t i = 0; i < x.dim(); ++i) (i < dim ? p.outer : i == dim ? p.channels : p.inner) *= x.size(i);
  }
  check(p, b ? b->numel() : -1);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T><<<blocks_for(x.numel(), kThreads), kThreads, 0, stream>>>(
        data<T>(x), b ? data<T>(*b) : nullptr, p, T(p.floor()), T(p.upper_limit()), mutable_data<T>(y));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor bias_act_backward(Tensor grad, Tensor y, double slope, double gain, double clamp) {
  require(grad.numel() == y.numel() && grad.scalar_type() == y.scalar_type(), "bias_act_backward: grad must match y");
  require(grad.is_cuda() && y.is_cuda(), "bias_act_backward: grad and y must be on one device");
  BiasActParams p{1, 1, grad.numel(), slope, gain, clamp};
  check(p, -1);
  Scope stream(grad);
  grad = torch::stable::contiguous(grad);
  y = torch::stable::contiguous(y);
  Tensor out = torch::stable::empty_like(grad);
  if (grad.numel() == 0) return out;
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    backward<T><<<blocks_for(grad.numel(), kThreads), kThreads, 0, stream>>>(
        data<T>(grad), data<T>(y), grad.numel(), T(slope * gain), T(gain), T(p.dead_above()), T(p.dead_below()),
        mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
}

}  // namespace sage_fast
