#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>

namespace miaotui {

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found;
#ifdef MIAOTUI_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
      found.push_back({"avx512bf16", kernels_avx512(), attention_kernels_avx512bf16()});
    if (avx512) found.push_back({"avx512", kernels_avx512(), attention_kernels_avx512()});
    if (avx2 && __builtin_cpu_supports("avxvnni"))
      found.push_back({"avxvnni", kernels_avxvnni(), attention_kernels_avx2()});
    if (avx2) found.push_back({"avx2", kernels_avx2(), attention_kernels_avx2()});
#endif
    found.push_back({"portable", kernels_portable(), attention_kernels_portable()});
    const char* most = std::getenv("MIAOTUI_ISA");
    const auto named = std::find_if(found.begin(), found.end(),
                                    [&](const Isa& isa) { return most && std::strcmp(isa.name, most) == 0; });
    if (named != found.end()) found.erase(found.begin(), named);
    return found;
  }();
  return isas;
}

Program::Program(std::shared_ptr<Pool> pool, const Isa& isa, Limits limits, size_t arena_floats)
    : pool_(std::move(pool)), limits_(limits), arena_(arena_floats * sizeof(float) + 64, Pages::huge) {
  context_.threads = pool_->threads();
  context_.kernels = isa.kernels;
  context_.attention = isa.attention;
  seq_of_token_.resize(static_cast<size_t>(limits.max_tokens));
}

void Program::finish() {
  size_t workspace = 0, handed = 0, scratch = 0, attention = 0;
  for (const auto& op : ops_) {
    workspace = std::max(workspace, op->workspace_bytes(limits_));
    handed = std::max(handed, op->handed_bytes(limits_));
    scratch = std::max(scratch, op->scratch_bytes());
    attention = std::max(attention, op->attention_bytes(limits_, threads()));
  }
  scratch = round_up(scratch, 4096);
  workspace_ = Memory(workspace + 64, Pages::huge);
  handed_ = Memory(handed + 64, Pages::huge);
  scratch_ = Memory(scratch * static_cast<size_t>(threads()) + 64, Pages::huge);
  attention_scratch_ = Memory(attention + 64, Pages::small);
  next_linear_.assign(ops_.size(), nullptr);
  const Op* next = nullptr;
  for (size_t i = ops_.size(); i-- > 0;) {
    if (!ops_[i]->streams_weights()) continue;
    next_linear_[i] = next;
    next = ops_[i].get();
  }
  next_cache_.assign(ops_.size() + 1, nullptr);
  for (size_t i = ops_.size(); i-- > 0;) {
    const LayerCache* read = ops_[i]->reads_cache();
    next_cache_[i] = read ? read : next_cache_[i + 1];
  }
  if (!ops_.empty() && ops_.back()->note_greatest()) {
    const size_t values = static_cast<size_t>(threads()) * static_cast<size_t>(limits_.max_rows) * 16;
    greatest_ = Memory(2 * values * sizeof(float) + 64, Pages::small);
    context_.greatest.value = reinterpret_cast<float*>(greatest_.data());
    context_.greatest.panel = context_.greatest.value + values;
    context_.greatest_rows = limits_.max_rows;
  }
  ahead_ = std::make_unique<Ahead[]>(static_cast<size_t>(threads()));
  context_.ahead = ahead_.get();
  context_.workspace = workspace_.data();
  context_.handed = handed_.data();
  context_.attention_scratch = attention_scratch_.data();
  context_.scratch.clear();
  for (int t = 0; t < threads(); ++t) context_.scratch.push_back(scratch_.data() + scratch * static_cast<size_t>(t));
  settle();
}

void Program::settle() {
  const std::vector<Seat>& seats = pool_->seats();
  if (std::all_of(seats.begin(), seats.end(), [&](const Seat& seat) { return seat.node == seats[0].node; })) return;
  std::map<const Weight*, std::vector<std::pair<int, int>>> readers;  // (panels, node), one after another
  for (const int rows : {1, limits_.max_tokens}) {                    // with more rows, recoded weights are read
    Context step = context_;
    step.step.tokens = step.step.rows = rows;
    std::map<const Weight*, std::vector<std::pair<int, int>>> found;
    for (const auto& op : ops_)
      for (int t = 0; t < threads(); ++t)
        op->reads(step, t, [&](const Weight& weight, int first, int last) {
          found[&weight].emplace_back(last - first, seats[static_cast<size_t>(t)].node);
        });
    readers.merge(found);
  }
  for (const auto& [weight, shares] : readers) {
    auto move = [&shares = shares](const uint8_t* begin, size_t panel_bytes) {
      std::vector<Reader> parts;
      for (const auto& [panels, node] : shares) parts.push_back({static_cast<size_t>(panels) * panel_bytes, node});
      move_to_readers(begin, parts);
    };
    move(weight->codes, weight->panel_bytes);
    move(weight->scales, weight->panel_scale_bytes);
    if (weight->has_min) move(weight->mins, weight->panel_scale_bytes);
  }
}

void Program::needs_cache(int layer, LayerCache* cache, size_t bytes) {
  if (layers_.size() <= static_cast<size_t>(layer)) layers_.resize(static_cast<size_t>(layer) + 1);
  LayerSlot& slot = layers_[static_cast<size_t>(layer)];
  slot.users.push_back(cache);
  slot.bytes = bytes;
}

size_t Program::block_bytes() const {
  size_t total = 0;
  for (const LayerSlot& slot : layers_) total += slot.bytes;
  return total;
}

int Program::likeliest(int row) const {
  if (!context_.greatest.value || row < 0 || row >= context_.step.rows) return -1;
  float best = -std::numeric_limits<float>::infinity();
  int column = 0;
  for (int t = 0; t < threads(); ++t) {
    const Greatest mine = context_.greatest_of(t);
    for (int i = row * 16; i < row * 16 + 16; ++i) {
      const int at = static_cast<int>(mine.panel[i]) * kRowsPerPanel + i % 16;
      if (mine.value[i] > best || (mine.value[i] == best && at < column)) best = mine.value[i], column = at;
    }
  }
  return column;
}

// A block holds every layer's part, one after another: a short context touches little memory, and a block is copied
// in one piece.
void Program::allocate_cache(int64_t blocks) {
  const size_t stride = block_bytes();
  cache_ = Memory(stride * static_cast<size_t>(blocks));
  blocks_ = blocks;
  uint8_t* base = cache_.data();
  for (const LayerSlot& slot : layers_) {
    for (LayerCache* user : slot.users) user->base = base, user->block_stride = stride;
    base += slot.bytes;
  }
}

uint8_t* Program::block_at(int64_t block) const {
  if (block < 0 || block >= blocks_) throw std::out_of_range("no such cache block");
  return cache_.data() + block_bytes() * static_cast<size_t>(block);
}

void Program::copy_block(int64_t from, int64_t to) { std::memcpy(block_at(to), block_at(from), block_bytes()); }

void Program::read_block(int64_t block, uint8_t* content) const {
  std::memcpy(content, block_at(block), block_bytes());
}

void Program::write_block(int64_t block, const uint8_t* content) {
  std::memcpy(block_at(block), content, block_bytes());
}

void Program::run(const StepView& step) {
  if (step.tokens < 1 || step.tokens > limits_.max_tokens || step.seqs < 1 || step.seqs > limits_.max_seqs ||
      step.rows > limits_.max_rows)
    throw std::invalid_argument("the step is larger than the program was recorded for");
  if (blocks_ < 1) throw std::invalid_argument("the cache has not been allocated");
  context_.step = step;
  for (int s = 0; s < step.seqs; ++s) {
    if (step.query_start[s + 1] < step.query_start[s] || step.query_start[s + 1] > step.tokens)
      throw std::invalid_argument("query_start must ascend to the number of tokens");
    for (int t = step.query_start[s]; t < step.query_start[s + 1]; ++t) seq_of_token_[static_cast<size_t>(t)] = s;
  }
  context_.step.seq_of_token = seq_of_token_.data();
  look_ahead();
  pool_->each([this](int thread) { replay(thread); });
  if (!ops_.empty()) ops_.back()->after(context_);
  if (profiling_) ++profiled_runs_;
}

int Program::run_on(const StepView& first, int steps, const std::vector<int32_t>& ends, int32_t* chosen) {
  if (first.tokens != first.seqs || first.rows != first.seqs || !first.greedy || !notes_greatest())
    throw std::invalid_argument("only greedy steps of one token a sequence run on");
  const size_t count = static_cast<size_t>(first.seqs);
  ids_.assign(first.token_ids, first.token_ids + count);
  positions_.assign(first.positions, first.positions + count);
  lengths_.assign(first.context_len, first.context_len + count);
  StepView step = first;
  step.token_ids = ids_.data(), step.positions = positions_.data(), step.context_len = lengths_.data();
  for (int done = 1; done <= steps; ++done, chosen += count) {
    run(step);
    bool ended = false;
    for (size_t s = 0; s < count; ++s) {
      ids_[s] = chosen[s] = likeliest(static_cast<int>(s));
      ++positions_[s], ++lengths_[s];
      ended |= std::find(ends.begin(), ends.end(), chosen[s]) != ends.end();
    }
    if (ended) return done;
  }
  return steps;
}

// Each thread's share of what every layer's attention reads of the cache. With few rows the linears themselves wait for
// memory; and what would not stay in the caches is not worth asking for.
void Program::look_ahead() {
  constexpr size_t kPiece = 4 << 10, kMost = 6 << 20;
  const StepView& step = context_.step;
  const size_t bytes = layers_.empty() ? 0 : layers_[0].bytes, stride = block_bytes();
  const bool alike = std::all_of(layers_.begin(), layers_.end(), [&](const LayerSlot& l) { return l.bytes == bytes; });
  const size_t pieces = (bytes + kPiece - 1) / kPiece;
  const size_t piece = pieces ? round_up((bytes + pieces - 1) / pieces, 64) : 0;
  runs_.clear();
  if (alike && bytes && step.tokens > kStreamingRows) {
    const size_t most = kMost * static_cast<size_t>(threads()) / piece;
    for (int s = 0; s < step.seqs; ++s) {
      const int32_t* table = step.block_table + static_cast<int64_t>(s) * step.table_stride;
      for (int b = 0; b * kBlockSize < step.context_len[s] && runs_.size() < most; ++b)
        for (size_t i = 0; i < pieces; ++i) runs_.push_back(static_cast<size_t>(table[b]) * stride + i * piece);
    }
  }
  for (int t = 0; t < threads(); ++t) {
    int first, last;
    share_of(static_cast<int>(runs_.size()), t, threads(), first, last);
    Ahead& mine = ahead_[static_cast<size_t>(t)];
    mine.runs = runs_.data() + first;
    mine.count = last - first;
    mine.lines = static_cast<int>(piece / 64);
  }
}

// A thread that waits at a barrier asks for what it will read of the next linear's weights: with few rows they are the
// step's time, and a wait is lost to the memory otherwise.
void Program::replay(int thread) {
  constexpr size_t kAskedAtOnce = 1 << 10, kMostAsked = 128 << 10;  // of the second-level cache
  using Clock = std::chrono::steady_clock;
  const bool timed = profiling_ && thread == 0;
  Ahead& ahead = ahead_[static_cast<size_t>(thread)];
  ahead.base = nullptr, ahead.next = ahead.count;
  const Op* next = nullptr;
  size_t asked = 0;  // bytes of its share
  auto begin = timed ? Clock::now() : Clock::time_point();
  for (size_t i = 0; i < ops_.size(); ++i) {
    const Op& op = *ops_[i];
    const uint8_t* cache = next_cache_[i] ? next_cache_[i]->base : nullptr;
    if (cache != ahead.base) ahead.base = cache, ahead.next = cache ? 0 : ahead.count;
    const int phases = op.phases(context_);
    if (next_linear_[i] != next) next = next_linear_[i], asked = 0;
    auto ask = [&] {
      const size_t from = asked;
      return next && from < kMostAsked && next->prefetch(context_, thread, from, asked += kAskedAtOnce);
    };
    for (int phase = 0; phase < phases; ++phase) {
      op.run(context_, phase, thread);
      if (phase + 1 < phases || op.barrier) pool_->barrier(ask);
    }
    if (timed) {
      const auto now = Clock::now();
      seconds_[i] += std::chrono::duration<double>(now - begin).count();
      begin = now;
    }
  }
}

void Program::set_profiling(bool on) {
  profiling_ = on;
  profiled_runs_ = 0;
  seconds_.assign(ops_.size(), 0.0);
}

std::vector<std::pair<std::string, double>> Program::profile() const {
  std::vector<std::pair<std::string, double>> rows;
  for (size_t i = 0; i < ops_.size() && i < seconds_.size(); ++i) rows.emplace_back(ops_[i]->name, seconds_[i]);
  return rows;
}

}  // namespace miaotui
