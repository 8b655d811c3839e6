// parallel_for of the host module: helpers that wait for work, started when they are first needed.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

#include "cpu/parallel.h"
#include "host.h"

namespace sage_fast {
namespace {

int64_t processors() {
#ifdef __linux__
  cpu_set_t mine;
  if (sched_getaffinity(0, sizeof(mine), &mine) == 0) return std::max(1, CPU_COUNT(&mine));
#endif
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

std::atomic<int64_t>& threads() {
  static std::atomic<int64_t> n = [] {
    const char* cap = std::getenv("OMP_NUM_THREADS");
    const int64_t most = cap == nullptr ? 0 : std::strtoll(cap, nullptr, 10);
    return most > 0 ? std::min(most, processors()) : processors();
  }();
  return n;
}

struct Job {
  int64_t n, length;  // indices 0 to n, in runs of `length`
  void* context;
  void (*body)(void*, int64_t, int64_t);
  int64_t open;      // runs that are not done
  int64_t next = 0;  // the first index that nobody has taken
  std::exception_ptr error = nullptr;
};

// Whoever calls works on its own job too, so a job ends even where no helper comes: a call inside a call, a processor
// that is busy, a thread that could not be started.
class Pool {
 public:
  void run(Job& job, int64_t helpers) {
    std::unique_lock<std::mutex> lock(mutex_);
    hire(helpers);
    jobs_.push_back(&job);
    wake_.notify_all();
    while (job.next < job.n) take(job, lock);
    done_.wait(lock, [&] { return job.open == 0; });
  }

 private:
  void hire(int64_t helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {  // no more threads are to be had
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return !jobs_.empty(); });
      take(*jobs_.front(), lock);
    }
  }

  void take(Job& job, std::unique_lock<std::mutex>& lock) {
    const int64_t begin = job.next, end = std::min(begin + job.length, job.n);
    job.next = end;
    if (end == job.n) jobs_.remove(&job);
    lock.unlock();
    std::exception_ptr error;
    try {
      job.body(job.context, begin, end);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) job.error = error;
    if (--job.open == 0) done_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::list<Job*> jobs_;
  int64_t helpers_ = 0;
};

// Never destroyed: helpers still wait on it when the process ends. A forked child has none of them and gets a new one.
Pool*& pool() {
  static Pool* kept = [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
#endif
    return new Pool;
  }();
  return kept;
}

}  // namespace

int64_t num_threads() { return threads(); }

void set_num_threads(int64_t n) {
  if (n < 1) throw std::invalid_argument("n must be at least 1, got " + std::to_string(n) + ".");
  threads() = n;
}

void parallel_for(int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  const int64_t runs = std::min((n + grain - 1) / grain, num_threads());
  if (runs <= 1) return body(context, 0, n);
  const int64_t length = (n + runs - 1) / runs;
  Job job{n, length, context, body, (n + length - 1) / length};
  pool()->run(job, runs - 1);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace sage_fast
