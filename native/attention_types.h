// The three types of KV cache: how a K tile meets packed queries, how a V tile meets probabilities, and how a position
// is written. Included by attention_impl.h, inside a per-instruction-set namespace.
//
//   kKeyStep      d covered by one step of QK, which reads one 64-byte line of each K tile
//   kWords        4-byte words of a packed query row per step; packed queries are [steps][kWords][R rows]
//   kValueStep    positions covered by one step of PV
//   kDotScores    probabilities are kept as bfloat16 pairs
//   kScaled       tiles end with a scale for each position

// Rounded to nearest even; NaN stays NaN.
MIAOTUI_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

struct Fp32 {
  static constexpr int kKeyStep = 1, kWords = 1, kValueStep = 1;
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
    for (int d = 0; d < dp; ++d) out[d * rows] = d < dim ? q[d] * factor : 0.0f;
    return 1.0f;
  }

  static void put(uint8_t* keys, uint8_t* values, const float* k, const float* v, int slot, int dim, int dp) {
    float* kt = reinterpret_cast<float*>(keys);
    for (int d = 0; d < dim; ++d) kt[d * kBlockSize + slot] = k[d];
    memcpy(reinterpret_cast<float*>(values) + slot * dp, v, sizeof(float) * static_cast<size_t>(dim));
  }
};

// What both ways of computing with a bfloat16 cache share.
struct Bf16Cache {
  static constexpr int kKeyStep = 2, kValueStep = 2;
  static constexpr bool kScaled = false;
  using Sum = F16x;
  static size_t tile_bytes(int dp) { return static_cast<size_t>(dp) * kBlockSize * 2; }
  static constexpr size_t value_bytes(int d) { return static_cast<size_t>(d) * 4; }
  static MIAOTUI_INLINE Sum none() { return zero(); }
  static MIAOTUI_INLINE F16x finish(Sum sum, float, const float*) { return sum; }

  static void put(uint8_t* keys, uint8_t* values, const float* k, const float* v, int slot, int dim, int dp) {
    uint16_t* kt = reinterpret_cast<uint16_t*>(keys);
    for (int d = 0; d < dim; ++d) kt[(d / 2 * kBlockSize + slot) * 2 + d % 2] = to_bf16(k[d]);
    uint16_t* vt = reinterpret_cast<uint16_t*>(values) + slot / 2 * dp * 2 + slot % 2;
    for (int d = 0; d < dim; ++d) vt[d * 2] = to_bf16(v[d]);
  }
};

// bfloat16 widened to float: everything but the cache is float32.
struct Bf16 : Bf16Cache {
  static constexpr int kWords = 2;
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
  static constexpr int kWords = 1;
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
    for (int d = 0; d < dp; d += 2) {
      const uint32_t low = d < dim ? to_bf16(q[d] * factor) : 0u, high = d + 1 < dim ? to_bf16(q[d + 1] * factor) : 0u;
      out[d / 2 * rows] = low | high << 16;
    }
    return 1.0f;
  }
};
#endif

// int8 with one scale per position and head. Queries become 15-bit integers, so that QK is an exact integer sum and the
// cache's own rounding is the only one that matters; V is widened to float, its scale goes into the probability.
struct Int8 {
  static constexpr int kKeyStep = 4, kWords = 2, kValueStep = 1;
  static constexpr bool kDotScores = false, kScaled = true;
  static constexpr float kQueryMost = 16256.0f;  // |k · q| summed over 1024 d stays below 2^31
  using Word = int32_t;
  using Sum = I16x;
  static size_t tile_bytes(int dp) { return static_cast<size_t>(dp) * kBlockSize + 64; }
  static constexpr size_t value_bytes(int d) { return static_cast<size_t>(d); }
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
  static MIAOTUI_INLINE void value_step(F16x (&acc)[R][N], const uint8_t* v, const float* p, int step) {
    F16x line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load_int8(reinterpret_cast<const int8_t*>(v) + 16 * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16x x = splat(p[r * kChunk + step]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = fma(line[n], x, acc[r][n]);
    }
  }

  // Words of a step: d 0 and 2, then d 1 and 3. Returns what one unit of the packed query is worth.
  static float pack(Word* out, int rows, const float* q, int dim, int dp, float factor) {
    const float largest = most_abs(q, dim), unit = largest > 0.0f ? kQueryMost / largest : 0.0f;
    for (int d = 0; d < dp; d += 4) {
      const uint32_t a = quantised(q, d, dim, unit), b = quantised(q, d + 1, dim, unit);
      const uint32_t c = quantised(q, d + 2, dim, unit), e = quantised(q, d + 3, dim, unit);
      out[d / 2 * rows] = static_cast<int32_t>(a | c << 16);
      out[(d / 2 + 1) * rows] = static_cast<int32_t>(b | e << 16);
    }
    return largest / kQueryMost * factor;
  }

  static void put(uint8_t* keys, uint8_t* values, const float* k, const float* v, int slot, int dim, int dp) {
    const float k_most = most_abs(k, dim), v_most = most_abs(v, dim);
    const float k_unit = k_most > 0.0f ? 127.0f / k_most : 0.0f, v_unit = v_most > 0.0f ? 127.0f / v_most : 0.0f;
    int8_t* kt = reinterpret_cast<int8_t*>(keys);
    for (int d = 0; d < dim; ++d)
      kt[(d / 4 * kBlockSize + slot) * 4 + d % 4] = static_cast<int8_t>(nearest(k[d] * k_unit));
    int8_t* vt = reinterpret_cast<int8_t*>(values) + slot * dp;
    for (int d = 0; d < dim; ++d) vt[d] = static_cast<int8_t>(nearest(v[d] * v_unit));
    reinterpret_cast<float*>(keys + dp * kBlockSize)[slot] = k_most / 127.0f;
    reinterpret_cast<float*>(values + dp * kBlockSize)[slot] = v_most / 127.0f;
  }

 private:
  static MIAOTUI_INLINE int32_t nearest(float x) { return static_cast<int32_t>(x + (x < 0.0f ? -0.5f : 0.5f)); }
  static uint32_t quantised(const float* q, int d, int dim, float unit) {
    return d < dim ? static_cast<uint32_t>(nearest(q[d] * unit)) & 0xFFFFu : 0u;
  }
  static float most_abs(const float* x, int n) {
    float largest = 0.0f;
    for (int i = 0; i < n; ++i) largest = most(largest, __builtin_fabsf(x[i]));
    return largest;
  }
};
