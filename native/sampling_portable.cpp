#include <cmath>
#include <cstring>

#include "kernels.h"
#include "sampling.h"

namespace miaotui {
namespace sampling_in_portable {
namespace {

#define MIAOTUI_INLINE inline
#include "simd_portable.h"
// The lanes must be defined first.
#include "exp_impl.h"
#include "sampling_impl.h"

constexpr SamplingKernels table{"portable", largest, greater, weigh, above};

}  // namespace
}  // namespace sampling_in_portable

const SamplingKernels* sampling_kernels_portable() { return &sampling_in_portable::table; }

}  // namespace miaotui
