#include <cmath>
#include <cstring>

#include "kernels.h"

namespace miaotui {
namespace kernels_in_portable {
namespace {

#define MIAOTUI_INLINE inline
#include "simd_portable.h"
// The lanes must be defined first.
#include "exp_impl.h"
#include "kernels_impl.h"
#include "screen_impl.h"

constexpr Kernels table{"portable", linear,      norm,    quantise, activate, dequantise_row,
                        widen,      add_columns, coarsen, decode,   lift};

}  // namespace
}  // namespace kernels_in_portable

const Kernels* kernels_portable() { return &kernels_in_portable::table; }

}  // namespace miaotui
