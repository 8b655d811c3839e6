// The thread pool that is handed to the CPU kernels: torch's own for the ops (parallel.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

namespace sage_fast {

// body(context, begin, end) over 0 to n in runs of at least `grain`, on several threads at once.
void parallel_for(int64_t n, int64_t grain, void* context, void (*body)(void* context, int64_t begin, int64_t end));

// The same for a lambda body(begin, end).
template <class F>
inline void parallel(int64_t n, int64_t grain, F&& body) {
  if (n <= 0) return;
  if (n <= grain) return body(int64_t{0}, n);  // the way to the pool takes as long as a small kernel
  parallel_for(n, grain > 0 ? grain : 1, &body, [](void* context, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
  });
}

}  // namespace sage_fast
