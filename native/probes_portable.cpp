#include <cmath>
#include <cstring>

#include "kernels.h"
#include "probes.h"

namespace miaotui {
namespace probes_in_portable {
namespace {

#define MIAOTUI_INLINE inline
#include "simd_portable.h"
// The lanes must be defined first.
#include "probes_impl.h"

constexpr ProbeKernels table{probe_read, probe_dot, probe_fma};

}  // namespace
}  // namespace probes_in_portable

const ProbeKernels* probe_kernels_portable() { return &probes_in_portable::table; }

}  // namespace miaotui
