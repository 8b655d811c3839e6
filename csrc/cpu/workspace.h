// Memory that outlives a call: activations above 32 MB would otherwise be mapped and unmapped at every layer.
#pragma once

#include <cstdint>

namespace sage_fast {

// Numbered blocks of floats that grow and stay, aligned to a cache line, contents undefined.
class Workspace {
 public:
  enum Slot {
    transformed,
    products,
    before_blur,
    activations_a,
    activations_b,
    image_a,
    image_b,
    vectors,
    packed,
    n_slots
  };

  Workspace() = default;
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* get(Slot slot, int64_t floats);

 private:
  float* data_[n_slots] = {};
  int64_t size_[n_slots] = {};
  Workspace* next_ = nullptr;  // in the list of those that nobody holds
  friend class Lease;
};

// A workspace of the calling thread's own, kept as long as the thread.
Workspace& thread_workspace();

// A workspace for the time of a call, which the next call gets again: as many as were ever held at the same time.
class Lease {
 public:
  Lease();
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Workspace& operator*() const { return *workspace_; }

 private:
  Workspace* workspace_;
};

}  // namespace sage_fast
