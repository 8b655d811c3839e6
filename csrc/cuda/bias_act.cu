#include "../bias_act_layout.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;

// exp(x), x at most 0. Under --use_fast_math expf is exp2f of x log2(e) rounded, 30 units off at -80; what the rounding
// loses is made up for here.
__device__ inline float exponential(float x) {
  x = x < -150 ? -150 : x;
  const float power = x * 1.44269502f, lost = fmaf(x, 1.44269502f, -power) + x * 1.92596299e-8f;
  const float e = exp2f(power);
  return e + e * (lost * .69314718f);
}

__device__ inline float sigmoid(float u) {
  const float e = exponential(-fabsf(u)), r = 1 / (1 + e);
  return u > 0 ? r : e * r;
}

// value(u): the activation. slope(r): its derivative, r being its value, or u for swish. Both without gain and clamp.
// Where 1 is subtracted by expm1f, not by expf and tanhf, which lose half of their digits under --use_fast_math.
template <class A, Act act>
struct Activation {
  A alpha, floor;

  __device__ A value(A u) const {
    if constexpr (act == Act::leaky) {
      u = u < floor ? floor : u;
      return u > 0 ? u : u * alpha;
    } else if constexpr (act == Act::tanh) {
      const float m = expm1f(-2 * fabsf(u));
      return copysignf(-m / (2 + m), u);
    } else if constexpr (act == Act::elu) {
      return u > 0 ? u : expm1f(u) * alpha;
    } else if constexpr (act == Act::selu) {
      return float(kSeluScale) * (u > 0 ? u : expm1f(u) * float(kSeluAlpha));
    } else if constexpr (act == Act::softplus) {
      return (u > 0 ? u : 0.0f) + log1pf(exponential(-fabsf(u)));
    } else if constexpr (act == Act::sigmoid) {
      return sigmoid(u);
    } else {
      return u * sigmoid(u);
    }
  }

  __device__ A slope(A r) const {
    if constexpr (act == Act::leaky) {
      return r > 0 ? A(1) : alpha;
    } else if constexpr (act == Act::tanh) {
      return 1 - r * r;
    } else if constexpr (act == Act::elu) {
      return r > 0 ? 1.0f : r + alpha;
    } else if constexpr (act == Act::selu) {
      return r > 0 ? float(kSeluScale) : r + float(kSeluScale * kSeluAlpha);
    } else if constexpr (act == Act::softplus) {
      return -expm1f(-r);
    } else if constexpr (act == Act::sigmoid) {
      return r - r * r;
    } else {
      const float s = sigmoid(r);
      return s + r * s * (1 - s);
    }
  }
};

// x [outer, channels, inner] as n packs of N neighbours -> y; a pack has one bias, or N of them where inner is 1
template <class T, int N, Act act>
__global__ void forward(const T* __restrict__ x, const void* __restrict__ b, bool wide_bias, int64_t channels,
                        int64_t inner, int64_t n, Activation<typename Accumulator<T>::type, act> activation,
                        typename Accumulator<T>::type gain, typename Accumulator<T>::type limit, T* __restrict__ y) {
  using A = typename Accumulator<T>::type;
  SAGE_FAST_GRID_STRIDE(i, n) {
    const Pack<T, N> in = reinterpret_cast<const Pack<T, N>*>(x)[i];
    Pack<T, N> out;
    // 64-bit divisions cost more than the rest together
    const int64_t first = i * N, channel = first <= 0x7fffffff && channels * inner <= 0x7fffffff
                                               ? uint32_t(first) / uint32_t(inner) % uint32_t(channels)
                                               : first / inner % channels;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A bias = 0;
      if (b != nullptr) {
        const int64_t c = inner == 1 ? channel + k : channel;
        bias = wide_bias ? static_cast<const A*>(b)[c] : static_cast<A>(static_cast<const T*>(b)[c]);
      }
      A v = activation.value(static_cast<A>(in.v[k]) + bias) * gain;
      v = v > limit ? limit : v;
      out.v[k] = static_cast<T>(v < -limit ? -limit : v);
    }
    reinterpret_cast<Pack<T, N>*>(y)[i] = out;
  }
}

// y: the output, or x + b for swish
template <class T, int N, Act act>
__global__ void backward(const T* __restrict__ grad, const T* __restrict__ y, int64_t n,
                         Activation<typename Accumulator<T>::type, act> activation, typename Accumulator<T>::type gain,
                         typename Accumulator<T>::type over, typename Accumulator<T>::type top,
                         typename Accumulator<T>::type bottom, T* __restrict__ out) {
  using A = typename Accumulator<T>::type;
  SAGE_FAST_GRID_STRIDE(i, n) {
    const Pack<T, N> g = reinterpret_cast<const Pack<T, N>*>(grad)[i], r = reinterpret_cast<const Pack<T, N>*>(y)[i];
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A of = static_cast<A>(r.v[k]), slope = activation.slope(of * over) * gain;
      A y = of;
      if constexpr (act == Act::swish) y = activation.value(of) * gain;
      result.v[k] = static_cast<T>(y >= top || y <= bottom ? A(0) : static_cast<A>(g.v[k]) * slope);
    }
    reinterpret_cast<Pack<T, N>*>(out)[i] = result;
  }
}

// Calls f(T{}, constant of the activation); the smooth ones are there in float sums only.
template <class F>
void with_act(Dtype dtype, Act act, F&& f) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (act == Act::leaky) return f(zero, std::integral_constant<Act, Act::leaky>());
    if constexpr (sizeof(T) < 8) {
      if (act == Act::tanh) f(zero, std::integral_constant<Act, Act::tanh>());
      if (act == Act::elu) f(zero, std::integral_constant<Act, Act::elu>());
      if (act == Act::selu) f(zero, std::integral_constant<Act, Act::selu>());
      if (act == Act::softplus) f(zero, std::integral_constant<Act, Act::softplus>());
      if (act == Act::sigmoid) f(zero, std::integral_constant<Act, Act::sigmoid>());
      if (act == Act::swish) f(zero, std::integral_constant<Act, Act::swish>());
    } else {
      require(false, "bias_act: float64 has no smooth kernels");
    }
  });
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Tensor bias_act(Tensor x, std::optional<Tensor> b, int64_t dim, double slope, double gain, double clamp, int64_t act) {
  require(dim >= 0 && (dim < x.dim() || !b), "bias_act: dim must be an axis of x");
  require(x.is_cuda() && (!b || b->is_cuda()), "bias_act: x and b must be on one device");
  Scope stream(x);
  BiasActParams p = biased_as(x, b ? &*b : nullptr, dim);
  p.slope = slope, p.gain = gain, p.clamp = clamp, p.act = Act(act);
  check(p, b ? b->numel() : -1);
  Tensor y = new_like(x);
  if (x.numel() == 0) return y;
  const bool wide_bias = b && b->scalar_type() != x.scalar_type();
  const void* bias = b ? values(*b) : nullptr;
  with_act(dtype_of(x), p.act, [&](auto zero, auto chosen) {
    using T = decltype(zero);
    using A = typename Accumulator<T>::type;
    constexpr Act kAct = decltype(chosen)::value;
    constexpr int kPack = pack_size<T>;
    const Activation<A, kAct> activation{A(p.slope), A(p.floor())};
    const int64_t n = x.numel(), along = p.inner == 1 ? p.channels : p.inner;
    const bool packed = along % kPack == 0 && aligned(x.const_data_ptr()) && aligned(y.const_data_ptr());
    const auto launch = [&](auto size) {
      constexpr int N = decltype(size)::value;
      forward<T, N, kAct><<<blocks_for(n / N, kThreads), kThreads, 0, stream>>>(data<T>(x), bias, wide_bias, p.channels,
                                                                                p.inner, n / N, activation, A(p.gain),
                                                                                A(p.upper_limit()), mutable_data<T>(y));
    };
    packed ? launch(std::integral_constant<int, kPack>()) : launch(std::integral_constant<int, 1>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor bias_act_backward(Tensor grad, Tensor y, double slope, double gain, double clamp, int64_t act) {
  require(grad.is_cuda() && y.is_cuda(), "bias_act_backward: grad and y must be on one device");
  BiasActParams p{1, 1, y.numel(), slope, gain, clamp, Act(act)};
  check(p, -1);
  Scope stream(y);
  match(y, grad);
  Tensor out = new_like(y);
  if (y.numel() == 0) return out;
  with_act(dtype_of(y), p.act, [&](auto zero, auto chosen) {
    using T = decltype(zero);
    using A = typename Accumulator<T>::type;
    constexpr Act kAct = decltype(chosen)::value;
    constexpr int kPack = pack_size<T>;
    const Activation<A, kAct> activation{A(p.slope), A(p.floor())};
    const double over = kAct == Act::leaky || kAct == Act::swish ? 1 : 1 / p.gain;
    const int64_t n = y.numel();
    const bool packed = n % kPack == 0 && aligned(grad.const_data_ptr()) && aligned(y.const_data_ptr()) &&
                        aligned(out.const_data_ptr());
    const auto launch = [&](auto size) {
      constexpr int N = decltype(size)::value;
      backward<T, N, kAct><<<blocks_for(n / N, kThreads), kThreads, 0, stream>>>(
          data<T>(grad), data<T>(y), n / N, activation, A(p.gain), A(over), A(p.dead_above()), A(p.dead_below()),
          mutable_data<T>(out));
    };
    packed ? launch(std::integral_constant<int, kPack>()) : launch(std::integral_constant<int, 1>());
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
