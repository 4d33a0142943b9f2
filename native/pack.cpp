#include "pack.h"

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace miaotui {
namespace {

size_t scale_bytes(ScaleType type) { return type == ScaleType::F32 ? 4 : 2; }

// Fills in panels and strides; returns the bytes of codes, of scales (and of minima again as many).
std::pair<size_t, size_t> measure(Weight& w) {
  w.panels = (w.n + kRowsPerPanel - 1) / kRowsPerPanel;
  const size_t elements = static_cast<size_t>(w.k_pad) * kRowsPerPanel;
  switch (w.code) {
    case Code::F32: w.panel_bytes = elements * 4; break;
    case Code::F16:
    case Code::BF16: w.panel_bytes = elements * 2; break;
    case Code::INT8: w.panel_bytes = elements; break;
    case Code::INT4: w.panel_bytes = elements / 2; break;
  }
  w.panel_scale_bytes = 0;
  if (w.integer()) w.panel_scale_bytes = static_cast<size_t>(w.groups) * kRowsPerPanel * scale_bytes(w.scale_type);
  const size_t panels = static_cast<size_t>(w.panels);
  return {round_up(panels * w.panel_bytes, 64), round_up(panels * w.panel_scale_bytes, 64)};
}

void point_into(Weight& w, const uint8_t* bytes, size_t codes, size_t scales) {
  w.codes = bytes;
  w.scales = w.codes + codes;
  w.mins = w.has_min ? w.scales + scales : w.scales;
}

// Takes the memory: codes, then scales, then minima, each panel after panel.
void lay_out(PackedWeight& packed, Heap& heap) {
  const auto [codes, scales] = measure(packed.view);
  packed.size = codes + scales * (packed.view.has_min ? 2 : 1);
  Heap::Part part = heap.take(packed.size);
  packed.owner = std::move(part.owner);
  point_into(packed.view, part.data, codes, scales);
}

uint8_t* mutable_bytes(const uint8_t* p) { return const_cast<uint8_t*>(p); }

template <typename F>
void for_panels(Pool& pool, int panels, F&& f) {
  pool.each([&](int thread) {
    int first, last;
    share_of(panels, thread, pool.threads(), first, last);
    for (int p = first; p < last; ++p) f(p);
  });
}

uint32_t load32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

void store32(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }

uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// Exact for values that a half holds; others are rounded to nearest even.
uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = x < 0 ? -x : x;
  if (!(magnitude < 65520.0f)) return static_cast<uint16_t>(sign | (magnitude == magnitude ? 0x7C00u : 0x7E00u));
  if (magnitude < 6.103515625e-5f) {  // subnormal: units of 2^-24, rounded by adding and taking away 2^-1
    float shifted = magnitude + 0.5f;
    uint32_t b;
    std::memcpy(&b, &shifted, 4);
    return static_cast<uint16_t>(sign | (b - 0x3F000000u));
  }
  uint32_t m;
  std::memcpy(&m, &magnitude, 4);
  m += 0xFFFu + (m >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((m - 0x38000000u) >> 13));
}

void store_scale(uint8_t* line, ScaleType type, int lane, float value) {
  if (type == ScaleType::F32) {
    std::memcpy(line + lane * 4, &value, 4);
  } else {
    const uint16_t bits = type == ScaleType::F16 ? float_to_half(value) : float_to_bf16(value);
    std::memcpy(line + lane * 2, &bits, 2);
  }
}

// Where lane `row` of block b's 32 elements lies.
struct BlockTarget {
  uint8_t* codes;
  uint8_t* scale;
  uint8_t* minimum;
};

BlockTarget target(const Weight& w, int panel, int lane, int block) {
  const size_t p = static_cast<size_t>(panel), step = w.code == Code::INT4 ? 256 : 512;
  const size_t line = p * w.panel_scale_bytes + static_cast<size_t>(block) * 32 + lane * 2;
  return {mutable_bytes(w.codes) + p * w.panel_bytes + block * step + lane * 4, mutable_bytes(w.scales) + line,
          mutable_bytes(w.mins) + line};
}

void put_nibbles(const uint8_t* q, uint8_t* codes) {  // 16 bytes: low nibbles are elements 0-15, high 16-31
  constexpr uint32_t low = 0x0F0F0F0Fu;
  uint32_t a = load32(q), b = load32(q + 4), c = load32(q + 8), d = load32(q + 12);
  store32(codes, (a & low) | (b & low) << 4);
  store32(codes + 64, (c & low) | (d & low) << 4);
  store32(codes + 128, (a >> 4 & low) | (b & ~low));
  store32(codes + 192, (c >> 4 & low) | (d & ~low));
}

void put_bytes(const uint8_t* q, uint8_t* codes) {
  for (int i = 0; i < 8; ++i) store32(codes + i * 64, load32(q + i * 4) ^ 0x80808080u);
}

}  // namespace

PackedWeight packed_at(const Weight& like, const uint8_t* bytes, size_t size, std::shared_ptr<void> owner) {
  PackedWeight packed;
  packed.view = like;
  const auto [codes, scales] = measure(packed.view);
  packed.size = codes + scales * (like.has_min ? 2 : 1);
  if (packed.size != size) throw std::invalid_argument("packed bytes of a wrong size");
  point_into(packed.view, bytes, codes, scales);
  packed.owner = std::move(owner);
  return packed;
}

PackedWeight pack_dense(Pool& pool, Heap& heap, const void* data, Code code, int n, int k) {
  PackedWeight packed;
  Weight& w = packed.view;
  w.code = code, w.n = n, w.k = k, w.k_pad = static_cast<int>(round_up(static_cast<size_t>(k), 32));
  lay_out(packed, heap);
  for_panels(pool, w.panels, [&](int p) {
    uint8_t* out = mutable_bytes(w.codes) + p * w.panel_bytes;
    for (int lane = 0; lane < kRowsPerPanel && p * kRowsPerPanel + lane < n; ++lane) {
      const size_t row = static_cast<size_t>(p * kRowsPerPanel + lane) * k;
      if (code == Code::F32) {
        const float* from = static_cast<const float*>(data) + row;
        for (int i = 0; i < k; ++i) reinterpret_cast<float*>(out)[i * 16 + lane] = from[i];
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(data) + row;
        uint16_t* to = reinterpret_cast<uint16_t*>(out);
        if (code == Code::F16)
          for (int i = 0; i < k; ++i) to[i * 16 + lane] = from[i];
        else
          for (int i = 0; i < k; ++i) to[(i / 2 * 16 + lane) * 2 + i % 2] = from[i];
      }
    }
  });
  return packed;
}

PackedWeight pack_gguf(Pool& pool, Heap& heap, const uint8_t* rows, const std::string& kind, int n, int k,
                       size_t row_bytes) {
  PackedWeight packed;
  Weight& w = packed.view;
  const bool eight = kind == "Q8_0", with_min = kind == "Q4_1";
  if (!eight && !with_min && kind != "Q4_0") throw std::invalid_argument("no panel layout for GGUF " + kind);
  if (k % 32 != 0) throw std::invalid_argument("GGUF rows hold whole blocks of 32");
  w.code = eight ? Code::INT8 : Code::INT4;
  w.has_min = with_min;
  w.n = n, w.k = k, w.k_pad = k, w.groups = k / 32;
  lay_out(packed, heap);
  const size_t block_bytes = eight ? 34 : with_min ? 20 : 18, head = with_min ? 4 : 2;
  for_panels(pool, w.panels, [&](int p) {
    for (int lane = 0; lane < kRowsPerPanel && p * kRowsPerPanel + lane < n; ++lane) {
      const uint8_t* block = rows + static_cast<size_t>(p * kRowsPerPanel + lane) * row_bytes;
      for (int b = 0; b < w.groups; ++b, block += block_bytes) {
        const BlockTarget to = target(w, p, lane, b);
        std::memcpy(to.scale, block, 2);
        if (with_min) std::memcpy(to.minimum, block + 2, 2);
        if (eight)
          put_bytes(block + head, to.codes);
        else
          put_nibbles(block + head, to.codes);
      }
    }
  });
  return packed;
}

PackedWeight pack_wide(Pool& pool, Heap& heap, const Kernels& kernels, const PackedWeight& weight) {
  const Weight& from = weight.view;
  PackedWeight packed;
  Weight& w = packed.view;
  w.code = Code::INT8;
  w.scale_type = ScaleType::F32;
  w.inputs = Inputs::By64;
  w.n = from.n, w.k = from.k, w.k_pad = from.k_pad, w.groups = 1;
  w.folds_per_group = w.k_pad / w.fold;
  lay_out(packed, heap);
  for_panels(pool, w.panels, [&](int p) {
    std::vector<float> values(static_cast<size_t>(w.k_pad) * kRowsPerPanel + 16);
    kernels.widen(from, p, reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(values.data()), 64)),
                  mutable_bytes(w.codes) + p * w.panel_bytes,
                  reinterpret_cast<float*>(mutable_bytes(w.scales) + p * w.panel_scale_bytes));
  });
  return packed;
}

PackedWeight empty_int4(Heap& heap, int n, int k) {
  PackedWeight packed;
  Weight& w = packed.view;
  w.code = Code::INT4;
  w.scale_type = ScaleType::BF16;
  w.n = n, w.k = w.k_pad = k, w.groups = k / 32;
  lay_out(packed, heap);
  return packed;
}

PackedWeight pack_grouped(Pool& pool, Heap& heap, const uint8_t* codes, const float* scale, const float* minimum,
                          int bits, int group, ScaleType scale_type, int n, int k) {
  PackedWeight packed;
  Weight& w = packed.view;
  const int groups = (k + group - 1) / group;
  if (groups > 1 && group % 16 != 0) throw std::invalid_argument("groups must be multiples of 16");
  w.code = bits <= 4 ? Code::INT4 : Code::INT8;
  w.scale_type = scale_type;
  w.has_min = minimum != nullptr;
  w.n = n, w.k = k, w.k_pad = static_cast<int>(round_up(static_cast<size_t>(k), 32)), w.groups = groups;
  w.fold = groups > 1 && group % 32 != 0 ? 16 : 32;
  w.folds_per_group = groups == 1 ? w.k_pad / w.fold : group / w.fold;
  lay_out(packed, heap);
  const int shift = w.has_min ? 0 : w.zero() - (1 << (bits - 1));
  for_panels(pool, w.panels, [&](int p) {
    uint8_t* out = mutable_bytes(w.codes) + p * w.panel_bytes;
    for (int lane = 0; lane < kRowsPerPanel && p * kRowsPerPanel + lane < n; ++lane) {
      const size_t row = static_cast<size_t>(p * kRowsPerPanel + lane);
      const uint8_t* from = codes + row * k;
      for (int i = 0; i < k; ++i) {
        const int code = from[i] + shift;
        if (w.code == Code::INT8)
          out[(i / 4 * 16 + lane) * 4 + i % 4] = static_cast<uint8_t>(code);
        else
          out[(i / 8 * 16 + lane) * 4 + i % 4] |= static_cast<uint8_t>(i % 8 < 4 ? code : code << 4);
      }
      for (int g = 0; g < groups; ++g) {
        const size_t line = p * w.panel_scale_bytes + g * kRowsPerPanel * scale_bytes(scale_type);
        store_scale(mutable_bytes(w.scales) + line, scale_type, lane, scale[row * groups + g]);
        if (minimum) store_scale(mutable_bytes(w.mins) + line, scale_type, lane, minimum[row * groups + g]);
      }
    }
  });
  return packed;
}

}  // namespace miaotui
