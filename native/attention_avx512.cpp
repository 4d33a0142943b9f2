// Attention with AVX-512 (F, BW, VL, DQ, VNNI).
#include <immintrin.h>
#include <string.h>

#include "attention_plan.h"

namespace miaotui {
namespace attention_in_avx512 {
namespace {

#include "simd_avx512.h"

constexpr int kQueryRows = 6;
constexpr int kAccumulators = 24;

#include "attention_avx512_lanes.h"
#include "attention_impl.h"
#include "rope_impl.h"

constexpr AttentionKernels table{rope_angles, rope_and_cache, attention, attention_merge};

}  // namespace
}  // namespace attention_in_avx512

const AttentionKernels* attention_kernels_avx512() { return &attention_in_avx512::table; }

}  // namespace miaotui
