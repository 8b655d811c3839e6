// The little of the stable ABI that the launches of both devices share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "contract.h"
#include "dtype.h"

namespace sage_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T{}) for the scalar type of a tensor.
template <class F>
void dispatch(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    require(x.scalar_type() == ScalarType::Double, "the kernels take float32 and float64");
    f(double{});
  }
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      require(x.scalar_type() == ScalarType::Half, "the kernels take float32, float64, bfloat16 and float16");
      return Dtype::float16;
  }
}

// Whether x [N, C, H, W] lies in memory as [N, H, W, C], and not also as it is written.
inline bool channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// Without values, of like's dtype and device. By the C function: the op of the dispatcher takes as long as a small
// kernel.
inline Tensor new_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int32_t dtype, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device, like.get_device_index(), &made));
  return Tensor(made);
}

// As like, which is dense, lies.
inline Tensor new_like(const Tensor& like) {
  return new_strided(like, like.dim(), like.sizes().data(), like.strides().data());
}

// [N, C, H, W], channels first or last.
inline Tensor new_images(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool last) {
  const int64_t sizes[4] = {n, c, h, w}, first_strides[4] = {c * h * w, h * w, w, 1},
                last_strides[4] = {c * h * w, 1, w * c, c};
  return new_strided(like, 4, sizes, last ? last_strides : first_strides);
}

// The values of x, unless its memory was freed under it, as FSDP does with weights that are gathered between their
// uses.
inline const void* values(const Tensor& x) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  require(bytes > 0 || x.numel() == 0, "a tensor has no memory; it was freed, as FSDP frees weights after their use");
  return x.const_data_ptr();
}
template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(values(x));
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace sage_fast
