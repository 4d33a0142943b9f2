// Sixteen lanes as one 512-bit register (AVX-512 F, BW, VL, DQ, VNNI). See simd_portable.h for the meanings.

constexpr int kMaxTile = 12;
constexpr int kWideRows = 6, kWidePanels = 2;  // of a tile whose integers are seldom folded
constexpr int kChainedRows = 2;                // so few rows leave registers for two sums each
constexpr bool kCentred = false;

using F16x = __m512;
using I16x = __m512i;
using Bytes = __m512i;

#define MIAOTUI_INLINE inline __attribute__((always_inline))

MIAOTUI_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
MIAOTUI_INLINE F16x zero() { return _mm512_setzero_ps(); }
MIAOTUI_INLINE F16x splat(float x) { return _mm512_set1_ps(x); }
MIAOTUI_INLINE F16x load(const float* p) { return _mm512_loadu_ps(p); }
MIAOTUI_INLINE F16x load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
MIAOTUI_INLINE void store(float* p, F16x a) { _mm512_storeu_ps(p, a); }
MIAOTUI_INLINE void store_n(float* p, F16x a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
MIAOTUI_INLINE F16x add(F16x a, F16x b) { return _mm512_add_ps(a, b); }
MIAOTUI_INLINE F16x sub(F16x a, F16x b) { return _mm512_sub_ps(a, b); }
MIAOTUI_INLINE F16x mul(F16x a, F16x b) { return _mm512_mul_ps(a, b); }
MIAOTUI_INLINE F16x div(F16x a, F16x b) { return _mm512_div_ps(a, b); }
// 1 / a to within 2^-27: the estimate of 14 bits and one step of Newton's.
MIAOTUI_INLINE F16x reciprocal(F16x a) {
  F16x r = _mm512_rcp14_ps(a);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(2.0f)));
}
MIAOTUI_INLINE F16x fma(F16x a, F16x b, F16x c) { return _mm512_fmadd_ps(a, b, c); }
MIAOTUI_INLINE F16x max(F16x a, F16x b) { return _mm512_max_ps(a, b); }
// Lanes of x where a > b, else of y.
MIAOTUI_INLINE F16x where_greater(F16x a, F16x b, F16x x, F16x y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x);
}
MIAOTUI_INLINE F16x min(F16x a, F16x b) { return _mm512_min_ps(a, b); }
MIAOTUI_INLINE F16x abs(F16x a) { return _mm512_abs_ps(a); }
MIAOTUI_INLINE F16x round(F16x a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
MIAOTUI_INLINE F16x to_float(I16x a) { return _mm512_cvtepi32_ps(a); }
MIAOTUI_INLINE I16x to_int(F16x a) { return _mm512_cvtps_epi32(a); }
MIAOTUI_INLINE float reduce_add(F16x a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
MIAOTUI_INLINE float reduce_max(F16x a) { return _mm512_reduce_max_ps(a); }
// Four vectors reduced together, in reduce_add's tree; out[i] is that of the i-th.
template <typename F>
MIAOTUI_INLINE void reduce_four(F16x a, F16x b, F16x c, F16x d, float* out, F&& join) {
  const F16x ab = join(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const F16x cd = join(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  F16x all = join(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  all = join(all, _mm512_permute_ps(all, 0x4E));
  all = join(all, _mm512_permute_ps(all, 0xB1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
}
MIAOTUI_INLINE void reduce_add_four(F16x a, F16x b, F16x c, F16x d, float* out) {
  reduce_four(a, b, c, d, out, [](F16x x, F16x y) __attribute__((always_inline)) { return _mm512_add_ps(x, y); });
}
MIAOTUI_INLINE void reduce_max_four(F16x a, F16x b, F16x c, F16x d, float* out) {
  reduce_four(a, b, c, d, out, [](F16x x, F16x y) __attribute__((always_inline)) { return _mm512_max_ps(x, y); });
}
// The 32 values of both become their Walsh-Hadamard transform, without its factor: sums and differences of those 16, 8,
// 4, 2 and 1 apart.
MIAOTUI_INLINE F16x turn_lanes(F16x x) {
  auto step = [](F16x x, F16x partner, __mmask16 second) __attribute__((always_inline)) {
    return _mm512_add_ps(
        partner, _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(x), second, _mm512_castps_si512(x),
                                                           _mm512_set1_epi32(static_cast<int>(0x80000000u)))));
  };
  x = step(x, _mm512_shuffle_f32x4(x, x, 0x4E), 0xFF00);
  x = step(x, _mm512_shuffle_f32x4(x, x, 0xB1), 0xF0F0);
  x = step(x, _mm512_permute_ps(x, 0x4E), 0xCCCC);
  return step(x, _mm512_permute_ps(x, 0xB1), 0xAAAA);
}
MIAOTUI_INLINE void turn_pair(F16x& a, F16x& b) {
  const F16x sum = add(a, b), difference = sub(a, b);
  a = turn_lanes(sum), b = turn_lanes(difference);
}
MIAOTUI_INLINE F16x pow2(I16x n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
MIAOTUI_INLINE I16x isplat(int32_t x) { return _mm512_set1_epi32(x); }
// By way of the load unit; the compiler would broadcast from a general register.
MIAOTUI_INLINE I16x isplat_at(const int32_t* p) {
  I16x r;
  __asm__("vpbroadcastd %1, %0" : "=v"(r) : "m"(*p));
  return r;
}
MIAOTUI_INLINE I16x iadd(I16x a, I16x b) { return _mm512_add_epi32(a, b); }
template <int N>
MIAOTUI_INLINE I16x shift_left(I16x a) {
  return _mm512_slli_epi32(a, N);
}
template <int N>
MIAOTUI_INLINE I16x shift_right(I16x a) {
  return _mm512_srai_epi32(a, N);
}
MIAOTUI_INLINE void store_int8(int8_t* p, I16x a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
// Once: the compiler would load them for each half of the bytes.
MIAOTUI_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes r = _mm512_loadu_si512(p);
  __asm__("" : "+v"(r));
  return r;
}
MIAOTUI_INLINE Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
MIAOTUI_INLINE Bytes high_nibbles_there(Bytes a) {
  return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(0xF0)));
}
MIAOTUI_INLINE Bytes high_nibbles(Bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
// Issued directly: left to itself the compiler splits the broadcast from the product and spills the tile.
MIAOTUI_INLINE I16x dot4(I16x acc, Bytes w, const int8_t* a) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(a)));
  return acc;
}
using Spread = __m512i;  // four inputs in every lane
MIAOTUI_INLINE Spread spread(const int8_t* a) {
  Spread r;
  __asm__("vpbroadcastd %1, %0" : "=v"(r) : "m"(*reinterpret_cast<const int32_t*>(a)));
  return r;
}
MIAOTUI_INLINE I16x dot4_spread(I16x acc, Bytes w, Spread a) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  return acc;
}
template <int J>
MIAOTUI_INLINE F16x byte_lane(Bytes a) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a, 8 * J), _mm512_set1_epi32(255)));
}
MIAOTUI_INLINE F16x load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MIAOTUI_INLINE F16x load_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
MIAOTUI_INLINE void load_bf16_pair(const uint16_t* p, F16x& even, F16x& odd) {
  __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
MIAOTUI_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
MIAOTUI_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
