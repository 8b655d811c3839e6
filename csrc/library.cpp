// Every op schema, nothing else: the one list of ops. Kernels register in cpu/<op>.cpp and cuda/<op>.cu; fake kernels
// and derivatives in sage_fast/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sage_fast, m) {
  m.def("bias_act(Tensor x, Tensor? b, int dim, float slope, float gain, float clamp, int act=0) -> Tensor");
  m.def("bias_act_backward(Tensor grad, Tensor y, float slope, float gain, float clamp, int act=0) -> Tensor");
  m.def(
      "upfirdn2d(Tensor x, Tensor f, int up, int down, int left, int right, int top, int bottom, bool flip_filter, "
      "float gain) -> Tensor");
  m.def("project_onto_basis(Tensor w_plus, Tensor basis) -> Tensor");
  m.def("gaussian_low_pass(Tensor images, float sigma) -> Tensor");
}
