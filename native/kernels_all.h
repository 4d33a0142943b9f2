// All kernels of one instruction set; a kernels_<isa>.cpp includes its simd_<isa>.h and then this file inside its own
// namespace.

#include "exp_impl.h"
#include "kernels_impl.h"
#include "screen_impl.h"

constexpr Kernels kernels_named(const char* name) {
  return {name, linear, norm, quantise, activate, dequantise_row, widen, add_columns, coarsen, decode, lift};
}
