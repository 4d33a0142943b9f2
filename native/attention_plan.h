// How a step's attention is cut into work and shared among threads. No instruction set is mentioned here.
//
// An item is one (sequence, kv head, tile of query tokens); items follow each other in that order, and each is a run of
// chunks of positions. The step's work is that long list of chunks, weighed by cost; a thread owns those whose middle
// falls into its equal share of the total. With many items a thread takes whole items; with few, an item's chunks may
// fall to several threads: the first of them then holds the merged state of its own chunks, the others hold each
// chunk's state apart, and attention_merge adds those in ascending order: the same operations as one thread would have
// done.
#pragma once

#include "attention.h"

namespace miaotui {

struct Item {
  int32_t seq = 0;
  int32_t head = 0;
  int32_t row = 0;          // first token row of the tile
  int32_t tokens = 0;       // tokens in the tile
  int32_t position = 0;     // of the first of them
  int32_t first_block = 0;  // blocks that any of the tile's tokens sees: [first_block, end_block)
  int32_t end_block = 0;
  int32_t first_chunk = 0;
  int32_t end_chunk = 0;
};

/// An item's chunks [begin, end) that one thread does.
struct Segment {
  Item item;
  int32_t begin = 0;
  int32_t end = 0;
  int64_t start = 0;  // cost before the item

  bool whole() const { return begin == item.first_chunk && end == item.end_chunk; }
  bool starts() const { return begin == item.first_chunk; }
};

/// The cut of one step; every thread computes the same one.
class Plan {
 public:
  Plan(const AttentionArgs& args, int threads);

  int32_t group() const { return group_; }
  bool split() const { return split_; }
  /// Whether some item has chunks of more than one thread.
  bool divides_an_item() const;
  /// The thread that owns a chunk of the item which `start` cost precedes.
  int owner(const Item& item, int64_t start, int32_t chunk) const;

 private:
  friend class Walk;
  void measure(int32_t rows);
  Item tile(int32_t seq, int32_t head, int32_t first) const;
  int64_t cost(const Item& item) const;
  int64_t cost(const Item& item, int32_t chunk) const;
  int owner_of(int64_t start, int64_t cost) const;
  /// Whether the middle of `cost` behind `start` falls to a thread before this one: owner_of without dividing.
  bool before(int64_t start, int64_t cost, int thread) const {
    return (2 * start + cost) * threads_ < 2 * total_ * thread;
  }

  const StepView& step_;
  int32_t kv_heads_;
  int32_t group_;
  int32_t window_;
  int threads_;
  int32_t tile_ = 1;  // tokens of a tile
  int64_t total_ = 0;
  int64_t largest_ = 0;
  bool split_ = false;
};

/// One thread's segments in order.
class Walk {
 public:
  Walk(const Plan& plan, int thread) : plan_(plan), thread_(thread) {}
  bool next(Segment& segment);

 private:
  bool advance();
  bool take(Segment& segment, const Item& item, int64_t start) const;

  const Plan& plan_;
  int thread_;
  int32_t seq_ = 0, head_ = 0, first_ = 0;
  int64_t start_ = 0;
};

/// Most rows (query tokens × heads of a group) that an item can have, and that it has when it is split.
int32_t most_rows(int32_t group);
int32_t most_split_rows(int32_t group);

/// Where things lie in the scratch. Offsets are bytes from its start and multiples of 64.
struct ScratchLayout {
  int32_t padded_rows = 0;  // most rows of an item, rounded up to 16
  size_t queries = 0;       // within one thread's work area: packed queries
  size_t scores = 0;        // [rows][kChunk] float
  size_t rows = 0;          // 6 arrays of [padded_rows] float
  size_t state = 0;         // the running state: [rows][Dp] float, then max and sum [rows]
  size_t work = 0;          // bytes of one work area
  size_t slot = 0;          // bytes of one chunk's state

  ScratchLayout(int32_t group, int32_t head_dim);
  size_t work_at(int thread) const { return work * static_cast<size_t>(thread); }
  /// The state of chunk `index` of the thread's segment.
  size_t slot_at(int32_t index, int thread, int threads) const {
    return work * static_cast<size_t>(threads) + slot * (static_cast<size_t>(index) * threads + thread);
  }
};

}  // namespace miaotui
