// What a Screen (screen.h) is made with, sixteen rows at a time; included after kernels_impl.h.

// Any panel as float32 [k_pad][16].
inline void panel_values(const Weight& w, int panel, float* out) {
  if (w.integer()) return dequantise_panel(w, panel, out);
  const uint8_t* from = w.codes + panel * w.panel_bytes;
  for (int k = 0; k < w.k_pad; ++k) {
    if (w.code == Code::F32) store(out + k * 16, load(reinterpret_cast<const float*>(from) + k * 16));
    if (w.code == Code::F16) store(out + k * 16, load_f16(reinterpret_cast<const uint16_t*>(from) + k * 16));
    if (w.code != Code::BF16 || k % 2) continue;
    F16x even, odd;
    load_bf16_pair(reinterpret_cast<const uint16_t*>(from) + k * 16, even, odd);
    store(out + k * 16, even), store(out + (k + 1) * 16, odd);
  }
}

// Adds the panel's rows to each column's sum, and their squares to its squares.
inline void add_columns(const Weight& w, int panel, float* scratch, double* sum, double* square) {
  panel_values(w, panel, scratch);
  for (int k = 0; k < w.k; ++k) {
    const F16x x = load(scratch + k * 16);
    sum[k] += reduce_add(x);
    square[k] += reduce_add(mul(x, x));
  }
}

// The scale with eight bits of fraction.
MIAOTUI_INLINE F16x to_bf16(F16x x, uint16_t* bits) {
  float lanes[16];
  store(lanes, x);
  for (float& lane : lanes) {
    uint32_t b;
    std::memcpy(&b, &lane, 4);
    *bits++ = static_cast<uint16_t>(b >> 16);
    b &= 0xFFFF0000u;
    std::memcpy(&lane, &b, 4);
  }
  return load(lanes);
}

struct CoarseGroup {
  F16x error;  // |x - scale * code| over the scale
  F16x norm;   // |code|
};

// 32 columns x [32][16] as INT4, each row with one scale; x keeps what that leaves. Of several scales the least whose
// error is in proportion, for the bound is the error's largest proportion times the scale.
inline CoarseGroup coarse_group(float* x, uint8_t* codes, uint16_t* scales) {
  constexpr float kProportion = 1.8f * 1.8f;
  F16x most = splat(1e-30f);
  for (int k = 0; k < 32; ++k) most = max(most, abs(load(x + k * 16)));
  auto code = [&](int k, F16x inverse) {
    return min(max(round(mul(load(x + k * 16), inverse)), splat(-8.0f)), splat(7.0f));
  };
  F16x best = zero(), least = splat(1e30f);
  for (int i = 0; i < 11; ++i) {
    uint16_t bits[16];
    const F16x scale = to_bf16(mul(most, splat((1.06f - 0.02f * static_cast<float>(i)) / 7.5f)), bits);
    const F16x inverse = div(splat(1.0f), scale);
    F16x error = zero();
    for (int k = 0; k < 32; ++k) {
      const F16x left = sub(mul(load(x + k * 16), inverse), code(k, inverse));
      error = fma(left, left, error);
    }
    const F16x bound = max(least, splat(kProportion));
    best = where_greater(bound, error, scale, best);
    least = where_greater(bound, error, error, least);
  }
  best = to_bf16(best, scales);
  const F16x inverse = div(splat(1.0f), best);
  F16x error = zero(), norm = zero();
  uint8_t* line = codes;
  for (int k = 0; k < 32; k += 8, line += 64) {
    I16x four = isplat(0);
    auto put = [&](int i, auto shift) {
      const F16x c = code(k + i, inverse), left = sub(load(x + (k + i) * 16), mul(c, best));
      four = iadd(four, shift_left<decltype(shift)::value>(to_int(add(c, splat(8.0f)))));
      const F16x part = mul(left, inverse);
      error = fma(part, part, error), norm = fma(c, c, norm);
      store(x + (k + i) * 16, left);
    };
    put(0, Int<0>{}), put(1, Int<8>{}), put(2, Int<16>{}), put(3, Int<24>{});
    put(4, Int<4>{}), put(5, Int<12>{}), put(6, Int<20>{}), put(7, Int<28>{});
    std::memcpy(line, &four, 64);
  }
  float squares[2][16];
  store(squares[0], error), store(squares[1], norm);
  for (auto& of : squares)
    for (float& lane : of) lane = std::sqrt(lane);
  return {load(squares[0]), load(squares[1])};
}

// Sixteen rows of the head less its centre: codes and scales of the panel of INT4, and the most of what bounds need.
inline void coarsen(const Weight& w, int panel, const float* centre, const int32_t* apart, float* scratch,
                    uint8_t* codes, uint16_t* scales, CoarseMost& most) {
  panel_values(w, panel, scratch);
  F16x square = zero();
  for (int k = 0; k < w.k_pad; ++k) {
    const F16x x = k < w.k ? load(scratch + k * 16) : zero();
    square = fma(x, x, square);
    store(scratch + k * 16, k < w.k ? sub(x, splat(centre[k])) : x);
  }
  float* of_apart = scratch + w.k_pad * 16;
  for (int i = 0; i < kApart; ++i) {
    store(of_apart + i * 16, load(scratch + apart[i] * 16));
    store(scratch + apart[i] * 16, zero());
  }
  F16x error = zero(), norm = zero();
  for (int g = 0; g < w.k_pad / 32; ++g, codes += 256, scales += 16) {
    const CoarseGroup group = coarse_group(scratch + g * 32 * 16, codes, scales);
    error = max(error, group.error), norm = max(norm, group.norm);
  }
  const CoarseGroup first = coarse_group(of_apart, codes, scales);
  const CoarseGroup second = coarse_group(of_apart, codes + 256, scales + 16);
  auto raise = [](float& to, F16x lanes) { to = std::fmax(to, reduce_max(lanes)); };
  raise(most.error, error), raise(most.norm, norm), raise(most.square, square);
  raise(most.first_norm, first.norm), raise(most.second_norm, second.norm), raise(most.second_error, second.error);
}

inline void decode(const QuantRows& rows, int row, float* values, float* scales) {
  const QuantRows tile = tile_of(rows, row);
  for (int g = 0; g < tile.k_pad / 32; ++g) {
    const int at = g * tile.rows + row;
    scales[g] = tile.scale[at];
    for (int i = 0; i < 32; ++i) values[g * 32 + i] = static_cast<float>(tile.q[at * 32 + i]) * scales[g];
  }
}

inline void lift(const QuantRows& rows, int row, const int32_t* more) {
  const QuantRows tile = tile_of(rows, row);
  for (int g = 0; g < tile.k_pad / 32; ++g) tile.minus32[g * tile.rows + row] += more[g];
}
