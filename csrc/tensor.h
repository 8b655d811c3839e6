// The little of the stable ABI that the launches of both devices share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "contract.h"

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

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace sage_fast
