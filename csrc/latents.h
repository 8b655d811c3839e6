// What the launches of project_onto_basis, least_squares_codes, edit_latents and combine_rows share on both devices:
// checks and strides.
#pragma once

#include "combine_rows.h"
#include "edit_latents.h"
#include "least_squares_codes.h"
#include "project_onto_basis.h"
#include "tensor.h"

namespace sage_fast {

// The kernels take any strides but that of the last axis.
inline Tensor last_axis_contiguous(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

// [n, layers, last] without values, of like's dtype and device.
inline Tensor new_latents(const Tensor& like, int64_t n, int64_t layers, int64_t last) {
  const int64_t sizes[3] = {n, layers, last}, strides[3] = {layers * last, last, 1};
  return new_strided(like, 3, sizes, strides);
}

inline Tensor rows_contiguous(const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

inline void check_combination(const Tensor& weights, const Tensor& table, const Tensor& centre, const Tensor& rows,
                              const Tensor& columns) {
  require(weights.dim() == 2 && table.dim() == 2 && rows.dim() == 1 && columns.dim() == 1 && centre.dim() == 1 &&
              centre.size(0) == table.size(1),
          "combine_rows: weights must be [N, m], table [M, C], centre [C], rows [m] and columns [K]");
  require(weights.size(1) == rows.size(0), "combine_rows: weights must have one column for each of rows");
  require(weights.scalar_type() == table.scalar_type() && weights.scalar_type() == centre.scalar_type(),
          "combine_rows: table and centre must have the dtype of weights");
  require(rows.scalar_type() == ScalarType::Long && columns.scalar_type() == ScalarType::Long,
          "combine_rows: rows and columns must be int64");
}

inline void check_projection(const Tensor& w_plus, const Tensor& basis) {
  require(w_plus.dim() == 3 && basis.dim() == 3, "project_onto_basis: w_plus must be [N, L, D] and basis [L, D, R]");
  require(basis.size(0) == w_plus.size(1) && basis.size(1) == w_plus.size(2),
          "project_onto_basis: basis must be [L, D, R] of w_plus");
  require(basis.scalar_type() == w_plus.scalar_type() && basis.is_cuda() == w_plus.is_cuda(),
          "project_onto_basis: basis must have the dtype and device of w_plus");
}

inline ProjectParams projection_params(const Tensor& w_plus, const Tensor& basis) {
  return {w_plus.size(0),   w_plus.size(1),   w_plus.size(2),  basis.size(2),
          w_plus.stride(0), w_plus.stride(1), basis.stride(0), basis.stride(1)};
}

inline void check_codes(const Tensor& delta_w, const Tensor& pseudo_inverse) {
  require(delta_w.dim() == 3 && pseudo_inverse.dim() == 3,
          "least_squares_codes: delta_w must be [N, L, D] and pseudo_inverse [L, K, D]");
  require(pseudo_inverse.size(0) == delta_w.size(1) && pseudo_inverse.size(2) == delta_w.size(2),
          "least_squares_codes: pseudo_inverse must be [L, K, D] of delta_w");
  require(pseudo_inverse.scalar_type() == delta_w.scalar_type() && pseudo_inverse.is_cuda() == delta_w.is_cuda(),
          "least_squares_codes: pseudo_inverse must have the dtype and device of delta_w");
}

inline CodesParams codes_params(const Tensor& delta_w, const Tensor& pseudo_inverse) {
  return {delta_w.size(0),   delta_w.size(1),   delta_w.size(2),          pseudo_inverse.size(1),
          delta_w.stride(0), delta_w.stride(1), pseudo_inverse.stride(0), pseudo_inverse.stride(1)};
}

inline void check_edit(const Tensor& class_embedding, const Tensor& codes, const Tensor& directions,
                       const std::optional<Tensor>& mask, const std::optional<Tensor>& class_index) {
  require(codes.dim() == 3 && class_embedding.dim() == 3 && directions.dim() == 3,
          "edit_latents: class_embedding must be [B, L, D], codes [N, L, K] and directions [L, D, K]");
  const int64_t n = codes.size(0), layers = codes.size(1), k = codes.size(2), rows = class_embedding.size(0);
  require(directions.size(0) == layers && directions.size(2) == k,
          "edit_latents: directions must be [L, D, K] of codes");
  require(class_embedding.size(1) == layers && class_embedding.size(2) == directions.size(1),
          "edit_latents: class_embedding must be [B, L, D] of directions");
  for (const Tensor* x : {&class_embedding, &directions}) {
    require(x->scalar_type() == codes.scalar_type() && x->is_cuda() == codes.is_cuda(),
            "edit_latents: class_embedding, codes and directions must have one dtype and device");
  }
  if (class_index.has_value()) {
    require(class_index->dim() == 1 && class_index->size(0) == n && class_index->scalar_type() == ScalarType::Long &&
                class_index->is_cuda() == codes.is_cuda(),
            "edit_latents: class_index must be int64 [N] on the device of codes");
  } else {
    require(rows == 1 || rows == n, "edit_latents: class_embedding must hold 1 or N rows without class_index");
  }
  if (mask.has_value()) {
    require(mask->dim() == 3 && (mask->size(0) == 1 || mask->size(0) == rows) && mask->size(1) == layers &&
                mask->size(2) == k && mask->scalar_type() == ScalarType::Bool && mask->is_cuda() == codes.is_cuda(),
            "edit_latents: mask must be bool [1 or B, L, K] on the device of codes");
  }
}

inline EditParams edit_params(const Tensor& class_embedding, const Tensor& codes, const Tensor& directions,
                              const std::optional<Tensor>& mask, double alpha) {
  return {codes.size(0),
          codes.size(1),
          directions.size(1),
          codes.size(2),
          class_embedding.size(0),
          mask.has_value() ? mask->size(0) : 0,
          class_embedding.stride(0),
          class_embedding.stride(1),
          codes.stride(0),
          codes.stride(1),
          directions.stride(0),
          directions.stride(1),
          alpha};
}

}  // namespace sage_fast
