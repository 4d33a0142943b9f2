#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "probes.h"

namespace miaotui {
namespace probes_in_avxvnni {
namespace {

#define MIAOTUI_VNNI
#include "simd_avx2.h"
// The lanes must be defined first.
#include "probes_impl.h"

constexpr ProbeKernels table{probe_read, probe_dot, probe_fma};

}  // namespace
}  // namespace probes_in_avxvnni

const ProbeKernels* probe_kernels_avxvnni() { return &probes_in_avxvnni::table; }

}  // namespace miaotui
