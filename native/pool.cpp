#include "pool.h"

#include <chrono>
#include <optional>
#include <stdexcept>
#include <utility>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#ifdef MIAOTUI_X86
#include <immintrin.h>
#endif

namespace miaotui {
namespace {

inline void relax() {
#ifdef MIAOTUI_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Keeps the calling thread to a seat, until it is destroyed to where the thread might be before. What the kernel
// refuses leaves the thread where it is.
class Seated {
 public:
  explicit Seated(const Seat& seat) {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : seat.cpus)
      if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    moved_ = sched_getaffinity(0, sizeof before_, &before_) == 0 && sched_setaffinity(0, sizeof set, &set) == 0;
#else
    (void)seat;
#endif
  }
  ~Seated() {
#ifdef __linux__
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
#endif
  }
  Seated(const Seated&) = delete;
  Seated& operator=(const Seated&) = delete;

 private:
#ifdef __linux__
  cpu_set_t before_;
  bool moved_ = false;
#endif
};

long current_process() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

// Longer than the host's work between two steps, so that decoding never pays for waking a thread.
constexpr auto kSpin = std::chrono::microseconds(300);
// A few microseconds, the unevenness of shares; a thread that waits longer may be keeping its partner off the core.
constexpr int kSpinsBeforeYield = 128;

}  // namespace

void Pool::wait_a_little(int round) {
  if (round < kSpinsBeforeYield)
    relax();
  else
    std::this_thread::yield();
}

Pool::Pool(int threads, std::vector<Seat> seats)
    : threads_(threads < 1 ? 1 : threads), seats_(std::move(seats)), process_(current_process()) {
  if (!seats_.empty() && seats_.size() != static_cast<size_t>(threads_))
    throw std::invalid_argument("a pool has a seat for each thread, or none");
  for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { worker(i); });
}

// A forked child has the pool but not its threads: there is no one to stop, and joining would wait for ever.
Pool::~Pool() {
  if (process_ != current_process()) {
    new std::vector<std::thread>(std::move(workers_));  // neither these nor what they wait on may be destroyed
    parking_.release();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(parking_->mutex);
    stop_.store(true);
    epoch_.fetch_add(1);
  }
  parking_->wake.notify_all();
  for (auto& thread : workers_) thread.join();
}

// A parked worker counts itself before it looks at the epoch, and run() moves the epoch before it looks at the
// count: one of the two sees the other.
bool Pool::wait_for_work(uint64_t seen) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  for (int i = 0;; ++i) {
    if (epoch_.load(std::memory_order_acquire) != seen) return !stop_.load();
    wait_a_little(i);
    if (i % 64 == 63 && std::chrono::steady_clock::now() > deadline) break;
  }
  std::unique_lock<std::mutex> lock(parking_->mutex);
  sleepers_.fetch_add(1);
  parking_->wake.wait(lock, [&] { return epoch_.load() != seen; });
  sleepers_.fetch_sub(1);
  return !stop_.load();
}

void Pool::worker(int thread) {
  std::optional<Seated> seated;
  if (!seats_.empty()) seated.emplace(seats_[static_cast<size_t>(thread)]);
  uint64_t seen = 0;
  while (wait_for_work(seen)) {
    seen = epoch_.load(std::memory_order_acquire);
    job_(context_, thread);
    barrier();
  }
}

void Pool::run(void (*job)(void*, int), void* context) {
  std::optional<Seated> seated;
  if (!seats_.empty()) seated.emplace(seats_[0]);
  job_ = job;
  context_ = context;
  if (threads_ == 1) return job(context, 0);
  epoch_.fetch_add(1);
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> lock(parking_->mutex);
    parking_->wake.notify_all();
  }
  job(context, 0);
  barrier();
}

}  // namespace miaotui
