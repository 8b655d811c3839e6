// Gaussian low-pass of planes on the device, for gaussian_low_pass.cu and fuse_frequencies.cu: the bands of
// ../gaussian_low_pass.h, down along rows and columns, then up along columns and rows.
//
// A warp makes eight outputs next to each other of each of its lines, from the places that their bands cover together:
// at each place a value of every line from shared memory, and eight weights that all lanes share.
// 256 px at a pass band of 5 (256 -> 59 -> 256, bands of 68 and 16): 39 products a pixel, 52 with those that are zero;
// 192 planes with real, inverted and edited images are 201 MB, 47 us at 4.2 TB/s, and 0.66 G products, 22 us at the
// rate of 132 multiprocessors; what lies between the kernels is 46 MB, from the L2 cache for the most part.
#pragma once

#include <map>
#include <tuple>

#include "../gaussian_low_pass.h"
#include "common.cuh"

namespace sage_fast {

constexpr int kLowPassThreads = 256, kWarps = kLowPassThreads / 32;
constexpr int kGroup = 8, kBatch = kGroup * kWarps;  // outputs of a warp and of a block

// Positions on an axis: one span of them or, where they go around a circle, two.
struct Reach {
  int begin[2], end[2];
  int weights;  // of a group: the first of its rows of kGroup weights, a row a position
};

// A band in groups of kGroup outputs, and what the groups of a block reach together.
template <class T>
struct DeviceBand {
  int n_in = 0, n_out = 0;  // no outputs: an axis without this band
  const T* weights = nullptr;
  const Reach *groups = nullptr, *blocks = nullptr;
};

// Those of the groups of a batch, and what they reach together, into shared memory, where they cost no registers.
template <class T>
__device__ void read_reaches(const DeviceBand<T>& band, int batch, Reach* to) {
  const int i = threadIdx.x, group = batch * kWarps + i;
  if (i < kWarps) to[i] = group * kGroup < band.n_out ? band.groups[group] : Reach{};
  if (i == kWarps) to[i] = band.blocks[batch];
  __syncthreads();
}

// The next positions of a reach, kMost at most; none at its end.
template <int kMost>
struct Chunk {
  int part, start, end;

  __device__ explicit Chunk(const Reach& r) : part(0), start(r.begin[0]), end(min(r.begin[0] + kMost, r.end[0])) {}
  __device__ void advance(const Reach& r) {
    start = end;
    if (part == 0 && start == r.end[0]) part = 1, start = r.begin[1];
    end = min(start + kMost, part == 0 ? r.end[0] : r.end[1]);
  }
};

// sums [kGroup, V] += weights of a group times the values of a chunk: of this lane, `pitch` apart.
template <class T, int V, class C>
__device__ __forceinline__ void add_products(T (&sums)[kGroup][V], const Pack<T, V>* values, int pitch, const C& chunk,
                                             const Reach& group, const T* weights) {
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const int low = max(group.begin[part], chunk.start), high = min(group.end[part], chunk.end);
    const int row = group.weights - group.begin[part] + (part == 0 ? 0 : group.end[0] - group.begin[0]);
    const auto* w = reinterpret_cast<const Pack<T, pack_size<T>>*>(weights + int64_t{row + low} * kGroup);
    const Pack<T, V>* v = values + (low - chunk.start) * pitch;
#pragma unroll(V > 1 ? 1 : 4)
    for (int at = low; at < high; ++at, v += pitch, w += kGroup / pack_size<T>) {
      const Pack<T, V> value = *v;
#pragma unroll
      for (int i = 0; i < kGroup; i += pack_size<T>) {
        const auto pack = read_pack(w + i / pack_size<T>);
#pragma unroll
        for (int j = 0; j < pack_size<T>; ++j) {
#pragma unroll
          for (int k = 0; k < V; ++k) sums[i + j][k] += pack.v[j] * value.v[k];
        }
      }
    }
  }
}

// Where a result goes: y and base, which may be null, are [copies, planes, n_out, w]; a block writes `each` copies.
struct Copies {
  int count, each;

  __device__ int first(int block) const { return block * each; }
  __device__ int last(int block) const { return min(count, first(block) + each); }
};

// Planes [planes, n_in, w] as they lie.
template <class T>
struct PlainPlanes {
  static constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;  // on a multiprocessor
  static constexpr bool kLast = true;                     // something may be added to what is made of them
  template <int V>
  using Raw = Pack<T, V>;
  using At = const T*;

  const T* x;
  int64_t size;  // of a plane

  bool aligned() const { return is_aligned(x); }
  __device__ At at(int64_t plane) const { return x + plane * size; }
  template <int V>
  __device__ static Raw<V> fetch(const At& from, int64_t i) {
    return read_pack(reinterpret_cast<const Pack<T, V>*>(from + i));
  }
  template <int V>
  __device__ Pack<T, V> value(const Raw<V>& raw) const {
    return raw;
  }
};

struct RowsShape {
  int64_t planes;
  int w, strips;  // of 32 V columns
};

// load [planes, n_in, w] -> y [copies, planes, n_out, w] + base. A block has a strip of columns, V a lane, and a batch
// of outputs, a group a warp; the positions pass through shared memory, the next ones on their way meanwhile.
template <class T, int V, class Load>
__global__ void __launch_bounds__(kLowPassThreads, Load::kBlocks)
    rows(Load load, DeviceBand<T> band, RowsShape s, Copies copies, const T* __restrict__ base, T* __restrict__ y) {
  constexpr int kRows = 2 * kWarps, kAtOnce = 4;  // outputs whose base is on its way
  __shared__ Pack<T, V> tile[2][kRows][32];
  __shared__ Reach reaches[kWarps + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = (static_cast<int>(blockIdx.x) % s.strips * 32 + lane) * V, block = blockIdx.x / s.strips;
  const bool inside = column < s.w;
  const int first = blockIdx.y * kBatch + warp * kGroup;
  read_reaches(band, blockIdx.y, reaches);
  const Reach &group = reaches[warp], &all = reaches[kWarps];
  for (int64_t plane = blockIdx.z; plane < s.planes; plane += gridDim.z) {
    const typename Load::At from = load.at(plane);
    typename Load::template Raw<V> raw[2] = {};
    const auto fetch = [&](const Chunk<kRows>& chunk) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = chunk.start + warp + i * kWarps;
        if (inside && row < chunk.end) raw[i] = Load::template fetch<V>(from, int64_t{row} * s.w + column);
      }
    };
    T sums[kGroup][V] = {};
    Chunk<kRows> chunk(all);
    fetch(chunk);
    for (int turn = 0;; turn ^= 1) {
#pragma unroll
      for (int i = 0; i < 2; ++i) tile[turn][warp + i * kWarps][lane] = load.template value<V>(raw[i]);
      __syncthreads();
      const Chunk<kRows> here = chunk;
      chunk.advance(all);
      const bool more = chunk.start < chunk.end;
      if (more) fetch(chunk);
      add_products(sums, &tile[turn][0][lane], 32, here, group, band.weights);
      if (!more) break;
    }
    for (int copy = copies.first(block); copy < copies.last(block); ++copy) {
      const int64_t to = ((int64_t{copy} * s.planes + plane) * band.n_out + first) * s.w + column;
      const auto writes = [&](int i) { return inside && first + i < band.n_out; };
#pragma unroll
      for (int i0 = 0; i0 < kGroup; i0 += kAtOnce) {
        Pack<T, V> out[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (Load::kLast && base && writes(i0 + i)) {
            out[i] = read_once(reinterpret_cast<const Pack<T, V>*>(base + to + (i0 + i) * s.w));
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int k = 0; k < V; ++k) out[i].v[k] += sums[i0 + i][k];
          if (writes(i0 + i)) *reinterpret_cast<Pack<T, V>*>(y + to + (i0 + i) * s.w) = out[i];
        }
      }
    }
    __syncthreads();  // before the next plane takes the tile
  }
}

template <class T>
constexpr int kColumnBlocks = sizeof(T) == 4 ? 3 : 2;  // on a multiprocessor

// All positions of an axis.
struct Whole {
  int start, end;
};

// x [lines, n_in] -> y [copies, lines, n_out] + base. A block has 32 lines, one a lane, and a batch of outputs; or all
// outputs of a first band, which fit a batch, and from them batches of those of a second one (kTwo).
template <class T, bool kTwo>
__global__ void __launch_bounds__(kLowPassThreads, kColumnBlocks<T>)
    columns(const T* __restrict__ x, DeviceBand<T> band, DeviceBand<T> second, int64_t lines, Copies copies,
            const T* __restrict__ base, T* __restrict__ y) {
  constexpr int kPlaces = 32, kPitch = 33, kOutPitch = kBatch + 1, kEach = kPlaces / kWarps;
  __shared__ T memory[2 * kPlaces * kPitch], between[kTwo ? kBatch * kPitch : 1];
  __shared__ Reach reaches[kWarps + 1];
  static_assert(32 * kOutPitch <= 2 * kPlaces * kPitch);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = kTwo ? 0 : blockIdx.y;
  const int64_t line0 = int64_t{blockIdx.x} * 32;
  read_reaches(band, batch, reaches);
  const Reach &group = reaches[warp], &all = reaches[kWarps];
  T raw[kEach] = {};
  const auto fetch = [&](const Chunk<kPlaces>& chunk) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t line = line0 + warp + i * kWarps;
      if (line < lines && chunk.start + lane < chunk.end) raw[i] = x[line * band.n_in + chunk.start + lane];
    }
  };
  T sums[kGroup][1] = {};
  Chunk<kPlaces> chunk(all);
  fetch(chunk);
  for (int turn = 0;; turn ^= 1) {
    T* tile = memory + turn * kPlaces * kPitch;
#pragma unroll
    for (int i = 0; i < kEach; ++i) tile[lane * kPitch + warp + i * kWarps] = raw[i];
    __syncthreads();
    const Chunk<kPlaces> here = chunk;
    chunk.advance(all);
    const bool more = chunk.start < chunk.end;
    if (more) fetch(chunk);
    add_products(sums, reinterpret_cast<const Pack<T, 1>*>(tile + lane), kPitch, here, group, band.weights);
    if (!more) break;
  }
  // the block's sums to y, turned, so that a warp writes along a line
  const auto write = [&](int batch, int n_out) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) memory[lane * kOutPitch + warp * kGroup + i] = sums[i][0];
    __syncthreads();
    const int out = threadIdx.x % kBatch, j = batch * kBatch + out;
    for (int at = threadIdx.x / kBatch; at < 32 && line0 + at < lines; at += kLowPassThreads / kBatch) {
      if (j >= n_out) break;
      const T value = memory[at * kOutPitch + out];
      for (int copy = copies.first(blockIdx.z); copy < copies.last(blockIdx.z); ++copy) {
        const int64_t to = (int64_t{copy} * lines + line0 + at) * n_out + j;
        y[to] = base ? base[to] + value : value;
      }
    }
  };
  if constexpr (kTwo) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) between[(warp * kGroup + i) * kPitch + lane] = sums[i][0];
    __syncthreads();
    for (int b = blockIdx.y; b * kBatch < second.n_out; b += gridDim.y) {
      read_reaches(second, b, reaches);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sums[i][0] = 0;
      add_products(sums, reinterpret_cast<const Pack<T, 1>*>(between + lane), kPitch, Whole{0, band.n_out}, group,
                   second.weights);
      write(b, second.n_out);
    }
  } else {
    write(batch, band.n_out);
  }
}

// Places low to high - 1 of an endless line, folded onto its pixels.
inline Reach reach_of(const Line& line, int64_t low, int64_t high) {
  const int n = static_cast<int>(line.n);
  Reach reach{};
  if (high - low >= line.period()) {
    reach.end[0] = n;
  } else if (line.reflect) {
    reach.begin[0] = n;
    for (int64_t place = low; place < high; ++place) {
      const int at = static_cast<int>(line.at(place));
      reach.begin[0] = std::min(reach.begin[0], at), reach.end[0] = std::max(reach.end[0], at + 1);
    }
  } else {
    const int begin = static_cast<int>(line.at(low)), end = begin + static_cast<int>(high - low);
    reach.begin[0] = end <= n ? begin : 0, reach.end[0] = end <= n ? end : end - n;
    if (end > n) reach.begin[1] = begin, reach.end[1] = n;
  }
  return reach;
}

// A band as the device wants it, on the host.
template <class T>
struct PackedBand {
  int n_in = 0, n_out = 0;
  std::vector<T> weights;
  std::vector<Reach> groups, blocks;

  explicit PackedBand(const Band& band) : n_in(static_cast<int>(band.from.n)), n_out(static_cast<int>(band.rows())) {
    for (int first = 0; first < n_out; first += kGroup) add_group(band, first);
    for (int first = 0; first < n_out; first += kBatch) blocks.push_back(reach_of(band, first, kBatch));
  }

 private:
  Reach reach_of(const Band& band, int first, int count) const {  // the first places ascend
    const int last = std::min(first + count, n_out) - 1;
    return sage_fast::reach_of(band.from, band.first[first], band.first[last] + band.width);
  }
  void add_group(const Band& band, int first) {
    Reach reach = reach_of(band, first, kGroup);
    const int before = reach.end[0] - reach.begin[0], count = before + reach.end[1] - reach.begin[1];
    require(weights.size() / kGroup + count < (size_t{1} << 31), "gaussian_low_pass: too wide for so long an axis");
    reach.weights = static_cast<int>(weights.size() / kGroup);
    std::vector<double> sums(size_t(count) * kGroup);
    for (int i = 0; i < std::min(kGroup, n_out - first); ++i) {
      for (int64_t k = 0; k < band.width; ++k) {
        const int at = static_cast<int>(band.from.at(band.first[first + i] + k));
        const bool in_first = at >= reach.begin[0] && at < reach.end[0];
        const int row = in_first ? at - reach.begin[0] : at - reach.begin[1] + before;
        sums[size_t(row) * kGroup + i] += band.weights[(first + i) * band.width + k];
      }
    }
    weights.insert(weights.end(), sums.begin(), sums.end());
    groups.push_back(reach);
  }
};

// An axis on a device.
template <class T>
struct DeviceAxis {
  Tensor memory;
  DeviceBand<T> down, up;

  DeviceAxis(const Tensor& like, const LowPassAxis& axis, cudaStream_t stream) : memory(like) {
    const PackedBand<T> bands[2] = {PackedBand<T>(axis.down), PackedBand<T>(axis.up)};
    std::vector<unsigned char> bytes;
    const auto add = [&](const auto& values) {
      const size_t at = bytes.size(), size = values.size() * sizeof(values[0]);
      bytes.resize((at + size + 15) / 16 * 16);
      if (size > 0) std::memcpy(bytes.data() + at, values.data(), size);
      return at;
    };
    size_t at[2][3];
    for (int i = 0; i < 2; ++i) {
      at[i][0] = add(bands[i].weights), at[i][1] = add(bands[i].groups), at[i][2] = add(bands[i].blocks);
    }
    memory = torch::stable::new_empty(like, {static_cast<int64_t>(bytes.size() / sizeof(T))});
    STD_CUDA_CHECK(
        cudaMemcpyAsync(memory.mutable_data_ptr(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));  // other streams read it too
    const auto* start = static_cast<const unsigned char*>(memory.const_data_ptr());
    for (int i = 0; i < 2; ++i) {
      (i == 0 ? down : up) = {bands[i].n_in, bands[i].n_out, reinterpret_cast<const T*>(start + at[i][0]),
                              reinterpret_cast<const Reach*>(start + at[i][1]),
                              reinterpret_cast<const Reach*>(start + at[i][2])};
    }
  }
};

// Made at the first call and kept to the end: a captured graph reads it as long as it lives.
template <class T>
const DeviceAxis<T>& device_axis(const Tensor& like, int64_t n, const LowPassParams& p, cudaStream_t stream) {
  static std::mutex mutex;
  static auto& kept = *new std::map<std::tuple<int32_t, int64_t, double, bool, bool>, DeviceAxis<T>>();
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key(static_cast<int32_t>(like.get_device_index()), n, p.sigma, p.reflect, p.pixels);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capturing));
  require(capturing == cudaStreamCaptureStatusNone,
          "gaussian_low_pass: before a graph is captured, a call with the same sizes and sigma must have run");
  return kept.emplace(key, DeviceAxis<T>(like, low_pass_axis(n, p, kLowPassError<T>), stream)).first->second;
}

// How many copies a block writes: one, unless there are more blocks than fill a device.
inline Copies shared_among(int64_t copies, int64_t blocks) {
  return {static_cast<int>(copies),
          static_cast<int>(std::clamp<int64_t>(copies * blocks * kWarps / (4 * kManyWarps), 1, 8))};
}

template <class T, class Load>
Tensor multiply_rows(const Tensor& like, const Load& load, int64_t planes, int64_t w, const DeviceBand<T>& band,
                     cudaStream_t stream, const T* base = nullptr, int64_t count = 1) {
  Tensor y = torch::stable::new_empty(like, {count * planes, band.n_out, w});
  const unsigned batches = (band.n_out + kBatch - 1) / kBatch;
  const auto launch = [&](auto size) {
    constexpr int V = decltype(size)::value;
    const int strips = static_cast<int>((w + 32 * V - 1) / (32 * V));
    const Copies copies = shared_among(count, planes * strips * batches);
    const dim3 grid(static_cast<unsigned>(strips * ((count + copies.each - 1) / copies.each)), batches,
                    depth_for(planes));
    rows<T, V, Load><<<grid, kLowPassThreads, 0, stream>>>(load, band, RowsShape{planes, static_cast<int>(w), strips},
                                                           copies, base, mutable_data<T>(y));
  };
  // narrow planes leave lanes of packs idle
  const bool packed = w % pack_size<T> == 0 && w > 64 && load.aligned() && is_aligned(base) && is_aligned(data<T>(y));
  if (packed) {
    launch(std::integral_constant<int, pack_size<T>>());
  } else {
    launch(std::integral_constant<int, 1>());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// x [planes, n_mid, n_in] -> [count planes, n_mid, n_out], by one band or, at once, by two.
template <class T>
Tensor multiply_columns(const Tensor& x, const DeviceBand<T>& band, const DeviceBand<T>* second, cudaStream_t stream,
                        const T* base = nullptr, int64_t count = 1) {
  const int64_t lines = x.size(0) * x.size(1), blocks = (lines + 31) / 32;
  const int n_out = second ? second->n_out : band.n_out;
  unsigned batches = (n_out + kBatch - 1) / kBatch;
  Tensor y = torch::stable::new_empty(x, {count * x.size(0), x.size(1), n_out});
  Copies copies = shared_among(count, blocks * batches);
  copies.each = std::max(copies.each, static_cast<int>((count + kMostPlanes - 1) / kMostPlanes));
  const unsigned depth = static_cast<unsigned>((count + copies.each - 1) / copies.each);
  // few blocks make the first band anew for each batch of the second one
  if (second) batches = std::min(batches, 1 + static_cast<unsigned>(kManyWarps / (blocks * kWarps)));
  const dim3 grid(static_cast<unsigned>(blocks), batches, depth);
  const T* from = data<T>(x);
  T* to = mutable_data<T>(y);
  if (second) {
    columns<T, true><<<grid, kLowPassThreads, 0, stream>>>(from, band, *second, lines, copies, base, to);
  } else {
    columns<T, false><<<grid, kLowPassThreads, 0, stream>>>(from, band, band, lines, copies, base, to);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// Low-pass of load [planes, h, w], and base [count, planes, h, w], which may be null, beside it -> [count planes, h,
// w].
template <class T, class Load>
Tensor low_pass(const Tensor& like, const Load& load, int64_t planes, int64_t h, int64_t w, const LowPassParams& p,
                cudaStream_t stream, const T* base = nullptr, int64_t count = 1) {
  require(h <= 1 << 20 && w <= 1 << 20, "gaussian_low_pass: sides of at most 2^20 pixels");
  const DeviceAxis<T>&down = device_axis<T>(like, h, p, stream), &across = device_axis<T>(like, w, p, stream);
  const bool both = down.down.n_out > 0;
  Tensor x = multiply_rows(like, load, planes, w, both ? down.down : down.up, stream);
  const bool at_once = across.down.n_out > 0 && across.down.n_out <= kBatch;
  if (across.down.n_out > kBatch) x = multiply_columns<T>(x, across.down, nullptr, stream);
  const DeviceBand<T>&next = at_once ? across.down : across.up, *then = at_once ? &across.up : nullptr;
  if (!both) return multiply_columns(x, next, then, stream, base, count);
  x = multiply_columns<T>(x, next, then, stream);
  const PlainPlanes<T> plain{data<T>(x), x.size(1) * w};
  return multiply_rows(like, plain, planes, w, down.up, stream, base, count);
}

}  // namespace sage_fast
