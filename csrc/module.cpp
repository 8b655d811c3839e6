// The pybind11 host module: what was built, with what, and the kernels on NumPy arrays. No torch header, so it loads
// whatever torch there is.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "host.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// What this processor offers, by name; empty where the compiler cannot ask.
py::list processor_features() {
  py::list found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("sse4.2")) found.append("sse4.2");
  if (__builtin_cpu_supports("avx2")) found.append("avx2");
  if (__builtin_cpu_supports("fma")) found.append("fma");
  if (__builtin_cpu_supports("avx512f")) found.append("avx512f");
#endif
  return found;
}

py::dict build_report() {
  py::dict report;
  report["compiler"] = compiler();
  report["standard"] = static_cast<long>(__cplusplus);
  report["instruction_set"] = sage_fast::isa_name();
  report["processor"] = processor_features();
  return report;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() =
      "The kernels of sage_fast on NumPy arrays, without torch. Contiguous arrays are read in place, others are "
      "copied; "
      "results are new, or written to out. The GIL is released while a kernel runs.";
  m.def("build_report", &build_report,
        "Compiler, language standard, instruction set that the kernels use here, features of this processor.");
  sage_fast::define_ops(m);
}
