#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "sampling.h"

namespace miaotui {
namespace sampling_in_avx512 {
namespace {

#include "simd_avx512.h"
// The lanes must be defined first.
#include "exp_impl.h"
#include "sampling_impl.h"

constexpr SamplingKernels table{"avx512", largest, greater, weigh, above};

}  // namespace
}  // namespace sampling_in_avx512

const SamplingKernels* sampling_kernels_avx512() { return &sampling_in_avx512::table; }

}  // namespace miaotui
