// From a file's layout to the kernels' panels (kernels.h), once, at load, by all threads.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace miaotui {

struct PackedWeight {
  Weight view;
  Memory memory;

  size_t bytes() const { return memory.bytes(); }
};

// Dense [n, k], row-major: float32, IEEE half or bfloat16 bits; kept in that type.
PackedWeight pack_dense(Pool& pool, const void* data, Code code, int n, int k);

// GGUF blocks Q4_0, Q4_1 or Q8_0, rows of row_bytes. Scales and minima stay the file's own halves.
PackedWeight pack_gguf(Pool& pool, const uint8_t* rows, const std::string& kind, int n, int k, size_t row_bytes);

// Codes [n, k] one to a byte, scale (and minimum, or null) [n, groups] float32. `group` divides by 16.
// Scales are stored as scale_type, in which they must be exact.
PackedWeight pack_grouped(Pool& pool, const uint8_t* codes, const float* scale, const float* minimum, int bits,
                          int group, ScaleType scale_type, int n, int k);

}  // namespace miaotui
