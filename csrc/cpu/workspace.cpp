#include "workspace.h"

#include <cstdlib>
#include <new>

namespace sage_fast {

Workspace::~Workspace() {
  for (float* block : data_) std::free(block);
}

float* Workspace::get(Slot slot, int64_t floats) {
  if (size_[slot] < floats) {
    std::free(data_[slot]);
    size_[slot] = 0;
    data_[slot] = static_cast<float*>(std::aligned_alloc(64, (floats / 16 + 1) * 64));
    if (data_[slot] == nullptr) throw std::bad_alloc();
    size_[slot] = floats;
  }
  return data_[slot];
}

}  // namespace sage_fast
