#include <cmath>
#include <cstring>

#include "kernels.h"

namespace miaotui {
namespace kernels_in_portable {
namespace {

#define MIAOTUI_INLINE inline
#include "simd_portable.h"
// The lanes must be defined first.
#include "kernels_all.h"

constexpr Kernels table = kernels_named("portable");

}  // namespace
}  // namespace kernels_in_portable

const Kernels* kernels_portable() { return &kernels_in_portable::table; }

}  // namespace miaotui
