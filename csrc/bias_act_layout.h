// How the axes of bias_act's tensors lie in memory, for the launches of both devices.
#pragma once

#include "bias_act.h"
#include "tensor.h"

namespace sage_fast {

// x as [outer, channels, inner], made contiguous unless its channels come last, and b contiguous.
inline BiasActParams biased_as(Tensor& x, Tensor* b, int64_t dim) {
  const bool last = channels_last(x);
  if (!last && !x.is_contiguous()) x = torch::stable::contiguous(x);
  BiasActParams p{1, 1, x.numel(), 1, 1, -1, Act::leaky};
  if (b == nullptr) return p;
  require(b->dim() == 1 && (b->scalar_type() == x.scalar_type() || (x.element_size() == 2 && b->element_size() == 4)),
          "bias_act: b must be a vector in the dtype of x, or float32 for x of 16 bits");
  if (!b->is_contiguous()) *b = torch::stable::contiguous(*b);
  p.inner = 1;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    const int64_t place = !last || axis == 0 ? axis : axis == 1 ? 3 : axis - 1;  // where the axis lies in memory
    const int64_t bias_place = !last || dim == 0 ? dim : dim == 1 ? 3 : dim - 1;
    (place < bias_place ? p.outer : place == bias_place ? p.channels : p.inner) *= x.size(axis);
  }
  return p;
}

// The incoming gradient laid out as y is; both dense.
inline void match(Tensor& y, Tensor& grad) {
  require(grad.numel() == y.numel() && grad.scalar_type() == y.scalar_type(), "bias_act_backward: grad must match y");
  const bool last = channels_last(y);
  if (last && !channels_last(grad)) {
    grad = torch::stable::contiguous(grad, torch::headeronly::MemoryFormat::ChannelsLast);
  } else if (!last) {
    if (!y.is_contiguous()) y = torch::stable::contiguous(y);
    if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  }
}

}  // namespace sage_fast
