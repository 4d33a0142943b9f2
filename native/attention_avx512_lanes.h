// What attention needs of AVX-512 beyond simd_avx512.h. See attention_impl.h for the meanings.

MIAOTUI_INLINE F16x keep_lanes(F16x x, int from, int to) {
  const __mmask16 kept =
      static_cast<__mmask16>(((1u << (to < 16 ? to : 16)) - 1) & ~((1u << (from > 0 ? from : 0)) - 1));
  return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), kept, x);
}
MIAOTUI_INLINE F16x keep_from(F16x r, F16x x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), r);
}
MIAOTUI_INLINE F16x scaled_from(F16x r, F16x n, F16x x, float limit) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), r, n);
}
using BytePairs = __m512i;
MIAOTUI_INLINE BytePairs load_byte_pairs(const uint8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MIAOTUI_INLINE I16x dot_byte_pairs(I16x acc, BytePairs v, const float* p) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(v), "m"(*p));
  return acc;
}
MIAOTUI_INLINE void store_int16(void* p, I16x x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
MIAOTUI_INLINE void store_key_words(int32_t* p, I16x x) {
  const __m256i words = _mm512_cvtepi32_epi16(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8));
}
MIAOTUI_INLINE void store_bf16(uint16_t* p, F16x x) {
  const __m512i bits = _mm512_castps_si512(x),
                lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), lowest);
  const __m512i kept =
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
MIAOTUI_INLINE void store_every_other(uint16_t* p, int odd, const uint16_t* x) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  _mm512_mask_storeu_epi16(p, odd ? 0xAAAAAAAAu : 0x55555555u, _mm512_sllv_epi32(words, _mm512_set1_epi32(odd * 16)));
}
MIAOTUI_INLINE void store_every_other(uint8_t* p, int odd, const int8_t* x) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  _mm256_mask_storeu_epi8(p, odd ? 0xAAAAAAAAu : 0x55555555u, odd ? _mm256_slli_epi16(bytes, 8) : bytes);
}

struct KeyBytes {
  __m512i even, odd;  // per position d 0 and 2, and d 1 and 3, as int16
};
MIAOTUI_INLINE KeyBytes load_key_bytes(const uint8_t* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
MIAOTUI_INLINE I16x dot_key_bytes(I16x acc, const KeyBytes& k, const int32_t* q02, const int32_t* q13) {
  acc = _mm512_dpwssd_epi32(acc, k.even, _mm512_set1_epi32(*q02));
  return _mm512_dpwssd_epi32(acc, k.odd, _mm512_set1_epi32(*q13));
}
