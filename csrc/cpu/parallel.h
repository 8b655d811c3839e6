// torch's own thread pool, handed to the CPU kernels.
#pragma once

#include "../tensor.h"

namespace sage_fast {

// body(begin, end) over 0 to n; at least `grain` items a task.
template <class F>
void parallel(int64_t n, int64_t grain, F&& body) {
  if (n <= 0) return;
  torch::stable::parallel_for(0, n, grain > 0 ? grain : 1, body);
}

}  // namespace sage_fast
