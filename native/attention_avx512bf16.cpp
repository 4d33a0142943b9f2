// Attention with AVX-512 BF16, for a bfloat16 cache: the products of QK and PV are of bfloat16 pairs. Everything else
// is AVX-512's.
#include <immintrin.h>
#include <string.h>

#include "attention_plan.h"

namespace miaotui {
namespace attention_in_avx512bf16 {
namespace {

#include "simd_avx512.h"

constexpr int kQueryRows = 6;
constexpr int kAccumulators = 24;

#include "attention_avx512_lanes.h"

#define MIAOTUI_DOT_BF16
using DotLine = __m512bh;

MIAOTUI_INLINE DotLine load_dot(const uint8_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
MIAOTUI_INLINE DotLine splat_dot(const void* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}
MIAOTUI_INLINE F16x dot_bf16(F16x acc, DotLine line, DotLine x) { return _mm512_dpbf16_ps(acc, line, x); }
MIAOTUI_INLINE DotLine store_dot(void* p, F16x x, F16x y) {
  const __m512bh line = _mm512_cvtne2ps_pbh(y, x);
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(line));
  return line;
}
MIAOTUI_INLINE F16x sum_dot(F16x acc, DotLine line) {
  return _mm512_dpbf16_ps(acc, line, reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F803F80)));
}

#include "attention_impl.h"

void attention(const AttentionArgs& args, int thread, int threads) {
  if (args.cache.type == CacheType::bf16) return attend<Bf16Dot>(args, thread, threads);
  attention_kernels_avx512()->attention(args, thread, threads);
}
void rope_angles(const RopeAnglesArgs& args, int thread, int threads) {
  attention_kernels_avx512()->rope_angles(args, thread, threads);
}
void rope_and_cache(const RopeCacheArgs& args, int thread, int threads) {
  attention_kernels_avx512()->rope_and_cache(args, thread, threads);
}

constexpr AttentionKernels table{rope_angles, rope_and_cache, attention, attention_merge};

}  // namespace
}  // namespace attention_in_avx512bf16

const AttentionKernels* attention_kernels_avx512bf16() { return &attention_in_avx512bf16::table; }

}  // namespace miaotui
