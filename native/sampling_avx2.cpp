#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "sampling.h"

namespace miaotui {
namespace sampling_in_avx2 {
namespace {

#include "simd_avx2.h"
// The lanes must be defined first.
#include "exp_impl.h"
#include "sampling_impl.h"

constexpr SamplingKernels table{"avx2", largest, greater, weigh, above};

}  // namespace
}  // namespace sampling_in_avx2

const SamplingKernels* sampling_kernels_avx2() { return &sampling_in_avx2::table; }

}  // namespace miaotui
