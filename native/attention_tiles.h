// The inner loops of attention: scores of a register tile, its values, and the softmax of one row between them.
// Included by attention_impl.h, inside a per-instruction-set namespace.

constexpr int kBlocksPerChunk = kChunk / kBlockSize;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kMinusInfinity = -__builtin_inff();

template <typename T>
MIAOTUI_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
MIAOTUI_INLINE T most(T a, T b) {
  return a > b ? a : b;
}

#include "attention_types.h"

// 2^x for x ≤ 0, exactly 1 at 0, 0 below −126. Relative error 1e-7 (polynomial: Cephes exp2f), or 1e-4 if ROUGH, which
// is a twentieth of bfloat16's rounding (minimax cubic, 1 at 0).
template <bool ROUGH = false>
MIAOTUI_INLINE F16x exp2_lanes(F16x x) {
  const F16x n = round(max(splat(-127.0f), x)), f = sub(x, n);
  F16x p;
  if constexpr (ROUGH) {
    p = fma(splat(0.0550088602f), f, splat(0.242210963f));
    p = fma(p, f, splat(0.693282935f));
  } else {
    p = fma(splat(1.535336188319500e-4f), f, splat(1.339887440266574e-3f));
    p = fma(p, f, splat(9.618437357674640e-3f));
    p = fma(p, f, splat(5.550332471162809e-2f));
    p = fma(p, f, splat(2.402264791363012e-1f));
    p = fma(p, f, splat(6.931472028550421e-1f));
  }
  return scaled_from(fma(p, f, splat(1.0f)), n, x, -126.0f);
}

// tanh, relative error 2e-7: an odd polynomial below 0.625 (Cephes tanhf), (1 − e^−2|x|) / (1 + e^−2|x|) above.
MIAOTUI_INLINE F16x tanh_lanes(F16x x) {
  const F16x one = splat(1.0f), a = abs(x), z = mul(x, x);
  F16x p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  p = fma(mul(p, z), x, x);
  const F16x e = exp2_lanes(mul(a, splat(-2.0f * kLog2e)));
  const F16x sign = fma(splat(2.0f), keep_from(one, x, 0.0f), splat(-1.0f));
  const F16x large = mul(sign, div(sub(one, e), add(one, e)));
  return add(keep_from(large, a, 0.625f), sub(p, keep_from(p, a, 0.625f)));
}

// ---- tiles -------------------------------------------------------------------------------------------------------

constexpr int tiles_for(int rows, int accumulators) {
  return accumulators / rows >= 4 ? 4 : accumulators / rows >= 2 ? 2 : 1;
}

// Scores of R rows against N blocks, out[r · kChunk + 16 n]. The V tile, which follows the K tile, is fetched
// meanwhile.
template <typename T, int R, int N>
__attribute__((noinline)) void score_tile(const uint8_t* const* keys, const typename T::Word* q, int dp,
                                          const float* query_scale, float* out) {
  const uint8_t* k[N];
  typename T::Sum acc[R][N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) k[n] = keys[n];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = T::none();
  }
  const size_t value = T::tile_bytes(dp);
  const int steps = dp / T::kKeyStep;
  for (int step = 0; step < steps; ++step) {
    const size_t at = static_cast<size_t>(step) * 64;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) prefetch(k[n] + value + at);
    T::template key_step<R, N>(acc, k, at, q);
    q += T::kWords * R;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const float* scales = reinterpret_cast<const float*>(k[n] + value - 64);
      store(out + r * kChunk + n * kBlockSize, T::finish(acc[r][n], query_scale[r], scales));
    }
  }
}

struct ValueTile {
  const uint8_t* const* values;  // V tiles of the chunk's blocks
  const uint8_t* const* ahead;   // what to fetch meanwhile: for each block, as many bytes as a V tile
  int blocks;
  int dp;
  const float* scores;  // of the first row, at the first block
  float* out;           // [row][dp]
  const float* keep;    // out = keep · out + gain · result; null: out = result
  const float* gain;
  const float* unit;  // of each row's probabilities
};

// 16 N columns from column d on of the chunk's result for R rows.
template <typename T, int R, int N>
__attribute__((noinline)) void value_tile(const ValueTile& tile, int d) {
  typename T::ValueSum acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = T::no_value();
  }
  constexpr int kLines = (static_cast<int>(T::value_bytes(16 * N)) + 63) / 64;
  const size_t offset = T::value_bytes(d), stride = T::value_bytes(tile.dp);
  for (int b = 0; b < tile.blocks; ++b) {
    const uint8_t *v = tile.values[b] + offset, *ahead = tile.ahead[b] + offset;
    const float* p = tile.scores + b * T::kScoreWords;
    for (int step = 0; step < kBlockSize / T::kValueStep; ++step) {
#pragma GCC unroll 8
      for (int line = 0; line < kLines; ++line) prefetch(ahead + 64 * line);
      T::template value_step<R, N>(acc, v, p, step);
      v += stride;
      ahead += stride;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* out = tile.out + r * tile.dp + d + 16 * n;
      F16x result = T::value_of(acc[r][n], tile.unit[r]);
      if (tile.keep) result = fma(load(out), splat(tile.keep[r]), mul(result, splat(tile.gain[r])));
      store(out, result);
    }
  }
}

template <typename T, int R>
void score_rows(const uint8_t* const* keys, int blocks, const typename T::Word* q, int dp, const float* query_scale,
                float* out) {
  constexpr int N = tiles_for(R, T::kScaled ? kAccumulators / 2 : kAccumulators);  // int8 lines need registers
  for (; blocks >= N; blocks -= N, keys += N, out += N * kBlockSize) score_tile<T, R, N>(keys, q, dp, query_scale, out);
  for (; blocks > 0; --blocks, ++keys, out += kBlockSize) score_tile<T, R, 1>(keys, q, dp, query_scale, out);
}

template <typename T, int R>
void value_rows(const ValueTile& tile) {
  constexpr int N = tiles_for(R, kAccumulators);
  int d = 0;
  for (; d + 16 * N <= tile.dp; d += 16 * N) value_tile<T, R, N>(tile, d);
  if constexpr (N > 2) {
    for (; d + 32 <= tile.dp; d += 32) value_tile<T, R, 2>(tile, d);
  }
  for (; d < tile.dp; d += 16) value_tile<T, R, 1>(tile, d);
}

// Calls f.run<R>() for R = rows, 1 … kQueryRows.
template <int R, typename F>
MIAOTUI_INLINE void with_rows(int rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f.template run<R>();
}

template <typename T>
struct ScoreCall {
  const uint8_t* const* keys;
  int blocks;
  const typename T::Word* q;
  int dp;
  const float* query_scale;
  float* out;
  template <int R>
  void run() const {
    score_rows<T, R>(keys, blocks, q, dp, query_scale, out);
  }
};

template <typename T>
struct ValueCall {
  const ValueTile& tile;
  template <int R>
  void run() const {
    value_rows<T, R>(tile);
  }
};

// ---- softmax -----------------------------------------------------------------------------------------------------

// A row of a chunk's scores (log2 units, or tanh's argument with a soft cap) becomes probabilities relative to the
// row's maximum in this chunk. Blocks [first, end) of the chunk have scores; the row sees positions [low, high) of it.
// Pairs of blocks are cut at the chunk's start, so that a lane of the sum holds the same positions in every tile.
struct Row {
  int first;
  int end;
  int low;
  int high;
};

MIAOTUI_INLINE F16x seen_lanes(F16x x, const Row& row, int block) {
  const int from = row.low - block * kBlockSize, to = row.high - block * kBlockSize;
  return from > 0 || to < kBlockSize ? keep_lanes(x, least(from, 16), most(to, 0)) : x;
}

// The row's largest score; scores become final (log2 units, −inf where not seen).
inline F16x finish_scores(float* scores, const Row& row, float softcap) {
  F16x largest = splat(kMinusInfinity);
  for (int b = row.first; b < row.end; ++b) {
    float* at = scores + b * kBlockSize;
    F16x x = load(at);
    if (softcap > 0.0f) x = mul(tanh_lanes(x), splat(softcap * kLog2e));
    const bool whole = row.low <= b * kBlockSize && row.high >= (b + 1) * kBlockSize;
    if (!whole) x = seen_lanes(x, row, b);
    if (!whole || softcap > 0.0f) store(at, x);
    largest = max(largest, x);
  }
  return largest;
}

template <typename T>
__attribute__((noinline)) void softmax_row(float* scores, const Row& row, float softcap, const uint8_t* const* values,
                                           int dp, float& row_max, float& row_sum, float& unit) {
  row_max = reduce_max(finish_scores(scores, row, softcap));
  const F16x base = splat(row_max == kMinusInfinity ? 0.0f : row_max);
  F16x sum = zero();
#ifdef MIAOTUI_DOT_BF16
  if constexpr (T::kDotScores) {  // in place: pairs of blocks become bfloat16 in half the room
    const int first = row.first & ~1;
    float* out = scores + first * (kBlockSize / 2);
    if (first < row.first) store(scores + first * kBlockSize, splat(kMinusInfinity));
    if (row.end & 1) store(scores + row.end * kBlockSize, splat(kMinusInfinity));
    for (int b = first; b < row.end; b += 2, out += kBlockSize) {
      const F16x low = exp2_lanes<true>(sub(load(scores + b * kBlockSize), base));
      const F16x high = exp2_lanes<true>(sub(load(scores + (b + 1) * kBlockSize), base));
      sum = sum_dot(sum, store_dot(out, low, high));
    }
    row_sum = reduce_add(sum);
    return;
  }
#endif
  F16x largest = zero();
  for (int b = row.first; b < row.end; ++b) {
    F16x p = exp2_lanes(sub(load(scores + b * kBlockSize), base));
    sum = add(sum, p);
    if constexpr (T::kScaled) {
      p = mul(p, load(reinterpret_cast<const float*>(values[b - row.first] + dp * kBlockSize)));
      largest = max(largest, p);
    }
    store(scores + b * kBlockSize, p);
  }
  row_sum = reduce_add(sum);
  if constexpr (T::kScaled) {  // in place, in half the room
    const float most = reduce_max(largest);
    const F16x inverse = splat(most > 0.0f ? T::kValueMost / most : 0.0f);
    unit = most / T::kValueMost;
    for (int b = row.first; b < row.end; ++b)
      store_int16(scores + b * T::kScoreWords, to_int(round(mul(load(scores + b * kBlockSize), inverse))));
  }
}
