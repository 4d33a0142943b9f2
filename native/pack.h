// From a file's layout to the kernels' panels (kernels.h), once, at load, by all threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace miaotui {

// A weight and what keeps its memory: a heap's slab, or a mapped file.
struct PackedWeight {
  Weight view;
  std::shared_ptr<void> owner;
  size_t size = 0;  // bytes from view.codes on: codes, scales, minima

  size_t bytes() const { return size; }
};

// A weight that was packed before, its panels at `bytes`. `like` has all but the pointers and strides.
PackedWeight packed_at(const Weight& like, const uint8_t* bytes, size_t size, std::shared_ptr<void> owner);

// Dense [n, k], row-major: float32, IEEE half or bfloat16 bits; kept in that type.
PackedWeight pack_dense(Pool& pool, Heap& heap, const void* data, Code code, int n, int k);

// GGUF blocks Q4_0, Q4_1 or Q8_0, rows of row_bytes. Scales and minima stay the file's own halves.
PackedWeight pack_gguf(Pool& pool, Heap& heap, const uint8_t* rows, const std::string& kind, int n, int k,
                       size_t row_bytes);

// Integer weights as INT8 with one scale a row, for inputs quantised by 64: scale = max|w| / 127, code =
// round-half-even(w * (127 / max|w|)), where w are the weights with every run of 32 columns turned by a Walsh-Hadamard
// matrix, as their inputs will be: that spreads what stands out, as in QuaRot (Ashkboos et al. 2024, section 4).
PackedWeight pack_wide(Pool& pool, Heap& heap, const Kernels& kernels, const PackedWeight& from);

// Room for INT4 in groups of 32 with bfloat16 scales, zeroed; k is a multiple of 32.
PackedWeight empty_int4(Heap& heap, int n, int k);

// Codes [n, k] one to a byte, scale (and minimum, or null) [n, groups] float32. `group` divides by 16.
// Scales are stored as scale_type, in which they must be exact.
PackedWeight pack_grouped(Pool& pool, Heap& heap, const uint8_t* codes, const float* scale, const float* minimum,
                          int bits, int group, ScaleType scale_type, int n, int k);

}  // namespace miaotui
