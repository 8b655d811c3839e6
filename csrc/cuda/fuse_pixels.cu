// A warp has 128 columns (V neighbours a lane) of a strip of rows and marches along it with three rows of the mask in
// registers, so that each pixel is read once, but for the rows that neighbouring strips share.
// Memory sets the pace: 16 bytes a value, 805 MB at 1024 px for 16 images, 190 us at 4.2 TB/s; the 400 instructions of
// a warp for 128 pixels are 57 us at the rate of 132 multiprocessors. Nothing passes through shared memory.
#include "../fusion.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 128, kFewestRows = 2;

template <class T>
__device__ T clamped(T v, T low, T high) {
  v = v < low ? low : v;  // NaN stays: every comparison with it is false
  return v > high ? high : v;
}

// Pixel before or behind the first or last one, mirrored about it.
__device__ int mirrored(int i, int n) {
  i = i < 0 ? -i : i;
  i = i >= n ? 2 * n - 2 - i : i;
  return i < 0 ? 0 : i;  // of an axis of one pixel
}

template <class T, int V, int kChannels>
constexpr int kBlocks = V * kChannels * sizeof(T) > 12 ? 4 : 6;  // on a multiprocessor

template <class T>
struct Images {
  const T *real, *inverted, *edited, *low;  // low: where kLow
};

template <class T>
struct Numbers {
  T beta, side, middle;
  Blend blend;
};

// V pixels of one channel, as loaded.
template <class T, int V>
struct Raw {
  Pack<T, V> real, inverted, edited, low;
};

// The edited values, and what the blend adds where the mask is one.
template <class T, int V>
struct Channel {
  Pack<T, V> edited, added;
};

template <int V, bool kLow, class T>
__device__ __forceinline__ Raw<T, V> fetch(const Images<T>& from, int64_t at) {
  const auto pack = [at](const T* image) { return *reinterpret_cast<const Pack<T, V>*>(image + at); };
  Raw<T, V> raw{pack(from.real), pack(from.inverted), pack(from.edited), {}};
  if constexpr (kLow) raw.low = pack(from.low);
  return raw;
}

// Adds squared differences, whose roots make the mask.
template <bool kLow, class T, int V>
__device__ __forceinline__ Channel<T, V> compare(const Raw<T, V>& raw, Blend blend, T (&lost)[V], T (&changed)[V]) {
  Channel<T, V> channel{raw.edited, {}};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const T real = raw.real.v[k], inverted = raw.inverted.v[k];
    T& value = channel.edited.v[k];
    if constexpr (kLow) value = clamped(value + raw.low.v[k], T(-1), T(1));
    const T from_real = real - inverted, from_edited = value - inverted;
    lost[k] += from_real * from_real;
    changed[k] += from_edited * from_edited;
    channel.added.v[k] = blend == Blend::residual ? from_real : blend == Blend::convex ? real - value : real + 1;
  }
  return channel;
}

// real, inverted, low [n or 1, c, h, w], edited [n, c, h, w] -> y. A stretch of a strip of an image's rows has `lanes`
// lanes, a power of two. kChannels: how many stay in registers until their mask is known; 0: any number, read again.
template <class T, int V, int kChannels, bool kLow>
__global__ void __launch_bounds__(kThreads, kBlocks<T, V, kChannels>)
    run(Images<T> images, FusePixelsParams p, Numbers<T> numbers, int lanes, int rows, T* __restrict__ y) {
  constexpr int kAtOnce = kChannels ? kChannels : 1;
  const int h = static_cast<int>(p.h), w = static_cast<int>(p.w), channels = kChannels ? kChannels : int(p.c);
  const int stretches = (w + lanes * V - 1) / (lanes * V), strips = (h + rows - 1) / rows;
  const int64_t plane = p.h * p.w, jobs = p.n * strips * stretches;
  const int lane = threadIdx.x % lanes, a_block = kThreads / lanes;
  for (int64_t first = int64_t{blockIdx.x} * a_block; first < jobs; first += int64_t{gridDim.x} * a_block) {
    const int64_t job = min(first + threadIdx.x / lanes, jobs - 1), n = job / stretches / strips;
    const int x = (static_cast<int>(job % stretches) * lanes + lane) * V;
    const int strip = static_cast<int>(job / stretches % strips), y0 = strip * rows, y1 = min(y0 + rows, h);
    const bool active = x < w && first + threadIdx.x / lanes < jobs;
    const bool down = strip % 2 == 0;  // every other strip goes up: neighbours read the rows that they share together
    // column beside a stretch that its first or last lane needs
    const int beside = lane == 0 && x > 0 ? x - 1 : lane == lanes - 1 && x + V < w ? x + V : -1;
    const Images<T> from{images.real + n * p.real_step, images.inverted + n * p.inverted_step,
                         images.edited + n * p.c * plane, kLow ? images.low + n * p.low_step : nullptr};
    T* to = y + n * p.c * plane;
    // images in [0, 1] differ by half as much as in [-1, 1]
    const auto mask_of = [&](T lost, T changed) { return T(0.5) * (sqrt(lost) - numbers.beta * sqrt(changed)); };

    T before[V] = {}, here[V] = {};  // the mask blurred along the last two rows
    Channel<T, V> kept[kAtOnce] = {};
    for (int step = -1; step <= rows; ++step) {
      const int at = down ? y0 + step : y1 - 1 - step;
      const bool reads = active && step <= y1 - y0;
      const int64_t row = int64_t{mirrored(at, h)} * w;
      Channel<T, V> read[kAtOnce];
      T lost[V] = {}, changed[V] = {}, lost_beside[1] = {}, changed_beside[1] = {};
      for (int c0 = 0; c0 < channels; c0 += kAtOnce) {
        Raw<T, V> raw[kAtOnce] = {};
        Raw<T, 1> raw_beside[kAtOnce] = {};
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
          if (reads) raw[c] = fetch<V, kLow>(from, (c0 + c) * plane + row + x);
          if (reads && beside >= 0) raw_beside[c] = fetch<1, kLow>(from, (c0 + c) * plane + row + beside);
        }
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
          read[c] = compare<kLow>(raw[c], numbers.blend, lost, changed);
          compare<kLow>(raw_beside[c], numbers.blend, lost_beside, changed_beside);
        }
      }
      T sharp[V], ahead[V], mask[V];
#pragma unroll
      for (int k = 0; k < V; ++k) sharp[k] = mask_of(lost[k], changed[k]);
      T left = __shfl_up_sync(0xffffffffu, sharp[V - 1], 1, lanes);
      T right = __shfl_down_sync(0xffffffffu, sharp[0], 1, lanes);
      if (beside >= 0) (lane == 0 ? left : right) = mask_of(lost_beside[0], changed_beside[0]);
      if (x == 0) left = V > 1 ? sharp[1 % V] : right;
      if (x + V == w) right = V > 1 ? sharp[(V - 2 + V) % V] : left;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const T both = (k > 0 ? sharp[(k - 1 + V) % V] : left) + (k + 1 < V ? sharp[(k + 1) % V] : right);
        ahead[k] = numbers.middle * sharp[k] + numbers.side * both;
        mask[k] = clamped(numbers.middle * here[k] + numbers.side * (before[k] + ahead[k]), T(0), T(1));
        before[k] = here[k], here[k] = ahead[k];
      }
      if (reads && step > 0) {
        const int64_t middle = int64_t{down ? at - 1 : at + 1} * w + x;
        for (int c0 = 0; c0 < channels; c0 += kAtOnce) {
          if (kChannels == 0) {
            T unused[2][V] = {};
            kept[0] = compare<kLow>(fetch<V, kLow>(from, c0 * plane + middle), numbers.blend, unused[0], unused[1]);
          }
#pragma unroll
          for (int c = 0; c < kAtOnce; ++c) {
            Pack<T, V> out;
#pragma unroll
            for (int k = 0; k < V; ++k) out.v[k] = kept[c].edited.v[k] + mask[k] * kept[c].added.v[k];
            *reinterpret_cast<Pack<T, V>*>(to + (c0 + c) * plane + middle) = out;
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) kept[c] = read[c];
    }
  }
}

template <class T, int V, int kChannels>
void launch(const Images<T>& images, const FusePixelsParams& p, const Numbers<T>& numbers, cudaStream_t stream, T* y) {
  int lanes = 1;
  while (lanes < 32 && lanes * V < p.w) lanes *= 2;
  // strips as long as leave so many warps: two rows more are read of each, from the L2 cache for the most part
  const int64_t stretches = (p.w + lanes * V - 1) / (lanes * V), warps = p.n * p.h * stretches * lanes / 32;
  const int rows = static_cast<int>(std::clamp<int64_t>(warps / kManyWarps, kFewestRows, 32));
  const int64_t threads = p.n * ((p.h + rows - 1) / rows) * stretches * lanes;
  const unsigned blocks = blocks_for(threads, kThreads);
  if (images.low) {
    run<T, V, kChannels, true><<<blocks, kThreads, 0, stream>>>(images, p, numbers, lanes, rows, y);
  } else {
    run<T, V, kChannels, false><<<blocks, kThreads, 0, stream>>>(images, p, numbers, lanes, rows, y);
  }
}

Tensor fuse_pixels(Tensor real, Tensor inverted, Tensor edited, std::optional<Tensor> low, double beta, int64_t blend,
                   double blur) {
  const FusePixelsParams p = fuse_pixels_params(real, inverted, edited, low, beta, blend, blur);
  Scope stream(edited);
  Tensor out = torch::stable::empty_like(edited);
  if (edited.numel() == 0) return out;
  require(p.h < 1 << 30 && p.w < 1 << 30, "fuse_pixels: sides of less than 2^30 pixels");
  dispatch(edited, [&](auto zero) {
    using T = decltype(zero);
    const Images<T> images{data<T>(real), data<T>(inverted), data<T>(edited), low ? data<T>(*low) : nullptr};
    const Numbers<T> numbers{T(p.beta), T(p.side), T(p.middle), p.blend};
    T* y = mutable_data<T>(out);
    const auto go = [&](auto size) {
      constexpr int V = decltype(size)::value;
      if (p.c == 3) {
        launch<T, V, 3>(images, p, numbers, stream, y);
      } else {
        launch<T, V, 0>(images, p, numbers, stream, y);
      }
    };
    const bool aligned = is_aligned(images.real) && is_aligned(images.inverted) && is_aligned(images.edited) &&
                         is_aligned(images.low) && is_aligned(y);
    if constexpr (sizeof(T) == 4) {
      if (aligned && p.w % 4 == 0) return go(std::integral_constant<int, 4>());
    }
    go(std::integral_constant<int, 1>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("fuse_pixels", TORCH_BOX(&fuse_pixels)); }

}  // namespace sage_fast
