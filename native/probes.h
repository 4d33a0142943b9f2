// What this machine can do at most, measured: the ceilings beside which our figures are shown.
#pragma once

#include <vector>

#include "numa.h"

namespace miaotui {

// GB/s read, in each round: every thread reads memory of its own, which is beside its seat.
std::vector<double> probe_bandwidth(int threads, double megabytes, double seconds, const std::vector<Seat>& seats);
double probe_int8(int threads, double seconds);  // TOPS
double probe_fp32(int threads, double seconds);  // TFLOP/s

// The inner loops, by instruction set: operations (or bytes) done in one call.
struct ProbeKernels {
  double (*read)(const unsigned char* data, long bytes);  // returns bytes
  double (*int8)(long rounds);
  double (*fp32)(long rounds);
};
const ProbeKernels* probe_kernels_portable();
#ifdef MIAOTUI_X86
const ProbeKernels* probe_kernels_avx2();
const ProbeKernels* probe_kernels_avxvnni();
const ProbeKernels* probe_kernels_avx512();
#endif

}  // namespace miaotui
