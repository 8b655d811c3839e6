#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace sage_fast {

void parallel_for(int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace sage_fast
