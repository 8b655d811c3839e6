// Every kernel, for the instruction set of the file that includes this.
#include "kernels_std.h"
// what they know of the world
#include "../dtype.h"
#include "isa.h"
#include "parallel.h"
#include "simd.inl"
// the kernels
#include "bias_act.inl"
#include "combine_rows.inl"
#ifdef SAGE_BF16
#include "strided_bf16.inl"
#endif
#include "conv3x3.inl"
#include "edit_latents.inl"
#include "fuse_frequencies.inl"
#include "fuse_pixels.inl"
#include "gaussian_low_pass.inl"
#include "least_squares_codes.inl"
#include "project_onto_basis.inl"
#include "scaled_bias_act.inl"
#include "synthesis.inl"
#include "upfirdn2d.inl"
