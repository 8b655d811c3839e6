// A styled layer as one kernel: a 3 x 3 convolution as a product on tensor cores, and everything behind it in
// registers.
//
// A block multiplies the surroundings of 128 pixels with the weights of kColumns output channels, 64 bytes of input
// channels at a time: the patch of the pixels once for all nine taps, which differ by the row of the patch where a
// fragment begins, and the weights of one tap a step, kStages steps ahead. Its eight warps share the block four by two.
// The sums of a warp stay where the product leaves them until they are activations.
#pragma once

#include "../styled_conv.h"
#include "activations.cuh"
#include "tensor_cores.cuh"

namespace sage_fast {

constexpr int kConvThreads = 256, kConvRows = PixelTiles::kRows, kStages = 4, kRowBytes = 64, kTaps = 9;

// Of 64 bytes.
template <class T>
SAGE_FAST_HD int channel_chunks(int c_in) {
  constexpr int per_chunk = kRowBytes / int(sizeof(T));
  return (c_in + per_chunk - 1) / per_chunk;
}

// What a block works on.
struct ConvBlock {
  int channel_tile, channel, phase;  // channel: the first
  Tile tile;

  // Neighbouring blocks read the same pixels.
  template <class T>
  __device__ ConvBlock(const StyledConvArgs<T>& a, int64_t block, int columns)
      : channel_tile(int(block % a.channel_tiles)),
        channel(channel_tile * columns),
        phase(int(block / a.channel_tiles % a.phases)),
        tile(a.tiles, block / a.channel_tiles / a.phases) {}
};

// Of a block's dynamic shared memory: which pixel each row of the patch is; then the weights of kStages steps and two
// patches, and in their place later the activations and the warps' shares of the image.
template <class T, int kColumns>
struct ConvShared {
  static constexpr int kSources = PixelTiles::kMostPatchRows * 4, kWeights = kColumns * kRowBytes;
  static constexpr int kPitch = kColumns * int(sizeof(T)) + 16;  // of activations: rows begin in different banks
  static constexpr int kShares = 2 * kConvRows * 4 * 4;
  int patch;
  unsigned char* at;

  static constexpr int bytes(int patch_rows) {
    const int product = kStages * kWeights + 2 * patch_rows * kRowBytes;
    const int results = kConvRows * kPitch + kShares;
    return kSources + (product > results ? product : results);
  }
  __device__ ConvShared(const PixelTiles& tiles, unsigned char* at) : patch(tiles.patch_rows() * kRowBytes), at(at) {}
  __device__ int* sources() const { return reinterpret_cast<int*>(at); }
  __device__ unsigned char* weights(int step) const { return at + kSources + step % kStages * kWeights; }
  __device__ unsigned char* patches(int chunk) const { return at + kSources + kStages * kWeights + chunk % 2 * patch; }
  __device__ unsigned char* activations(int row) const { return at + kSources + row * kPitch; }
  __device__ float* shares() const { return reinterpret_cast<float*>(at + kSources + kConvRows * kPitch); }
};

// Starts the copies of one chunk of channels of all pixels of the patch.
template <class T>
__device__ void fetch_patch(const StyledConvArgs<T>& a, const int* sources, int chunk, unsigned char* to) {
  for (int i = threadIdx.x; i < a.tiles.patch_rows() * 4; i += kConvThreads) {
    const int row = i / 4, part = i % 4, pixel = sources[row];
    const int channel = chunk * (kRowBytes / int(sizeof(T))) + part * kVector<T>;
    const bool inside = pixel >= 0 && channel < a.c_in;
    copy_async_16(to + swizzled(row, part), inside ? a.out.x + int64_t{pixel} * a.c_in + channel : a.out.x, inside);
  }
}

// Starts the copies of one chunk of channels of one tap's weights.
template <class T, int kColumns>
__device__ void fetch_weights(const StyledConvArgs<T>& a, const ConvBlock& block, int chunk, int tap,
                              unsigned char* to) {
#pragma unroll
  for (int i = threadIdx.x; i < kColumns * 4; i += kConvThreads) {
    const int row = i / 4, part = i % 4, c = int(a.out.c);
    const int channel = chunk * (kRowBytes / int(sizeof(T))) + part * kVector<T>;
    const bool inside = block.channel + row < c && channel < a.c_in;
    const int64_t from = (int64_t{block.phase * c + block.channel + row} * kTaps + tap) * a.c_in + channel;
    copy_async_16(to + swizzled(row, part), inside ? a.weight + from : a.weight, inside);
  }
}

// One step of a warp: sums [32 pixels, kColumns / 2 channels] += 64 bytes of a patch's channels times those of weights.
// patch_rows: of this lane's row in both halves of the pixels; weight_row: of its row in the first two tiles.
template <class T, int kTiles>
__device__ __forceinline__ void multiply(float (&sums)[2][kTiles][4], const unsigned char* patch,
                                         const int (&patch_rows)[2], const unsigned char* weights, int weight_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 2; ++k) {  // 32 bytes
    uint32_t pixels[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrix_x4(pixels[i], patch + swizzled(patch_rows[i], 2 * k + lane / 16));
      if constexpr (std::is_same_v<T, float>) {
        for (uint32_t& word : pixels[i]) word = rounded_to_tf32(word);
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t both[4];
      load_matrix_x4(both, weights + swizzled(weight_row + 8 * j, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add<T>(sums[i][j], pixels[i], both[0], both[1]);
        multiply_add<T>(sums[i][j + 1], pixels[i], both[2], both[3]);
      }
    }
  }
}

// The sums of a block's product.
template <class T, int kColumns>
__device__ void convolve(const StyledConvArgs<T>& a, const ConvBlock& block, const ConvShared<T, kColumns>& shared,
                         float (&sums)[2][kColumns / 16][4]) {
  for (int row = threadIdx.x; row < a.tiles.patch_rows(); row += kConvThreads) {
    const Pixel pixel = block.tile.of_patch(a.tiles, row);
    shared.sources()[row] = pixel.inside ? pixel.index(a.tiles) : -1;
  }
  __syncthreads();

  const int chunks = channel_chunks<T>(a.c_in), begin = chunks * int(blockIdx.y) / a.splits;
  const int steps = (chunks * int(blockIdx.y + 1) / a.splits - begin) * kTaps;
  int next = 0, next_chunk = begin, next_tap = 0;  // whose copies start next
  const auto fetch = [&] {
    if (next < steps) {
      if (next_tap == 0) fetch_patch(a, shared.sources(), next_chunk, shared.patches(next_chunk));
      fetch_weights<T, kColumns>(a, block, next_chunk, next_tap, shared.weights(next));
      ++next;
      if (++next_tap == kTaps) next_tap = 0, ++next_chunk;
    }
    commit_copies();  // empty at the end, so that the count of groups stays the same
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / 2 * 32 + lane % 16;
  const int first_row[2] = {a.tiles.patch_row(row), a.tiles.patch_row(row + 16)};
  const int weight_row = warp % 2 * (kColumns / 2) + lane % 8 + lane / 16 * 8;
  int step = 0;
  for (int chunk = begin; step < steps; ++chunk) {
    for (int tap = 0; tap < kTaps; ++tap, ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this step's copies of all threads are there, and nobody reads the stage before it any more
      fetch();
      const int shift = tap / 3 * a.tiles.patch_w + tap % 3;
      const int rows[2] = {first_row[0] + shift, first_row[1] + shift};
      multiply<T>(sums, shared.patches(chunk), rows, shared.weights(step), weight_row);
    }
  }
  wait_copies<0>();
  __syncthreads();
}

// Where a pixel of the convolution's input lies in the output.
template <class T>
__device__ int64_t output_pixel(const StyledConvArgs<T>& a, const ConvBlock& block, const Pixel& p) {
  if (a.phases == 1) return int64_t{p.y} * a.out.w + p.x;
  return int64_t{2 * p.y + block.phase / 2} * a.out.w + 2 * p.x + block.phase % 2;
}

__device__ inline float2 pair_at(const float* from) { return *reinterpret_cast<const float2*>(from); }

// Two neighbouring values of an activation in shared memory.
template <class T>
__device__ void store_pair(unsigned char* to, float first, float second) {
  T* const pair = reinterpret_cast<T*>(to);
  pair[0] = from_float<T>(first), pair[1] = from_float<T>(second);
}

// A warp's sums become activations times the next style, in shared memory, and its share of the image.
template <class T, int kColumns>
__device__ void activate_sums(const StyledConvArgs<T>& a, const ConvBlock& block, const ConvShared<T, kColumns>& shared,
                              float (&sums)[2][kColumns / 16][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = int(a.to.channels);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp / 2 * 32 + 16 * i + lane / 4;  // and row + 8, of the same sample
    float noise[2], image[2][4] = {};
    int64_t sample = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pixel p = block.tile.of_row(a.tiles, row + 8 * half);
      noise[half] = p.inside ? noise_at(a.out, p.sample, output_pixel(a, block, p)) : 0.f;
      if (p.inside) sample = p.sample;
    }
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const int column = warp % 2 * (kColumns / 2) + 8 * j + lane % 4 * 2, channel = block.channel + column;
      if (channel >= a.out.c) continue;
      const int64_t at = sample * a.out.pitch + channel;
      const float2 factor = pair_at(a.out.factor + at), bias = pair_at(a.out.bias + channel);
      float (&v)[4] = sums[i][j];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[2 * half] = activation(v[2 * half] * factor.x + (noise[half] + bias.x), a.out.slope, a.out.gain, a.out.most);
        v[2 * half + 1] =
            activation(v[2 * half + 1] * factor.y + (noise[half] + bias.y), a.out.slope, a.out.gain, a.out.most);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k >= channels) continue;
        const float2 weight = pair_at(a.to.weight + (sample * channels + k) * a.out.pitch + channel);
        image[0][k] += weight.x * v[0] + weight.y * v[1];
        image[1][k] += weight.x * v[2] + weight.y * v[3];
      }
      if (!a.out.next) continue;
      const float2 next = pair_at(a.out.next + at);
      unsigned char* const to = shared.activations(row) + column * sizeof(T);
      store_pair<T>(to, v[0] * next.x, v[1] * next.y);
      store_pair<T>(to + 8 * shared.kPitch, v[2] * next.x, v[3] * next.y);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= channels) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        image[half][k] += __shfl_xor_sync(0xffffffffu, image[half][k], 1);
        image[half][k] += __shfl_xor_sync(0xffffffffu, image[half][k], 2);
        if (lane % 4 == 0) shared.shares()[(warp % 2 * kConvRows + row + 8 * half) * 4 + k] = image[half][k];
      }
    }
  }
}

// From shared memory, 16 bytes at a time.
template <class T, int kColumns>
__device__ void store_activations(const StyledConvArgs<T>& a, const ConvBlock& block,
                                  const ConvShared<T, kColumns>& shared) {
  constexpr int kVectors = kColumns / kVector<T>;
  for (int i = threadIdx.x; i < kConvRows * kVectors; i += kConvThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector<T>, channel = block.channel + column;
    const Pixel p = block.tile.of_row(a.tiles, row);
    if (!p.inside || channel >= a.out.c) continue;
    T* const to = a.out.y + (p.sample * a.out.h * a.out.w + output_pixel(a, block, p)) * a.out.c + channel;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(shared.activations(row) + column * int(sizeof(T)));
  }
}

// The block's share of the image from those of its warps, in an order that is always the same.
template <class T, int kColumns>
__device__ void store_image(const StyledConvArgs<T>& a, const ConvBlock& block, const ConvShared<T, kColumns>& shared) {
  const int64_t channels = a.to.channels;
  for (int i = threadIdx.x; i < kConvRows * int(channels); i += kConvThreads) {
    const int k = i / kConvRows, row = i % kConvRows;
    const Pixel p = block.tile.of_row(a.tiles, row);
    if (!p.inside) continue;
    const float sum = shared.shares()[row * 4 + k] + shared.shares()[(kConvRows + row) * 4 + k];
    const int64_t pixel = output_pixel(a, block, p);
    if (a.image_parts) {
      const int64_t plane = (block.channel_tile * a.out.n + p.sample) * channels + k;
      a.image_parts[plane * a.out.h * a.out.w + pixel] = sum;
    } else {
      finish_image(a.to, p.sample, k, pixel, a.out.h, a.out.w, a.out.most, sum);
    }
  }
}

template <class T, int kColumns>
__device__ void finish_tile(const StyledConvArgs<T>& a, const ConvBlock& block, const ConvShared<T, kColumns>& shared,
                            float (&sums)[2][kColumns / 16][4]) {
  activate_sums(a, block, shared, sums);
  __syncthreads();
  if (a.out.next) store_activations(a, block, shared);
  store_image(a, block, shared);
}

// Calls f(four sums, where they lie among those of split 0).
template <int kTiles, class F>
__device__ void for_all_sums(float (&sums)[2][kTiles][4], F&& f) {
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int64_t at = (int64_t{blockIdx.x} * 2 * kTiles + i) * kConvThreads + threadIdx.x;
    f(sums[i / kTiles][i % kTiles], at);
  }
}

// Grid: [tiles of pixels x phases x tiles of channels, splits].
template <class T, int kColumns>
__global__ void __launch_bounds__(kConvThreads, 2) convolve_tiles(StyledConvArgs<T> a) {
  extern __shared__ __align__(128) unsigned char memory[];
  const ConvBlock block(a, blockIdx.x, kColumns);
  const ConvShared<T, kColumns> shared(a.tiles, memory);
  float sums[2][kColumns / 16][4] = {};
  convolve(a, block, shared, sums);
  if (!a.split_sums) return finish_tile(a, block, shared, sums);
  float4* const to = reinterpret_cast<float4*>(a.split_sums);
  const int64_t before = int64_t{blockIdx.y} * gridDim.x * (kConvRows * kColumns / 4);
  for_all_sums(sums, [&](float (&v)[4], int64_t at) { to[before + at] = make_float4(v[0], v[1], v[2], v[3]); });
}

// The rest of convolve_tiles when the input channels were shared by several blocks: always in the same order.
template <class T, int kColumns>
__global__ void __launch_bounds__(kConvThreads, 2) join_splits(StyledConvArgs<T> a) {
  extern __shared__ __align__(128) unsigned char memory[];
  float sums[2][kColumns / 16][4] = {};
  const float4* from = reinterpret_cast<const float4*>(a.split_sums);
  for (int split = 0; split < a.splits; ++split, from += int64_t{gridDim.x} * (kConvRows * kColumns / 4)) {
    for_all_sums(sums, [&](float (&v)[4], int64_t at) {
      const float4 more = from[at];
      v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
    });
  }
  finish_tile(a, ConvBlock(a, blockIdx.x, kColumns), ConvShared<T, kColumns>(a.tiles, memory), sums);
}

// The image from the shares of all tiles of channels, a thread a value.
template <class T>
__global__ void __launch_bounds__(kConvThreads) join_image(StyledConvArgs<T> a) {
  const int64_t area = a.out.h * a.out.w, values = a.out.n * a.to.channels * area;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < values; i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0;
    for (int tile = 0; tile < a.channel_tiles; ++tile) sum += a.image_parts[tile * values + i];
    const int64_t plane = i / area;
    finish_image(a.to, plane / a.to.channels, plane % a.to.channels, i % area, a.out.h, a.out.w, a.out.most, sum);
  }
}

}  // namespace sage_fast
