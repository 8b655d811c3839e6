#include <tuple>

#include "epilogue_arguments.cuh"
#include "tensor_cores.cuh"

// Both kernels are to be bound by memory: on an H200 some 20 instructions a value are the most that its bandwidth
// leaves time for. So sums are made of as few as possible (the activation's gain is part of the factors behind it,
// pixels are counted in 32 bits), and what comes next is on its way while a value is computed.

namespace sage_fast {
namespace {

// The larger and the smaller of two, NaN if one is.
#ifndef SAGE_FAST_ON_HOST
__device__ __forceinline__ float larger(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ __forceinline__ float smaller(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
#else
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
inline float smaller(float a, float b) { return a < b || a != a ? a : b; }
#endif

// V neighbouring channels, in one load or store of 8 or 16 bytes.
template <class T, int V>
__device__ __forceinline__ void load(const void* from, float (&to)[V]) {
  using Raw = std::conditional_t<sizeof(T) * V == 16, uint4, uint2>;
  const Raw raw = *static_cast<const Raw*>(from);
  const T* v = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = to_float(v[i]);
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
  using Raw = std::conditional_t<sizeof(T) * V == 16, uint4, uint2>;
  Raw raw;
  T* v = reinterpret_cast<T*>(&raw);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = from_float<T>(from[i]);
  *reinterpret_cast<Raw*>(to) = raw;
}

template <int V>
__device__ __forceinline__ void read(const float* from, float factor, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = factor * from[i];
}

// The activation of a thread's V channels of one sample, divided by the gain: what is made of it is multiplied by that.
template <int V>
struct Activation {
  float factor[V], bias[V], slope, most;

  template <class T>
  __device__ Activation(const EpilogueArgs<T>& a, int64_t sample, int64_t channel, float times)
      : slope(a.slope), most(a.most / a.gain) {
    read(a.factor + sample * a.pitch + channel, times, factor);
    read(a.bias + channel, 1.f, bias);
  }

  // v: convolution in, activation out.
  __device__ __forceinline__ void operator()(float noise, float (&v)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = v[i] * factor[i] + (noise + bias[i]);
      v[i] = larger(v[i], slope * v[i]);
    }
    if (most < INFINITY) {  // the same for all threads
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = larger(smaller(v[i], most), -most);
    }
  }
};

// How the threads of a block share the pixels of a plain layer: a group of 2^shift threads holds all channels of a
// pixel, a vector each, and kPixels pixels at a time.
struct PixelGroups {
  static constexpr int kThreads = 256, kPixels = 4, kStages = 3, kStageBytes = kThreads * kPixels * 16;
  static constexpr int kMostParts = kThreads * kPixels;  // of a round, where each thread has pixels of its own
#ifdef SAGE_FAST_ON_HOST                                 // few, for several rounds in small tests
  static constexpr int64_t kMostBlocks = 3;
#else
  static constexpr int64_t kMostBlocks = 2048;
#endif
  int shift = 0;

  __host__ __device__ explicit PixelGroups(int64_t vectors) {
    while ((int64_t{1} << shift) < vectors) ++shift;
  }
  __host__ __device__ int size() const { return 1 << shift; }
  __host__ __device__ int slots() const { return kThreads >> shift; }  // groups in a block
  __host__ __device__ int tile() const { return slots() * kPixels; }   // pixels of a round
  __device__ int tile_shift() const { return 10 - shift; }
  __device__ int lane() const { return threadIdx.x & (size() - 1); }
  __device__ int slot() const { return int(threadIdx.x >> shift); }  // which takes every slots()-th pixel of a tile
  // Sums over channels meet within a warp first: the warps of a group, and where the sums of a pixel's warp lie.
  __device__ int in_warp() const { return size() < 32 ? size() : 32; }
  __host__ __device__ int warps() const { return size() > 32 ? size() / 32 : 1; }
  __host__ __device__ int parts() const { return tile() * warps(); }  // of a round, K sums each
  __device__ int part(int at, int warp) const { return at * warps() + warp; }

  // Blocks of a sample: enough for every multiprocessor, few enough that what a thread keeps serves many pixels.
  int64_t blocks(int64_t n, int64_t pixels) const {
    const int64_t tiles = (pixels + tile() - 1) / tile(), wanted = kMostBlocks / n > 1 ? kMostBlocks / n : 1;
    return tiles < wanted ? tiles : wanted;
  }
};

// sums [pixels, K] of all lanes of a group, added: give(u, sums of pixel u) is called by one lane for each. The lanes
// halve the pixels among them before they add up: half of the shuffles that sums of all pixels for all lanes would
// take.
template <int K, class F>
__device__ __forceinline__ void add_up(float (&sums)[PixelGroups::kPixels][K], int lanes, F&& give) {
  static_assert(PixelGroups::kPixels == 4 && PixelGroups::kThreads == 256);
  const int lane = threadIdx.x & (lanes - 1);
  if (lanes < 4) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (lanes == 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) sums[u][k] += __shfl_xor_sync(0xffffffffu, sums[u][k], 1);
      }
      if (lane == 0) give(u, sums[u]);
    }
    return;
  }
  const bool second = lane & (lanes / 2), odd = lane & (lanes / 4);
  float mine[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float pair[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float other = second ? sums[u][k] : sums[u + 2][k];
      pair[u] = (second ? sums[u + 2][k] : sums[u][k]) + __shfl_xor_sync(0xffffffffu, other, lanes / 2);
    }
    mine[k] = (odd ? pair[1] : pair[0]) + __shfl_xor_sync(0xffffffffu, odd ? pair[0] : pair[1], lanes / 4);
  }
  for (int offset = lanes / 8; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) mine[k] += __shfl_xor_sync(0xffffffffu, mine[k], offset);
  }
  if ((lane & (lanes / 4 - 1)) == 0) give(2 * second + odd, mine);
}

// Walks over the pixels of sample blockIdx.y. A thread's values of the next two rounds are on their way into shared
// memory, places of its own; the sums over channels that make the image meet in the warp and then there too. K: sums
// kept.
template <class T, int K>
__global__ void __launch_bounds__(PixelGroups::kThreads, 2)
    styled(EpilogueArgs<T> a, ImageArgs image, PixelGroups groups) {
  constexpr int V = kVector<T>, kPixels = PixelGroups::kPixels, kStages = PixelGroups::kStages;
  extern __shared__ __align__(16) unsigned char memory[];
  float* const parts = reinterpret_cast<float*>(memory + kStages * PixelGroups::kStageBytes);
  const int lane = groups.lane(), tile = groups.tile(), c = int(a.c), channel = lane * V;
  const int pixels = int(a.h * a.w), slots = groups.slots(), stride = int(gridDim.x) * tile;
  const int64_t sample = blockIdx.y;
  const bool active = channel < c;

  const Activation<V> activate(a, sample, active ? channel : 0, 1.f);
  float next[V] = {}, weight[K][V] = {};
  if (active && a.next) read(a.next + sample * a.pitch + channel, a.gain, next);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (active && k < image.channels) {
      read(image.weight + (sample * image.channels + k) * a.pitch + channel, a.gain, weight[k]);
    }
  }

  // A thread's pixels of a round are those with u * slots below what is left of the image, counted from its first one.
  int first = int(blockIdx.x) * tile, stage = 0, turn = 0, left = pixels - first - groups.slot();
  const int64_t before = sample * pixels + first + groups.slot();
  const T* from = a.x + before * c + channel;  // of the round that is fetched
  T* to = a.y + before * c + channel;
  const float* noise = a.noise ? a.noise + before - (a.noise_per_sample ? 0 : sample * pixels) : nullptr;
  unsigned char* const own = memory + threadIdx.x * 16;
  const auto fetch = [&](int left, int stage) {
#pragma unroll
    for (int u = 0; u < kPixels; ++u) {
      const bool wanted = active && u * slots < left;
      copy_async_16(own + stage * PixelGroups::kStageBytes + u * PixelGroups::kThreads * 16,
                    wanted ? from + int64_t{u * slots} * c : a.x, wanted);
    }
    from += int64_t{stride} * c;
  };
  float noise_coming[kPixels] = {};
  const auto fetch_noise = [&](int left) {
    if (!noise) return;
#pragma unroll
    for (int u = 0; u < kPixels; ++u) noise_coming[u] = u * slots < left ? a.strength * __ldg(noise + u * slots) : 0.f;
    noise += stride;
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i * stride < pixels) fetch(left - i * stride, i);
    commit_copies();
  }
  fetch_noise(left);
  for (; first < pixels; first += stride, left -= stride, to += int64_t{stride} * c, turn ^= 1) {
    float of_noise[kPixels], sums[kPixels][K];
#pragma unroll
    for (int u = 0; u < kPixels; ++u) of_noise[u] = noise_coming[u];
    fetch_noise(left - stride);
    if (pixels - first > (kStages - 1) * stride) {
      fetch(left - (kStages - 1) * stride, stage == 0 ? kStages - 1 : stage - 1);
    }
    commit_copies();
    wait_copies<kStages - 1>();
#pragma unroll
    for (int u = 0; u < kPixels; ++u) {
      float v[V];
      load<T>(own + stage * PixelGroups::kStageBytes + u * PixelGroups::kThreads * 16, v);
      activate(of_noise[u], v);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        sums[u][k] = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) sums[u][k] += weight[k][i] * v[i];
      }
      if (a.next && active && u * slots < left) {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] *= next[i];
        store(to + int64_t{u * slots} * c, v);
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    float* const meeting = parts + turn * groups.parts() * K;  // by turns, so that one barrier a round is enough
    add_up(sums, groups.in_warp(), [&](int u, const float (&of)[K]) {
      float* const part = meeting + groups.part(u * slots + groups.slot(), lane / 32) * K;
#pragma unroll
      for (int k = 0; k < K; ++k) part[k] = of[k];
    });
    __syncthreads();
    for (int job = threadIdx.x; job < tile * int(image.channels); job += PixelGroups::kThreads) {
      const int k = job >> groups.tile_shift(), at = job & (tile - 1);
      if (first + at >= pixels) continue;
      float sum = 0;
      for (int w = 0; w < groups.warps(); ++w) sum += meeting[groups.part(at, w) * K + k];
      finish_image(image, sample, k, first + at, a.h, a.w, a.most, sum);
    }
  }
}

// The part of a layer that a block of the blur makes: a thread four channels of four neighbouring columns, 2^shift
// threads the channels of a column, the others columns; down `rows` rows.
struct BlurTile {
  static constexpr int kThreads = 128, kChannels = 4, kColumns = 4, kStages = 4;
  static constexpr int kMostGroups = 64;  // more would not leave room for four stages of float32
  int shift, rows;

  BlurTile(int64_t c, int64_t w, int rows) : shift(0), rows(rows) {
    // at least 16 groups where there are as many, whole lines of memory; more where the columns are too few for all
    // threads
    while (groups() < kMostGroups && groups() * kChannels < c && (groups() < 16 || columns() / 2 >= w)) ++shift;
  }
  __host__ __device__ int groups() const { return 1 << shift; }
  __host__ __device__ int columns() const { return kColumns * (kThreads >> shift); }
  __host__ __device__ int channels() const { return kChannels * groups(); }
  int64_t blocks_along(int64_t c, int64_t w) const {
    return (c + channels() - 1) / channels() * ((w + columns() - 1) / columns());
  }

  // Where a column of the input lies in a stage of shared memory. Behind every fourth is room for one, where that keeps
  // what the lanes of a load want in different banks.
  template <class T>
  __host__ __device__ int place(int column) const {
    const int bytes = channels() * int(sizeof(T));
    return column * bytes + (bytes < 128 ? column / kColumns * bytes : 0);
  }
  template <class T>
  __host__ __device__ int stage_bytes() const {
    return place<T>(columns() + 3);
  }
};

// Blurs by [1, 3, 3, 1] = (1 + z)^3 on both axes, along rows by additions alone. Rows of the input arrive in a ring of
// stages, three of them on their way while one is computed; each goes to the next three outputs and completes one.
template <class T>
__global__ void __launch_bounds__(BlurTile::kThreads, 4) blurred(EpilogueArgs<T> a, BlurTile tile) {
  constexpr int V = BlurTile::kChannels, C = BlurTile::kColumns, kStages = BlurTile::kStages, kEach = 16 / sizeof(T);
  extern __shared__ __align__(16) unsigned char memory[];
  const int c = int(a.c), h = int(a.h), w = int(a.w), in_w = w + 1, stage_bytes = tile.stage_bytes<T>();
  const int parts = (c + tile.channels() - 1) / tile.channels(), along = int(blockIdx.x) / parts;
  const int left = along * tile.columns(), first_channel = (int(blockIdx.x) - along * parts) * tile.channels();
  const int quad = threadIdx.x >> tile.shift, channel = first_channel + (threadIdx.x & (tile.groups() - 1)) * V;
  const int x0 = left + quad * C, y0 = int(blockIdx.y) * tile.rows, y1 = min(y0 + tile.rows, h);
  const int64_t sample = blockIdx.z;
  const T* const in = a.x + sample * (h + 1) * in_w * c;

  // Of the 16 bytes that a thread fetches only the column changes.
  const int vectors = tile.channels() / kEach, step = BlurTile::kThreads / vectors;
  const int vector = threadIdx.x & (vectors - 1), first_column = int(threadIdx.x) / vectors;
  const bool wanted = first_channel + vector * kEach < c;
  const T* const source = in + int64_t{left - 1 + first_column} * c + first_channel + vector * kEach;
  const int target = tile.place<T>(first_column) + vector * 16, target_step = tile.place<T>(step);
  const auto fetch = [&](int row) {  // row y0 - 1 into stage 0, and so on by turns
    unsigned char* to = memory + unsigned(row - y0 + 1) % kStages * stage_bytes + target;
    const bool in_image = wanted && row >= 0 && row <= h;
    const T* from = source + int64_t{row} * in_w * c;
    for (int column = first_column; column < tile.columns() + 3; column += step) {
      const bool inside = in_image && unsigned(left - 1 + column) < unsigned(in_w);
      copy_async_16(to, inside ? from : in, inside);
      to += target_step, from += int64_t{step} * c;
    }
  };

  const int valid = channel < c ? min(C, w - x0) : 0;  // columns, may be below 0
  const Activation<V> activate(a, sample, channel < c ? channel : 0, 1.f / 16);
  float next[V];
  read(a.next + sample * a.pitch + (channel < c ? channel : 0), a.gain, next);
  const float* const noise = a.noise ? a.noise + (a.noise_per_sample ? sample * h * w : 0) : nullptr;
  T* out = a.y + ((sample * h + y0 - 4) * w + x0) * c + channel;  // of the row before the first that is done
  const int own = tile.place<T>(quad * C) + (threadIdx.x & (tile.groups() - 1)) * V * int(sizeof(T));

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (y0 - 1 + i <= y1 + 1) fetch(y0 - 1 + i);
    commit_copies();
  }
  float soon[C][V] = {}, later[C][V] = {}, last[C][V] = {};  // what is known of the next three outputs
#pragma unroll 2
  for (int row = y0 - 1; row <= y1 + 1; ++row) {
    const int done = row - 2;
    out += int64_t{w} * c;
    float of_noise[C] = {};
    if (noise) {
#pragma unroll
      for (int k = 0; k < C; ++k) of_noise[k] = a.strength * __ldg(noise + max(done, 0) * w + min(x0 + k, w - 1));
    }
    wait_copies<kStages - 2>();
    __syncthreads();  // the row is there for all, and all are done with the stage before it
    if (row + kStages - 1 <= y1 + 1) fetch(row + kStages - 1);
    commit_copies();
    const unsigned char* const stage = memory + unsigned(row - y0 + 1) % kStages * stage_bytes + own;
    float one[V], two[V], three[V];  // the last column, and it times (1 + z) and (1 + z)^2
#pragma unroll
    for (int k = 0; k < C + 3; ++k) {
      float v[V];
      load<T>(stage + tile.place<T>(k), v);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float to_two = k > 0 ? one[i] + v[i] : 0.f, to_three = k > 1 ? two[i] + to_two : 0.f;
        one[i] = v[i];
        if (k > 2) {
          const int x = k - 3;
          const float sum = three[i] + to_three;
          v[i] = soon[x][i] + sum;
          soon[x][i] = 3 * sum + later[x][i];
          later[x][i] = 3 * sum + last[x][i];
          last[x][i] = sum;
        }
        two[i] = to_two, three[i] = to_three;
      }
      if (k > 2) {
        activate(of_noise[k - 3], v);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] *= next[i];
        if (done >= y0 && k - 3 < valid) store(out + (k - 3) * c, v);
      }
    }
  }
}

void check_activation(double slope, double gain, int64_t pixels, int64_t row) {
  require(slope >= 0 && slope <= 1 && gain > 0, "epilogue: slope must be from 0 to 1, gain above 0");
  require(pixels < INT32_MAX && row < INT32_MAX, "epilogue: an image or a row of it has 2^31 values or more");
}

std::tuple<Tensor, Tensor> styled_epilogue(Tensor x, Tensor factor, Tensor bias, std::optional<Tensor> noise,
                                           double strength, std::optional<Tensor> next_style, Tensor image_weight,
                                           Tensor image_bias, std::optional<Tensor> skip, double slope, double gain,
                                           double clamp) {
  require(x.dim() == 4 && x.is_cuda() && x.is_contiguous(), "styled_epilogue: x must be contiguous [N, H, W, C]");
  Scope stream(x);
  const int64_t n = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  check_activation(slope, gain, h * w, c);
  Tensor y = next_style ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor image = torch::stable::new_empty(factor, {n, image_bias.numel(), h, w});
  if (n == 0) return {y, image};
  dispatch_activation(x, [&](auto zero) {
    using T = decltype(zero);
    const auto a =
        epilogue_arguments<T>(n, h, w, c, x, factor, bias, noise, strength, next_style, slope, gain, clamp, y);
    const ImageArgs to = image_arguments(a, image_weight, image_bias, skip, image);
    constexpr int kThreads = PixelGroups::kThreads;
    require(c <= kThreads * kVector<T>, "styled_epilogue: a pixel's channels must fit into 256 vectors of 16 bytes");
    const PixelGroups groups(a.c / kVector<T>);
    const dim3 grid(unsigned(groups.blocks(n, h * w)), unsigned(n));
    const auto launch = [&](auto sums) {
      constexpr int K = decltype(sums)::value;
      const auto bytes = [](int parts) {
        return PixelGroups::kStages * PixelGroups::kStageBytes + 2 * parts * K * int(sizeof(float));
      };
      allow_shared(styled<T, K>, bytes(PixelGroups::kMostParts));
      styled<T, K><<<grid, kThreads, size_t(bytes(groups.parts())), stream>>>(a, to, groups);
    };
    to.channels <= 3 ? launch(std::integral_constant<int, 3>()) : launch(std::integral_constant<int, 4>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, image};
}

Tensor blur_epilogue(Tensor x, Tensor factor, Tensor bias, std::optional<Tensor> noise, double strength,
                     Tensor next_style, double slope, double gain, double clamp) {
  require(x.dim() == 4 && x.is_cuda() && x.is_contiguous() && x.size(1) % 2 == 1 && x.size(2) % 2 == 1,
          "blur_epilogue: x must be contiguous [N, 2 H + 1, 2 W + 1, C]");
  Scope stream(x);
  const int64_t n = x.size(0), h = x.size(1) - 1, w = x.size(2) - 1, c = x.size(3);
  check_activation(slope, gain, h * w, (w + 1) * c);
  Tensor y = torch::stable::new_empty(x, {n, h, w, c});
  if (n == 0) return y;
  dispatch_activation(x, [&](auto zero) {
    using T = decltype(zero);
    const auto a =
        epilogue_arguments<T>(n, h, w, c, x, factor, bias, noise, strength, next_style, slope, gain, clamp, y);
    // a strip reads three rows more than it writes: long strips, unless that leaves multiprocessors idle
    BlurTile tile(c, w, 64);
    const int64_t along = n * tile.blocks_along(c, w);
    while (tile.rows > 4 && along * ((h + tile.rows - 1) / tile.rows) < 1024) tile.rows /= 2;
    const dim3 grid(unsigned(tile.blocks_along(c, w)), unsigned((h + tile.rows - 1) / tile.rows), unsigned(n));
    blurred<T><<<grid, BlurTile::kThreads, size_t(BlurTile::kStages * tile.stage_bytes<T>()), stream>>>(a, tile);
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
