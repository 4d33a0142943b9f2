#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace miaotui {
namespace kernels_in_avx512 {
namespace {

#include "simd_avx512.h"
// The lanes must be defined first.
#include "kernels_all.h"

constexpr Kernels table = kernels_named("avx512");

}  // namespace
}  // namespace kernels_in_avx512

const Kernels* kernels_avx512() { return &kernels_in_avx512::table; }

}  // namespace miaotui
