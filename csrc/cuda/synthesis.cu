#include <tuple>

#include "epilogue_arguments.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = PixelGroups::kThreads;
constexpr int kBlurThreads = 128;  // fewer: a thread of the blur keeps more registers

// 16 bytes at a time.
template <class T>
struct Memory {
  __device__ static uint4 fetch(const T* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }
  __device__ static void unpack(const uint4& raw, float (&to)[kVector<T>]) {
    const T* v = reinterpret_cast<const T*>(&raw);
    for (int i = 0; i < kVector<T>; ++i) to[i] = to_float(v[i]);
  }
  __device__ void load(const T* from, float (&to)[kVector<T>]) const { unpack(fetch(from), to); }
  __device__ void store(T* to, const float (&from)[kVector<T>]) const {
    uint4 raw;
    T* v = reinterpret_cast<T*>(&raw);
    for (int i = 0; i < kVector<T>; ++i) v[i] = from_float<T>(from[i]);
    *reinterpret_cast<uint4*>(to) = raw;
  }
};

// Walks over the pixels of sample blockIdx.y; the sums over channels that make the image go through the warp and then
// through shared memory. K: sums kept.
template <class T, int K>
__global__ void __launch_bounds__(kThreads, 2) styled(EpilogueArgs<T> a, ImageArgs image, PixelGroups groups) {
  constexpr int V = kVector<T>, kPixels = PixelGroups::kPixels;
  __shared__ float parts[2][kPixels * kThreads * K];  // by turns, so that one barrier a round is enough
  const int lane = groups.lane(threadIdx.x), tile = groups.tile();
  const int64_t sample = blockIdx.y, pixels = a.h * a.w, channel = int64_t{lane} * V;
  const bool active = channel < a.c;
  const Memory<T> memory;

  const ChannelNumbers<V> numbers(a, sample, active ? channel : 0);
  float weight[K][V] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (active && k < image.channels) read(image.weight + (sample * image.channels + k) * a.pitch + channel, weight[k]);
  }

  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * tile; first < pixels; first += int64_t{gridDim.x} * tile, turn ^= 1) {
    uint4 raw[kPixels] = {};
#pragma unroll
    for (int u = 0; u < kPixels; ++u) {
      const int64_t pixel = first + groups.at(threadIdx.x, u);
      if (active && pixel < pixels) raw[u] = memory.fetch(a.x + (sample * pixels + pixel) * a.c + channel);
    }
#pragma unroll
    for (int u = 0; u < kPixels; ++u) {
      const int at = groups.at(threadIdx.x, u);
      const int64_t pixel = first + at;
      const bool inside = pixel < pixels;
      float v[V];
      memory.unpack(raw[u], v);
      activate(a, numbers, inside ? noise_at(a, sample, pixel) : 0.f, v);
      float sums[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        sums[k] = active ? dot(weight[k], v) : 0.f;
        for (int offset = (groups.size() < 32 ? groups.size() : 32) / 2; offset > 0; offset /= 2) {
          sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], offset);
        }
      }
      if (lane % 32 == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) parts[turn][groups.part(at, lane / 32) * K + k] = sums[k];
      }
      if (a.next && active && inside) {
        for (int i = 0; i < V; ++i) v[i] *= numbers.next[i];
        memory.store(a.y + (sample * pixels + pixel) * a.c + channel, v);
      }
    }
    __syncthreads();
    for (int job = threadIdx.x; job < tile * int(image.channels); job += kThreads) {
      const int k = job / tile, at = job % tile;
      if (first + at >= pixels) continue;
      float sum = 0;
      for (int w = 0; w < groups.warps(); ++w) sum += parts[turn][groups.part(at, w) * K + k];
      finish_image(image, sample, k, first + at, a.h, a.w, a.most, sum);
    }
  }
}

// A thread a vector of channels, two columns and `rows` rows; neighbours take neighbouring channels, then columns.
template <class T>
__global__ void __launch_bounds__(kBlurThreads, 3) blurred(EpilogueArgs<T> a, int64_t rows) {
  constexpr int V = kVector<T>;
  const int64_t vectors = a.c / V, pairs = a.w / 2, strips = (a.h + rows - 1) / rows;
  SAGE_FAST_GRID_STRIDE(i, a.n * strips * pairs * vectors) {
    const int64_t y0 = i / (vectors * pairs) % strips * rows, y1 = y0 + rows < a.h ? y0 + rows : a.h;
    blur_columns<V>(a, i / (vectors * pairs * strips), i % vectors * V, i / vectors % pairs * 2, y0, y1, Memory<T>{});
  }
}

std::tuple<Tensor, Tensor> styled_epilogue(Tensor x, Tensor factor, Tensor bias, std::optional<Tensor> noise,
                                           double strength, std::optional<Tensor> next_style, Tensor image_weight,
                                           Tensor image_bias, std::optional<Tensor> skip, double slope, double gain,
                                           double clamp) {
  require(x.dim() == 4 && x.is_cuda() && x.is_contiguous(), "styled_epilogue: x must be contiguous [N, H, W, C]");
  Scope stream(x);
  const int64_t n = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  Tensor y = next_style ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor image = torch::stable::new_empty(factor, {n, image_bias.numel(), h, w});
  if (n == 0) return {y, image};
  dispatch_activation(x, [&](auto zero) {
    using T = decltype(zero);
    const auto a =
        epilogue_arguments<T>(n, h, w, c, x, factor, bias, noise, strength, next_style, slope, gain, clamp, y);
    const ImageArgs to = image_arguments(a, image_weight, image_bias, skip, image);
    require(c <= kThreads * kVector<T>, "styled_epilogue: a pixel's channels must fit into 256 vectors of 16 bytes");
    const PixelGroups groups(a.c / kVector<T>);
    const dim3 grid(unsigned(groups.blocks(n, h * w)), unsigned(n));
    if (to.channels <= 3) {
      styled<T, 3><<<grid, kThreads, 0, stream>>>(a, to, groups);
    } else {
      styled<T, 4><<<grid, kThreads, 0, stream>>>(a, to, groups);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, image};
}

Tensor blur_epilogue(Tensor x, Tensor factor, Tensor bias, std::optional<Tensor> noise, double strength,
                     Tensor next_style, double slope, double gain, double clamp) {
  require(x.dim() == 4 && x.is_cuda() && x.is_contiguous() && x.size(1) % 2 == 1 && x.size(2) % 2 == 1,
          "blur_epilogue: x must be contiguous [N, 2 H + 1, 2 W + 1, C]");
  Scope stream(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1) - 1, x.size(2) - 1, x.size(3)});
  if (x.size(0) == 0) return y;
  dispatch_activation(x, [&](auto zero) {
    using T = decltype(zero);
    const auto a = epilogue_arguments<T>(x.size(0), x.size(1) - 1, x.size(2) - 1, x.size(3), x, factor, bias, noise,
                                         strength, next_style, slope, gain, clamp, y);
    // a strip reads three rows more than it writes: long strips, unless that leaves multiprocessors idle
    const int64_t columns = a.n * (a.w / 2) * (a.c / kVector<T>);
    int64_t rows = 32;
    while (rows > 4 && columns * ((a.h + rows - 1) / rows) < int64_t{kThreads} * 512) rows /= 2;
    const int64_t threads = columns * ((a.h + rows - 1) / rows);
    blurred<T><<<blocks_for(threads, kBlurThreads), kBlurThreads, 0, stream>>>(a, rows);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) {
  m.impl("styled_epilogue", TORCH_BOX(&styled_epilogue));
  m.impl("blur_epilogue", TORCH_BOX(&blur_epilogue));
}

}  // namespace sage_fast
