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
  const T* b = basis + layer * p.dim * p.rank;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (int64_t job = warp; job < rows * p.rank; job += kThreads / 32) {
    const int64_t row = job / p.rank, r = job % p.rank;
    const T* in = w + ((first + row) * p.layers + layer) * p.dim;
    T sum = 0;
    for (int64_t d = lane; d < p.dim; d += 32) sum += in[d] * b[d * p.rank + r];
    sum = warp_sum(sum);
    if (lane == 0) codes[job] = sum;
  }
  __syncthreads();
  for (int64_t job = threadIdx.x; job < rows * p.dim; job += kThreads) {
    const int64_t row = job / p.dim, d = job % p.dim;
    T sum = 0;
    for (int64_t r = 0; r < p.rank; ++r) sum += codes[row * p.rank + r] * b[d * p.rank + r];
    out[((first + row) * p.layers + layer) * p.dim + d] = sum;
  }
}

Tensor project_onto_basis(Tensor w_plus, Tensor basis) {
  require(w_plus.dim() == 3 && basis.dim() == 3, "project_onto_basis: w_plus must be [N, L, D] and basis [L, D, R]");
  ProjectParams p{w_plus.size(0), w_plus.size(1), w_plus.size(2), basis.size(2)};
  require(basis.size(0) == p.layers && basis.size(1) == p.dim, "project_onto_basis: basis must be [L, D, R] of w_plus");
  require(basis.scalar_type() == w_plus.scalar_type() && w_plus.is_cuda() && basis.is_cuda(),
          "project_onto_basis: basis must have the dtype and device of w_plus");
  require(p.layers <= 65535 && p.rank <= 512, "project_onto_basis: at most 65535 layers and 512 columns");
  Scope stream(w_plus);
  w_plus = torch::stable::contiguous(w_plus);
  basis = torch::stable::contiguous(basis);
  Tensor out = torch::stable::empty_like(w_plus);
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
