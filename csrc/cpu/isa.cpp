#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace sage_fast {
namespace {

Isa best() {
#ifdef SAGE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa chosen() {
  const char* cap = std::getenv("SAGE_FAST_ISA");
  if (cap == nullptr) return best();
  if (std::strcmp(cap, "portable") == 0) return Isa::portable;
  if (std::strcmp(cap, "avx2") == 0) return std::min(best(), Isa::avx2);
  if (std::strcmp(cap, "avx512") == 0) return std::min(best(), Isa::avx512);
  return best();
}

}  // namespace

Isa isa() {
  static const Isa found = chosen();
  return found;
}

const char* isa_name() {
  static const char* const names[] = {"portable", "AVX2", "AVX-512", "AVX-512 BF16"};
  return names[static_cast<int>(isa())];
}

}  // namespace sage_fast
