#include "workspace.h"

#include <cstdlib>
#include <mutex>
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

namespace {

std::mutex kept_taken;
Workspace kept;

}  // namespace

Workspace& thread_workspace() {
  static thread_local Workspace own;
  return own;
}

Lease::Lease() : workspace_(kept_taken.try_lock() ? &kept : new Workspace) {}

Lease::~Lease() {
  if (workspace_ == &kept) {
    kept_taken.unlock();
  } else {
    delete workspace_;
  }
}

}  // namespace sage_fast
