#include <cmath>

#include "../latents.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256, kColumns = 64, kSums = 8;
constexpr int kSamples = kThreads / kColumns * kSums;  // of a block
constexpr int kTerms = 16;                             // rows of the table in shared memory at a time

// out [n, columns] = weights [n, m] x (table - centre)[rows][:, columns].
// A block makes kSamples x kColumns sums, a thread kSums of one column; a row or column that is not there is NaN. The
// terms of a sum come in the order of rows, whatever else is asked for in the same call.
template <class T>
__global__ void __launch_bounds__(kThreads)
    run(const T* __restrict__ weights, const T* __restrict__ table, const T* __restrict__ centre,
        const int64_t* __restrict__ rows, const int64_t* __restrict__ columns, CombineParams p, int64_t table_rows,
        int64_t table_columns, T* __restrict__ out) {
  __shared__ T terms[kTerms][kColumns], factors[kTerms][kSamples + 1];
  const int lane = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const int64_t k = int64_t{blockIdx.x} * kColumns + lane, first = int64_t{blockIdx.y} * kSamples;
  const int64_t column = k < p.columns ? columns[k] : 0;
  const bool known = column >= 0 && column < table_columns;
  const T middle = known ? centre[column] : T(NAN);

  T sums[kSums] = {};
  for (int64_t m0 = 0; m0 < p.m; m0 += kTerms) {
    for (int i = group; i < kTerms; i += kThreads / kColumns) {
      const int64_t row = m0 + i < p.m ? rows[m0 + i] : 0;
      const bool inside = known && row >= 0 && row < table_rows;
      terms[i][lane] = m0 + i >= p.m ? T(0) : inside ? table[row * p.table_row + column] - middle : T(NAN);
    }
    for (int i = threadIdx.x; i < kTerms * kSamples; i += kThreads) {
      const int64_t n = first + i / kTerms, m = m0 + i % kTerms;
      factors[i % kTerms][i / kTerms] = n < p.n && m < p.m ? weights[n * p.weight_row + m] : T(0);
    }
    __syncthreads();
    for (int i = 0; i < kTerms; ++i) {
      const T term = terms[i][lane];
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] += factors[i][group * kSums + s] * term;
    }
    __syncthreads();
  }
  for (int s = 0; s < kSums; ++s) {
    const int64_t n = first + group * kSums + s;
    if (n < p.n && k < p.columns) out[n * p.columns + k] = sums[s];
  }
}

Tensor combine_rows(Tensor weights, Tensor table, Tensor centre, Tensor rows, Tensor columns) {
  check_combination(weights, table, centre, rows, columns);
  Scope stream(weights);
  weights = rows_contiguous(weights);
  table = rows_contiguous(table);
  centre = torch::stable::contiguous(centre);
  rows = torch::stable::contiguous(rows);
  columns = torch::stable::contiguous(columns);
  const CombineParams p{weights.size(0), rows.size(0), columns.size(0), weights.stride(0), table.stride(0)};
  Tensor out = torch::stable::new_empty(weights, {p.n, p.columns});
  if (out.numel() == 0) return out;
  const int64_t tiles = (p.n + kSamples - 1) / kSamples;
  require(tiles <= 65535, "combine_rows: weights must have at most 2097120 rows");
  const dim3 grid(static_cast<unsigned>((p.columns + kColumns - 1) / kColumns), static_cast<unsigned>(tiles));
  dispatch(weights, [&](auto zero) {
    using T = decltype(zero);
    run<T><<<grid, kThreads, 0, stream>>>(data<T>(weights), data<T>(table), data<T>(centre), data<int64_t>(rows),
                                          data<int64_t>(columns), p, table.size(0), table.size(1),
                                          mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("combine_rows", TORCH_BOX(&combine_rows)); }

}  // namespace sage_fast
