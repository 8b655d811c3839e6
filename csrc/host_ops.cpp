// The kernels on NumPy arrays: checks of what came, the array of the result, and the kernel without the GIL.
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstring>
#include <variant>

#include "cpu/edit_runs.h"
#include "cpu/kernels.h"
#include "cpu/low_pass_plan.h"
#include "host.h"
#include "host_array.h"

namespace sage_fast {
namespace {

using Out = std::optional<py::array>;

// f(T{}) without the GIL: other Python threads go on meanwhile.
template <class F>
void compute(Dtype dtype, F&& f) {
  const py::gil_scoped_release released;
  dtype == Dtype::float32 ? f(float{}) : f(double{});
}

template <class T>
T* written(void* memory) {
  return static_cast<T*>(memory);
}

double positive(double value, const char* name) {
  if (!(value > 0 && std::isfinite(value))) refuse(name, "be positive and finite", std::to_string(value));
  return value;
}

py::array upfirdn2d(const py::array& x_, const py::array& f_, int64_t up, int64_t down,
                    const std::variant<int64_t, std::array<int64_t, 4>>& padding, bool flip_filter, double gain,
                    const Out& out) {
  const Array x(x_, "x"), f(f_, "f");
  const Dtype dtype = x.floating(true);
  x.need_dim(4, "[N, C, H, W]");
  const bool one_row = f.dim() == 1;
  const auto side = [](int64_t k) { return k >= 1 && k <= 32; };
  if (!(one_row || f.dim() == 2) || !side(f[0]) || !side(f[f.dim() - 1])) {
    refuse("f", "have shape [k] or [kh, kw] with sides from 1 to 32", text(f.shape()));
  }
  if (std::string("fiub").find(f.dtype().kind()) == std::string::npos) refuse("f", "be of numbers", text(f.dtype()));
  if (up < 1) refuse("up", "be a positive integer", std::to_string(up));
  if (down < 1) refuse("down", "be a positive integer", std::to_string(down));
  std::array<int64_t, 4> pad;
  if (const int64_t* all = std::get_if<int64_t>(&padding)) {
    pad.fill(*all);
  } else {
    pad = std::get<1>(padding);
  }
  const UpfirdnParams p{x[0] * x[1], x[2],   x[3],   1,      f[0],   f[f.dim() - 1], up,
                        down,        pad[0], pad[1], pad[2], pad[3], flip_filter,    gain};
  const int64_t h = p.h * up + p.top + p.bottom, w = p.w * up + p.left + p.right;
  if (p.h < 1 || p.w < 1 || h < p.kh || w < p.kw) {
    refuse("padding", "leave images of at least the filter's " + text({p.kh, p.kw}) + " of x " + text(x.shape()),
           text({h, w}));
  }
  check(p);
  const py::array taps_of = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(f_);
  if (!taps_of) throw std::bad_alloc();
  double taps[32 * 32];
  read_taps(static_cast<const double*>(taps_of.data()), one_row, one_row ? 0 : p.kw, 1, p, taps);
  py::array y = result(out, {x[0], x[1], p.out_h(), p.out_w()}, dtype, {&x});
  void* const to = y.mutable_data();
  const py::gil_scoped_release released;
  SAGE_CALL(upfirdn2d)(x.raw(), taps, p, dtype, to);
  return y;
}

py::array bias_act(const py::array& x_, const std::optional<py::array>& b_, int64_t dim, double slope, double gain,
                   double clamp, int64_t act, const Out& out) {
  const Array x(x_, "x");
  const Dtype dtype = x.floating(true);
  BiasActParams p{1, 1, x.numel(), slope, gain, clamp, Act(act)};
  if (p.act < Act::leaky || p.act > Act::swish) refuse("act", "be 0 to 6", std::to_string(act));
  if (p.act != Act::leaky && dtype == Dtype::float64) refuse("x", "be float32 or float16 for this act", "float64");
  std::optional<Array> b;
  if (b_) {
    b.emplace(*b_, "b");
    if (dim < -x.dim() || dim >= x.dim()) refuse("dim", "be an axis of x " + text(x.shape()), std::to_string(dim));
    dim += dim < 0 ? x.dim() : 0;
    b->need_shape({x[dim]}, "[x.shape[dim]]");
    if (!(dtype == Dtype::float16 && b->floating(true) == Dtype::float32)) b->need_dtype(dtype, x);
    p.channels = x[dim], p.inner = 1;
    for (int64_t axis = 0; axis < x.dim(); ++axis) {
      if (axis != dim) (axis < dim ? p.outer : p.inner) *= x[axis];
    }
  }
  check(p, b ? b->numel() : -1);
  const bool in_place = out && out->data() == x.raw();  // each value is read before it is written
  py::array y = result(out, x.shape(), dtype, {in_place ? nullptr : &x, b ? &*b : nullptr});
  if (x.numel() == 0) return y;
  const bool wide_bias = b && b->floating(true) != dtype;
  void* const to = y.mutable_data();
  const py::gil_scoped_release released;
  SAGE_CALL(bias_act)(x.raw(), b ? b->raw() : nullptr, wide_bias, p, dtype, to);
  return y;
}

py::array project_onto_basis(const py::array& w_plus_, const py::array& basis_, const Out& out) {
  const Array w_plus(w_plus_, "w_plus"), basis(basis_, "basis");
  const Dtype dtype = w_plus.floating();
  w_plus.need_dim(3, "[N, L, D]");
  basis.need_dim(3, "[L, D, R]");
  const int64_t layers = w_plus[1], dim = w_plus[2], rank = basis[2];
  basis.need_shape({layers, dim, rank}, "[L, D, R]");
  basis.need_dtype(dtype, w_plus);
  const ProjectParams p{w_plus[0], layers, dim, rank, layers * dim, dim, dim * rank, rank};
  py::array y = result(out, w_plus.shape(), dtype, {&w_plus, &basis});
  if (w_plus.numel() == 0) return y;
  void* const to = y.mutable_data();
  if (rank == 0) {
    std::memset(to, 0, y.nbytes());
    return y;
  }
  compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(project_onto_basis<T>)(w_plus.data<T>(), basis.data<T>(), p, written<T>(to));
  });
  return y;
}

py::array least_squares_codes(const py::array& delta_w_, const py::array& pseudo_inverse_, const Out& out) {
  const Array delta_w(delta_w_, "delta_w"), pseudo_inverse(pseudo_inverse_, "pseudo_inverse");
  const Dtype dtype = delta_w.floating();
  delta_w.need_dim(3, "[N, L, D]");
  pseudo_inverse.need_dim(3, "[L, K, D]");
  const int64_t n = delta_w[0], layers = delta_w[1], dim = delta_w[2], k = pseudo_inverse[1];
  pseudo_inverse.need_shape({layers, k, dim}, "[L, K, D]");
  pseudo_inverse.need_dtype(dtype, delta_w);
  const CodesParams p{n, layers, dim, k, layers * dim, dim, k * dim, dim};
  py::array y = result(out, {n, layers, k}, dtype, {&delta_w, &pseudo_inverse});
  if (y.size() == 0) return y;
  void* const to = y.mutable_data();
  if (dim == 0) {
    std::memset(to, 0, y.nbytes());
    return y;
  }
  compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(least_squares_codes<T>)(delta_w.data<T>(), pseudo_inverse.data<T>(), p, written<T>(to));
  });
  return y;
}

py::array edit_latents(const py::array& class_embedding_, const py::array& codes_, const py::array& directions_,
                       double alpha, const std::optional<py::array>& mask_,
                       const std::optional<py::array>& class_index_, const Out& out) {
  const Array embedding(class_embedding_, "class_embedding"), codes(codes_, "codes");
  const Array directions(directions_, "directions");
  const Dtype dtype = codes.floating();
  codes.need_dim(3, "[N, L, K]");
  directions.need_dim(3, "[L, D, K]");
  embedding.need_dim(3, "[B, L, D]");
  const int64_t n = codes[0], layers = codes[1], k = codes[2], dim = directions[1], rows = embedding[0];
  directions.need_shape({layers, dim, k}, "[L, D, K]");
  embedding.need_shape({rows, layers, dim}, "[B, L, D]");
  embedding.need_dtype(dtype, codes);
  directions.need_dtype(dtype, codes);
  std::optional<Array> mask, class_index;
  if (class_index_) {
    class_index.emplace(*class_index_, "class_index");
    class_index->need_shape({n}, "[N]");
    if (!class_index->dtype().equal(py::dtype::of<int64_t>())) {
      refuse("class_index", "be int64", text(class_index->dtype()));
    }
  } else if (rows != 1 && rows != n) {
    refuse("class_embedding", "hold 1 or N = " + std::to_string(n) + " rows without class_index", std::to_string(rows));
  }
  if (mask_) {
    mask.emplace(*mask_, "mask");
    if (mask->dtype().kind() != 'b') refuse("mask", "be bool", text(mask->dtype()));
    const std::vector<int64_t> all{layers, k}, one{1, layers, k}, each{rows, layers, k};
    if (mask->shape() != all && mask->shape() != one && mask->shape() != each) {
      refuse("mask", "have shape " + text(all) + " or " + text(each), text(mask->shape()));
    }
  }
  const int64_t mask_rows = !mask ? 0 : mask->dim() == 2 ? 1 : (*mask)[0];
  const EditParams p{n, layers, dim, k, rows, mask_rows, layers * dim, dim, layers * k, k, dim * k, k, alpha};
  py::array y = result(out, {n, layers, dim}, dtype, {&embedding, &codes, &directions});
  if (y.size() == 0) return y;
  const EditRuns runs(class_index ? class_index->data<int64_t>() : nullptr, p);
  void* const to = y.mutable_data();
  compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(edit_latents<T>)(embedding.data<T>(), codes.data<T>(), directions.data<T>(),
                               mask ? mask->data<uint8_t>() : nullptr, runs.rows.data(), runs.order.data(),
                               runs.starts.data(), runs.count(), p, written<T>(to));
  });
  return y;
}

py::array gaussian_low_pass(const py::array& images_, double sigma, bool reflect, bool pixels, const Out& out) {
  const Array images(images_, "images");
  const Dtype dtype = images.floating();
  images.need_dim(4, "[N, C, H, W]");
  const LowPassParams p{positive(sigma, "sigma"), reflect, pixels};
  py::array y = result(out, images.shape(), dtype, {&images});
  if (images.numel() == 0) return y;
  void* const to = y.mutable_data();
  compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto plan = recent_plan<LowPassPlan<T>>(images[2], images[3], p);
    SAGE_CALL(gaussian_low_pass<T>)(plan->view(), images.data<T>(), images[0] * images[1], written<T>(to));
  });
  return y;
}

// Values from image to image of [N or 1, C, H, W]: 0 for one that all edited images share.
int64_t source_step(const Array& image, const Array& edited, Dtype dtype) {
  image.need_dim(4, "[N or 1, C, H, W]");
  std::vector<int64_t> wanted = edited.shape();
  if (image[0] == 1) wanted[0] = 1;
  image.need_shape(wanted, "[N or 1, C, H, W] of edited");
  image.need_dtype(dtype, edited);
  return image[0] == 1 ? 0 : image[1] * image[2] * image[3];
}

py::array fuse_frequencies(const py::array& real_, const py::array& inverted_, const py::array& edited_, double gamma1,
                           double gamma2, double sigma, const Out& out) {
  const Array real(real_, "real"), inverted(inverted_, "inverted"), edited(edited_, "edited");
  const Dtype dtype = edited.floating();
  edited.need_dim(4, "[N, C, H, W]");
  const int64_t real_step = source_step(real, edited, dtype), inverted_step = source_step(inverted, edited, dtype);
  const FuseFrequenciesParams p{edited[0], edited[1], edited[2], edited[3], real_step, inverted_step, gamma1, gamma2};
  positive(sigma, "sigma");
  py::array y = result(out, edited.shape(), dtype, {&real, &inverted, &edited});
  if (edited.numel() == 0) return y;
  void* const to = y.mutable_data();
  compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> shared(p.one_source() && p.n > 1 ? p.c * p.h * p.w : 0);
    const auto plan = recent_plan<LowPassPlan<T>>(p.h, p.w, {sigma, false, false});
    SAGE_CALL(fuse_frequencies<T>)
    (plan->view(), real.data<T>(), inverted.data<T>(), edited.data<T>(), p, shared.data(), written<T>(to));
  });
  return y;
}

py::array fuse_pixels(const py::array& real_, const py::array& inverted_, const py::array& edited_,
                      const std::optional<py::array>& low_, double beta, int64_t blend, double blur, const Out& out) {
  const Array real(real_, "real"), inverted(inverted_, "inverted"), edited(edited_, "edited");
  const Dtype dtype = edited.floating();
  edited.need_dim(4, "[N, C, H, W]");
  std::optional<Array> low;
  if (low_) low.emplace(*low_, "low");
  if (blend < 0 || blend > 2) refuse("blend", "be 0 (residual), 1 (convex) or 2 (printed)", std::to_string(blend));
  const int64_t real_step = source_step(real, edited, dtype), inverted_step = source_step(inverted, edited, dtype);
  FusePixelsParams p{edited[0], edited[1], edited[2], edited[3], real_step, inverted_step, 0, beta, Blend(blend)};
  if (low) p.low_step = source_step(*low, edited, dtype);
  p.set_blur(positive(blur, "blur"));
  py::array y = result(out, edited.shape(), dtype, {&real, &inverted, &edited, low ? &*low : nullptr});
  if (edited.numel() == 0) return y;
  void* const to = y.mutable_data();
  compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(fuse_pixels<T>)(real.data<T>(), inverted.data<T>(), edited.data<T>(), low ? low->data<T>() : nullptr, p,
                              written<T>(to));
  });
  return y;
}

}  // namespace

void define_ops(py::module_& m) {
  using namespace py::literals;
  const py::arg_v out = "out"_a = py::none();
  const std::array<int64_t, 4> no_padding{};
  m.def("upfirdn2d", &upfirdn2d, "x"_a, "f"_a, "up"_a = 1, "down"_a = 1, "padding"_a = no_padding,
        "flip_filter"_a = false, "gain"_a = 1.0, out,
        "Upsample x [N, C, H, W], pad by one integer or (left, right, top, bottom), convolve with f [k] or [kh, kw], "
        "decimate.");
  m.def("bias_act", &bias_act, "x"_a, "b"_a = py::none(), "dim"_a = 1, "slope"_a = 0.2, "gain"_a = 1.0,
        "clamp"_a = -1.0, "act"_a = 0, out,
        "clamp(gain * act(x + b)) with b along dim; act 0: slope below zero, 1: tanh, 2: elu of scale slope, 3: selu, "
        "4: softplus, 5: sigmoid, 6: swish; clamp < 0: none. out may be x.");
  m.def("project_onto_basis", &project_onto_basis, "w_plus"_a, "basis"_a, out,
        "B (B^T w) per layer: w_plus [N, L, D], basis [L, D, R].");
  m.def("least_squares_codes", &least_squares_codes, "delta_w"_a, "pseudo_inverse"_a, out,
        "A+ w per layer: delta_w [N, L, D], pseudo_inverse [L, K, D].");
  m.def("edit_latents", &edit_latents, "class_embedding"_a, "codes"_a, "directions"_a, "alpha"_a = 1.0,
        "mask"_a = py::none(), "class_index"_a = py::none(), out,
        "e + alpha A (mask n) per layer: class_embedding [B, L, D], codes [N, L, K], directions [L, D, K], mask bool "
        "[L, K] or [B, L, K], class_index int64 [N].");
  m.def("gaussian_low_pass", &gaussian_low_pass, "images"_a, "sigma"_a = 5.0, "reflect"_a = false, "pixels"_a = false,
        out, "Gaussian low-pass of images [N, C, H, W]; sigma in cycles per image, or the blur's in pixels.");
  m.def("fuse_frequencies", &fuse_frequencies, "real"_a, "inverted"_a, "edited"_a, "gamma1"_a = 1.0, "gamma2"_a = 1.0,
        "sigma"_a = 5.0, out, "Low frequencies of real for those of inverted in edited [N, C, H, W]: Eq. 23.");
  m.def("fuse_pixels", &fuse_pixels, "real"_a, "inverted"_a, "edited"_a, "low"_a = py::none(), "beta"_a = 0.5,
        "blend"_a = 0, "blur"_a = 1.3, out,
        "real where inverted is farther from it than from edited [N, C, H, W]: Eq. 21, 22; blend 0: residual, 1: "
        "convex, 2: printed; low is added to edited first.");
  m.def("num_threads", &num_threads, "Threads of a call; at first the processors of this process or OMP_NUM_THREADS.");
  m.def("set_num_threads", &set_num_threads, "n"_a, "Set the threads of a call; results do not depend on them.");
}

}  // namespace sage_fast
