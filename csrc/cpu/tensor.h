// The little of the stable ABI that the CPU launches share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "../contract.h"

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

// torch's own thread pool; body(begin, end). At least `grain` items a task.
template <class F>
void parallel(int64_t n, int64_t grain, F&& body) {
  if (n <= 0) return;
  torch::stable::parallel_for(0, n, grain > 0 ? grain : 1, body);
}

}  // namespace sage_fast
