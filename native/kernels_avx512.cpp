#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace miaotui {
namespace kernels_in_avx512 {
namespace {

#include "simd_avx512.h"
// The lanes must be defined first.
#include "exp_impl.h"
#include "kernels_impl.h"
#include "screen_impl.h"

constexpr Kernels table{"avx512", linear,      norm,    quantise, activate, dequantise_row,
                        widen,    add_columns, coarsen, decode,   lift};

}  // namespace
}  // namespace kernels_in_avx512

const Kernels* kernels_avx512() { return &kernels_in_avx512::table; }

}  // namespace miaotui
