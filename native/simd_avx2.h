// Sixteen lanes as two 256-bit registers (AVX2, FMA, F16C), with AVX-VNNI if MIAOTUI_VNNI is defined. See
// simd_portable.h for the meanings.

constexpr int kMaxTile = 4;
constexpr int kWideRows = kMaxTile, kWidePanels = 1;
#ifdef MIAOTUI_VNNI
constexpr int kChainedRows = 2;
constexpr bool kCentred = false;
#else
constexpr int kChainedRows = 0;
constexpr bool kCentred = true;
#endif

struct F16x {
  __m256 a, b;
};
struct I16x {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
};

#define MIAOTUI_INLINE inline __attribute__((always_inline))

MIAOTUI_INLINE __m256i first8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MIAOTUI_INLINE F16x zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MIAOTUI_INLINE F16x splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MIAOTUI_INLINE F16x load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MIAOTUI_INLINE F16x load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, first8(n)), _mm256_maskload_ps(p + 8, first8(n - 8))};
}
MIAOTUI_INLINE void store(float* p, F16x x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
MIAOTUI_INLINE void store_n(float* p, F16x x, int n) {
  _mm256_maskstore_ps(p, first8(n), x.a);
  _mm256_maskstore_ps(p + 8, first8(n - 8), x.b);
}
MIAOTUI_INLINE F16x add(F16x x, F16x y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
MIAOTUI_INLINE F16x sub(F16x x, F16x y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
MIAOTUI_INLINE F16x mul(F16x x, F16x y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
MIAOTUI_INLINE F16x div(F16x x, F16x y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
MIAOTUI_INLINE F16x reciprocal(F16x a) { return div(splat(1.0f), a); }
MIAOTUI_INLINE F16x fma(F16x x, F16x y, F16x z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
MIAOTUI_INLINE F16x max(F16x x, F16x y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
MIAOTUI_INLINE F16x where_greater(F16x a, F16x b, F16x x, F16x y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}
MIAOTUI_INLINE F16x min(F16x x, F16x y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
MIAOTUI_INLINE F16x abs(F16x x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
MIAOTUI_INLINE F16x round(F16x x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
MIAOTUI_INLINE F16x to_float(I16x x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
MIAOTUI_INLINE I16x to_int(F16x x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
MIAOTUI_INLINE float reduce_add(F16x x) {
  __m256 b = _mm256_add_ps(x.a, x.b);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
MIAOTUI_INLINE float reduce_max(F16x x) {
  __m256 b = _mm256_max_ps(x.a, x.b);
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
MIAOTUI_INLINE void reduce_add_four(F16x a, F16x b, F16x c, F16x d, float* out) {
  out[0] = reduce_add(a), out[1] = reduce_add(b), out[2] = reduce_add(c), out[3] = reduce_add(d);
}
MIAOTUI_INLINE void reduce_max_four(F16x a, F16x b, F16x c, F16x d, float* out) {
  out[0] = reduce_max(a), out[1] = reduce_max(b), out[2] = reduce_max(c), out[3] = reduce_max(d);
}
MIAOTUI_INLINE __m256 turn_eight(__m256 x) {
  const __m256 four = _mm256_setr_ps(0, 0, 0, 0, -0.0f, -0.0f, -0.0f, -0.0f);
  const __m256 two = _mm256_setr_ps(0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f);
  const __m256 one = _mm256_setr_ps(0, -0.0f, 0, -0.0f, 0, -0.0f, 0, -0.0f);
  x = _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, four));
  x = _mm256_add_ps(_mm256_permute_ps(x, 0x4E), _mm256_xor_ps(x, two));
  return _mm256_add_ps(_mm256_permute_ps(x, 0xB1), _mm256_xor_ps(x, one));
}
MIAOTUI_INLINE F16x turn_lanes(F16x x) {
  return {turn_eight(_mm256_add_ps(x.a, x.b)), turn_eight(_mm256_sub_ps(x.a, x.b))};
}
MIAOTUI_INLINE void turn_pair(F16x& a, F16x& b) {
  const F16x sum = add(a, b), difference = sub(a, b);
  a = turn_lanes(sum), b = turn_lanes(difference);
}
MIAOTUI_INLINE F16x pow2(I16x n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
MIAOTUI_INLINE I16x isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
MIAOTUI_INLINE I16x isplat_at(const int32_t* p) { return isplat(*p); }
MIAOTUI_INLINE I16x iadd(I16x x, I16x y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
template <int N>
MIAOTUI_INLINE I16x shift_left(I16x x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
MIAOTUI_INLINE I16x shift_right(I16x x) {
  return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
MIAOTUI_INLINE void store_int8(int8_t* p, I16x x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
MIAOTUI_INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
MIAOTUI_INLINE Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
MIAOTUI_INLINE Bytes high_nibbles_there(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(0xF0));
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
MIAOTUI_INLINE Bytes high_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
using Spread = __m256i;
MIAOTUI_INLINE Spread spread(const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, 4);
  return _mm256_set1_epi32(four);
}
// Issued directly: left to itself the compiler adds products in another order, for which it has not the registers.
#ifdef MIAOTUI_VNNI
MIAOTUI_INLINE __m256i dot4_half(__m256i acc, __m256i w, Spread a) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  return acc;
}
#else
// Codes over 127 would saturate vpmaddubsw: the sign of code - 128 moves to the input.
MIAOTUI_INLINE __m256i dot4_half(__m256i acc, __m256i w, Spread a) {
  const __m256i centred = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
  __m256i part;
  __asm__("vpsignb %2, %3, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc), "=&x"(part)
          : "x"(centred), "x"(a), "x"(_mm256_abs_epi8(centred)), "x"(_mm256_set1_epi16(1)));
  return acc;
}
// Nibbles times inputs: of the products of a fold, at most 8 pairs of 15 * 127 each, sixteen bits hold the sum.
#define MIAOTUI_SHORT_SUMS
struct ShortSums {
  __m256i a, b;
};
MIAOTUI_INLINE ShortSums short_dot(Bytes w, Spread a) {
  return {_mm256_maddubs_epi16(w.a, a), _mm256_maddubs_epi16(w.b, a)};
}
MIAOTUI_INLINE __m256i short_dot_half(__m256i sum, __m256i w, Spread a) {
  __m256i pairs;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(w), "x"(a));
  return sum;
}
MIAOTUI_INLINE ShortSums short_dot(ShortSums sum, Bytes w, Spread a) {
  return {short_dot_half(sum.a, w.a, a), short_dot_half(sum.b, w.b, a)};
}
MIAOTUI_INLINE I16x iadd(I16x x, ShortSums sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(x.a, _mm256_madd_epi16(sum.a, ones)), _mm256_add_epi32(x.b, _mm256_madd_epi16(sum.b, ones))};
}
#endif
MIAOTUI_INLINE I16x dot4_spread(I16x acc, Bytes w, Spread a) {
  return {dot4_half(acc.a, w.a, a), dot4_half(acc.b, w.b, a)};
}
MIAOTUI_INLINE I16x dot4(I16x acc, Bytes w, const int8_t* a) { return dot4_spread(acc, w, spread(a)); }
template <int J>
MIAOTUI_INLINE F16x byte_lane(Bytes x) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * J), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.b, 8 * J), mask))};
}
MIAOTUI_INLINE F16x load_f16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
MIAOTUI_INLINE F16x load_bf16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
MIAOTUI_INLINE void load_bf16_pair(const uint16_t* p, F16x& even, F16x& odd) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i x = _mm256_loadu_si256(q), y = _mm256_loadu_si256(q + 1);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high))};
}
MIAOTUI_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
MIAOTUI_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
