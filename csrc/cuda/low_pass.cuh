// Gaussian low-pass of planes on the device, for gaussian_low_pass.cu and fuse_frequencies.cu: the bands of
// ../gaussian_low_pass.h, down and up along rows and columns.
#pragma once

#include "../gaussian_low_pass.h"
#include "common.cuh"

namespace sage_fast {

constexpr int kTile = 32, kTileRows = 8;  // a block makes 32 x 32 outputs with 32 x 8 threads

struct BandShape {
  int64_t planes, lines;  // kColumns: lines in all, planes is 1
  int n_in, n_out, width, period;
};

// x [planes, n_in, lines] (kColumns: [lines, n_in]) -> y [planes, n_out, lines] (kColumns: [lines, n_out]), plus base,
// laid out as y, which may be null. first [n_out] ascends, weights [n_out, width]. The places that a block's outputs
// need pass through shared memory 32 at a time; lanes lie along the lines, so that a warp has one weight.
template <class T, bool kColumns>
__global__ void banded(const T* __restrict__ x, const int* __restrict__ first, const T* __restrict__ weights,
                       BandShape s, const T* __restrict__ base, T* __restrict__ y) {
  __shared__ T tile[kTile][kTile + 1];
  constexpr int kEach = kTile / kTileRows;
  const int tx = threadIdx.x, ty = threadIdx.y, j0 = blockIdx.y * kTile;
  const int64_t line0 = int64_t{blockIdx.x} * kTile;
  const int low = first[j0], high = first[min(j0 + kTile, s.n_out) - 1] + s.width;
  for (int64_t plane = blockIdx.z; plane < s.planes; plane += gridDim.z) {
    const T* in = x + plane * s.n_in * s.lines;
    T sums[kEach] = {};
    for (int start = low; start < high; start += kTile) {
      for (int r = ty; r < kTile; r += kTileRows) {
        const int place = start + (kColumns ? tx : r);
        const int64_t line = line0 + (kColumns ? r : tx);
        T value = 0;
        if (place < high && line < s.lines) {
          int at = place % s.period;
          at += at < 0 ? s.period : 0;
          at = at < s.n_in ? at : s.period - at;
          value = in[kColumns ? line * s.n_in + at : at * s.lines + line];
        }
        tile[kColumns ? tx : r][kColumns ? r : tx] = value;
      }
      __syncthreads();
      for (int e = 0; e < kEach; ++e) {
        const int j = j0 + ty + e * kTileRows;
        if (j >= s.n_out) continue;
        const int shift = start - first[j];  // weight of the tile's first place
        const T* row = weights + int64_t{j} * s.width + shift;
        for (int k = max(0, -shift); k < min(kTile, s.width - shift); ++k) sums[e] += row[k] * tile[k][tx];
      }
      __syncthreads();
    }
    if (kColumns) {  // turned, so that a warp writes along a row
      for (int e = 0; e < kEach; ++e) tile[ty + e * kTileRows][tx] = sums[e];
      __syncthreads();
    }
    for (int e = 0; e < kEach; ++e) {
      const int across = ty + e * kTileRows, j = j0 + (kColumns ? tx : across);
      const int64_t line = line0 + (kColumns ? across : tx);
      if (j >= s.n_out || line >= s.lines) continue;
      const int64_t to = kColumns ? line * s.n_out + j : (plane * s.n_out + j) * s.lines + line;
      const T value = kColumns ? tile[tx][across] : sums[e];
      y[to] = base ? base[to] + value : value;
    }
    __syncthreads();
  }
}

// A band as the device wants it.
template <class T>
struct PackedBand {
  BandShape shape{};
  std::vector<int> first;
  std::vector<T> weights;

  explicit PackedBand(const Band& band) : first(band.first.begin(), band.first.end()) {
    weights.assign(band.weights.begin(), band.weights.end());
    shape.n_in = static_cast<int>(band.from.n), shape.n_out = static_cast<int>(band.rows());
    shape.width = static_cast<int>(band.width), shape.period = static_cast<int>(band.from.period());
  }
};

template <class T>
struct PackedLowPass {
  PackedBand<T> rows_down, cols_down, cols_up, rows_up;

  PackedLowPass(int64_t h, int64_t w, const LowPassParams& p)
      : PackedLowPass(low_pass_axis(h, p, kLowPassError<T>), low_pass_axis(w, p, kLowPassError<T>)) {}
  PackedLowPass(const LowPassAxis& rows, const LowPassAxis& cols)
      : rows_down(rows.down), cols_down(cols.down), cols_up(cols.up), rows_up(rows.up) {}
};

// x [planes, h, w] along its rows (kColumns: columns) -> [planes, n_out, w] ([planes, h, n_out]).
template <class T, bool kColumns>
Tensor multiply(const Tensor& x, const PackedBand<T>& band, cudaStream_t stream, const T* base = nullptr) {
  BandShape s = band.shape;
  const int64_t planes = x.size(0), h = x.size(1), w = x.size(2);
  s.planes = kColumns ? 1 : planes, s.lines = kColumns ? planes * h : w;
  Tensor y = torch::stable::new_empty(x, {planes, kColumns ? h : s.n_out, kColumns ? s.n_out : w});
  Tensor weights = torch::stable::new_empty(x, {static_cast<int64_t>(band.weights.size())});
  Tensor first = torch::stable::new_empty(x, {s.n_out}, ScalarType::Int);
  // pageable memory: the call returns only when the host's may be reused
  STD_CUDA_CHECK(cudaMemcpyAsync(weights.mutable_data_ptr(), band.weights.data(), band.weights.size() * sizeof(T),
                                 cudaMemcpyHostToDevice, stream));
  STD_CUDA_CHECK(cudaMemcpyAsync(first.mutable_data_ptr(), band.first.data(), band.first.size() * sizeof(int),
                                 cudaMemcpyHostToDevice, stream));
  const dim3 grid(static_cast<unsigned>((s.lines + kTile - 1) / kTile),
                  static_cast<unsigned>((s.n_out + kTile - 1) / kTile), depth_for(s.planes));
  banded<T, kColumns><<<grid, dim3(kTile, kTileRows), 0, stream>>>(
      data<T>(x), static_cast<const int*>(first.const_data_ptr()), data<T>(weights), s, base, mutable_data<T>(y));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// x [planes, h, w] -> low-pass + base, which may be null.
template <class T>
Tensor low_pass(Tensor x, const LowPassParams& p, cudaStream_t stream, const T* base) {
  require(x.size(1) <= 1 << 20 && x.size(2) <= 1 << 20, "gaussian_low_pass: sides of at most 2^20 pixels");
  const auto plan = recent_plan<PackedLowPass<T>>(x.size(1), x.size(2), p);
  if (plan->rows_down.shape.n_out) x = multiply<T, false>(x, plan->rows_down, stream);
  if (plan->cols_down.shape.n_out) x = multiply<T, true>(x, plan->cols_down, stream);
  x = multiply<T, true>(x, plan->cols_up, stream);
  return multiply<T, false>(x, plan->rows_up, stream, base);
}

}  // namespace sage_fast
