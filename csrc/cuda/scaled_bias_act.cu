#include "../scaled_bias_act_layout.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256, kSumRows = 32;
#ifdef SAGE_FAST_ON_HOST
constexpr int64_t kBlocks = 8;
#else
constexpr int64_t kBlocks =
    1056;  // eight for each multiprocessor of an H100; the sums of each are added in a second pass
#endif

// What is added to a pixel and multiplied with its channels; null where there is none. All of [n or 1, pixels], [1],
// [n, channels], [channels].
template <class A>
struct Factors {
  const A *scale, *noise, *strength, *b;

  explicit Factors(const ScaledBiasActFactors& of)
      : scale(static_cast<const A*>(of.scale)),
        noise(static_cast<const A*>(of.noise)),
        strength(static_cast<const A*>(of.strength)),
        b(static_cast<const A*>(of.b)) {}

  __device__ const A* map(int64_t n, const ScaledBiasActParams& p) const {
    return noise + (p.shared_noise ? 0 : n * p.pixels);
  }
};

// Threads lie over the packs of N channels, then over pixels; a block strides over the pixels of an image, so what the
// channels have is read once.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    forward(const T* __restrict__ x, Factors<typename Accumulator<T>::type> of, ScaledBiasActParams p,
            typename Accumulator<T>::type slope, typename Accumulator<T>::type gain,
            typename Accumulator<T>::type limit, T* __restrict__ y) {
  using A = typename Accumulator<T>::type;
  const int64_t packs = p.channels / N;
  const A strength = of.strength ? *of.strength : A(1);
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) {
      A scale[N], b[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        scale[k] = of.scale ? of.scale[n * p.channels + c * N + k] : A(1);
        b[k] = of.b ? of.b[c * N + k] : A(0);
      }
      const int64_t step = int64_t{gridDim.x} * blockDim.y;
#pragma unroll 2
      for (int64_t pixel = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; pixel < p.pixels; pixel += step) {
        const int64_t at = (n * p.pixels + pixel) * packs + c;
        const Pack<T, N> in = read_pack(reinterpret_cast<const Pack<T, N>*>(x) + at);
        const A level = of.noise ? strength * of.map(n, p)[pixel] : A(0);
        Pack<T, N> out;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          A u = static_cast<A>(in.v[k]) * scale[k] + (b[k] + level);
          u = (u > 0 ? u : u * slope) * gain;
          u = u > limit ? limit : u;
          out.v[k] = static_cast<T>(u < -limit ? -limit : u);
        }
        reinterpret_cast<Pack<T, N>*>(y)[at] = out;
      }
    }
  }
}

// The gradient of x, and of a block's pixels the sums over scale and b, [2, channels] with the noise's behind them: a
// row of `parts` [n, blocks of an image, 2 channels + 1].
template <class T, int N, bool kScaled>
__global__ void __launch_bounds__(kThreads, 2)
    backward(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ y,
             Factors<typename Accumulator<T>::type> of, ScaledBiasActParams p, typename Accumulator<T>::type above,
             typename Accumulator<T>::type below, typename Accumulator<T>::type dead, T* __restrict__ out,
             typename Accumulator<T>::type* __restrict__ parts) {
  using A = typename Accumulator<T>::type;
  __shared__ A sums[2 * N * kThreads], of_noise[kThreads];
  const int64_t packs = p.channels / N;
  const int lanes = blockDim.x, rows = blockDim.y, thread = threadIdx.y * lanes + threadIdx.x;
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    A* const row = parts + (n * gridDim.x + blockIdx.x) * (2 * p.channels + 1);
    A noises = 0;
    for (int64_t first = 0; first < packs; first += lanes) {
      const int64_t c = first + threadIdx.x;
      A scale[N], of_scale[N] = {}, of_b[N] = {};
      if (c < packs) {
#pragma unroll
        for (int k = 0; kScaled && k < N; ++k) scale[k] = of.scale[n * p.channels + c * N + k];
        const int64_t step = int64_t{gridDim.x} * rows;
#pragma unroll(sizeof(A) == 8 ? 1 : 2)
        for (int64_t pixel = int64_t{blockIdx.x} * rows + threadIdx.y; pixel < p.pixels; pixel += step) {
          const int64_t at = (n * p.pixels + pixel) * packs + c;
          const Pack<T, N> g = read_pack(reinterpret_cast<const Pack<T, N>*>(grad) + at),
                           value = read_pack(reinterpret_cast<const Pack<T, N>*>(y) + at);
          Pack<T, N> of_x, from;
          if constexpr (kScaled) from = read_pack(reinterpret_cast<const Pack<T, N>*>(x) + at);
          A together = 0;
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const A v = static_cast<A>(value.v[k]);
            A straight = static_cast<A>(g.v[k]) * (v > 0 ? above : below);
            straight = v >= dead || v <= -dead ? A(0) : straight;
            of_b[k] += straight;
            together += straight;
            if constexpr (kScaled) {
              of_scale[k] += straight * static_cast<A>(from.v[k]);
              straight *= scale[k];
            }
            of_x.v[k] = static_cast<T>(straight);
          }
          if (of.noise) noises += together * of.map(n, p)[pixel];
          reinterpret_cast<Pack<T, N>*>(out)[at] = of_x;
        }
      }
      __syncthreads();  // sums of the round before were read
#pragma unroll
      for (int k = 0; k < N; ++k) {
        sums[(threadIdx.y * 2 * N + k) * lanes + threadIdx.x] = of_scale[k];
        sums[(threadIdx.y * 2 * N + N + k) * lanes + threadIdx.x] = of_b[k];
      }
      __syncthreads();
      for (int column = thread; column < 2 * N * lanes; column += lanes * rows) {
        const int of_which = column / (N * lanes), k = column / lanes % N;  // 0: scale, 1: b
        const int64_t channel = (first + column % lanes) * N + k;
        A sum = 0;
        for (int r = 0; r < rows; ++r) sum += sums[r * 2 * N * lanes + column];
        if (channel < p.channels) row[of_which * p.channels + channel] = sum;
      }
    }
    of_noise[thread] = noises;
    __syncthreads();
    if (thread < 32) {  // a block has more than 128
      A sum = 0;
      for (int i = thread; i < lanes * rows; i += 32) sum += of_noise[i];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
      if (thread == 0) row[2 * p.channels] = sum;
    }
    __syncthreads();
  }
}

// Adds up the rows of `parts`: those of an image for its scales, all of them for b and strength. A block takes 32
// columns, blockIdx.y the image or, behind the last, all.
template <class A>
__global__ void __launch_bounds__(32 * kSumRows)
    join(const A* __restrict__ parts, int64_t blocks, ScaledBiasActParams p, bool scaled, A* __restrict__ of_scale,
         A* __restrict__ of_b, A* __restrict__ of_strength) {
  __shared__ A sums[kSumRows][33];
  const int64_t width = 2 * p.channels + 1, column = int64_t{blockIdx.x} * 32 + threadIdx.x;
  for (int64_t n = scaled ? blockIdx.y : p.n; n <= p.n; n += gridDim.y) {
    const bool all = n == p.n;
    const int64_t wanted = all ? p.channels + 1 : p.channels, first = all ? 0 : n * blocks;
    const int64_t last = all ? p.n * blocks : first + blocks;
    A sum = 0;
    if (column < wanted) {
      for (int64_t i = first + threadIdx.y; i < last; i += kSumRows) {
        sum += parts[i * width + (all ? p.channels : 0) + column];
      }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < wanted) {
      sum = 0;
      for (int i = 0; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
      if (!all) {
        of_scale[n * p.channels + column] = sum;
      } else if (column < p.channels) {
        of_b[column] = sum;
      } else {
        *of_strength = sum;
      }
    }
    __syncthreads();
  }
}

// Threads and blocks for packs of N channels; they depend on the shape alone, so sums do not change with the device.
struct Grid {
  dim3 blocks, threads;

  Grid(const ScaledBiasActParams& p, int64_t pack) {
    const int64_t lanes = std::min<int64_t>(p.channels / pack, kThreads), rows = kThreads / lanes;
    const int64_t most = (p.pixels + rows - 1) / rows, fair = std::max<int64_t>(1, kBlocks / p.n);
    blocks = dim3(static_cast<unsigned>(std::min(most, fair)), depth_for(p.n));
    threads = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rows));
  }
};

template <class T>
bool packed(const ScaledBiasActParams& p, std::initializer_list<const void*> pointers) {
  return p.channels % pack_size<T> == 0 && std::all_of(pointers.begin(), pointers.end(), is_aligned);
}

Tensor scaled_bias_act(Tensor x, std::optional<Tensor> scale, std::optional<Tensor> noise,
                       std::optional<Tensor> strength, std::optional<Tensor> b, double slope, double gain,
                       double clamp) {
  Scope stream(x);
  const ScaledBiasActParams p = scaled_as(x, noise, slope, gain, clamp);
  const ScaledBiasActFactors given(p, x, scale, noise, strength, b);
  Tensor y = new_images(x, x.size(0), x.size(1), x.size(2), x.size(3), true);
  if (x.numel() == 0) return y;
  with_type(dtype_of(x), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulator<T>::type;
    const auto launch = [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const Grid grid(p, N);
      forward<T, N><<<grid.blocks, grid.threads, 0, stream>>>(data<T>(x), Factors<A>(given), p, A(p.slope), A(p.gain),
                                                              A(p.upper_limit()), mutable_data<T>(y));
    };
    const bool whole = packed<T>(p, {x.const_data_ptr(), y.const_data_ptr()});
    whole ? launch(std::integral_constant<int, pack_size<T>>()) : launch(std::integral_constant<int, 1>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_bias_act_backward(Tensor grad, std::optional<Tensor> x, Tensor y,
                                                                    std::optional<Tensor> scale,
                                                                    std::optional<Tensor> noise, double slope,
                                                                    double gain, double clamp) {
  Scope stream(y);
  ScaledBiasActBackward call(grad, x, y, scale, noise, slope, gain, clamp);
  const ScaledBiasActParams& p = call.p;
  ScaledBiasActGradients& made = call.made;
  if (y.numel() == 0) return made.all();
  with_type(dtype_of(y), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulator<T>::type;
    const auto launch = [&](auto pack, auto scaled) {
      constexpr int N = decltype(pack)::value;
      constexpr bool kScaled = decltype(scaled)::value;
      const Grid grid(p, N);
      const int64_t rows = p.n * grid.blocks.x, width = 2 * p.channels + 1;
      Tensor parts = torch::stable::new_empty(made.b, {rows * width});
      backward<T, N, kScaled><<<grid.blocks, grid.threads, 0, stream>>>(
          data<T>(grad), x ? data<T>(*x) : nullptr, data<T>(y), Factors<A>(call.given), p, A(p.gain),
          A(p.gain * p.slope), A(p.dead_above()), mutable_data<T>(made.x), mutable_data<A>(parts));
      const dim3 columns(static_cast<unsigned>((p.channels + 32) / 32), kScaled ? depth_for(p.n + 1) : 1);
      join<A><<<columns, dim3(32, kSumRows), 0, stream>>>(data<A>(parts), grid.blocks.x, p, kScaled,
                                                          mutable_data<A>(made.scale), mutable_data<A>(made.b),
                                                          mutable_data<A>(made.strength));
    };
    const auto packs = [&](auto scaled) {
      const bool whole = packed<T>(p, {grad.const_data_ptr(), y.const_data_ptr(), made.x.const_data_ptr(),
                                       x ? x->const_data_ptr() : y.const_data_ptr()});
      whole ? launch(std::integral_constant<int, pack_size<T>>(), scaled)
            : launch(std::integral_constant<int, 1>(), scaled);
    };
    scale ? packs(std::true_type()) : packs(std::false_type());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return made.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) {
  m.impl("scaled_bias_act", TORCH_BOX(&scaled_bias_act));
  m.impl("scaled_bias_act_backward", TORCH_BOX(&scaled_bias_act_backward));
}

}  // namespace sage_fast
