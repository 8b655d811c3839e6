#include "../latents.h"
#include "../project_onto_basis.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 8;  // rows of w per block: they share every load of the basis

template <class T>
__device__ T warp_sum(T v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;
}

// w [n, layers, dim], basis [layers, dim, rank] -> out [n, layers, dim].
// A block takes one layer and kSamples rows. Codes first, a warp each, then every thread sums rank products a value.
template <class T>
__global__ void run(const T* __restrict__ w, const T* __restrict__ basis, ProjectParams p, T* __restrict__ out) {
  extern __shared__ unsigned char memory[];
  T* codes = reinterpret_cast<T*>(memory);  // [kSamples, rank]
  const int64_t layer = blockIdx.y, first = int64_t{blockIdx.x} * kSamples;
  const int rows = static_cast<int>(p.n - first < kSamples ? p.n - first : kSamples);
  const T* b = basis + layer * p.basis_layer;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (int64_t job = warp; job < rows * p.rank; job += kThreads / 32) {
    const int64_t row = job / p.rank, r = job % p.rank;
    const T* in = w + (first + row) * p.w_row + layer * p.w_layer;
    T sum = 0;
    for (int64_t d = lane; d < p.dim; d += 32) sum += in[d] * b[d * p.basis_row + r];
    sum = warp_sum(sum);
    if (lane == 0) codes[job] = sum;
  }
  __syncthreads();
  for (int64_t job = threadIdx.x; job < rows * p.dim; job += kThreads) {
    const int64_t row = job / p.dim, d = job % p.dim;
    T sum = 0;
    for (int64_t r = 0; r < p.rank; ++r) sum += codes[row * p.rank + r] * b[d * p.basis_row + r];
    out[((first + row) * p.layers + layer) * p.dim + d] = sum;
  }
}

Tensor project_onto_basis(Tensor w_plus, Tensor basis) {
  check_projection(w_plus, basis);
  Scope stream(w_plus);
  w_plus = last_axis_contiguous(w_plus);
  basis = last_axis_contiguous(basis);
  const ProjectParams p = projection_params(w_plus, basis);
  require(p.layers <= 65535 && p.rank <= 512,
          "project_onto_basis: basis must have at most 65535 layers and 512 columns");
  Tensor out = new_latents(w_plus, p.n, p.layers, p.dim);
  if (w_plus.numel() == 0) return out;
  const dim3 grid(static_cast<unsigned>((p.n + kSamples - 1) / kSamples), static_cast<unsigned>(p.layers));
  dispatch(w_plus, [&](auto zero) {
    using T = decltype(zero);
    run<T><<<grid, kThreads, kSamples * p.rank * sizeof(T), stream>>>(data<T>(w_plus), data<T>(basis), p,
                                                                      mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("project_onto_basis", TORCH_BOX(&project_onto_basis)); }

}  // namespace sage_fast
