#include "screened_op.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace miaotui {
namespace {

constexpr int kMostThreads = 1024, kMostGroups = 1024;
constexpr float kOver = 1.0001f;     // for the rounding of the bounds themselves
constexpr float kWorthWhile = 0.8f;  // of the bytes that the screen saves, those that panels may cost again
constexpr float kForget = 0.05f;
constexpr int kRest = 256;
constexpr float kMostUnits = 0x1p22f;
constexpr int kProbed = 32;  // panels for each row, of all threads together

// Sums in eight parts, which the compiler may not make of one.
template <typename F>
float sum_of(int n, F&& term) {
  float part[8] = {};
  for (int i = 0; i < n; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += term(i + j);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

}  // namespace

struct ScreenedOp::Own {
  float* rows;         // what LinearOp::prepare needs
  PreparedRows exact;  // the head's input
  float* row;          // one as the coarse head meets it: k_pad, then the columns apart twice
  float* coded;        // what its codes are worth
  int32_t* more;       // of each group
  float* moved;        // of each row: what all its logits have more than in the coarse head
  float* slack;        // and what rounding may amount to
  PreparedRows coarse;
  Greatest likely;  // of the bounds, in this thread's panels
  int32_t* noted;   // panels, as many as there are
  float* kernel;
};

struct ScreenedOp::Shared {
  float* bounds;  // [rows][stride]
  int64_t stride;
  float* best;     // [threads][kScreenedRows]
  int32_t* done;   // [threads]: panels multiplied
  uint8_t* known;  // [panels]: which
};

bool ScreenedOp::can_be_screened() const {
  const Weight& w = head();
  return parts.size() == 1 && !gated && perm.empty() && parts[0].bias.empty() && !add.data && scale == 1.0f &&
         softcap == 0.0f && of_logits && !handed && !hands_on && w.k >= 2 * kApart && w.k_pad <= kMostGroups * 32 &&
         (integers() ? w.code == Code::INT8 && w.inputs == Inputs::By32 : !w.integer());
}

ScreenedOp::Own ScreenedOp::lay_out(uint8_t* memory, int count) const {
  auto take = [&memory](size_t bytes) {
    uint8_t* at = memory;
    memory += round_up(bytes, 64);
    return at;
  };
  auto floats = [&take](int n) { return reinterpret_cast<float*>(take(static_cast<size_t>(n) * sizeof(float))); };
  const int wide = screen->width();
  Own own;
  own.rows = floats(2 * k_pad());
  own.exact = prepared_in(take(prepared_bytes(count)), count);
  own.row = floats(wide), own.coded = floats(wide);
  own.more = reinterpret_cast<int32_t*>(floats(wide / 32));
  own.moved = floats(count), own.slack = floats(count);
  own.coarse =
      PreparedRows::in(take(PreparedRows::bytes(count, wide, false, true)), count, wide, false, true, nullptr, 0);
  own.likely.value = floats(count * 16), own.likely.panel = floats(count * 16);
  own.noted = reinterpret_cast<int32_t*>(floats(head().panels));
  own.kernel = floats(0);
  return own;
}

size_t ScreenedOp::scratch_bytes() const {
  if (!screen) return LinearOp::scratch_bytes();
  const Own own = lay_out(nullptr, kScreenedRows);
  return std::max(reinterpret_cast<uintptr_t>(own.kernel) + linear_scratch_bytes(screen->width()) + 64,
                  LinearOp::scratch_bytes());
}

ScreenedOp::Shared ScreenedOp::lay_out_shared(uint8_t* memory, int threads) const {
  Shared shared;
  shared.stride = static_cast<int64_t>(head().panels) * kRowsPerPanel;
  shared.bounds = reinterpret_cast<float*>(memory);
  shared.best = shared.bounds + kScreenedRows * shared.stride;
  shared.done = reinterpret_cast<int32_t*>(shared.best + threads * kScreenedRows);
  shared.known = reinterpret_cast<uint8_t*>(shared.done + threads);
  return shared;
}

size_t ScreenedOp::workspace_bytes(const Limits& limits) const {
  if (!screen) return LinearOp::workspace_bytes(limits);
  const Shared shared = lay_out_shared(nullptr, kMostThreads);
  return std::max(reinterpret_cast<uintptr_t>(shared.known) + static_cast<size_t>(head().panels),
                  LinearOp::workspace_bytes(limits));
}

// A row's codes for the coarse head, the sums of their groups raised to bounds. Where a group of the coarse head has
// scale s and codes c, a row of the head has s * c + e there, |e| <= most.error * s; and where the input is x and its
// codes are worth y, c * x <= c * y + |c| * |x - y|.
void ScreenedOp::lift(const Context& c, const Own& own, int row) const {
  const int k = static_cast<int>(in.width), padded = k_pad(), groups = padded / 32;
  const CoarseMost& most = screen->most;
  const float* x = in.data + row * in.stride;
  if (norm)
    c.kernels->norm(x, norm->weight.data(), norm->bias.empty() ? nullptr : norm->bias.data(), nullptr, norm->eps, k,
                    norm->layer, own.row);
  else
    std::memcpy(own.row, x, sizeof(float) * static_cast<size_t>(k));
  std::fill(own.row + k, own.row + padded, 0.0f);
  float *apart = own.row + padded, *coded_apart = own.coded + padded;
  for (int i = 0; i < kApart; ++i) apart[i] = apart[kApart + i] = own.row[screen->apart[static_cast<size_t>(i)]];
  c.kernels->quantise(own.row, screen->width(), own.coarse.quant, row, Inputs::By32);

  float scales[kMostGroups + 2], away[kMostGroups];  // |x - y|
  c.kernels->decode(own.coarse.quant, row, own.coded, scales);
  for (int g = 0; g < groups; ++g) {
    const float *from = own.row + g * 32, *coded = own.coded + g * 32;
    away[g] =
        integers() ? 0.0f : std::sqrt(sum_of(32, [&](int i) { return (from[i] - coded[i]) * (from[i] - coded[i]); }));
  }
  float* input = integers() ? own.coded : own.row;  // of the head
  own.moved[row] = sum_of(padded, [&](int i) { return input[i] * screen->centre[static_cast<size_t>(i)]; });
  const float length = std::sqrt(sum_of(padded, [&](int i) { return input[i] * input[i]; }));
  own.slack[row] = static_cast<float>(padded + 64) * 0x1p-22f * length * std::sqrt(most.square);
  float length_apart = 0.0f, away_apart = 0.0f;
  for (int i = 0; i < kApart; ++i) {
    float& value = input[screen->apart[static_cast<size_t>(i)]];
    length_apart += value * value, away_apart += (value - coded_apart[i]) * (value - coded_apart[i]);
    value = 0.0f;
  }
  length_apart = std::sqrt(length_apart), away_apart = std::sqrt(away_apart);
  auto units = [&](float bound, float scale) {
    const float count = scale > 0.0f ? std::ceil(bound * kOver / scale) : 0.0f;
    if (count <= kMostUnits) return static_cast<int32_t>(count);
    own.slack[row] = std::numeric_limits<float>::infinity();  // not a number, or more than a sum holds: nothing is out
    return 0;
  };
  for (int g = 0; g < groups; ++g) {
    const float* of = input + g * 32;
    const float left = std::sqrt(sum_of(32, [&](int i) { return of[i] * of[i]; }));
    own.more[g] = units(most.error * left + most.norm * away[g], scales[g]);
  }
  own.more[groups] = units(most.first_norm * away_apart, scales[groups]);
  own.more[groups + 1] = units(most.second_norm * away_apart + most.second_error * length_apart, scales[groups + 1]);
  c.kernels->lift(own.coarse.quant, row, own.more);
}

// The logits of the panels noted, each asking for the next one's codes.
void ScreenedOp::multiply_noted(const Context& c, const Own& own, int thread, int count) const {
  LinearArgs args = arguments(c, own.exact, thread);
  for (int i = 0; i < count; ++i) {
    args.next_panel = own.noted[i + 1 < count ? i + 1 : i];
    multiply(c, args, own.noted[i], own.noted[i] + 1, own.kernel);
  }
}

// Bounds for this thread's panels; then the logits of those that have the highest in some lane, the best of which
// tells what to leave out.
void ScreenedOp::bound(const Context& c, const Own& own, const Shared& shared, int thread) const {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const int count = rows(c);
  const Greatest found = c.greatest_of(thread);
  std::fill_n(found.value, count * 16, kNone);
  int first, last;
  share_of(head().panels, thread, c.threads, first, last);
  prepare(c, own.exact, 0, count, own.rows);
  for (int row = 0; row < count; ++row) lift(c, own, row);
  LinearArgs args;
  args.weight = &screen->coarse.view;
  args.rows = count;
  args.integer = true;
  args.quant = own.coarse.quant;
  args.epilogue.out = shared.bounds;
  args.epilogue.out_stride = static_cast<size_t>(shared.stride);
  args.greatest = own.likely;
  std::fill_n(own.likely.value, count * 16, kNone);
  std::fill_n(own.likely.panel, count * 16, static_cast<float>(first));
  c.kernels->linear(args, first, last, own.kernel);
  std::fill(shared.known + first, shared.known + last, uint8_t{0});
  int noted = 0;
  const int most = std::clamp(kProbed / c.threads, 1, 16);
  for (int row = 0; row < count && first < last; ++row) {
    const float *bounds = own.likely.value + row * 16, *panels = own.likely.panel + row * 16;
    int lanes[16];
    std::iota(lanes, lanes + 16, 0);
    std::partial_sort(lanes, lanes + most, lanes + 16, [&](int a, int b) { return bounds[a] > bounds[b]; });
    for (int i = 0; i < most; ++i) {
      const int panel = static_cast<int>(panels[lanes[i]]);
      if (!shared.known[panel]) shared.known[panel] = 1, own.noted[noted++] = panel;
    }
  }
  multiply_noted(c, own, thread, noted);
  shared.done[thread] = noted;
  for (int row = 0; row < count; ++row)
    shared.best[thread * kScreenedRows + row] = *std::max_element(found.value + row * 16, found.value + row * 16 + 16);
}

// The logits of every other panel where some bound is not below the best of all threads. A NaN is below nothing. Panels
// go to the threads in turn: those of frequent tokens, which stand together, are wanted more often.
void ScreenedOp::settle(const Context& c, const Own& own, const Shared& shared, int thread) const {
  const int count = rows(c);
  float least[kScreenedRows];
  for (int row = 0; row < count; ++row) {
    float best = shared.best[row];
    for (int t = 1; t < c.threads; ++t) best = std::max(best, shared.best[t * kScreenedRows + row]);
    least[row] = best - own.moved[row] - own.slack[row];
  }
  int noted = 0;
  for (int panel = thread; panel < head().panels; panel += c.threads) {
    int may = 0;
    for (int row = 0; row < count; ++row) {
      const float* bounds = shared.bounds + row * shared.stride + panel * kRowsPerPanel;
      for (int i = 0; i < kRowsPerPanel; ++i) may += !(bounds[i] < least[row]);
    }
    if (may && !shared.known[panel]) own.noted[noted++] = panel;
  }
  multiply_noted(c, own, thread, noted);
  shared.done[thread] += noted;
}

void ScreenedOp::run(const Context& c, int phase, int thread) const {
  if (!screens(c)) return LinearOp::run(c, phase, thread);
  const Own own = lay_out(c.scratch[static_cast<size_t>(thread)], rows(c));
  const Shared shared = lay_out_shared(c.workspace, c.threads);
  return phase == 0 ? bound(c, own, shared, thread) : settle(c, own, shared, thread);
}

bool ScreenedOp::prefetch(const Context& c, int thread, size_t from, size_t to) const {
  if (!screens(c) || c.step.tokens > kPreparedByEach) return LinearOp::prefetch(c, thread, from, to);
  int first, last;
  share_of(head().panels, thread, c.threads, first, last);
  return ask_for(screen->coarse.view, first, last, from, to);
}

void ScreenedOp::reads(const Context& c, int thread, const Read& read) const {
  LinearOp::reads(c, thread, read);
  int first, last;
  share_of(head().panels, thread, c.threads, first, last);
  if (screen) read(screen->coarse.view, first, last);
}

// Where bounds let too many panels through, as where all logits are alike, the head is read as ever for a while.
void ScreenedOp::after(const Context& c) {
  if (resting_) {
    --resting_;
    return;
  }
  if (!screens(c)) return;
  const Shared shared = lay_out_shared(c.workspace, c.threads);
  int done = 0;
  for (int t = 0; t < c.threads; ++t) done += shared.done[t];
  const float most = kWorthWhile * (1.0f - coarse_share(head()));
  share_ += kForget * (static_cast<float>(done) / static_cast<float>(head().panels) - share_);
  if (share_ > most) resting_ = kRest, share_ = most / 2;
}

}  // namespace miaotui
