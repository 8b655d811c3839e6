// AVX-512 with products of bfloat16, and with roundings to it.
#include "isa.h"
#ifdef SAGE_X86
#include "kernels_std.h"  // before the pragma: what std defines stays portable
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define SAGE_ISA avx512bf16
#define SAGE_VECTOR_BYTES 64
#define SAGE_BF16
#include "kernels.inl"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
