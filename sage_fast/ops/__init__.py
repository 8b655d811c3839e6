"""Differentiable functions of tensors, device-blind: native kernels where there are some, plain PyTorch elsewhere."""

from sage_fast import _native
from sage_fast.ops.bias_act import bias_act, bias_act_reference
from sage_fast.ops.combine_rows import combine_rows, combine_rows_reference
from sage_fast.ops.conv3x3 import conv3x3, conv3x3_reference, conv3x3_transposed, conv3x3_transposed_reference
from sage_fast.ops.counter_normal import counter_normal, counter_normal_reference
from sage_fast.ops.edit_latents import edit_latents, edit_latents_reference
from sage_fast.ops.fuse_frequencies import fuse_frequencies, fuse_frequencies_reference
from sage_fast.ops.fuse_pixels import fuse_pixels, fuse_pixels_reference
from sage_fast.ops.gaussian_low_pass import gaussian_low_pass, gaussian_low_pass_reference
from sage_fast.ops.least_squares_codes import least_squares_codes, least_squares_codes_reference
from sage_fast.ops.modulated_conv2d import modulated_conv2d, modulated_conv2d_reference
from sage_fast.ops.project_onto_basis import project_onto_basis, project_onto_basis_reference
from sage_fast.ops.scaled_bias_act import scaled_bias_act, scaled_bias_act_reference
from sage_fast.ops.synthesis import synthesis, synthesis_reference
from sage_fast.ops.upfirdn2d import upfirdn2d, upfirdn2d_reference

__all__ = [
    "bias_act",
    "bias_act_reference",
    "combine_rows",
    "combine_rows_reference",
    "conv3x3",
    "conv3x3_reference",
    "conv3x3_transposed",
    "conv3x3_transposed_reference",
    "counter_normal",
    "counter_normal_reference",
    "edit_latents",
    "edit_latents_reference",
    "fuse_frequencies",
    "fuse_frequencies_reference",
    "fuse_pixels",
    "fuse_pixels_reference",
    "gaussian_low_pass",
    "gaussian_low_pass_reference",
    "least_squares_codes",
    "least_squares_codes_reference",
    "modulated_conv2d",
    "modulated_conv2d_reference",
    "project_onto_basis",
    "project_onto_basis_reference",
    "scaled_bias_act",
    "scaled_bias_act_reference",
    "synthesis",
    "synthesis_reference",
    "upfirdn2d",
    "upfirdn2d_reference",
]

_native.load_installed()
