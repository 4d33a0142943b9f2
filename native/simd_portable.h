// Sixteen lanes in plain C++: the slow twin of simd_avx2.h and simd_avx512.h, and what other machines run.
// Included inside a per-instruction-set namespace, so that no inline function is shared between them.

constexpr int kMaxTile = 2;
constexpr int kWideRows = kMaxTile, kWidePanels = 1;
constexpr int kChainedRows = 2;   // integer sums of so few rows are two
constexpr bool kCentred = false;  // dot4 takes an INT8 code for code - 128

struct F16x {  // sixteen float32 lanes
  float v[16];
};
struct I16x {  // sixteen int32 lanes
  int32_t v[16];
};
struct Bytes {  // 64 unsigned bytes: 16 rows x 4 codes
  uint8_t v[64];
};

#define MIAOTUI_LANES for (int i = 0; i < 16; ++i)

inline F16x zero() { return F16x{}; }
inline F16x splat(float x) {
  F16x r;
  MIAOTUI_LANES r.v[i] = x;
  return r;
}
inline F16x load(const float* p) {
  F16x r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline F16x load_n(const float* p, int n) {
  F16x r{};
  std::memcpy(r.v, p, sizeof(float) * n);
  return r;
}
inline void store(float* p, F16x a) { std::memcpy(p, a.v, 64); }
inline void store_n(float* p, F16x a, int n) { std::memcpy(p, a.v, sizeof(float) * n); }
inline F16x add(F16x a, F16x b) {
  MIAOTUI_LANES a.v[i] += b.v[i];
  return a;
}
inline F16x sub(F16x a, F16x b) {
  MIAOTUI_LANES a.v[i] -= b.v[i];
  return a;
}
inline F16x mul(F16x a, F16x b) {
  MIAOTUI_LANES a.v[i] *= b.v[i];
  return a;
}
inline F16x div(F16x a, F16x b) {
  MIAOTUI_LANES a.v[i] /= b.v[i];
  return a;
}
inline F16x reciprocal(F16x a) { return div(splat(1.0f), a); }
inline F16x fma(F16x a, F16x b, F16x c) {
  MIAOTUI_LANES c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F16x max(F16x a, F16x b) {
  MIAOTUI_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F16x where_greater(F16x a, F16x b, F16x x, F16x y) {  // lanes of x where a > b, else of y
  MIAOTUI_LANES y.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i];
  return y;
}
inline F16x min(F16x a, F16x b) {
  MIAOTUI_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F16x abs(F16x a) {
  MIAOTUI_LANES a.v[i] = std::fabs(a.v[i]);
  return a;
}
inline F16x round(F16x a) {
  MIAOTUI_LANES a.v[i] = std::nearbyintf(a.v[i]);
  return a;
}
inline F16x to_float(I16x a) {
  F16x r;
  MIAOTUI_LANES r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline I16x to_int(F16x a) {  // of already rounded values
  I16x r;
  MIAOTUI_LANES r.v[i] = static_cast<int32_t>(a.v[i]);
  return r;
}
// Lanes in a fixed tree, the same in every instruction set: (i, i+8), (i, i+4), (i, i+2), (i, i+1).
inline float reduce_add(F16x a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float reduce_max(F16x a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline void reduce_add_four(F16x a, F16x b, F16x c, F16x d, float* out) {
  out[0] = reduce_add(a), out[1] = reduce_add(b), out[2] = reduce_add(c), out[3] = reduce_add(d);
}
inline void reduce_max_four(F16x a, F16x b, F16x c, F16x d, float* out) {
  out[0] = reduce_max(a), out[1] = reduce_max(b), out[2] = reduce_max(c), out[3] = reduce_max(d);
}
// The 32 values of both become their Walsh-Hadamard transform, without its factor.
inline void turn_pair(F16x& a, F16x& b) {
  float v[32];
  MIAOTUI_LANES v[i] = a.v[i], v[16 + i] = b.v[i];
  for (int apart = 16; apart; apart /= 2)
    for (int i = 0; i < 32; ++i)
      if (!(i & apart)) {
        const float x = v[i], y = v[i + apart];
        v[i] = x + y, v[i + apart] = x - y;
      }
  MIAOTUI_LANES a.v[i] = v[i], b.v[i] = v[16 + i];
}
inline F16x pow2(I16x n) {  // 2^n for n in [-126, 127]
  F16x r;
  MIAOTUI_LANES {
    uint32_t bits = static_cast<uint32_t>(n.v[i] + 127) << 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline I16x isplat(int32_t x) {
  I16x r;
  MIAOTUI_LANES r.v[i] = x;
  return r;
}
inline I16x isplat_at(const int32_t* p) { return isplat(*p); }
inline I16x iadd(I16x a, I16x b) {
  MIAOTUI_LANES a.v[i] += b.v[i];
  return a;
}
template <int N>
inline I16x shift_left(I16x a) {
  MIAOTUI_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N);
  return a;
}
template <int N>
inline I16x shift_right(I16x a) {
  MIAOTUI_LANES a.v[i] >>= N;
  return a;
}
inline void store_int8(int8_t* p, I16x a) { MIAOTUI_LANES p[i] = static_cast<int8_t>(a.v[i]); }

inline Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline Bytes low_nibbles(Bytes a) {
  for (int i = 0; i < 64; ++i) a.v[i] &= 15;
  return a;
}
// Where they are: 16 times as large.
inline Bytes high_nibbles_there(Bytes a) {
  for (int i = 0; i < 64; ++i) a.v[i] &= 0xF0;
  return a;
}
inline Bytes high_nibbles(Bytes a) {
  for (int i = 0; i < 64; ++i) a.v[i] >>= 4;
  return a;
}
// acc[row] += sum over j of codes[row][j] * activations[j]
inline I16x dot4(I16x acc, Bytes w, const int8_t* a) {
  MIAOTUI_LANES acc.v[i] += w.v[4 * i] * a[0] + w.v[4 * i + 1] * a[1] + w.v[4 * i + 2] * a[2] + w.v[4 * i + 3] * a[3];
  return acc;
}
// Four inputs for every row, and their product with codes.
using Spread = const int8_t*;
inline Spread spread(const int8_t* a) { return a; }
inline I16x dot4_spread(I16x acc, Bytes w, Spread a) { return dot4(acc, w, a); }
// Byte j of each lane as a float.
template <int J>
inline F16x byte_lane(Bytes a) {
  F16x r;
  MIAOTUI_LANES r.v[i] = a.v[4 * i + J];
  return r;
}
inline F16x load_f16(const uint16_t* p) {
  F16x r;
  MIAOTUI_LANES r.v[i] = half_to_float(p[i]);
  return r;
}
inline F16x load_bf16(const uint16_t* p) {
  F16x r;
  MIAOTUI_LANES {
    uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
// Lanes hold pairs (even k, odd k) of bfloat16.
inline void load_bf16_pair(const uint16_t* p, F16x& even, F16x& odd) {
  MIAOTUI_LANES {
    uint32_t e = static_cast<uint32_t>(p[2 * i]) << 16, o = static_cast<uint32_t>(p[2 * i + 1]) << 16;
    std::memcpy(&even.v[i], &e, 4);
    std::memcpy(&odd.v[i], &o, 4);
  }
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second level
#undef MIAOTUI_LANES
