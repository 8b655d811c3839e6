// The kernels that both the torch ops (cpu/<op>.cpp) and the host module (host_ops.cpp) launch.
#pragma once

#include "../bias_act.h"
#include "../dtype.h"
#include "../edit_latents.h"
#include "../fuse_frequencies.h"
#include "../fuse_pixels.h"
#include "../least_squares_codes.h"
#include "../project_onto_basis.h"
#include "../upfirdn2d.h"
#include "isa.h"
#include "low_pass.h"

SAGE_DECLARE(void bias_act(const void* x, const void* b, bool wide_bias, const BiasActParams& p, Dtype dtype, void* y))
SAGE_DECLARE(void bias_act_backward(const void* grad, const void* y, int64_t n, const BiasActParams& p, Dtype dtype,
                                    void* out))
SAGE_DECLARE(template <class T> void edit_latents(const T* embeddings, const T* codes, const T* directions,
                                                  const uint8_t* mask, const int64_t* row, const int64_t* order,
                                                  const int64_t* starts, int64_t runs, const EditParams& p, T* out))
SAGE_DECLARE(template <class T> void fuse_frequencies(const LowPass<T>& plan, const T* real, const T* inverted,
                                                      const T* edited, const FuseFrequenciesParams& p, T* shared, T* y))
SAGE_DECLARE(template <class T> void fuse_pixels(const T* real, const T* inverted, const T* edited, const T* low,
                                                 const FusePixelsParams& p, T* y))
SAGE_DECLARE(template <class T> void gaussian_low_pass(const LowPass<T>& plan, const T* x, int64_t planes, T* y))
SAGE_DECLARE(template <class T> void least_squares_codes(const T* w, const T* pinv, const CodesParams& p, T* out))
SAGE_DECLARE(template <class T> void project_onto_basis(const T* w, const T* basis, const ProjectParams& p, T* out))
SAGE_DECLARE(void upfirdn2d(const void* x, const double* filter, const UpfirdnParams& p, Dtype dtype, void* y))
