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
#include "kernels_all.h"

constexpr Kernels table = kernels_named("avxvnni");

}  // namespace
}  // namespace kernels_in_avxvnni

const Kernels* kernels_avxvnni() { return &kernels_in_avxvnni::table; }

}  // namespace miaotui
