#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace miaotui {
namespace kernels_in_avxvnni {
namespace {

#define MIAOTUI_VNNI
#include "simd_avx2.h"
// The lanes must be defined first.
#include "exp_impl.h"
#include "kernels_impl.h"
#include "screen_impl.h"

constexpr Kernels table{"avxvnni", linear,      norm,    quantise, activate, dequantise_row,
                        widen,     add_columns, coarsen, decode,   lift};

}  // namespace
}  // namespace kernels_in_avxvnni

const Kernels* kernels_avxvnni() { return &kernels_in_avxvnni::table; }

}  // namespace miaotui
