#include "../latents.h"
#include "../least_squares_codes.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kWarps = 8, kSamples = 8;
constexpr int kColumns = 32 / kSamples;  // of a warp: a lane for each sum

// Lane i of the warp: the sum over all lanes of v[i]. Each round halves the values and doubles the lanes of each.
template <class T>
__device__ T sum_of_each(T (&v)[32], int lane) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    const bool high = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T sent = high ? v[i] : v[i + half], kept = high ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, half);
    }
  }
  return v[0];
}

// w [n, layers, dim], pinv [layers, k, dim] -> out [n, layers, k].
// A warp takes one layer, kSamples rows of w and kColumns rows of pinv; its lanes share the sums over dim.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    run(const T* __restrict__ w, const T* __restrict__ pinv, CodesParams p, T* __restrict__ out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t blocks_of_k = (p.k + kWarps * kColumns - 1) / (kWarps * kColumns), layer = blockIdx.y;
  const int64_t first = blockIdx.x / blocks_of_k * kSamples;
  const int64_t column = (blockIdx.x % blocks_of_k * kWarps + warp) * kColumns;
  if (column >= p.k) return;
  const T *samples[kSamples], *columns[kColumns];  // beyond the last: the last again, whose sums are not written
  for (int s = 0; s < kSamples; ++s) samples[s] = w + min(first + s, p.n - 1) * p.w_row + layer * p.w_layer;
  for (int c = 0; c < kColumns; ++c) columns[c] = pinv + layer * p.pinv_layer + min(column + c, p.k - 1) * p.pinv_row;
  T sums[32] = {};
  for (int64_t d = lane; d < p.dim; d += 32) {
    T a[kColumns];
    for (int c = 0; c < kColumns; ++c) a[c] = columns[c][d];
    for (int s = 0; s < kSamples; ++s) {
      const T value = samples[s][d];
      for (int c = 0; c < kColumns; ++c) sums[s * kColumns + c] += value * a[c];
    }
  }
  const T sum = sum_of_each(sums, lane);
  const int64_t sample = first + lane / kColumns, k = column + lane % kColumns;
  if (sample < p.n && k < p.k) out[(sample * p.layers + layer) * p.k + k] = sum;
}

Tensor least_squares_codes(Tensor delta_w, Tensor pseudo_inverse) {
  check_codes(delta_w, pseudo_inverse);
  Scope stream(delta_w);
  delta_w = last_axis_contiguous(delta_w);
  pseudo_inverse = last_axis_contiguous(pseudo_inverse);
  const CodesParams p = codes_params(delta_w, pseudo_inverse);
  Tensor out = new_latents(delta_w, p.n, p.layers, p.k);
  if (p.n * p.layers * p.k == 0) return out;
  constexpr int64_t of_k = kWarps * kColumns;
  const int64_t blocks = (p.n + kSamples - 1) / kSamples * ((p.k + of_k - 1) / of_k);
  require(p.layers <= 65535 && blocks <= 2147483647,
          "least_squares_codes: delta_w must have at most 65535 layers, and N * K at most 2^39");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.layers));
  dispatch(delta_w, [&](auto zero) {
    using T = decltype(zero);
    run<T><<<grid, kWarps * 32, 0, stream>>>(data<T>(delta_w), data<T>(pseudo_inverse), p, mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("least_squares_codes", TORCH_BOX(&least_squares_codes)); }

}  // namespace sage_fast
