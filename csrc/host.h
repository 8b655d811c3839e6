// The parts of the pybind11 host module: the CPU kernels on NumPy arrays (host_ops.cpp) and threads of its own for them
// (host_parallel.cpp), since torch's are not there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace sage_fast {

void define_ops(pybind11::module_& m);

// Threads of a call, the caller's included. At first those of the processors that this process may use, at most
// OMP_NUM_THREADS.
int64_t num_threads();
void set_num_threads(int64_t n);

}  // namespace sage_fast
