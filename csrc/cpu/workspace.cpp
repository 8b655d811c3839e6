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

std::mutex idle_guard;
Workspace* idle = nullptr;  // a list; as many as were held at the same time

}  // namespace

Workspace& thread_workspace() {
  static thread_local Workspace own;
  return own;
}

Lease::Lease() {
  {
    const std::lock_guard<std::mutex> lock(idle_guard);
    workspace_ = idle;
    if (idle != nullptr) idle = idle->next_;
  }
  if (workspace_ == nullptr) workspace_ = new Workspace;
}

Lease::~Lease() {
  const std::lock_guard<std::mutex> lock(idle_guard);
  workspace_->next_ = idle;
  idle = workspace_;
}

}  // namespace sage_fast
