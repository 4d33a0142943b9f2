// Attention in plain C++: the slow twin of the others, and what other machines run.
#include <string.h>

#include <cmath>
#include <cstring>

#include "attention_plan.h"
#include "kernels.h"

namespace miaotui {
namespace attention_in_portable {
namespace {

#ifndef MIAOTUI_INLINE
#define MIAOTUI_INLINE inline __attribute__((always_inline))
#endif

#include "simd_portable.h"

constexpr int kQueryRows = 3;
constexpr int kAccumulators = 3;

inline F16x keep_lanes(F16x x, int from, int to) {
  for (int i = 0; i < 16; ++i) x.v[i] = i >= from && i < to ? x.v[i] : -__builtin_inff();
  return x;
}
inline F16x keep_from(F16x r, F16x x, float limit) {
  for (int i = 0; i < 16; ++i) r.v[i] = x.v[i] < limit ? 0.0f : r.v[i];
  return r;
}
inline F16x scaled_from(F16x r, F16x n, F16x x, float limit) { return keep_from(mul(r, pow2(to_int(n))), x, limit); }
struct BytePairs {
  int8_t v[32];
};
inline BytePairs load_byte_pairs(const uint8_t* p) {
  BytePairs v;
  memcpy(v.v, p, 32);
  return v;
}
inline I16x dot_byte_pairs(I16x acc, const BytePairs& v, const float* p) {
  int16_t x[2];
  memcpy(x, p, 4);
  for (int i = 0; i < 16; ++i) acc.v[i] += v.v[2 * i] * x[0] + v.v[2 * i + 1] * x[1];
  return acc;
}
inline void store_int16(void* p, I16x x) {
  int16_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = static_cast<int16_t>(x.v[i]);
  memcpy(p, words, 32);
}
inline void store_key_words(int32_t* p, I16x x) {
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j)
      p[i / 2 + j] = static_cast<int32_t>((x.v[i + j] & 0xFFFF) | static_cast<uint32_t>(x.v[i + j + 2]) << 16);
}
// NaN stays NaN.
inline void store_bf16(uint16_t* p, F16x x) {
  uint32_t bits[16];
  memcpy(bits, &x, 64);
  for (int i = 0; i < 16; ++i) {
    const uint32_t rounded = (bits[i] + 0x7FFFu + ((bits[i] >> 16) & 1u)) >> 16;
    p[i] = static_cast<uint16_t>((bits[i] & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}
inline void store_every_other(uint16_t* p, int odd, const uint16_t* x) {
  for (int i = 0; i < 16; ++i) p[2 * i + odd] = x[i];
}
inline void store_every_other(uint8_t* p, int odd, const int8_t* x) {
  for (int i = 0; i < 16; ++i) p[2 * i + odd] = static_cast<uint8_t>(x[i]);
}

struct KeyBytes {
  int8_t v[64];
};
inline KeyBytes load_key_bytes(const uint8_t* p) {
  KeyBytes k;
  memcpy(k.v, p, 64);
  return k;
}
inline I16x dot_key_bytes(I16x acc, const KeyBytes& k, const int32_t* q02, const int32_t* q13) {
  int16_t even[2], odd[2];
  memcpy(even, q02, 4);
  memcpy(odd, q13, 4);
  for (int i = 0; i < 16; ++i) {
    const int8_t* d = k.v + 4 * i;
    acc.v[i] += d[0] * even[0] + d[2] * even[1] + d[1] * odd[0] + d[3] * odd[1];
  }
  return acc;
}

#include "attention_impl.h"
#include "rope_impl.h"

constexpr AttentionKernels table{rope_angles, rope_and_cache, attention, attention_merge};

}  // namespace
}  // namespace attention_in_portable

const AttentionKernels* attention_kernels_portable() { return &attention_in_portable::table; }

}  // namespace miaotui
