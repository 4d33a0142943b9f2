#include "screen.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <stdexcept>

namespace miaotui {
namespace {

constexpr int kMosts = 6;

// f(first, last, scratch) on every thread, for its share of the panels.
template <typename F>
void for_shares(Pool& pool, const Weight& head, F&& f) {
  pool.each([&](int thread) {
    int first, last;
    share_of(head.panels, thread, pool.threads(), first, last);
    std::vector<float> scratch(static_cast<size_t>(head.k_pad + kApart) * kRowsPerPanel + 16);
    f(first, last, reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(scratch.data()), 64)));
  });
}

}  // namespace

Screen make_screen(Pool& pool, Heap& heap, const Kernels& kernels, const Weight& head) {
  const size_t k = static_cast<size_t>(head.k);
  std::mutex mutex;
  std::vector<double> sum(k), square(k);
  for_shares(pool, head, [&](int first, int last, float* scratch) {
    std::vector<double> s(k), q(k);
    for (int p = first; p < last; ++p) kernels.add_columns(head, p, scratch, s.data(), q.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < k; ++i) sum[i] += s[i], square[i] += q[i];
  });
  Screen screen;
  screen.centre.assign(static_cast<size_t>(head.k_pad), 0.0f);
  for (size_t i = 0; i < k; ++i) {
    screen.centre[i] = static_cast<float>(sum[i] / head.n);
    square[i] -= sum[i] * sum[i] / head.n;
  }
  std::vector<int32_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return square[static_cast<size_t>(a)] > square[static_cast<size_t>(b)];
  });
  screen.apart.assign(order.begin(), order.begin() + kApart);
  screen.coarse = empty_int4(heap, head.n, head.k_pad + 2 * kApart);
  const Weight& w = screen.coarse.view;
  for_shares(pool, head, [&](int first, int last, float* scratch) {
    CoarseMost most;
    for (int p = first; p < last; ++p)
      kernels.coarsen(head, p, screen.centre.data(), screen.apart.data(), scratch,
                      const_cast<uint8_t*>(w.codes) + p * w.panel_bytes,
                      reinterpret_cast<uint16_t*>(const_cast<uint8_t*>(w.scales) + p * w.panel_scale_bytes), most);
    const std::lock_guard<std::mutex> lock(mutex);
    screen.most.raise(most);
  });
  std::vector<float> facts = screen.centre;
  facts.insert(facts.end(), screen.apart.begin(), screen.apart.end());
  const CoarseMost& m = screen.most;
  for (float x : {m.error, m.norm, m.first_norm, m.second_norm, m.second_error, m.square}) facts.push_back(x);
  screen.facts = pack_dense(pool, heap, facts.data(), Code::F32, 1, static_cast<int>(facts.size()));
  return screen;
}

Screen screen_again(const PackedWeight& coarse, const PackedWeight& facts) {
  const Weight &w = coarse.view, &f = facts.view;
  const int columns = w.k_pad - 2 * kApart;
  if (w.code != Code::INT4 || f.code != Code::F32 || columns < kApart || f.n != 1 || f.k != columns + kApart + kMosts)
    throw std::invalid_argument("no screen has these parts");
  const float* lane = reinterpret_cast<const float*>(f.codes);
  auto fact = [&](int i) { return lane[i * kRowsPerPanel]; };
  Screen screen;
  screen.coarse = coarse, screen.facts = facts;
  for (int i = 0; i < columns; ++i) screen.centre.push_back(fact(i));
  for (int i = columns; i < columns + kApart; ++i) {
    screen.apart.push_back(static_cast<int32_t>(fact(i)));
    if (!(fact(i) >= 0.0f && fact(i) < static_cast<float>(columns))) throw std::invalid_argument("no such column");
  }
  const int at = columns + kApart;
  screen.most = {fact(at), fact(at + 1), fact(at + 2), fact(at + 3), fact(at + 4), fact(at + 5)};
  return screen;
}

float coarse_share(const Weight& head) {
  const float bytes = static_cast<float>(head.panel_bytes + head.panel_scale_bytes);
  return static_cast<float>((head.k_pad + 2 * kApart) * (kRowsPerPanel / 2 + kRowsPerPanel * 2 / 32)) / bytes;
}

}  // namespace miaotui
