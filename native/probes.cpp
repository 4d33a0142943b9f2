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

// What each round did in a second; at least one. `work` returns its amount.
template <typename F>
std::vector<double> rates(int threads, double seconds, F&& work) {
  using Clock = std::chrono::steady_clock;
  Pool pool(threads);
  std::vector<double> done(static_cast<size_t>(threads));
  std::vector<double> found;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto begin = Clock::now();
    pool.each([&](int t) { done[static_cast<size_t>(t)] = work(t); });
    const double took = std::chrono::duration<double>(Clock::now() - begin).count();
    double total = 0.0;
    for (double d : done) total += d;
    found.push_back(total / took);
  } while (Clock::now() < end);
  return found;
}

// A ceiling is what the machine does when nothing disturbs it.
double best_of(const std::vector<double>& rates) { return *std::max_element(rates.begin(), rates.end()); }

}  // namespace

std::vector<double> probe_bandwidth(int threads, double megabytes, double seconds) {
  const size_t share = round_up(static_cast<size_t>(megabytes * 1e6 / threads), 4096);
  Memory memory(share * static_cast<size_t>(threads));
  std::memset(memory.data(), 1, memory.bytes());
  std::vector<double> found = rates(threads, seconds, [&](int t) {
    return best().read(memory.data() + share * static_cast<size_t>(t), static_cast<long>(share));
  });
  for (double& rate : found) rate /= 1e9;
  return found;
}

double probe_int8(int threads, double seconds) {
  return best_of(rates(threads, seconds, [](int) { return best().int8(200000); })) / 1e12;
}

double probe_fp32(int threads, double seconds) {
  return best_of(rates(threads, seconds, [](int) { return best().fp32(200000); })) / 1e12;
}

}  // namespace miaotui
