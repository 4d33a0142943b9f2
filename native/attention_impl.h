// The attention kernels, written once over sixteen lanes. An attention_<isa>.cpp includes its simd_<isa>.h, defines the
// few operations that only attention needs (listed below), and includes this file inside its own namespace.
//
//   kQueryRows            query rows of a register tile, at most 6
//   kAccumulators         F16x accumulators that fit into the registers
//   keep_lanes(x, a, b)   lanes [a, b) of x, −inf elsewhere; a ≤ 16, b ≥ 0
//   keep_from(r, x, t)    lanes of r where x ≥ t (or x is NaN), 0 elsewhere
//   scaled_from(r, n, x, t)  lanes of r · 2^n where x ≥ t (or x is NaN), 0 elsewhere; n integers ≥ −127
//   BytePairs, load_byte_pairs(p), dot_byte_pairs(acc, v, p): 16 d × 2 positions in int8 against two int16 at p
//   store_int16(p, x)     16 int16, of integers that fit
//   store_key_words(p, x) 8 words of two int16 each: of every four integers 0 and 2, then 1 and 3
//   store_bf16(p, x)      16 bfloat16, to nearest even
//   store_every_other(p, odd, x)  p[2 i + odd] = x[i] for 16 words or bytes, touching no other
//   KeyBytes, load_key_bytes(p), dot_key_bytes(acc, k, q02, q13): 16 positions × 4 int8 d against int16 q
//   and if MIAOTUI_DOT_BF16 is defined: DotLine, load_dot(p), splat_dot(p), dot_bf16(acc, line, x),
//   store_dot(p, x, y): 32 bfloat16, which it returns; sum_dot(acc, line): acc + the line's pairs
//
// A query row is one (token, head of the group). A row's result is one chain of operations that the tile it is computed
// in does not change: positions that it does not see contribute a probability of exactly 0, and products are added by
// explicit fma only, so that the compiler cannot contract them differently in different tiles.

#include "attention_tiles.h"

// Rows of an item: max and sum of the running state or of one chunk, and the factors that merge them.
struct State {
  float* out;  // [rows][dp]
  float* max;  // [rows]
  float* sum;
};

// Merges a chunk's (max, sum) into the running one; keep and gain do the same to the outputs.
inline __attribute__((noinline)) void merge_rows(int rows, const State& state, const State& chunk, float* keep,
                                                 float* gain) {
  for (int r = 0; r < rows; r += 16) {
    const int n = least(16, rows - r);
    const F16x old_max = load_n(state.max + r, n), chunk_max = load_n(chunk.max + r, n);
    const F16x merged = max(old_max, chunk_max);
    const F16x base = max(merged, splat(-3.0e38f));  // rows that have seen nothing: −inf − base is −inf, never NaN
    const F16x k = exp2_lanes(sub(old_max, base)), g = exp2_lanes(sub(chunk_max, base));
    store_n(keep + r, k, n);
    store_n(gain + r, g, n);
    store_n(state.max + r, merged, n);
    store_n(state.sum + r, fma(load_n(state.sum + r, n), k, mul(load_n(chunk.sum + r, n), g)), n);
  }
}

// ---- one item ----------------------------------------------------------------------------------------------------

// A thread's view of the scratch for one item.
struct Work {
  uint8_t* base;
  const ScratchLayout& layout;
  int rows;
  int dp;

  uint32_t* queries() const { return reinterpret_cast<uint32_t*>(base + layout.queries); }
  float* scores() const { return reinterpret_cast<float*>(base + layout.scores); }
  float* array(int i) const { return reinterpret_cast<float*>(base + layout.rows) + i * layout.padded_rows; }
  float* query_scale() const { return array(0); }
  float* keep() const { return array(1); }
  float* gain() const { return array(2); }
  float* unit() const { return array(5); }  // of a row's probabilities, where those are integers
  State state() const { return at(reinterpret_cast<float*>(base + layout.state)); }
  State chunk() const { return {nullptr, array(3), array(4)}; }  // max and sum; its output goes straight into state
  State at(float* p) const { return {p, p + rows * dp, p + rows * (dp + 1)}; }
};

// Row groups of the register tile, as even as possible: group g has rows [first(g), first(g + 1)).
struct RowGroups {
  int rows;
  int count;
  explicit RowGroups(int n) : rows(n), count((n + kQueryRows - 1) / kQueryRows) {}
  int first(int g) const { return rows * g / count; }
};

template <typename T>
void pack_queries(const AttentionArgs& args, const Item& item, const Work& work) {
  const int group = args.heads / args.kv_heads, words = work.dp / T::kKeyStep * T::kWords;
  const float factor = args.softcap > 0.0f ? args.scale / args.softcap : args.scale * kLog2e;
  const RowGroups groups(work.rows);
  for (int g = 0; g < groups.count; ++g) {
    const int first = groups.first(g), count = groups.first(g + 1) - first;
    typename T::Word* out = reinterpret_cast<typename T::Word*>(work.queries()) + first * words;
    for (int r = 0; r < count; ++r) {
      const int token = item.row + (first + r) / group, head = item.head * group + (first + r) % group;
      const float* q = args.q + token * args.q_stride + static_cast<int64_t>(head) * args.head_dim;
      work.query_scale()[first + r] = T::pack(out + r, count, q, args.head_dim, work.dp, factor);
    }
  }
}

// The K tiles of a chunk's blocks that the item sees.
struct ChunkTiles {
  const uint8_t* keys[kBlocksPerChunk];
  int first = 0;  // block of the first
  int count = 0;
  int offset = 0;  // of the first within the chunk

  ChunkTiles(const AttentionArgs& args, const Item& item, int chunk, size_t tile_bytes) {
    const StepView& step = *args.step;
    const int32_t* table = step.block_table + static_cast<int64_t>(item.seq) * step.table_stride;
    first = most(item.first_block, chunk * kBlocksPerChunk);
    count = least(item.end_block, (chunk + 1) * kBlocksPerChunk) - first;
    offset = first - chunk * kBlocksPerChunk;
    const uint8_t* base = args.cache.base + static_cast<size_t>(item.head) * 2 * tile_bytes;
    for (int b = 0; b < count; ++b) keys[b] = base + static_cast<size_t>(table[first + b]) * args.cache.block_stride;
  }
};

template <typename T>
void softmax_rows(const AttentionArgs& args, const Item& item, const Work& work, const ChunkTiles& tiles,
                  const uint8_t* const* values, const State& chunk) {
  const int group = args.heads / args.kv_heads, base = (tiles.first - tiles.offset) * kBlockSize;
  for (int r = 0; r < work.rows; ++r) {
    const int position = item.position + r / group;
    const int low = args.window > 0 ? most(position - args.window + 1 - base, 0) : 0;
    const Row row{tiles.offset, tiles.offset + tiles.count, low, position + 1 - base};
    softmax_row<T>(work.scores() + r * kChunk, row, args.softcap, values, work.dp, chunk.max[r], chunk.sum[r],
                   work.unit()[r]);
  }
}

// One chunk: its max and sum into `chunk`, its output merged into state.out, or stored as it is into chunk.out.
template <typename T>
void attend_chunk(const AttentionArgs& args, const Item& item, const Work& work, const ChunkTiles& tiles,
                  const ChunkTiles& ahead, const State* state, const State& chunk) {
  using Word = typename T::Word;
  const int words = work.dp / T::kKeyStep * T::kWords;
  const size_t tile_bytes = T::tile_bytes(work.dp);
  const RowGroups groups(work.rows);
  for (int b = 0; b < tiles.count; b += 4) {
    for (int g = 0; g < groups.count; ++g) {
      const int first = groups.first(g), count = groups.first(g + 1) - first;
      const ScoreCall<T> call{
          tiles.keys + b, least(4, tiles.count - b),  reinterpret_cast<const Word*>(work.queries()) + first * words,
          work.dp,        work.query_scale() + first, work.scores() + first * kChunk + (tiles.offset + b) * kBlockSize};
      with_rows<kQueryRows>(count, call);
    }
  }
  const uint8_t* values[kBlocksPerChunk];
  const uint8_t* next[kBlocksPerChunk];
  for (int b = 0; b < tiles.count; ++b) {
    values[b] = tiles.keys[b] + tile_bytes;
    next[b] = b < ahead.count ? ahead.keys[b] : values[b];
  }
  softmax_rows<T>(args, item, work, tiles, values, chunk);
  if (state) merge_rows(work.rows, *state, chunk, work.keep(), work.gain());
  for (int g = 0; g < groups.count; ++g) {
    const int first = groups.first(g), count = groups.first(g + 1) - first;
    const float* scores = work.scores() + first * kChunk + tiles.offset * T::kScoreWords;
    const ValueTile tile{values,
                         next,
                         tiles.count,
                         work.dp,
                         scores,
                         (state ? state->out : chunk.out) + first * work.dp,
                         state ? work.keep() + first : nullptr,
                         work.gain() + first,
                         work.unit() + first};
    with_rows<kQueryRows>(count, ValueCall<T>{tile});
  }
}

inline void clear(const State& state, int rows, int dp) {
  memset(state.out, 0, sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(dp));
  for (int r = 0; r < rows; ++r) {
    state.max[r] = kMinusInfinity;
    state.sum[r] = 0.0f;
  }
}

inline void write_rows(const AttentionArgs& args, const Item& item, const State& state, int rows, int dp) {
  const int group = args.heads / args.kv_heads;
  for (int r = 0; r < rows; ++r) {
    const int token = item.row + r / group, head = item.head * group + r % group;
    float* out = args.out + token * args.out_stride + static_cast<int64_t>(head) * args.head_dim;
    const F16x factor = splat(1.0f / state.sum[r]);
    for (int d = 0; d < args.head_dim; d += 16)
      store_n(out + d, mul(load(state.out + r * dp + d), factor), least(16, args.head_dim - d));
  }
}

// An item's queries come from the cores that projected them: asked for while the item before is done.
inline void prefetch_queries(const AttentionArgs& args, const Item& item) {
  const int group = args.heads / args.kv_heads, bytes = group * args.head_dim * static_cast<int>(sizeof(float));
  const float* q = args.q + item.row * args.q_stride + static_cast<int64_t>(item.head) * group * args.head_dim;
  for (int i = 0; i < bytes; i += 64) prefetch(reinterpret_cast<const uint8_t*>(q) + i);
}

template <typename T>
void attend(const AttentionArgs& args, int thread, int threads) {
  const Plan plan(args, threads);
  const ScratchLayout layout(plan.group(), args.head_dim);
  Walk walk(plan, thread);
  Segment segment, next;
  for (bool more = walk.next(next); more;) {
    segment = next;
    more = walk.next(next);
    if (more) prefetch_queries(args, next.item);
    const Item& item = segment.item;
    const int dp = (args.head_dim + 15) / 16 * 16;
    const Work work{args.scratch + layout.work_at(thread), layout, item.tokens * plan.group(), dp};
    const State state = work.state();
    pack_queries<T>(args, item, work);
    if (segment.starts()) clear(state, work.rows, dp);
    ChunkTiles tiles(args, item, segment.begin, T::tile_bytes(dp));
    for (int c = segment.begin; c < segment.end; ++c) {
      const ChunkTiles ahead(args, item, least(c + 1, item.end_chunk - 1), T::tile_bytes(dp));
      if (segment.starts()) {
        attend_chunk<T>(args, item, work, tiles, ahead, &state, work.chunk());
      } else {
        float* slot = reinterpret_cast<float*>(args.scratch + layout.slot_at(c - segment.begin, thread, threads));
        attend_chunk<T>(args, item, work, tiles, ahead, nullptr, work.at(slot));
      }
      tiles = ahead;
    }
    if (segment.whole()) write_rows(args, item, state, work.rows, dp);
  }
}

// Adds to the state that `thread` holds of an item's first chunks those that other threads hold, in order.
inline void attention_merge(const AttentionArgs& args, int thread, int threads) {
  const Plan plan(args, threads);
  if (!plan.split()) return;
  const ScratchLayout layout(plan.group(), args.head_dim);
  const int dp = (args.head_dim + 15) / 16 * 16;
  Walk walk(plan, thread);
  Segment segment;
  while (walk.next(segment)) {
    if (!segment.starts() || segment.whole()) continue;
    const Item& item = segment.item;
    const Work work{args.scratch + layout.work_at(thread), layout, item.tokens * plan.group(), dp};
    const State state = work.state();
    int owner = thread, begin = segment.end;
    for (int c = segment.end; c < item.end_chunk; ++c) {
      const int by = plan.owner(item, segment.start, c);
      if (by != owner) begin = c;
      owner = by;
      const State chunk = work.at(reinterpret_cast<float*>(args.scratch + layout.slot_at(c - begin, owner, threads)));
      merge_rows(work.rows, state, chunk, work.keep(), work.gain());
      for (int r = 0; r < work.rows; ++r) {
        const F16x keep = splat(work.keep()[r]), gain = splat(work.gain()[r]);
        for (int d = r * dp; d < (r + 1) * dp; d += 16)
          store(state.out + d, fma(load(state.out + d), keep, mul(load(chunk.out + d), gain)));
      }
    }
    write_rows(args, item, state, work.rows, dp);
  }
}
