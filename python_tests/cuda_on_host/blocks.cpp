// The blocks of a launch, one after the other; the threads of a block as fibers that run until they wait.
//
// A thread runs on as far as it can before another one starts, a warp too, and in which order they do is a setting: so
// what one thread reads of another's without a barrier between differs from order to order. What a GPU leaves undefined
// is an error here: barriers that not all threads reach, lanes that are missing, writes behind a shared array.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sage_fast::host_cuda {
namespace {

constexpr size_t kStack = 256 << 10, kMostShared = 48 << 10, kGuard = 64;
constexpr unsigned char kFresh = 0xFF, kGuardByte = 0xA5;

enum class State { ready, at_barrier, at_exchange, ended };
enum class Order { forward, backward, shuffled };

// Where a thread, or the scheduler, goes on.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;
};

// A stack that runs one thread after the other.
struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  Where where;
  uint3 index;
  // of the exchange that it waits in
  const void* mine;
  size_t bytes;
  void* all;
  unsigned mask;
};

struct SharedArray {
  const void* variable;
  size_t bytes;
  std::unique_ptr<unsigned char, decltype(&std::free)> memory{nullptr, &std::free};

  SharedArray(const void* variable, size_t bytes) : variable(variable), bytes(bytes) {
#ifdef __SANITIZE_ADDRESS__
    constexpr size_t guard = 0;  // the sanitizer has its own
#else
    constexpr size_t guard = kGuard;
#endif
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 1024, bytes + guard) != 0) throw std::bad_alloc();
    memory.reset(static_cast<unsigned char*>(fresh));
    std::memset(memory.get(), kFresh, bytes);
    std::memset(memory.get() + bytes, kGuardByte, guard);
  }
  bool whole() const {
#ifdef __SANITIZE_ADDRESS__
    return true;
#else
    return std::all_of(memory.get() + bytes, memory.get() + bytes + kGuard, [](auto b) { return b == kGuardByte; });
#endif
  }
};

std::mutex one_launch;
Order order = Order::forward;
std::mt19937 shuffling;
size_t allowed_shared = kMostShared, device_shared = 227 << 10;
std::set<std::string> launched;

Place scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::exception_ptr failure;
std::vector<SharedArray> shared;
size_t dynamic_bytes = 0;
const char dynamic_variable = 0;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_size;
#endif

std::string name_of(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("a kernel on the host: " + what); }

// To another stack. swapcontext asks the system each time; a jump, which does not, needs a stack that has begun.
void go(Place& from, Place& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.context, &to.context);
#else
  from.begun = true;
  if (_setjmp(from.jump) != 0) return;
  if (to.begun) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

void to_scheduler() {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
#endif
  go(running->place, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

void run_threads() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {
    try {
      (*body)();
    } catch (...) {
      failure = std::current_exception();
    }
    running->state = State::ended;
    to_scheduler();
  }
}

void wait(State state, const Where& where) {
  running->state = state;
  running->where = where;
  to_scheduler();
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
  go(scheduler, fiber.place);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

std::unique_ptr<Fiber> new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  ucontext_t& context = fiber->place.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack.get(), context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  return fiber;
}

std::vector<unsigned> numbers(unsigned n) {
  std::vector<unsigned> of(n);
  std::iota(of.begin(), of.end(), 0u);
  if (order == Order::backward) std::reverse(of.begin(), of.end());
  if (order == Order::shuffled) std::shuffle(of.begin(), of.end(), shuffling);
  return of;
}

// The lanes that `one` waits for, of the `lanes` of its warp; empty while some are on their way.
std::vector<unsigned> members_of(const Fiber& one, unsigned first, unsigned lanes) {
  std::vector<unsigned> members;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(one.mask >> lane & 1)) continue;
    const Fiber& other = *fibers[first + lane];
    if (other.state == State::ended) fail("a lane has ended that others wait for at " + name_of(one.where));
    if (other.state != State::at_exchange) return {};
    if (other.where.line() != one.where.line() || other.mask != one.mask || other.bytes != one.bytes) {
      fail("lanes meet at " + name_of(one.where) + " and at " + name_of(other.where));
    }
    members.push_back(lane);
  }
  return members;
}

// Hands out what lanes gave, where all of a mask are there.
bool complete_exchange(unsigned first, unsigned lanes) {
  bool any = false;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Fiber& one = *fibers[first + lane];
    if (one.state != State::at_exchange) continue;
    if (!(one.mask >> lane & 1)) fail("a lane is not in its own mask at " + name_of(one.where));
    const std::vector<unsigned> members = members_of(one, first, lanes);
    std::vector<unsigned char> all(32 * one.bytes, kFresh);
    for (unsigned from : members) std::memcpy(&all[from * one.bytes], fibers[first + from]->mine, one.bytes);
    for (unsigned to : members) {
      std::memcpy(fibers[first + to]->all, all.data(), all.size());
      fibers[first + to]->state = State::ready;
      any = true;
    }
  }
  return any;
}

// Runs a warp until each of its lanes is at a barrier or has ended.
void run_warp(unsigned first, unsigned lanes) {
  do {
    for (unsigned lane : numbers(lanes)) {
      if (fibers[first + lane]->state == State::ready) resume(*fibers[first + lane]);
    }
  } while (complete_exchange(first, lanes));
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Fiber& fiber = *fibers[first + lane];
    if (fiber.state == State::at_exchange) fail("a lane waits for others that never come at " + name_of(fiber.where));
  }
}

// Whether all threads have ended; otherwise all are at one barrier, and go on.
bool pass_barrier(unsigned threads) {
  const auto waits = [](const auto& fiber) { return fiber->state == State::at_barrier; };
  const auto end = fibers.begin() + threads, one = std::find_if(fibers.begin(), end, waits);
  if (one == end) return true;
  for (auto other = fibers.begin(); other != end; ++other) {
    if (!waits(*other)) fail("not all threads reach the barrier at " + name_of((*one)->where));
    if ((*other)->where.line() != (*one)->where.line()) {
      fail("threads meet at the barriers " + name_of((*one)->where) + " and " + name_of((*other)->where));
    }
  }
  std::for_each(fibers.begin(), end, [](const auto& fiber) { fiber->state = State::ready; });
  return false;
}

void run_block(unsigned threads) {
  shared.clear();
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->state = State::ready;
    fibers[i]->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  do {
    for (unsigned warp : numbers((threads + 31) / 32)) run_warp(warp * 32, std::min(32u, threads - warp * 32));
  } while (!pass_barrier(threads));
  for (const SharedArray& array : shared) {
    if (!array.whole()) fail("a write behind the end of a shared array of " + std::to_string(array.bytes) + " bytes");
  }
}

// What is too small for float32's usual digits becomes zero, as --use_fast_math has it.
class FlushToZero {
#ifdef __SSE__
 public:
  FlushToZero() { _mm_setcsr(before_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

}  // namespace

void barrier(const Where& where) { wait(State::at_barrier, where); }

void exchange(const void* mine, size_t bytes, void* all32, unsigned mask, const Where& where) {
  running->mine = mine, running->bytes = bytes, running->all = all32, running->mask = mask;
  wait(State::at_exchange, where);
}

void* shared_array(const void* variable, size_t bytes) {
  size_t in_all = bytes;
  for (const SharedArray& array : shared) {
    if (array.variable == variable) return array.memory.get();
    if (array.variable != &dynamic_variable) in_all += array.bytes;
  }
  if (in_all > kMostShared) fail("more than 48 KiB of static shared memory");
  return shared.emplace_back(variable, bytes).memory.get();
}

void* dynamic_shared_array() {
  for (const SharedArray& array : shared) {
    if (array.variable == &dynamic_variable) return array.memory.get();
  }
  return shared.emplace_back(&dynamic_variable, dynamic_bytes).memory.get();
}

void trap(const Where& where) { fail("__trap() at " + name_of(where)); }

void allow_shared(size_t bytes) {
  if (bytes > device_shared) fail(std::to_string(bytes) + " bytes of shared memory are more than a block may have");
  allowed_shared = bytes;
}

size_t most_shared() { return device_shared; }

void run(const Config& config, const char* kernel, const std::function<void()>& thread, const Where& where) {
  const std::lock_guard<std::mutex> lock(one_launch);
  [[maybe_unused]] const FlushToZero flush;
  const dim3 grid = config.grid, block = config.block;
  const unsigned threads = block.x * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) fail("blocks of " + std::to_string(threads) + " threads");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("a grid out of bounds");
  const size_t most = std::exchange(allowed_shared, kMostShared);  // each kernel is to be allowed its own
  if (config.shared > most) fail(std::to_string(config.shared) + " bytes of dynamic shared memory");
  launched.insert(name_of(where) + " " + kernel);
  blockDim = block, gridDim = grid, body = &thread, dynamic_bytes = config.shared;
  while (fibers.size() < threads) fibers.push_back(new_fiber());
  try {
    for (unsigned at : numbers(unsigned(blocks))) {
      blockIdx = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
      run_block(threads);
    }
  } catch (...) {
    fibers.clear();  // some are in the middle of a thread
    throw;
  }
}

}  // namespace sage_fast::host_cuda

#pragma GCC visibility push(default)
extern "C" {

// In which order threads, warps and blocks go: 0 forward, 1 backward, 2 shuffled by the seed.
void sage_fast_host_set_order(int order, unsigned seed) {
  sage_fast::host_cuda::order = sage_fast::host_cuda::Order(order);
  sage_fast::host_cuda::shuffling.seed(seed);
}

// The most shared memory of a block, in bytes.
void sage_fast_host_set_most_shared(size_t bytes) { sage_fast::host_cuda::device_shared = bytes; }

// Lines of "file:line kernel": what has run.
const char* sage_fast_host_launched() {
  static std::string lines;
  lines.clear();
  for (const std::string& line : sage_fast::host_cuda::launched) lines += line + "\n";
  return lines.c_str();
}

// What the sources ask torch for, of which a torch without CUDA has nothing.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  return *message = nullptr, 0;
}
void torch_c10_cuda_free_error_msg(char*) {}

}  // extern "C"
#pragma GCC visibility pop
