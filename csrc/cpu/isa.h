// The kernels are compiled once per instruction set, in the namespaces portable, avx2, avx512 and avx512bf16, and
// picked at run time: one binary runs everywhere and is as fast as the processor allows.
//
//   <op>.inl     kernels over plain pointers, in namespace sage_fast::SAGE_ISA; no torch header, no std container
//                (a std template instantiated with AVX-512 could be the one that the linker keeps for everybody)
//   <op>.cpp     checks, allocation, registration; calls SAGE_CALL(kernel)(...)
//   isa_*.cpp    one instruction set each: every .inl
#pragma once

namespace sage_fast {

enum class Isa { portable, avx2, avx512, avx512bf16 };  // the last: with products of bfloat16

// The best set that was compiled and that this processor has; SAGE_FAST_ISA=portable|avx2|avx512|avx512bf16 caps it.
Isa isa();
const char* isa_name();
inline bool has_bf16() { return isa() == Isa::avx512bf16; }

}  // namespace sage_fast

#if defined(__x86_64__) && defined(__GNUC__)
#define SAGE_X86 1
#define SAGE_DECLARE(...)           \
  namespace sage_fast::portable {   \
  __VA_ARGS__;                      \
  }                                 \
  namespace sage_fast::avx2 {       \
  __VA_ARGS__;                      \
  }                                 \
  namespace sage_fast::avx512 {     \
  __VA_ARGS__;                      \
  }                                 \
  namespace sage_fast::avx512bf16 { \
  __VA_ARGS__;                      \
  }
#define SAGE_CALL(...)                                                                        \
  (::sage_fast::isa() == ::sage_fast::Isa::avx512bf16 ? &::sage_fast::avx512bf16::__VA_ARGS__ \
   : ::sage_fast::isa() == ::sage_fast::Isa::avx512   ? &::sage_fast::avx512::__VA_ARGS__     \
   : ::sage_fast::isa() == ::sage_fast::Isa::avx2     ? &::sage_fast::avx2::__VA_ARGS__       \
                                                      : &::sage_fast::portable::__VA_ARGS__)
#else
#define SAGE_DECLARE(...)         \
  namespace sage_fast::portable { \
  __VA_ARGS__;                    \
  }
#define SAGE_CALL(...) (&::sage_fast::portable::__VA_ARGS__)
#endif
