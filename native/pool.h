// Threads that live as long as the model: they spin briefly for the next step, then park and cost nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "numa.h"

namespace miaotui {

class Pool {
 public:
  // `threads` includes the caller of run(), which is thread 0. With seats, one for each thread, thread i keeps to
  // seats[i], the caller for as long as run() takes; without, the kernel has its way.
  explicit Pool(int threads, std::vector<Seat> seats = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  const std::vector<Seat>& seats() const { return seats_; }

  // Calls job(context, thread) on every thread and returns when all are done. One caller at a time.
  void run(void (*job)(void*, int), void* context);

  // Inside a job: returns when every thread has arrived.
  void barrier() {
    barrier([] { return false; });
  }

  // Meanwhile what there is to do, piece by piece: `meanwhile` returns false when there is nothing left.
  template <typename F>
  void barrier(F&& meanwhile) {
    if (threads_ == 1) return;
    const uint64_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; generation_.load(std::memory_order_acquire) == generation;)
      if (!meanwhile()) wait_a_little(i++);
  }

  template <typename F>
  void each(F&& f) {  // f(thread)
    run([](void* context, int thread) { (*static_cast<std::remove_reference_t<F>*>(context))(thread); }, &f);
  }

 private:
  static void wait_a_little(int round);
  void worker(int thread);
  bool wait_for_work(uint64_t seen);

  const int threads_;
  const std::vector<Seat> seats_;
  const long process_;
  std::vector<std::thread> workers_;
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> generation_{0};
  struct Parking {
    std::mutex mutex;
    std::condition_variable wake;
  };
  std::unique_ptr<Parking> parking_ = std::make_unique<Parking>();
};

// [first, last) of `count` for one thread: contiguous, sizes differing by at most one.
inline void share_of(int count, int thread, int threads, int& first, int& last) {
  first = static_cast<int>(static_cast<int64_t>(count) * thread / threads);
  last = static_cast<int>(static_cast<int64_t>(count) * (thread + 1) / threads);
}

}  // namespace miaotui
