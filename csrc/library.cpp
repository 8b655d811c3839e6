// Every op schema, nothing else: the one list of ops. Kernels register in cpu/<op>.cpp and cuda/<op>.cu; fake kernels
// and derivatives in sage_fast/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sage_fast, m) {
  m.def("bias_act(Tensor x, Tensor? b, int dim, float slope, float gain, float clamp, int act=0) -> Tensor");
  m.def("bias_act_backward(Tensor grad, Tensor y, float slope, float gain, float clamp, int act=0) -> Tensor");
  m.def(
      "scaled_bias_act(Tensor x, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b, float slope, float gain, "
      "float clamp) -> Tensor");
  m.def(
      "scaled_bias_act_backward(Tensor grad, Tensor? x, Tensor y, Tensor? scale, Tensor? noise, float slope, "
      "float gain, float clamp) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "upfirdn2d(Tensor x, Tensor f, int up, int down, int left, int right, int top, int bottom, bool flip_filter, "
      "float gain) -> Tensor");
  m.def("project_onto_basis(Tensor w_plus, Tensor basis) -> Tensor");
  m.def("least_squares_codes(Tensor delta_w, Tensor pseudo_inverse) -> Tensor");
  m.def("gaussian_low_pass(Tensor images, float sigma, bool reflect=False, bool pixels=False) -> Tensor");
  m.def(
      "fuse_frequencies(Tensor real, Tensor inverted, Tensor edited, float gamma1, float gamma2, float sigma) -> "
      "Tensor");
  m.def(
      "fuse_pixels(Tensor real, Tensor inverted, Tensor edited, Tensor? low, float beta, int blend, float blur) -> "
      "Tensor");
  m.def(
      "synthesis(Tensor w_plus, Tensor input, Tensor[] layers, Tensor[] images, float[] strengths, float slope, "
      "float gain, float clamp) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor weight, int stride, float scale=1.0) -> Tensor");
  m.def("conv3x3_transposed(Tensor y, Tensor weight, int stride, float scale=1.0) -> Tensor");
  m.def("conv3x3_taps(Tensor x, Tensor y, int stride, float scale=1.0) -> Tensor");
  m.def("synthesis_pack(Tensor weight, bool up, bool bf16) -> Tensor");
  m.def("synthesis_fingerprint(Tensor[] weights) -> int");
  m.def("has_bf16_products(Tensor any) -> bool");
  m.def(
      "styled_epilogue(Tensor x, Tensor factor, Tensor bias, Tensor? noise, float strength, Tensor? next_style, "
      "Tensor image_weight, Tensor image_bias, Tensor? skip, float slope, float gain, float clamp) -> (Tensor, "
      "Tensor)");
  m.def(
      "blur_epilogue(Tensor x, Tensor factor, Tensor bias, Tensor? noise, float strength, Tensor next_style, "
      "float slope, float gain, float clamp) -> Tensor");
  m.def(
      "styled_conv(Tensor x, Tensor weight, Tensor factor, Tensor bias, Tensor? noise, float strength, "
      "Tensor? next_style, Tensor? image_weight, Tensor? image_bias, Tensor? skip, bool up, float slope, float gain, "
      "float clamp, int columns=0) -> (Tensor, Tensor)");
  m.def("counter_normal(Tensor samples, int seed, int stream, int numel) -> Tensor");
  m.def(
      "edit_latents(Tensor class_embedding, Tensor codes, Tensor directions, float alpha, Tensor? mask, "
      "Tensor? class_index) -> Tensor");
  m.def("combine_rows(Tensor weights, Tensor table, Tensor centre, Tensor rows, Tensor columns) -> Tensor");
}
