#include "../conv3x3.h"

#include "../tensor.h"
#include "isa.h"
#include "workspace.h"

SAGE_DECLARE(void conv3x3(const void* x, const float* weight, const Conv3x3Params& p, Workspace& workspace, void* y))
SAGE_DECLARE(void conv3x3_transposed(const void* y, const float* weight, const Conv3x3Params& p, Workspace& workspace,
                                     void* x))
SAGE_DECLARE(void conv3x3_taps(const void* x, const void* y, const Conv3x3Params& p, Workspace& workspace,
                               float* weight))

namespace sage_fast {
namespace {

void check_images(const Tensor& images) {
  require(images.dim() == 4 && images.size(2) == images.size(3) && (images.numel() == 0 || channels_last(images)),
          "conv3x3: images must be [N, C, R, R], channels last");
}

void check_weight(const Tensor& weight) {
  require(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.stride(3) == 1 &&
              weight.stride(2) == 3 && weight.scalar_type() == ScalarType::Float,
          "conv3x3: weight must be float32 [C_y, C_x, 3, 3] with its taps side by side");
}

Conv3x3Params params(const Tensor& images, int64_t size, int64_t stride, const Tensor& weight, double scale) {
  const Conv3x3Params p{images.size(0),   size,         stride,           weight.size(1),  weight.size(0),
                        dtype_of(images), float(scale), weight.stride(0), weight.stride(1)};
  check(p);
  require(!p.strided_bf16() || (has_bf16() && p.x_channels % 32 == 0 && p.y_channels % 32 == 0),
          "conv3x3: bfloat16 with stride 2 needs a processor with bfloat16 products, and channels that are multiples "
          "of 32");
  return p;
}

Tensor conv3x3(Tensor x, Tensor weight, int64_t stride, double scale) {
  check_images(x);
  check_weight(weight);
  require(weight.size(1) == x.size(1), "conv3x3: weight must have shape [C_y, C_x, 3, 3] with the channels of x");
  const Conv3x3Params p = params(x, stride == 1 ? x.size(2) : (x.size(2) - 1) / 2, stride, weight, scale);
  require(p.x_size() == x.size(2), "conv3x3: with stride 2 the sides of x must be odd");
  Tensor y = new_images(x, p.n, p.y_channels, p.size, p.size, true);
  if (p.n == 0) return y;
  Lease workspace;
  SAGE_CALL(conv3x3)(values(x), data<float>(weight), p, *workspace, y.mutable_data_ptr());
  return y;
}

Tensor conv3x3_transposed(Tensor y, Tensor weight, int64_t stride, double scale) {
  check_images(y);
  check_weight(weight);
  require(weight.size(0) == y.size(1), "conv3x3: weight must have shape [C_y, C_x, 3, 3] with the channels of y");
  const Conv3x3Params p = params(y, y.size(2), stride, weight, scale);
  Tensor x = new_images(y, p.n, p.x_channels, p.x_size(), p.x_size(), true);
  if (p.n == 0) return x;
  Lease workspace;
  SAGE_CALL(conv3x3_transposed)(values(y), data<float>(weight), p, *workspace, x.mutable_data_ptr());
  return x;
}

Tensor conv3x3_taps(Tensor x, Tensor y, int64_t stride, double scale) {
  check_images(x);
  check_images(y);
  const int64_t channels_x = x.size(1), channels_y = y.size(1);
  Tensor weight = torch::stable::new_zeros(x, {channels_y, channels_x, 3, 3}, ScalarType::Float);
  const Conv3x3Params p = params(x, y.size(2), stride, weight, scale);
  require(y.size(0) == p.n && x.size(2) == p.x_size() && y.scalar_type() == x.scalar_type(),
          "conv3x3_taps: y must match x in number, size and dtype");
  if (p.n == 0) return weight;
  Lease workspace;
  SAGE_CALL(conv3x3_taps)(values(x), values(y), p, *workspace, mutable_data<float>(weight));
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_transposed", TORCH_BOX(&conv3x3_transposed));
  m.impl("conv3x3_taps", TORCH_BOX(&conv3x3_taps));
}

}  // namespace sage_fast
