#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "probes.h"

namespace miaotui {
namespace probes_in_avx512 {
namespace {

#include "simd_avx512.h"
// The lanes must be defined first.
#include "probes_impl.h"

constexpr ProbeKernels table{probe_read, probe_dot, probe_fma};

}  // namespace
}  // namespace probes_in_avx512

const ProbeKernels* probe_kernels_avx512() { return &probes_in_avx512::table; }

}  // namespace miaotui
