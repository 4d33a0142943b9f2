#include "attention_plan.h"

namespace miaotui {

namespace {

constexpr int32_t kBlocksPerChunk = kChunk / kBlockSize;
constexpr int32_t kTileRows[] = {48, 24, 12};
constexpr int32_t kShare = 8;      // with this many of the largest items per thread, whole items balance well enough
constexpr int64_t kBlockCost = 3;  // of a block, in rows: reading it
constexpr int64_t kChunkCost = 8;  // of a chunk: softmax and merging

int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
size_t line(size_t bytes) { return (bytes + 63) / 64 * 64; }
int32_t padded(int32_t head_dim) { return (head_dim + 15) / 16 * 16; }

}  // namespace

int32_t most_rows(int32_t group) { return most(kTileRows[0], group); }
int32_t most_split_rows(int32_t group) { return most(kTileRows[2], group); }

size_t cache_layer_bytes(CacheType type, int32_t kv_heads, int32_t head_dim) {
  const size_t elements = static_cast<size_t>(padded(head_dim)) * kBlockSize;
  const size_t tile = type == CacheType::fp32 ? elements * 4 : type == CacheType::bf16 ? elements * 2 : elements + 64;
  return tile * 2 * static_cast<size_t>(kv_heads);
}

Plan::Plan(const AttentionArgs& args, int threads)
    : step_(*args.step),
      kv_heads_(args.kv_heads),
      group_(args.heads / args.kv_heads),
      window_(args.window),
      threads_(threads) {
  for (int32_t rows : kTileRows) {
    measure(rows);
    if (threads == 1 || total_ >= largest_ * kShare * threads) return;
  }
  split_ = true;
}

// Sets tile_, total_ and largest_ for tiles of about `rows` rows.
void Plan::measure(int32_t rows) {
  tile_ = most(1, rows / group_);
  total_ = largest_ = 0;
  for (int32_t s = 0; s < step_.seqs; ++s) {
    const int32_t count = step_.query_start[s + 1] - step_.query_start[s];
    for (int32_t first = 0; first < count; first += tile_) {
      const int64_t c = cost(tile(s, 0, first));
      total_ += c * kv_heads_;
      if (c > largest_) largest_ = c;
    }
  }
}

Item Plan::tile(int32_t seq, int32_t head, int32_t first) const {
  const int32_t begin = step_.query_start[seq], count = step_.query_start[seq + 1] - begin;
  Item item;
  item.seq = seq;
  item.head = head;
  item.row = begin + first;
  item.tokens = least(tile_, count - first);
  item.position = step_.context_len[seq] - count + first;
  const int32_t oldest = window_ > 0 ? most(0, item.position - window_ + 1) : 0;
  item.first_block = oldest / kBlockSize;
  item.end_block = (item.position + item.tokens - 1) / kBlockSize + 1;
  item.first_chunk = item.first_block / kBlocksPerChunk;
  item.end_chunk = (item.end_block - 1) / kBlocksPerChunk + 1;
  return item;
}

int64_t Plan::cost(const Item& item) const {
  const int64_t rows = static_cast<int64_t>(item.tokens) * group_;
  return (item.end_block - item.first_block) * (rows + kBlockCost) + (item.end_chunk - item.first_chunk) * kChunkCost;
}

int64_t Plan::cost(const Item& item, int32_t chunk) const {
  const int64_t rows = static_cast<int64_t>(item.tokens) * group_;
  const int32_t first = most(item.first_block, chunk * kBlocksPerChunk);
  const int32_t end = least(item.end_block, (chunk + 1) * kBlocksPerChunk);
  return (end - first) * (rows + kBlockCost) + kChunkCost;
}

int Plan::owner_of(int64_t start, int64_t cost) const {
  return static_cast<int>((2 * start + cost) * threads_ / (2 * total_));
}

int Plan::owner(const Item& item, int64_t start, int32_t chunk) const {
  if (!split_) return owner_of(start, cost(item));
  int64_t before = start;
  for (int32_t c = item.first_chunk; c < chunk; ++c) before += cost(item, c);
  return owner_of(before, cost(item, chunk));
}

bool Walk::next(Segment& segment) {
  while (seq_ < plan_.step_.seqs) {
    const Item item = plan_.tile(seq_, head_, first_);
    const int64_t start = start_, cost = plan_.cost(item);
    if (item.tokens > 0) start_ += cost;
    advance();
    if (item.tokens <= 0 || plan_.before(start, 2 * cost, thread_)) continue;  // it ends before this thread's share
    if (!plan_.before(start, 0, thread_ + 1)) return false;
    if (take(segment, item, start)) return true;
  }
  return false;
}

bool Walk::advance() {
  const StepView& step = plan_.step_;
  first_ += plan_.tile_;
  if (first_ < step.query_start[seq_ + 1] - step.query_start[seq_]) return true;
  first_ = 0;
  if (++head_ < plan_.kv_heads_) return true;
  head_ = 0;
  return ++seq_ < step.seqs;
}

bool Walk::take(Segment& segment, const Item& item, int64_t start) const {
  segment.item = item;
  segment.start = start;
  segment.begin = item.first_chunk;
  segment.end = item.end_chunk;
  if (!plan_.split_) {
    const int64_t cost = plan_.cost(item);
    return !plan_.before(start, cost, thread_) && plan_.before(start, cost, thread_ + 1);
  }
  int64_t before = start;
  bool found = false;
  for (int32_t c = item.first_chunk; c < item.end_chunk; ++c) {
    const int64_t cost = plan_.cost(item, c);
    const int owner = plan_.owner_of(before, cost);
    before += cost;
    if (owner < thread_) continue;
    if (owner > thread_) {
      segment.end = c;
      break;
    }
    if (!found) segment.begin = c;
    found = true;
  }
  return found;
}

bool Plan::divides_an_item() const {
  if (!split_) return false;
  int64_t start = 0;
  for (int32_t s = 0; s < step_.seqs; ++s) {
    const int32_t count = step_.query_start[s + 1] - step_.query_start[s];
    for (int32_t head = 0; head < kv_heads_; ++head) {
      for (int32_t first = 0; first < count; first += tile_) {
        const Item item = tile(s, head, first);
        const int64_t all = cost(item), last = cost(item, item.end_chunk - 1);
        if (owner_of(start, cost(item, item.first_chunk)) != owner_of(start + all - last, last)) return true;
        start += all;
      }
    }
  }
  return false;
}

bool attention_needs_merge(const AttentionArgs& args, int threads) {
  return threads > 1 && Plan(args, threads).divides_an_item();
}

ScratchLayout::ScratchLayout(int32_t group, int32_t head_dim) {
  padded_rows = padded(most_rows(group));
  const size_t rows_most = static_cast<size_t>(padded_rows), dp = static_cast<size_t>(padded(head_dim));
  scores = queries + line(rows_most * dp * sizeof(float));
  rows = scores + rows_most * kChunk * sizeof(float);
  state = rows + 6 * rows_most * sizeof(float);
  work = state + line(rows_most * (dp + 2) * sizeof(float));
  slot = line(static_cast<size_t>(most_split_rows(group)) * (dp + 2) * sizeof(float));
}

size_t attention_scratch_bytes(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t max_model_len, int threads) {
  const ScratchLayout layout(heads / kv_heads, head_dim);
  const size_t all = layout.work_at(threads);
  if (threads == 1) return all;
  return all + layout.slot * static_cast<size_t>(threads) * static_cast<size_t>((max_model_len + kChunk - 1) / kChunk);
}

}  // namespace miaotui
