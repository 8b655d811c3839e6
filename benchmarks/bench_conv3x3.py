"""3 x 3 convolutions of training, stride 1 and 2, and both their gradients, on the layers of a 32 and a 64 px network.

The rival is PyTorch's convolution (oneDNN), channels last, with weights already in the dtype of the images; ours takes float32
weights and rounds or transforms them itself. FLOPs are the direct algorithm's. A transposed convolution is the gradient by images, and
the other way round.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sage_fast import _native

BATCH = 16
#: channels of x and y, side of y, stride
LAYERS = {
    "64 to 64, 32 px": (64, 64, 32, 1),
    "128 to 128, 16 px": (128, 128, 16, 1),
    "128 to 128, 8 px": (128, 128, 8, 1),
    "128 to 128, 4 px": (128, 128, 4, 1),
    "64 to 128, stride 2, 16 px": (64, 128, 16, 2),
    "128 to 128, stride 2, 8 px": (128, 128, 8, 2),
    "128 to 128, stride 2, 4 px": (128, 128, 4, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_conv3x3(compare, layer, dtype):
    c_in, c_out, side, stride = LAYERS[layer]
    if stride == 2 and dtype == torch.bfloat16 and not _native.has_bf16_products():
        pytest.skip("this processor does not multiply bfloat16: PyTorch's convolution runs")
    if compare.device.type != "cpu":
        pytest.skip("PyTorch's convolution runs on a GPU")
    ops, last, pad = torch.ops.sage_fast, torch.channels_last, 2 - stride
    x_side = side if stride == 1 else 2 * side + 1
    x = torch.randn(BATCH, c_in, x_side, x_side).to(dtype).contiguous(memory_format=last)
    y = torch.randn(BATCH, c_out, side, side).to(dtype).contiguous(memory_format=last)
    weight = torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5)
    plain = weight.to(dtype).contiguous(memory_format=last)

    def gradient(which: int) -> torch.Tensor:
        mask = [which == i for i in range(3)]
        gradients = torch.ops.aten.convolution_backward(
            y, x, plain, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, mask
        )
        return gradients[which]

    parts = {
        "forward": (lambda: ops.conv3x3(x, weight, stride), lambda: F.conv2d(x, plain, stride=stride, padding=pad)),
        "by images": (lambda: ops.conv3x3_transposed(y, weight, stride), lambda: gradient(0)),
        "by weights": (lambda: ops.conv3x3_taps(x, y, stride), lambda: gradient(1)),
    }
    flops = 2 * 9 * BATCH * side**2 * c_in * c_out
    compare.tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for part, (ours, rival) in parts.items():
        name = f"{layer}, {str(dtype).removeprefix('torch.')}, {part}"
        compare(name, ours, {"PyTorch": rival}, flops=flops, dtype=dtype)
