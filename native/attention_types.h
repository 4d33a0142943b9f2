// The three types of KV cache: how a K tile meets packed queries, how a V tile meets probabilities, and how a position
// is written. Included by attention_impl.h, inside a per-instruction-set namespace.
//
//   kKeyStep      d covered by one step of QK, which reads one 64-byte line of each K tile
//   kWords        4-byte words of a packed query row per step; packed queries are [steps][kWords][R rows]
//   kValueStep    positions covered by one step of PV
//   kDotScores    probabilities are kept as bfloat16 pairs
//   kScaled       tiles end with a scale for each position, and probabilities are kept as pairs of integers
//   kScoreWords   4-byte words of a row's probabilities for one block
//   ValueSum      what PV is summed in; value_of(sum, unit) is the result

// Elements d … d + 15 of a row of dim elements, zero beyond its end.
MIAOTUI_INLINE F16x row_lanes(const float* row, int d, int dim) { return load_n(row + d, most(0, least(16, dim - d))); }

// out[i · stride] = words[i] for 16 words.
template <typename Word>
MIAOTUI_INLINE void scatter(Word* out, int stride, const Word* words) {
  for (int i = 0; i < 16; ++i) out[i * stride] = words[i];
}

inline float most_abs(const float* row, int dim) {
  F16x largest = zero();
  for (int d = 0; d < dim; d += 16) largest = max(largest, abs(row_lanes(row, d, dim)));
  return reduce_max(largest);
}

struct FloatValues {
  using ValueSum = F16x;
  static MIAOTUI_INLINE ValueSum no_value() { return zero(); }
  static MIAOTUI_INLINE F16x value_of(ValueSum sum, float) { return sum; }
};

struct Fp32 : FloatValues {
  static constexpr int kKeyStep = 1, kWords = 1, kValueStep = 1, kScoreWords = kBlockSize;
  static constexpr bool kDotScores = false, kScaled = false;
  using Word = float;
  using Sum = F16x;
  static size_t tile_bytes(int dp) { return static_cast<size_t>(dp) * kBlockSize * 4; }
  static constexpr size_t value_bytes(int d) { return static_cast<size_t>(d) * 4; }  // of d elements of one step
  static MIAOTUI_INLINE Sum none() { return zero(); }
  static MIAOTUI_INLINE F16x finish(Sum sum, float, const float*) { return sum; }

  template <int R, int N>
  static MIAOTUI_INLINE void key_step(Sum (&acc)[R][N], const uint8_t* const (&k)[N], size_t at, const Word* q) {
    F16x line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load(reinterpret_cast<const float*>(k[n] + at));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16x x = splat(q[r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = fma(line[n], x, acc[r][n]);
    }
  }

  template <int R, int N>
  static MIAOTUI_INLINE void value_step(F16x (&acc)[R][N], const uint8_t* v, const float* p, int step) {
    F16x line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load(reinterpret_cast<const float*>(v) + 16 * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16x x = splat(p[r * kChunk + step]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = fma(line[n], x, acc[r][n]);
    }
  }

  static float pack(Word* out, int rows, const float* q, int dim, int dp, float factor) {
    for (int d = 0; d < dp; d += 16) {
      float words[16];
      store(words, mul(row_lanes(q, d, dim), splat(factor)));
      scatter(out + d * rows, rows, words);
    }
    return 1.0f;
  }

  static void put(uint8_t* keys, uint8_t* values, const float* k, const float* v, int slot, int dim, int dp) {
    float* kt = reinterpret_cast<float*>(keys);
    for (int d = 0; d < dim; ++d) kt[d * kBlockSize + slot] = k[d];
    memcpy(reinterpret_cast<float*>(values) + slot * dp, v, sizeof(float) * static_cast<size_t>(dim));
  }
};

// What both ways of computing with a bfloat16 cache share.
struct Bf16Cache : FloatValues {
  static constexpr int kKeyStep = 2, kValueStep = 2;
  static constexpr bool kScaled = false;
  using Sum = F16x;
  static size_t tile_bytes(int dp) { return static_cast<size_t>(dp) * kBlockSize * 2; }
  static constexpr size_t value_bytes(int d) { return static_cast<size_t>(d) * 4; }
  static MIAOTUI_INLINE Sum none() { return zero(); }
  static MIAOTUI_INLINE F16x finish(Sum sum, float, const float*) { return sum; }

  static void put(uint8_t* keys, uint8_t* values, const float* k, const float* v, int slot, int dim, int dp) {
    uint32_t* kt = reinterpret_cast<uint32_t*>(keys) + slot;
    uint16_t* vt = reinterpret_cast<uint16_t*>(values) + slot / 2 * dp * 2;
    for (int d = 0; d < dim; d += 16) {
      uint16_t rounded[16];
      store_bf16(rounded, row_lanes(k, d, dim));
      for (int i = 0; i < 8; ++i) memcpy(kt + (d / 2 + i) * kBlockSize, rounded + 2 * i, 4);
      store_bf16(rounded, row_lanes(v, d, dim));
      store_every_other(vt + d * 2, slot % 2, rounded);
    }
  }
};

// bfloat16 widened to float: everything but the cache is float32.
struct Bf16 : Bf16Cache {
  static constexpr int kWords = 2, kScoreWords = kBlockSize;
  static constexpr bool kDotScores = false;
  using Word = float;

  template <int R, int N>
  static MIAOTUI_INLINE void key_step(Sum (&acc)[R][N], const uint8_t* const (&k)[N], size_t at, const Word* q) {
    F16x even[N], odd[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load_bf16_pair(reinterpret_cast<const uint16_t*>(k[n] + at), even[n], odd[n]);
    twice(acc, even, odd, q, q + R, 1);
  }

  template <int R, int N>
  static MIAOTUI_INLINE void value_step(F16x (&acc)[R][N], const uint8_t* v, const float* p, int step) {
    F16x even[N], odd[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load_bf16_pair(reinterpret_cast<const uint16_t*>(v) + 32 * n, even[n], odd[n]);
    twice(acc, even, odd, p + 2 * step, p + 2 * step + 1, kChunk);
  }

  static float pack(Word* out, int rows, const float* q, int dim, int dp, float factor) {
    return Fp32::pack(out, rows, q, dim, dp, factor);
  }

 private:
  template <int R, int N>
  static MIAOTUI_INLINE void twice(F16x (&acc)[R][N], const F16x (&even)[N], const F16x (&odd)[N], const float* first,
                                   const float* second, int stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16x x = splat(first[r * stride]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = fma(even[n], x, acc[r][n]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16x x = splat(second[r * stride]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = fma(odd[n], x, acc[r][n]);
    }
  }
};

#ifdef MIAOTUI_DOT_BF16
// bfloat16 products with float32 sums: queries and probabilities are rounded to bfloat16 too.
struct Bf16Dot : Bf16Cache {
  static constexpr int kWords = 1, kScoreWords = kBlockSize / 2;
  static constexpr bool kDotScores = true;
  using Word = uint32_t;

  template <int R, int N>
  static MIAOTUI_INLINE void key_step(Sum (&acc)[R][N], const uint8_t* const (&k)[N], size_t at, const Word* q) {
    DotLine line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load_dot(k[n] + at);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const DotLine x = splat_dot(q + r);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = dot_bf16(acc[r][n], line[n], x);
    }
  }

  template <int R, int N>
  static MIAOTUI_INLINE void value_step(F16x (&acc)[R][N], const uint8_t* v, const float* p, int step) {
    DotLine line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load_dot(v + 64 * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const DotLine x = splat_dot(p + r * kChunk + step);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = dot_bf16(acc[r][n], line[n], x);
    }
  }

  static float pack(Word* out, int rows, const float* q, int dim, int dp, float factor) {
    for (int d = 0; d < dp; d += 32) {
      uint32_t words[16];
      store_dot(words, mul(row_lanes(q, d, dim), splat(factor)), mul(row_lanes(q, d + 16, dim), splat(factor)));
      const int count = least(16, (dp - d) / 2);
      for (int i = 0; i < count; ++i) out[(d / 2 + i) * rows] = words[i];
    }
    return 1.0f;
  }
};
#endif

// int8 with one scale per position and head. Queries become 15-bit integers, and so do the probabilities of a chunk
// once V's scales are in them, so that QK and PV are exact integer sums and the cache's own rounding is the only one
// that matters.
struct Int8 {
  static constexpr int kKeyStep = 4, kWords = 2, kValueStep = 2, kScoreWords = kBlockSize / 2;
  static constexpr bool kDotScores = false, kScaled = true;
  static constexpr float kQueryMost = 16256.0f;  // |k · q| summed over 1024 d stays below 2^31
  static constexpr float kValueMost = 32767.0f;  // and |p · v| summed over a chunk
  using Word = int32_t;
  using Sum = I16x;
  using ValueSum = I16x;
  static MIAOTUI_INLINE ValueSum no_value() { return isplat(0); }
  static MIAOTUI_INLINE F16x value_of(ValueSum sum, float unit) { return mul(to_float(sum), splat(unit)); }
  static size_t tile_bytes(int dp) { return static_cast<size_t>(dp) * kBlockSize + 64; }
  static constexpr size_t value_bytes(int d) { return static_cast<size_t>(d) * 2; }
  static MIAOTUI_INLINE Sum none() { return isplat(0); }
  static MIAOTUI_INLINE F16x finish(Sum sum, float query_scale, const float* scales) {
    return mul(mul(to_float(sum), splat(query_scale)), load(scales));
  }

  template <int R, int N>
  static MIAOTUI_INLINE void key_step(Sum (&acc)[R][N], const uint8_t* const (&k)[N], size_t at, const Word* q) {
    KeyBytes line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load_key_bytes(k[n] + at);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = dot_key_bytes(acc[r][n], line[n], q + r, q + R + r);
    }
  }

  template <int R, int N>
  static MIAOTUI_INLINE void value_step(I16x (&acc)[R][N], const uint8_t* v, const float* p, int step) {
    BytePairs line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load_byte_pairs(v + 32 * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = dot_byte_pairs(acc[r][n], line[n], p + r * kChunk + step);
    }
  }

  // Words of a step: d 0 and 2, then d 1 and 3. Returns what one unit of the packed query is worth.
  static float pack(Word* out, int rows, const float* q, int dim, int dp, float factor) {
    const float largest = most_abs(q, dim), unit = largest > 0.0f ? kQueryMost / largest : 0.0f;
    for (int d = 0; d < dp; d += 16) {
      int32_t words[8];
      store_key_words(words, to_int(round(mul(row_lanes(q, d, dim), splat(unit)))));
      for (int i = 0; i < 8; ++i, out += rows) *out = words[i];
    }
    return largest / kQueryMost * factor;
  }

  static void put(uint8_t* keys, uint8_t* values, const float* k, const float* v, int slot, int dim, int dp) {
    const float k_most = most_abs(k, dim), v_most = most_abs(v, dim);
    const float k_unit = k_most > 0.0f ? 127.0f / k_most : 0.0f, v_unit = v_most > 0.0f ? 127.0f / v_most : 0.0f;
    for (int d = 0; d < dim; d += 16) {
      int8_t x[16];
      store_int8(x, to_int(round(mul(row_lanes(k, d, dim), splat(k_unit)))));
      for (int i = 0; i < 16; i += 4) memcpy(keys + (d / 4 + i / 4) * 64 + slot * 4, x + i, 4);
      store_int8(x, to_int(round(mul(row_lanes(v, d, dim), splat(v_unit)))));
      store_every_other(values + slot / 2 * dp * 2 + d * 2, slot % 2, x);
    }
    reinterpret_cast<float*>(keys + dp * kBlockSize)[slot] = k_most / 127.0f;
    reinterpret_cast<float*>(values + dp * kBlockSize)[slot] = v_most / 127.0f;
  }
};
