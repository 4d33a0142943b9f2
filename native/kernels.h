// What the kernels are given and what they are called by. No instruction set is mentioned here: each
// kernels_<isa>.cpp fills one table from kernels_impl.h, and Program picks a table by CPUID.
#pragma once

#include <cstddef>
#include <cstdint>

namespace miaotui {

constexpr int kRowsPerPanel = 16;  // output rows that one register accumulates
constexpr int kActGroup = 32;      // input elements that share a scale when activations are quantised
constexpr int kStreamingRows = 4;  // so few rows make a linear wait for memory

enum class Code : uint8_t { F32, F16, BF16, INT4, INT8 };
enum class ScaleType : uint8_t { F16, BF16, F32 };
enum class Act : uint8_t { None, Silu, Gelu, GeluTanh, Relu2 };
// The neighbouring inputs that share a scale once quantised; those by 64 are turned before (pack_wide).
enum class Inputs : uint8_t { By32, By64, ByToken };

// A weight [n, k] in panels of 16 output rows. Per panel, along k:
//   F32, F16   [k_pad][16]
//   BF16       [k_pad / 2][16][2]
//   INT8       [k_pad / 4][16][4] codes
//   INT4       [k_pad / 8][16][4] bytes; low nibbles are k..k+3, high nibbles k+4..k+7
// and, for the integer kinds, scales (and minima) [groups][16].
//   value = scale * (code - zero)            when there are no minima; zero is 8 for INT4 and 128 for INT8, fewer bits
//                                            being shifted up to it when they are packed
//   value = scale * code + minimum           when there are
// k_pad is k rounded up to 32; codes of the padding meet activations that are zero.
struct Weight {
  Code code = Code::F32;
  ScaleType scale_type = ScaleType::F16;
  bool has_min = false;
  int n = 0, k = 0, k_pad = 0, panels = 0;
  int fold = 32;  // elements between two foldings of the integer sum into float: 16 or 32
  int folds_per_group = 1;
  int groups = 0;
  Inputs inputs = Inputs::By32;  // By64 only for INT8 with one scale a row
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* mins = nullptr;
  size_t panel_bytes = 0;        // of codes
  size_t panel_scale_bytes = 0;  // of scales, and of mins

  bool integer() const { return code == Code::INT4 || code == Code::INT8; }
  int zero() const { return has_min ? 0 : code == Code::INT4 ? 8 : 128; }
  // Integer sums that need no folding by 32: a step takes two panels at once.
  bool wide() const { return code == Code::INT8 && groups == 1 && fold == 32 && !has_min && inputs != Inputs::By32; }
};

// Rows of activations quantised to int8 in groups of 32: x = scale * q, q in [-127, 127]. By token, all groups of a row
// have the row's scale. By 64, every second group has the scale of both, and -128 times their sum for minus32; the
// other sums are not there.
// Rows lie in the tiles in which a kernel takes them (12 at a time, then what is left): a tile of M rows that begins at
// row t is [groups of 32][M][32] at q + t * k_pad, and its other arrays likewise, so that a kernel walks one stream.
// Sums are kept because a weight's zero point multiplies them, and sum * scale because a minimum does; that of the
// whole row for INT8 weights with one scale a row, whose integers need no folding when the row's input has one scale
// too.
struct QuantRows {
  int8_t* q = nullptr;         // [groups][M][32]
  float* scale = nullptr;      // [groups][M]
  int32_t* minus32 = nullptr;  // [groups][M]: -8 * sum of q over 32
  float* total32 = nullptr;    // [groups][M]: scale * sum
  int32_t* minus16 = nullptr;  // [2 * groups][M]: the same over 16
  float* total16 = nullptr;
  int32_t* minus_row = nullptr;  // [M]: -128 * sum of the row's q
  int k_pad = 0;
  int rows = 0;
  bool totals = true;  // whether total32 is written
  bool halves = true;  // whether minus16 and total16 are

  // The rows that begin at `row`, on a tile's border, as rows of their own.
  QuantRows from(int row, int count) const {
    const size_t r = static_cast<size_t>(row), g = r * static_cast<size_t>(k_pad / 32);
    return {q + r * k_pad, scale + g, minus32 + g, total32 + g, minus16 + 2 * g, total16 + 2 * g,
            minus_row + r, k_pad,     count,       totals,      halves};
  }
  static size_t bytes(int k_pad) { return static_cast<size_t>(k_pad) + static_cast<size_t>(k_pad / 32) * 28 + 4; }
};

// What a later op will read, in runs of equal length, asked for while tiles of many rows keep the memory idle.
struct alignas(64) Ahead {
  const uint8_t* base = nullptr;
  const size_t* runs = nullptr;  // where each begins, from base
  int count = 0;
  int next = 0;
  int lines = 0;  // of 64 bytes, of each run

  const uint8_t* take() { return next < count ? base + runs[next++] : nullptr; }
};

// What happens to a result on its way out: out = softcap((result + bias) * scale + add).
struct Epilogue {
  const float* bias = nullptr;
  const float* add = nullptr;
  size_t add_stride = 0;
  float scale = 1.0f;
  float softcap = 0.0f;
  float* out = nullptr;
  size_t out_stride = 0;
};

// Of each row's results so far the greatest, sixteen columns beside one another: which panel had the first of equals.
struct Greatest {
  float* value = nullptr;  // [rows][16]
  float* panel = nullptr;  // [rows][16], whole numbers
};

struct LinearArgs {
  const Weight* weight = nullptr;
  const Weight* up = nullptr;  // with it, the result is act(weight row) * (up row)
  Act act = Act::None;
  int rows = 0;
  bool integer = false;      // use `quant`, else `x`
  const float* x = nullptr;  // [rows][x_stride], k_pad wide, zero beyond k
  size_t x_stride = 0;
  QuantRows quant;
  Epilogue epilogue;
  const float* up_bias = nullptr;
  Ahead* ahead = nullptr;      // the calling thread's
  int next_panel = -1;         // with few rows, what to ask for meanwhile; -1: what lies behind the panel
  Greatest greatest;           // the calling thread's, of these rows; with it, results are looked at on their way out
  bool only_greatest = false;  // and go nowhere
  const QuantRows* handed = nullptr;  // with it, results go there, quantised, and panels are asked for by whole groups
};

constexpr int kApart = 32;  // columns that a coarse head keeps apart

// Over all rows of a coarse head, the most that a group's codes miss, in units of its scale; that its codes are long;
// and that a row of the head is long, squared.
struct CoarseMost {
  float error = 0.0f, norm = 0.0f;
  float first_norm = 0.0f, second_norm = 0.0f, second_error = 0.0f;  // of the columns apart, and what is left of them
  float square = 0.0f;

  void raise(const CoarseMost& by) {
    error = error > by.error ? error : by.error;
    norm = norm > by.norm ? norm : by.norm;
    first_norm = first_norm > by.first_norm ? first_norm : by.first_norm;
    second_norm = second_norm > by.second_norm ? second_norm : by.second_norm;
    second_error = second_error > by.second_error ? second_error : by.second_error;
    square = square > by.square ? square : by.square;
  }
};

struct Kernels {
  const char* name;
  // Panels [first, last) of the weight for all rows. `scratch` is the calling thread's, linear_scratch_bytes(k_pad).
  void (*linear)(const LinearArgs& args, int first, int last, float* scratch);
  // out[0..n) = norm(x) * weight (+ bias) (+ add), float32 throughout.
  void (*norm)(const float* x, const float* weight, const float* bias, const float* add, float eps, int n, bool layer,
               float* out);
  // x [k] becomes row `row` of `to`, its padding zero.
  void (*quantise)(const float* x, int k, const QuantRows& to, int row, Inputs inputs);
  // out = act(gate) * up; up may be null.
  void (*activate)(const float* gate, const float* up, int n, Act act, float* out);
  // Row `row` of the weight as float32, times `factor`.
  void (*dequantise_row)(const Weight& weight, int row, float factor, float* out);
  // An integer weight's panel as INT8 codes with one scale a row. `scratch` has k_pad * 16 floats.
  void (*widen)(const Weight& weight, int panel, float* scratch, uint8_t* codes, float* scales);
  // For screen.h, whose comments say what for; `scratch` has (k_pad + kApart) * 16 floats.
  void (*add_columns)(const Weight& weight, int panel, float* scratch, double* sum, double* square);
  void (*coarsen)(const Weight& weight, int panel, const float* centre, const int32_t* apart, float* scratch,
                  uint8_t* codes, uint16_t* scales, CoarseMost& most);
  // What row `row`, quantised by 32, is worth, [k_pad], and its groups' scales.
  void (*decode)(const QuantRows& rows, int row, float* values, float* scales);
  // Adds more[g] to the integer sums of group g of row `row` with INT4 weights.
  void (*lift)(const QuantRows& rows, int row, const int32_t* more);
};

inline size_t linear_scratch_bytes(int k_pad) {
  return (2 * static_cast<size_t>(k_pad) + 8 * 48) * kRowsPerPanel * sizeof(float) + 64;  // two panels, eight results
}

const Kernels* kernels_portable();
#ifdef MIAOTUI_X86
const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512();
#endif

// IEEE half to float, exact. Subnormals, infinities and NaN included.
inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {
    float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

}  // namespace miaotui
