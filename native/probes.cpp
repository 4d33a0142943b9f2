#include "probes.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "program.h"

namespace miaotui {
namespace {

const ProbeKernels& best() {
#ifdef MIAOTUI_X86
  const std::string isa = available_isas()[0].name;
  if (isa == "avx512" || isa == "avx512bf16") return *probe_kernels_avx512();
  if (isa == "avxvnni") return *probe_kernels_avxvnni();
  if (isa == "avx2") return *probe_kernels_avx2();
#endif
  return *probe_kernels_portable();
}

// The best round of several: a ceiling is what the machine does when nothing disturbs it. `work` returns its amount.
template <typename F>
double best_rate(int threads, double seconds, F&& work) {
  using Clock = std::chrono::steady_clock;
  Pool pool(threads);
  std::vector<double> done(static_cast<size_t>(threads));
  double rate = 0.0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto begin = Clock::now();
    pool.each([&](int t) { done[static_cast<size_t>(t)] = work(t); });
    const double took = std::chrono::duration<double>(Clock::now() - begin).count();
    double total = 0.0;
    for (double d : done) total += d;
    rate = std::max(rate, total / took);
  } while (Clock::now() < end);
  return rate;
}

}  // namespace

double probe_bandwidth(int threads, double megabytes, double seconds) {
  const size_t share = round_up(static_cast<size_t>(megabytes * 1e6 / threads), 4096);
  Memory memory(share * static_cast<size_t>(threads));
  std::memset(memory.data(), 1, memory.bytes());
  return best_rate(threads, seconds,
                   [&](int t) {
                     return best().read(memory.data() + share * static_cast<size_t>(t), static_cast<long>(share));
                   }) /
         1e9;
}

double probe_int8(int threads, double seconds) {
  return best_rate(threads, seconds, [](int) { return best().int8(200000); }) / 1e12;
}

double probe_fp32(int threads, double seconds) {
  return best_rate(threads, seconds, [](int) { return best().fp32(200000); }) / 1e12;
}

}  // namespace miaotui
