// Traffic at 1024 latents of 18 x 512 and 10 columns: 75 MB, 18 us at 4.2 TB/s, and 0.19 G products each way, 11 us in
// all at the rate of 132 multiprocessors; with four samples a warp its loads of columns from shared memory take as long
// as the products (four wavefronts of 16 bytes a lane for 64 of them).
#include "../latents.h"
#include "../project_onto_basis.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSamples = 8;                    // rows of w per block of `any`: they share every load of the basis
constexpr int kMostRank = 32, kMostPacks = 8;  // of a basis and, for a lane, of a row that `packed` takes

template <class T>
__device__ T warp_sum(T v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;
}

// w [n, layers, dim], basis [layers, dim, rank] -> out [n, layers, dim]; any sizes and strides.
// A block takes one layer and kSamples rows. Codes first, a warp each, then every thread sums rank products a value.
template <class T>
__global__ void any(const T* __restrict__ w, const T* __restrict__ basis, ProjectParams p, T* __restrict__ out) {
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

// v of all lanes -> in each lane the sum of v[lane % S]: S - 1 exchanges for S values, then one a doubling.
template <class T, int S>
__device__ T sums_of_each(T (&v)[S]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = S / 2, bit = 1; half > 0; half /= 2, bit *= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool odd = lane & bit;
      const T mine = odd ? v[2 * i + 1] : v[2 * i], other = odd ? v[2 * i] : v[2 * i + 1];
      v[i] = mine + __shfl_xor_sync(0xffffffffu, other, bit);
    }
  }
#pragma unroll
  for (int bit = S; bit < 32; bit *= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
  return v[0];
}

template <class T>
constexpr int kPackedBlocks = sizeof(T) == 4 ? 3 : 2;  // on a multiprocessor

// The same for dim <= 32 Packs packs. The columns of a layer's basis lie in shared memory, a column after the other; a
// warp has S samples in registers, from which it makes their codes, and then their sums of columns in the same place.
template <class T, int Packs, int S>
__global__ void __launch_bounds__(kThreads, kPackedBlocks<T>)
    packed(const T* __restrict__ w, const T* __restrict__ basis, ProjectParams p, T* __restrict__ out) {
  constexpr int N = pack_size<T>, kPitch = 32 * Packs + 1;  // rows begin in different banks
  using P = Pack<T, N>;
  extern __shared__ __align__(32) unsigned char memory[];
  const int n = static_cast<int>(p.n), dim = static_cast<int>(p.dim), rank = static_cast<int>(p.rank), packs = dim / N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t layer = blockIdx.y;
  Pack<T, S>* codes = reinterpret_cast<Pack<T, S>*>(memory) + warp * rank;         // [kWarps][rank]
  P* columns = reinterpret_cast<P*>(memory + kWarps * rank * sizeof(Pack<T, S>));  // [rank][kPitch]

  for (int i = threadIdx.x; i < rank * kPitch; i += kThreads) {
    if (i % kPitch >= packs) columns[i] = P{};
  }
  const T* b = basis + layer * p.basis_layer;
  constexpr int kOnTheirWay = 8;
  const int more_rows = kThreads / rank, more_columns = kThreads % rank;
  for (int i = threadIdx.x; i < dim * rank; i += kOnTheirWay * kThreads) {
    T read[kOnTheirWay];
    int at[kOnTheirWay], d = i / rank, r = i % rank;
#pragma unroll
    for (int k = 0; k < kOnTheirWay; ++k) {
      at[k] = r * kPitch * N + d;
      if (d < dim) read[k] = b[d * p.basis_row + r];
      d += more_rows, r += more_columns;
      if (r >= rank) r -= rank, ++d;
    }
#pragma unroll
    for (int k = 0; k < kOnTheirWay; ++k) {
      if (i + k * kThreads < dim * rank) reinterpret_cast<T*>(columns)[at[k]] = read[k];
    }
  }
  __syncthreads();

  const int first = (static_cast<int>(blockIdx.x) * kWarps + warp) * S;
  if (first >= n) return;
  P values[S][Packs] = {};
#pragma unroll
  for (int s = 0; s < S; ++s) {
    if (first + s >= n) continue;
    const P* in = reinterpret_cast<const P*>(w + (int64_t{first} + s) * p.w_row + layer * p.w_layer);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      if (lane + 32 * i < packs) values[s][i] = read_once(in + lane + 32 * i);
    }
  }
#pragma unroll 1
  for (int r = 0; r < rank; ++r) {
    T sums[S] = {};
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const P column = columns[r * kPitch + lane + 32 * i];
#pragma unroll
      for (int s = 0; s < S; ++s) {
#pragma unroll
        for (int k = 0; k < N; ++k) sums[s] += values[s][i].v[k] * column.v[k];
      }
    }
    const T code = sums_of_each(sums);
    if (lane < S) codes[r].v[lane] = code;
  }
  __syncwarp();
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int i = 0; i < Packs; ++i) values[s][i] = P{};
  }
#pragma unroll 1
  for (int r = 0; r < rank; ++r) {
    const Pack<T, S> code = codes[r];
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const P column = columns[r * kPitch + lane + 32 * i];
#pragma unroll
      for (int s = 0; s < S; ++s) {
#pragma unroll
        for (int k = 0; k < N; ++k) values[s][i].v[k] += code.v[s] * column.v[k];
      }
    }
  }
#pragma unroll
  for (int s = 0; s < S; ++s) {
    if (first + s >= n) continue;
    P* to = reinterpret_cast<P*>(out + ((int64_t{first} + s) * p.layers + layer) * p.dim);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      if (lane + 32 * i < packs) to[lane + 32 * i] = values[s][i];
    }
  }
}

// Whether the basis fits into the device's shared memory; if so, launches.
template <class T, int Packs>
bool launch_packed(const T* w, const T* basis, const ProjectParams& p, T* out, cudaStream_t stream) {
  constexpr int S = Packs * pack_size<T> * (sizeof(T) / 4) > 16 ? 2 : 4;  // 64 registers of samples at most
  constexpr int kBlock = S * kWarps;
  constexpr auto shared = [](int64_t rank) {
    return static_cast<int>(rank * ((32 * Packs + 1) * 16 + kBlock * int{sizeof(T)}));
  };
  if (shared(p.rank) > kUsuallyShared) {
    const int most = std::min(shared(kMostRank), most_shared());
    if (shared(p.rank) > most) return false;
    allow_shared(packed<T, Packs, S>, most);
  }
  const dim3 grid(static_cast<unsigned>((p.n + kBlock - 1) / kBlock), static_cast<unsigned>(p.layers));
  packed<T, Packs, S><<<grid, kThreads, shared(p.rank), stream>>>(w, basis, p, out);
  return true;
}

// Whether `packed` takes the sizes: rows of whole packs, not too many, and few columns.
template <class T>
bool fits_packed(const ProjectParams& p) {
  constexpr int N = pack_size<T>;
  return p.dim % N == 0 && p.dim <= 32 * kMostPacks * N && p.rank > 0 && p.rank <= kMostRank && p.n < 1 << 30;
}

template <class T>
void launch(Tensor w_plus, const Tensor& basis, ProjectParams p, T* out, cudaStream_t stream) {
  constexpr int N = pack_size<T>;
  const bool fits = fits_packed<T>(p);
  if (fits && (p.w_row % N != 0 || p.w_layer % N != 0)) {
    w_plus = torch::stable::contiguous(w_plus);  // so that the bits do not depend on strides
    p = projection_params(w_plus, basis);
  }
  const T *w = data<T>(w_plus), *b = data<T>(basis);
  if (fits && is_aligned(w)) {
    const auto go = p.dim <= 32 * N    ? launch_packed<T, 1>
                    : p.dim <= 128 * N ? launch_packed<T, 4>
                                       : launch_packed<T, kMostPacks>;
    if (go(w, b, p, out, stream)) return;
  }
  const dim3 grid(static_cast<unsigned>((p.n + kSamples - 1) / kSamples), static_cast<unsigned>(p.layers));
  any<T><<<grid, kThreads, kSamples * p.rank * sizeof(T), stream>>>(w, b, p, out);
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
  dispatch(w_plus, [&](auto zero) {
    using T = decltype(zero);
    launch<T>(w_plus, basis, p, mutable_data<T>(out), stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("project_onto_basis", TORCH_BOX(&project_onto_basis)); }

}  // namespace sage_fast
