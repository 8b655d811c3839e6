"""That no CUDA kernel is left out: small calls reach every launch in csrc/cuda."""

from __future__ import annotations

import kernels_on_host
import torch


def call_everything() -> None:
    ops, normal = torch.ops.sage_fast_on_host, torch.randn
    for x in (normal(1, 8, 4, 4), normal(1, 8, 4, 4).contiguous(memory_format=torch.channels_last), normal(1, 3, 3, 1)):
        for f in (torch.ones(4, 4), torch.ones(3, 3)):
            for up, down in ((1, 1), (2, 1), (1, 2)):
                ops.upfirdn2d(x, f, up, down, 2, 2, 2, 2, False, 1.0)
        if x.shape[1] == 3:
            ops.upfirdn2d(
                x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), torch.ones(2, 2), 1, 1, 1, 1, 1, 1, False, 1.0
            )
        ops.bias_act_backward(x, ops.bias_act(x, None, 1, 0.2, 1.0, -1.0, 0), 0.2, 1.0, -1.0, 0)
    w, basis = normal(2, 1, 8), normal(1, 8, 3)
    ops.project_onto_basis(w, basis)
    ops.edit_latents(w, ops.least_squares_codes(w, basis.mT), basis, 1.0, None, None)
    images = normal(2, 1, 9, 9)
    ops.fuse_pixels(images, images, images, None, 0.5, 0, 1.3)
    ops.gaussian_low_pass(images, 1.0)
    ops.fuse_frequencies(images[:1], images[:1], images, 1.0, 1.0, 2.0)
    ops.counter_normal(torch.arange(2), 0, 0, 5)
    rows, x = normal(1, 8), normal(1, 5, 5, 8)
    ops.blur_epilogue(x, rows, rows[0], None, 0.0, rows, 0.2, 1.0, -1.0)
    for c in (8, 136):  # the channels in one tile and in two, the input's in one part and in two
        one, out = normal(1, 32), normal(1, c)
        x32 = normal(1, 4, 4, 32)
        ops.styled_conv(
            x32, normal(1, c, 9, 32), out, out[0], None, 0.0, out, out[None], one[0, :1], None, False, 0.2, 1.0, -1.0
        )
    for k in (3, 4):
        ops.styled_epilogue(x, rows, rows[0], None, 0.0, rows, normal(1, k, 8), normal(k), None, 0.2, 1.0, -1.0)


def test_every_launch_runs(library):
    call_everything()
    assert len(kernels_on_host.launches()) > 15
    assert kernels_on_host.launches() - library.launched() == set()
