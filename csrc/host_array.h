// NumPy arguments as the kernels want them, and errors that name them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "dtype.h"

namespace sage_fast {

namespace py = pybind11;

[[noreturn]] inline void refuse(const std::string& name, const std::string& expected, const std::string& came) {
  throw py::value_error(name + " must " + expected + ", got " + came + ".");
}

using Flags = py::detail::npy_api;
constexpr int dense = int(Flags::NPY_ARRAY_C_CONTIGUOUS_) | int(Flags::NPY_ARRAY_ALIGNED_);

inline std::string text(const std::vector<int64_t>& shape) {
  std::string all = "[";
  for (size_t i = 0; i < shape.size(); ++i) all += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return all + "]";
}

inline std::string text(const py::dtype& dtype) { return py::str(py::handle(dtype)); }

inline py::dtype dtype_of(Dtype dtype) {
  return py::dtype(dtype == Dtype::float32 ? "float32" : dtype == Dtype::float64 ? "float64" : "float16");
}

// An argument, dense in C order: read in place where it lies so, else copied.
class Array {
 public:
  Array(const py::array& given, const char* name) : name_(name), kept_(py::array::ensure(given, dense)) {
    if (!kept_) throw std::bad_alloc();
    for (py::ssize_t i = 0; i < kept_.ndim(); ++i) shape_.push_back(kept_.shape(i));
  }

  const char* name() const { return name_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t dim() const { return static_cast<int64_t>(shape_.size()); }
  int64_t operator[](int64_t axis) const { return shape_[axis]; }
  int64_t numel() const { return kept_.size(); }
  py::dtype dtype() const { return kept_.dtype(); }
  const void* raw() const { return kept_.data(); }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(kept_.data());
  }
  const char* end() const { return data<char>() + kept_.nbytes(); }

  // of a floating kind that this machine reads as it lies; half: float16 too
  Dtype floating(bool half = false) const {
    const py::dtype found = dtype();
    if (found.kind() == 'f' && found.byteorder() == '=') {
      if (found.itemsize() == 4) return Dtype::float32;
      if (found.itemsize() == 8) return Dtype::float64;
      if (found.itemsize() == 2 && half) return Dtype::float16;
    }
    refuse(name_, half ? "be float32, float64 or float16" : "be float32 or float64", text(found));
  }

  void need_dtype(Dtype wanted, const Array& like) const {
    const py::dtype found = dtype_of(wanted);
    if (!dtype().equal(found)) refuse(name_, "be " + text(found) + ", as " + like.name_ + " is", text(dtype()));
  }
  void need_dim(int64_t dim, const char* letters) const {
    if (this->dim() != dim) refuse(name_, std::string("have shape ") + letters, text(shape_));
  }
  void need_shape(const std::vector<int64_t>& wanted, const char* letters) const {
    if (shape_ != wanted) refuse(name_, std::string("have shape ") + letters + " = " + text(wanted), text(shape_));
  }

 private:
  const char* name_;
  py::array kept_;
  std::vector<int64_t> shape_;
};

// The array of a result: `out` where given, which is checked, else a new one; apart_from may hold null.
inline py::array result(const std::optional<py::array>& out, const std::vector<int64_t>& shape, Dtype dtype,
                        std::initializer_list<const Array*> apart_from) {
  if (!out) return py::array(dtype_of(dtype), shape);
  const std::vector<int64_t> found(out->shape(), out->shape() + out->ndim());
  if (found != shape) refuse("out", "have shape " + text(shape), text(found));
  if (!out->dtype().equal(dtype_of(dtype))) refuse("out", "be " + text(dtype_of(dtype)), text(out->dtype()));
  constexpr int usable = dense | int(Flags::NPY_ARRAY_WRITEABLE_);
  if ((out->flags() & usable) != usable) refuse("out", "be C-contiguous, aligned and writeable", "another array");
  const char *begin = static_cast<const char*>(out->data()), *end = begin + out->nbytes();
  for (const Array* other : apart_from) {
    if (other != nullptr && begin < other->end() && other->data<char>() < end) {
      refuse("out", std::string("not overlap ") + other->name(), "one memory for both");
    }
  }
  return *out;
}

}  // namespace sage_fast
