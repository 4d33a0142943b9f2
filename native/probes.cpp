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
std::vector<double> rates(Pool& pool, double seconds, F&& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> done(static_cast<size_t>(pool.threads()));
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

std::vector<double> probe_bandwidth(int threads, double megabytes, double seconds, const std::vector<Seat>& seats) {
  const size_t share = round_up(static_cast<size_t>(megabytes * 1e6 / threads), seats.empty() ? 4096 : 2 << 20);
  Memory memory(share * static_cast<size_t>(threads));
  auto own = [&](int t) { return memory.data() + share * static_cast<size_t>(t); };
  Pool pool(threads, seats);
  pool.each([&](int t) { std::memset(own(t), 1, share); });  // who writes memory first has it beside him
  std::vector<double> found =
      rates(pool, seconds, [&](int t) { return best().read(own(t), static_cast<long>(share)); });
  for (double& rate : found) rate /= 1e9;
  return found;
}

double probe_int8(int threads, double seconds) {
  Pool pool(threads);
  return best_of(rates(pool, seconds, [](int) { return best().int8(200000); })) / 1e12;
}

double probe_fp32(int threads, double seconds) {
  Pool pool(threads);
  return best_of(rates(pool, seconds, [](int) { return best().fp32(200000); })) / 1e12;
}

}  // namespace miaotui
