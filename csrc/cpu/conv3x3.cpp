#include "../conv3x3.h"

#include "../tensor.h"
#include "isa.h"
#include "workspace.h"

SAGE_DECLARE(void conv3x3(const float* x, const float* taps, const Conv3x3Params& p, Workspace& workspace, float* y))
SAGE_DECLARE(void conv3x3_taps(const float* x, const float* dy, const Conv3x3Params& p, Workspace& workspace,
                               float* taps))

namespace sage_fast {
namespace {

const float* images(const Tensor& x) {
  require(x.dim() == 4 && x.size(2) == x.size(3) && x.scalar_type() == ScalarType::Float &&
              (x.numel() == 0 || channels_last(x)),
          "conv3x3: images must be float32 [N, C, R, R], channels last");
  return data<float>(x);
}

Tensor conv3x3(Tensor x, Tensor taps) {
  const float* in = images(x);
  require(taps.dim() == 4 && taps.size(0) == 3 && taps.size(1) == 3 && taps.size(2) == x.size(1) &&
              taps.scalar_type() == ScalarType::Float,
          "conv3x3: taps must be float32 [3, 3, C_in, C_out] with the C_in of x");
  const Conv3x3Params p{x.size(0), x.size(2), x.size(1), taps.size(3)};
  check(p);
  taps = torch::stable::contiguous(taps);
  Tensor y = new_images(x, p.n, p.c_out, p.size, p.size, true);
  if (p.n == 0) return y;
  Lease workspace;
  SAGE_CALL(conv3x3)(in, data<float>(taps), p, *workspace, mutable_data<float>(y));
  return y;
}

Tensor conv3x3_taps(Tensor x, Tensor grad) {
  const float *in = images(x), *dy = images(grad);
  require(grad.size(0) == x.size(0) && grad.size(2) == x.size(2), "conv3x3_taps: grad must match x");
  const Conv3x3Params p{x.size(0), x.size(2), x.size(1), grad.size(1)};
  check(p);
  Tensor taps = torch::stable::new_zeros(x, {3, 3, p.c_in, p.c_out});
  if (p.n == 0) return taps;
  Lease workspace;
  SAGE_CALL(conv3x3_taps)(in, dy, p, *workspace, mutable_data<float>(taps));
  return taps;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_taps", TORCH_BOX(&conv3x3_taps));
}

}  // namespace sage_fast
