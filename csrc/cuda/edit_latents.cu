#include "../edit_latents.h"
#include "../latents.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256, kDim = 64, kSamples = 32, kDepth = 32;  // of a block's tile
constexpr int kEach = kDim * kSamples / kThreads;                     // values a thread

// embeddings [rows, layers, dim], codes [n, layers, k], directions [layers, dim, k], mask [mask_rows, layers, k] or
// null, index [n] or null -> out [n, layers, dim], NaN for a sample whose index is no row. A block takes one layer,
// kDim values and kSamples samples; its pieces of the directions and of the masked codes lie in shared memory, kDepth
// directions at a time.
template <class T>
__global__ void run(const T* __restrict__ embeddings, const T* __restrict__ codes, const T* __restrict__ directions,
                    const uint8_t* __restrict__ mask, const int64_t* __restrict__ index, EditParams p,
                    T* __restrict__ out) {
  __shared__ T a[kDepth][kDim + 1], c[kDepth][kSamples + 1];
  const int64_t layer = blockIdx.z, first_d = int64_t{blockIdx.y} * kDim, first_i = int64_t{blockIdx.x} * kSamples;
  const int d = threadIdx.x % kDim, s = threadIdx.x / kDim;
  const auto row_of = [&](int64_t i) -> int64_t { return index != nullptr ? index[i] : p.rows > 1 ? i : 0; };
  const auto is_row = [&](int64_t row) { return row >= 0 && row < p.rows; };

  T sum[kEach] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
    const int j = threadIdx.x % kDepth;
    for (int at = threadIdx.x / kDepth; at < kDim; at += kThreads / kDepth) {
      const bool inside = first_d + at < p.dim && k0 + j < p.k;
      a[j][at] = inside ? directions[layer * p.direction_layer + (first_d + at) * p.direction_row + k0 + j] : T(0);
    }
    for (int at = threadIdx.x / kDepth; at < kSamples; at += kThreads / kDepth) {
      const int64_t i = first_i + at;
      bool used = i < p.n && k0 + j < p.k;
      if (used && mask != nullptr) {
        const int64_t row = p.mask_rows > 1 ? row_of(i) : 0;
        used = is_row(row) && mask[(row * p.layers + layer) * p.k + k0 + j] != 0;
      }
      c[j][at] = used ? codes[i * p.code_row + layer * p.code_layer + k0 + j] : T(0);
    }
    __syncthreads();
    for (int depth = 0; depth < kDepth; ++depth) {
      const T direction = a[depth][d];
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum[e] += direction * c[depth][s + e * (kThreads / kDim)];
    }
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t i = first_i + s + e * (kThreads / kDim), at = first_d + d;
    if (i < p.n && at < p.dim) {
      const int64_t row = row_of(i);
      const T base = is_row(row) ? embeddings[row * p.embedding_row + layer * p.embedding_layer + at] : T(NAN);
      out[(i * p.layers + layer) * p.dim + at] = base + static_cast<T>(p.alpha) * sum[e];
    }
  }
}

Tensor edit_latents(Tensor class_embedding, Tensor codes, Tensor directions, double alpha, std::optional<Tensor> mask,
                    std::optional<Tensor> class_index) {
  check_edit(class_embedding, codes, directions, mask, class_index);
  Scope stream(codes);
  class_embedding = last_axis_contiguous(class_embedding);
  codes = last_axis_contiguous(codes);
  directions = last_axis_contiguous(directions);
  if (mask.has_value()) mask = torch::stable::contiguous(*mask);
  if (class_index.has_value()) class_index = torch::stable::contiguous(*class_index);
  const EditParams p = edit_params(class_embedding, codes, directions, mask, alpha);
  const int64_t tiles = (p.dim + kDim - 1) / kDim;
  require(p.layers <= 65535 && tiles <= 65535, "edit_latents: at most 65535 layers and 4194240 dimensions");
  Tensor out = new_latents(codes, p.n, p.layers, p.dim);
  if (p.n * p.layers * p.dim == 0) return out;
  const dim3 grid(static_cast<unsigned>((p.n + kSamples - 1) / kSamples), static_cast<unsigned>(tiles),
                  static_cast<unsigned>(p.layers));
  dispatch(codes, [&](auto zero) {
    using T = decltype(zero);
    run<T><<<grid, kThreads, 0, stream>>>(data<T>(class_embedding), data<T>(codes), data<T>(directions),
                                          mask.has_value() ? data<uint8_t>(*mask) : nullptr,
                                          class_index.has_value() ? data<int64_t>(*class_index) : nullptr, p,
                                          mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("edit_latents", TORCH_BOX(&edit_latents)); }

}  // namespace sage_fast
