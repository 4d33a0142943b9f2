#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace miaotui {
namespace kernels_in_avx2 {
namespace {

#include "simd_avx2.h"
// The lanes must be defined first.
#include "kernels_all.h"

constexpr Kernels table = kernels_named("avx2");

}  // namespace
}  // namespace kernels_in_avx2

const Kernels* kernels_avx2() { return &kernels_in_avx2::table; }

}  // namespace miaotui
