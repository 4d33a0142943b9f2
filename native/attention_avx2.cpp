// Attention with AVX2, FMA and F16C.
#include <immintrin.h>
#include <string.h>

#include <cstring>

#include "attention_plan.h"

namespace miaotui {
namespace attention_in_avx2 {
namespace {

#include "simd_avx2.h"

constexpr int kQueryRows = 6;
constexpr int kAccumulators = 6;

MIAOTUI_INLINE __m256 keep_eight(__m256 x, int from, int to) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i kept = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), x, _mm256_castsi256_ps(kept));
}
MIAOTUI_INLINE F16x keep_lanes(F16x x, int from, int to) {
  return {keep_eight(x.a, from, to), keep_eight(x.b, from - 8, to - 8)};
}
MIAOTUI_INLINE F16x keep_from(F16x r, F16x x, float limit) {
  const __m256 t = _mm256_set1_ps(limit);
  return {_mm256_and_ps(r.a, _mm256_cmp_ps(x.a, t, _CMP_NLT_UQ)),
          _mm256_and_ps(r.b, _mm256_cmp_ps(x.b, t, _CMP_NLT_UQ))};
}
MIAOTUI_INLINE F16x scaled_from(F16x r, F16x n, F16x x, float limit) {
  return keep_from(mul(r, pow2(to_int(n))), x, limit);
}
struct BytePairs {
  __m256i a, b;
};
MIAOTUI_INLINE BytePairs load_byte_pairs(const uint8_t* p) {
  const __m128i* at = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))};
}
MIAOTUI_INLINE I16x dot_byte_pairs(I16x acc, const BytePairs& v, const float* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  const __m256i x = _mm256_set1_epi32(pair);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(v.a, x)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(v.b, x))};
}
MIAOTUI_INLINE void store_int16(void* p, I16x x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8));
}
MIAOTUI_INLINE void store_key_words(int32_t* p, I16x x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8));
}
// NaN stays NaN.
inline void store_bf16(uint16_t* p, F16x x) {
  uint32_t bits[16];
  memcpy(bits, &x, 64);
  for (int i = 0; i < 16; ++i) {
    const uint32_t rounded = (bits[i] + 0x7FFFu + ((bits[i] >> 16) & 1u)) >> 16;
    p[i] = static_cast<uint16_t>((bits[i] & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}
inline void store_every_other(uint16_t* p, int odd, const uint16_t* x) {
  for (int i = 0; i < 16; ++i) p[2 * i + odd] = x[i];
}
inline void store_every_other(uint8_t* p, int odd, const int8_t* x) {
  for (int i = 0; i < 16; ++i) p[2 * i + odd] = static_cast<uint8_t>(x[i]);
}

struct KeyBytes {
  __m256i even_a, odd_a, even_b, odd_b;  // per position d 0 and 2, and d 1 and 3, as int16
};
MIAOTUI_INLINE __m256i even_words(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
MIAOTUI_INLINE KeyBytes load_key_bytes(const uint8_t* p) {
  const __m256i* at = reinterpret_cast<const __m256i*>(p);
  const __m256i a = _mm256_loadu_si256(at), b = _mm256_loadu_si256(at + 1);
  return {even_words(a), _mm256_srai_epi16(a, 8), even_words(b), _mm256_srai_epi16(b, 8)};
}
MIAOTUI_INLINE I16x dot_key_bytes(I16x acc, const KeyBytes& k, const int32_t* q02, const int32_t* q13) {
  const __m256i even = _mm256_set1_epi32(*q02), odd = _mm256_set1_epi32(*q13);
  const __m256i a = _mm256_add_epi32(_mm256_madd_epi16(k.even_a, even), _mm256_madd_epi16(k.odd_a, odd));
  const __m256i b = _mm256_add_epi32(_mm256_madd_epi16(k.even_b, even), _mm256_madd_epi16(k.odd_b, odd));
  return {_mm256_add_epi32(acc.a, a), _mm256_add_epi32(acc.b, b)};
}

#include "attention_impl.h"
#include "rope_impl.h"

constexpr AttentionKernels table{rope_angles, rope_and_cache, attention, attention_merge};

}  // namespace
}  // namespace attention_in_avx2

const AttentionKernels* attention_kernels_avx2() { return &attention_in_avx2::table; }

}  // namespace miaotui
