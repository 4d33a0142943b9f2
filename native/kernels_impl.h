// Every kernel, written once over sixteen lanes. Included by kernels_all.h.
//
// One rule runs through it: the bits of a row's result do not depend on how many rows are computed with it, nor on
// which thread computes it. So each output is one chain of operations in ascending k, whatever the tile:
//   integer   per fold of 16 or 32 inputs: an exact integer sum, then acc = fma(sum, w_scale * a_scale, acc)
//   wide      per fold of 64 inputs, or once a row: an exact integer sum, then acc = fma(sum, a_scale, acc); in the end
//             acc * w_scale
//   float     acc = fma(w, x, acc)

template <int N>
struct Int {
  static constexpr int value = N;
};

MIAOTUI_INLINE F16x load_scale(const uint8_t* p, ScaleType type) {
  if (type == ScaleType::F16) return load_f16(reinterpret_cast<const uint16_t*>(p));
  if (type == ScaleType::BF16) return load_bf16(reinterpret_cast<const uint16_t*>(p));
  return load(reinterpret_cast<const float*>(p));
}

inline int scale_line(ScaleType type) { return type == ScaleType::F32 ? 64 : 32; }  // bytes of 16 scales

MIAOTUI_INLINE F16x exp_lanes(F16x x) { return exp_within(min(max(x, splat(-87.0f)), splat(88.0f))); }

MIAOTUI_INLINE F16x tanh_lanes(F16x x) {  // 1 - 2 / (exp(2x) + 1)
  F16x e = exp_lanes(min(add(x, x), splat(80.0f)));
  return sub(splat(1.0f), mul(splat(2.0f), reciprocal(add(e, splat(1.0f)))));
}

MIAOTUI_INLINE F16x act_lanes(F16x x, Act act) {
  switch (act) {
    case Act::Silu: return mul(x, reciprocal(add(splat(1.0f), exp_lanes(sub(zero(), x)))));
    case Act::GeluTanh: {
      F16x inner = mul(splat(0.7978845608028654f), fma(mul(mul(x, x), x), splat(0.044715f), x));
      return mul(mul(splat(0.5f), x), add(splat(1.0f), tanh_lanes(inner)));
    }
    case Act::Gelu: {
      float v[16];
      store(v, x);
      for (int i = 0; i < 16; ++i) v[i] = 0.5f * v[i] * (1.0f + ::erff(v[i] * 0.70710678118654752f));
      return load(v);
    }
    case Act::Relu2: {
      F16x positive = max(x, zero());
      return mul(positive, positive);
    }
    case Act::None: break;
  }
  return x;
}

// ---- integer tiles ---------------------------------------------------------------------------------------------

// With few rows a tile waits for memory; it asks for what lies this far ahead in the thread's stream of panels, which
// the hardware's prefetcher, stopping at every page, does not.
constexpr size_t kCodesAhead = 4096;

struct IntTile {  // one panel against M rows
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* mins;
  const Weight* weight;
  const uint8_t* ahead;  // of the next panel's codes: what a tile of many rows asks for meanwhile,
  int ahead_lines;       // so many lines for each fold of 32 inputs
  const uint8_t* later;  // the same of a later op's memory
  int later_lines;
  bool streams;        // with few rows in all a tile asks for
  size_t codes_ahead;  // what lies so far ahead, modulo 2^64
  size_t scales_ahead;
};

MIAOTUI_INLINE void prefetch_lines(const uint8_t*& ahead, int lines) {
  for (int i = 0; i < lines; ++i, ahead += 64) prefetch(ahead);
}

MIAOTUI_INLINE void prefetch_far_lines(const uint8_t*& ahead, int lines) {
  for (int i = 0; i < lines; ++i, ahead += 64) prefetch_far(ahead);
}

// The next run of what a later op reads, spread over a tile's folds of 32 inputs.
template <typename Tile>
MIAOTUI_INLINE void take_later(Tile& tile, Ahead* ahead, int k_pad) {
  tile.later = ahead ? ahead->take() : nullptr;
  tile.later_lines = tile.later ? (ahead->lines * 32 + k_pad - 1) / k_pad : 0;
}

#ifdef MIAOTUI_SHORT_SUMS
// A fold of nibbles, summed in sixteen bits first.
template <int FOLD, int M>
MIAOTUI_INLINE void short_fold(I16x (&sum)[M], const uint8_t* codes, const int8_t* a) {
  ShortSums pairs[M];
#pragma GCC unroll 8
  for (int k = 0; k < FOLD; k += 8) {
    const Bytes w = load_bytes(codes + k * 8), low = low_nibbles(w), high = high_nibbles(w);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Spread x = spread(a + m * 32 + k);
      pairs[m] = k ? short_dot(pairs[m], low, x) : short_dot(low, x);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) pairs[m] = short_dot(pairs[m], high, spread(a + m * 32 + k + 4));
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sum[m] = iadd(sum[m], pairs[m]);
}
#endif

// The sums of a fold. With few rows each is two chains, so that no product waits for the one before; INT4's second
// takes high nibbles where they are, 16 times as large.
template <Code CODE, int FOLD, int C, int M>
MIAOTUI_INLINE void dot_fold(I16x (&sum)[C][M], const uint8_t* codes, const int8_t* a) {
  constexpr bool kInt4 = CODE == Code::INT4;
  constexpr int step = kInt4 ? 8 : 4;
#ifdef MIAOTUI_SHORT_SUMS
  if constexpr (kInt4) return short_fold<FOLD>(sum[0], codes, a);
#endif
#pragma GCC unroll 2
  for (int c = 1; c < C; ++c)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[c][m] = isplat(0);
#pragma GCC unroll 8
  for (int k = 0; k < FOLD; k += step) {
    Bytes w = load_bytes(codes + k / step * 64);
    if constexpr (kInt4) {
      Bytes low = low_nibbles(w), high = C == 2 ? high_nibbles_there(w) : high_nibbles(w);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[0][m] = dot4(sum[0][m], low, a + m * 32 + k);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[C - 1][m] = dot4(sum[C - 1][m], high, a + m * 32 + k + 4);
    } else {
      I16x(&chain)[M] = sum[k / 4 % C];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) chain[m] = dot4(chain[m], w, a + m * 32 + k);
    }
  }
  if constexpr (C == 2)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[0][m] = iadd(sum[0][m], kInt4 ? shift_right<4>(sum[1][m]) : sum[1][m]);
}

// What a sum over codes starts at. Without a minimum it is to be one over code - zero, so -zero * sum(a); the rows keep
// -8 times their sums, for the zero of INT4. That of INT8 is 16 times as large, and where codes are centred it is in
// each product already: then a sum with a minimum lacks it.
template <Code CODE, bool MIN>
MIAOTUI_INLINE I16x start_of(const int32_t* minus) {
  if constexpr (CODE == Code::INT4) return MIN ? isplat(0) : isplat_at(minus);
  if constexpr (kCentred) return MIN ? isplat(-16 * *minus) : isplat(0);
  return MIN ? isplat(0) : shift_left<4>(isplat_at(minus));
}

template <Code CODE, bool MIN, int FOLD, int M>
__attribute__((noinline)) void int_tile(const IntTile& tile, const QuantRows& rows, float* out) {
  const Weight& w = *tile.weight;
  const int folds = w.k_pad / FOLD, line = scale_line(w.scale_type), per_group = w.folds_per_group;
  constexpr size_t code_step = CODE == Code::INT4 ? FOLD * 8 : FOLD * 16;
  const int32_t* minus = FOLD == 32 ? rows.minus32 : rows.minus16;
  const float* total = FOLD == 32 ? rows.total32 : rows.total16;
  const int8_t* a = rows.q;
  const float* a_scale = rows.scale;
  const ScaleType type = w.scale_type;
  const uint8_t *codes = tile.codes, *scales = tile.scales, *mins = tile.mins, *ahead = tile.ahead, *later = tile.later;
  const size_t codes_ahead = tile.codes_ahead, scales_ahead = tile.scales_ahead;
  F16x acc[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m] = zero();
  int left = per_group;
  for (int f = 0; f < folds; ++f) {
    I16x sum[M <= kChainedRows ? 2 : 1][M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[0][m] = start_of<CODE, MIN>(minus + m);
    dot_fold<CODE, FOLD>(sum, codes, FOLD == 32 ? a : a + f % 2 * 16);
    if (M <= kStreamingRows && tile.streams) {
#pragma GCC unroll 8
      for (size_t i = 0; i < code_step; i += 64) prefetch(codes + codes_ahead + i);
      prefetch(scales + scales_ahead);
      if constexpr (MIN) prefetch(mins + scales_ahead);
    } else {
      prefetch_lines(ahead, tile.ahead_lines);
      prefetch_far_lines(later, tile.later_lines);
    }
    const F16x scale = load_scale(scales, type);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m] = fma(to_float(sum[0][m]), mul(scale, splat(a_scale[m])), acc[m]);
    if constexpr (MIN) {
      const F16x minimum = load_scale(mins, type);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m] = fma(minimum, splat(total[m]), acc[m]);
    }
    codes += code_step, minus += M, total += M;
    if (FOLD == 32 || f % 2) a += M * 32, a_scale += M;
    if (--left == 0) left = per_group, scales += line, mins += line;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store(out + m * 16, acc[m]);
}

// INT8 weights with one scale a row and a few input rows with one scale each: integers to the end. Each row has several
// sums, since one alone would wait for itself; the order of integer sums is nobody's concern.
template <int M>
__attribute__((noinline)) void row_tile(const IntTile& tile, const QuantRows& rows, float* out) {
  constexpr int kSums = M == 1 ? 8 : M == 2 ? 4 : 2;
  const Weight& w = *tile.weight;
  const uint8_t *codes = tile.codes, *stream = codes + tile.codes_ahead;
  const int8_t* a = rows.q;
  I16x sum[kSums][M];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[i][m] = i || kCentred ? isplat(0) : isplat_at(rows.minus_row + m);
  for (int k = 0; k < w.k_pad; k += 32, codes += 512, stream += 512, a += M * 32) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Bytes line = load_bytes(codes + i * 64);
      prefetch(stream + i * 64);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[i % kSums][m] = dot4(sum[i % kSums][m], line, a + m * 32 + i * 4);
    }
  }
  const F16x scale = load_scale(tile.scales, w.scale_type);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int i = 1; i < kSums; ++i) sum[0][m] = iadd(sum[0][m], sum[i][m]);
    store(out + m * 16, mul(mul(to_float(sum[0][m]), splat(rows.scale[m])), scale));
  }
}

template <Code CODE, int M>
MIAOTUI_INLINE void int_tile_of(const IntTile& t, const QuantRows& rows, float* out) {
  const Weight& w = *t.weight;
  const bool wide = w.fold == 32;
  if (w.has_min) return wide ? int_tile<CODE, true, 32, M>(t, rows, out) : int_tile<CODE, true, 16, M>(t, rows, out);
  return wide ? int_tile<CODE, false, 32, M>(t, rows, out) : int_tile<CODE, false, 16, M>(t, rows, out);
}

template <int M>
MIAOTUI_INLINE void int_tile_any(const IntTile& t, const QuantRows& rows, float* out) {
  const Weight& w = *t.weight;
  if (w.code == Code::INT4) return int_tile_of<Code::INT4, M>(t, rows, out);
  if constexpr (M <= kStreamingRows)
    if (w.wide()) return row_tile<M>(t, rows, out);
  return int_tile_of<Code::INT8, M>(t, rows, out);
}

// How many of the `left` rows the next tile takes. One row alone costs three quarters of two, so that a rest of less
// than a whole tile leaves none alone: 7 goes as 5 + 2, 9 as 5 + 4, 11 as 6 + 5.
constexpr int next_tile(int left) {
  if (kMaxTile >= 12) {
    if (left >= 12) return 12;
    if (left == 9 || left == 7 || left == 5) return 5;
    if (left >= 6) return left == 8 ? 8 : 6;
  }
  if (kMaxTile >= 4 && left >= 4) return 4;
  if (kMaxTile >= 3 && left >= 3) return 3;
  return left >= 2 ? 2 : 1;
}

// tile(Int<M>, first row) for every tile of the rows.
template <typename F>
MIAOTUI_INLINE void for_tiles(int rows, F&& tile) {
  for (int r = 0, m; r < rows; r += m) {
    m = next_tile(rows - r);
    switch (m) {
      case 12:
        if constexpr (kMaxTile >= 12) tile(Int<12>{}, r);
        break;
      case 8:
        if constexpr (kMaxTile >= 12) tile(Int<8>{}, r);
        break;
      case 6:
        if constexpr (kMaxTile >= 12) tile(Int<6>{}, r);
        break;
      case 5:
        if constexpr (kMaxTile >= 12) tile(Int<5>{}, r);
        break;
      case 4:
        if constexpr (kMaxTile >= 4) tile(Int<4>{}, r);
        break;
      case 3:
        if constexpr (kMaxTile >= 3) tile(Int<3>{}, r);
        break;
      case 2: tile(Int<2>{}, r); break;
      default: tile(Int<1>{}, r);
    }
  }
}

// The first time that rows meet a panel, they ask for the next one: its codes come from memory.
inline void int_panel(const LinearArgs& args, const Weight& w, int panel, const QuantRows& rows, int count, bool first,
                      float* out) {
  const uint8_t* codes = w.codes + panel * w.panel_bytes;
  const int lines = w.code == Code::INT4 ? 4 : 8, tiles = first ? (count >= 2 * kMaxTile ? 2 : 1) : 0;
  IntTile tile{codes,
               w.scales + panel * w.panel_scale_bytes,
               w.mins + panel * w.panel_scale_bytes,
               &w,
               codes + w.panel_bytes,
               tiles ? lines / tiles : 0,
               nullptr,
               0,
               args.rows <= kStreamingRows,
               args.next_panel < 0 ? kCodesAhead : (args.next_panel - panel) * w.panel_bytes,
               args.next_panel < 0 ? kCodesAhead / 8 : (args.next_panel - panel) * w.panel_scale_bytes};
  for_tiles(count, [&](auto m, int r) {
    if (!tile.ahead_lines && !tile.streams) take_later(tile, args.ahead, w.k_pad);
    int_tile_any<decltype(m)::value>(tile, rows.from(r, decltype(m)::value), out + r * 16);
    tile.ahead += w.panel_bytes / 2;
    if (r + decltype(m)::value >= tiles * kMaxTile) tile.ahead_lines = 0;
  });
}

// ---- wide tiles ------------------------------------------------------------------------------------------------

// Panels, and how much of the next ones to ask for meanwhile.
struct WideTile {
  const Weight* weight;
  int panel;
  const uint8_t* ahead;
  int ahead_lines;       // for each 32 inputs
  const uint8_t* later;  // and of a later op's memory
  int later_lines;
};

// P panels against M rows from `row` on, among those of the tile that `rows` is. Every broadcast of four inputs serves
// all panels.
template <bool TOKEN, int P, int M>
__attribute__((noinline)) void wide_tile(const WideTile& tile, const QuantRows& rows, int row, float* out,
                                         size_t out_panel) {
  const Weight& w = *tile.weight;
  const int beside = rows.rows;
  const uint8_t *codes = w.codes + tile.panel * w.panel_bytes, *ahead = tile.ahead, *later = tile.later;
  const int8_t* a = rows.q + row * 32;
  const int32_t* minus = (TOKEN ? rows.minus_row : rows.minus32) + row;
  const float* a_scale = rows.scale + row;
  F16x acc[P][M];
  I16x sum[P][M];
  auto begin = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      sum[0][m] = kCentred ? isplat(0) : isplat_at(minus + m);
#pragma GCC unroll 4
      for (int p = 1; p < P; ++p) sum[p][m] = sum[0][m];
    }
  };
  auto fold = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[p][m] = fma(to_float(sum[p][m]), splat(a_scale[m]), acc[p][m]);
  };
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[p][m] = zero();
  auto multiply = [&]() __attribute__((always_inline)) {  // the next 32 inputs
    prefetch_lines(ahead, tile.ahead_lines);
    prefetch_far_lines(later, tile.later_lines);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      Bytes line[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) line[p] = load_bytes(codes + p * w.panel_bytes + j * 64);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Spread four = spread(a + m * 32 + j * 4);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[p][m] = dot4_spread(sum[p][m], line[p], four);
      }
    }
    codes += 512, a += beside * 32;
  };
  int k = w.k_pad;
  if constexpr (TOKEN) {
    begin();
    for (; k; k -= 32) multiply();
    fold();
  } else {
    for (; k >= 64; k -= 64) {
      begin();
      multiply();
      multiply();
      fold();
      minus += 2 * beside, a_scale += 2 * beside;
    }
    if (k) {
      begin();
      multiply();
      fold();
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const F16x scale = load_scale(w.scales + (tile.panel + p) * w.panel_scale_bytes, w.scale_type);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store(out + p * out_panel + m * 16, mul(acc[p][m], scale));
  }
}

template <int P, int M>
MIAOTUI_INLINE void wide_tile_of(const WideTile& tile, const QuantRows& rows, int row, float* out, size_t out_panel) {
  if (tile.weight->inputs == Inputs::ByToken) return wide_tile<true, P, M>(tile, rows, row, out, out_panel);
  wide_tile<false, P, M>(tile, rows, row, out, out_panel);
}

// `panels` neighbouring ones against `count` rows; the results of panel p at out + p * out_panel.
inline void wide_panels(const Weight& w, int panel, int panels, const QuantRows& rows, int count, bool first,
                        Ahead* later, float* out, size_t out_panel) {
  const int lines = 8 * panels, tiles = count / kWideRows < 2 ? count / kWideRows : 2;
  WideTile tile{&w, panel, w.codes + (panel + panels) * w.panel_bytes, first && tiles ? lines / tiles : 0, nullptr, 0};
  int taken = 0;
  for_tiles(count, [&](auto size, int r) {
    constexpr int M = decltype(size)::value, kParts = (M + kWideRows - 1) / kWideRows, kPart = M / kParts;
    const QuantRows of_tile = rows.from(r, M);
    for (int part = 0; part < kParts; ++part) {
      float* to = out + (r + part * kPart) * 16;
      if (!tile.ahead_lines) take_later(tile, later, w.k_pad);
      if (panels == kWidePanels)
        wide_tile_of<kWidePanels, kPart>(tile, of_tile, part * kPart, to, out_panel);
      else
        wide_tile_of<1, kPart>(tile, of_tile, part * kPart, to, out_panel);
      tile.ahead += tile.ahead_lines * (w.k_pad / 32) * 64;
      if (++taken == tiles) tile.ahead_lines = 0;
    }
  });
}

// ---- float tiles -----------------------------------------------------------------------------------------------

// Sixteen rows' weights for k and k + 1.
template <Code CODE>
MIAOTUI_INLINE void load_pair(const uint8_t* panel, int k, F16x& even, F16x& odd) {
  if constexpr (CODE == Code::F32) {
    const float* p = reinterpret_cast<const float*>(panel) + k * 16;
    even = load(p), odd = load(p + 16);
  } else if constexpr (CODE == Code::F16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(panel) + k * 16;
    even = load_f16(p), odd = load_f16(p + 16);
  } else {
    load_bf16_pair(reinterpret_cast<const uint16_t*>(panel) + k * 16, even, odd);
  }
}

// P neighbouring panels against M rows: acc[p][m] += w[k] * x[m][k], k ascending.
template <Code CODE, int P, int M>
__attribute__((noinline)) void float_tile(const uint8_t* panels, size_t panel_bytes, int k_pad, const float* x,
                                          size_t x_stride, float* out, size_t out_panel) {
  F16x acc[P][M];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[p][m] = zero();
  for (int k = 0; k < k_pad; k += 2) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      F16x even, odd;
      load_pair<CODE>(panels + p * panel_bytes, k, even, odd);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[p][m] = fma(even, splat(x[m * x_stride + k]), acc[p][m]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[p][m] = fma(odd, splat(x[m * x_stride + k + 1]), acc[p][m]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store(out + p * out_panel + m * 16, acc[p][m]);
}

template <int P, int M>
MIAOTUI_INLINE void float_tile_any(Code code, const uint8_t* panels, size_t panel_bytes, int k_pad, const float* x,
                                   size_t x_stride, float* out, size_t out_panel) {
  if (code == Code::F32) return float_tile<Code::F32, P, M>(panels, panel_bytes, k_pad, x, x_stride, out, out_panel);
  if (code == Code::F16) return float_tile<Code::F16, P, M>(panels, panel_bytes, k_pad, x, x_stride, out, out_panel);
  return float_tile<Code::BF16, P, M>(panels, panel_bytes, k_pad, x, x_stride, out, out_panel);
}

// Integer panel to float32 [k_pad][16], each value rounded once: (code - zero) * scale, or code * scale + minimum.
inline void dequantise_panel(const Weight& w, int panel, float* out) {
  const uint8_t* codes = w.codes + panel * w.panel_bytes;
  const uint8_t* scales = w.scales + panel * w.panel_scale_bytes;
  const uint8_t* mins = w.mins + panel * w.panel_scale_bytes;
  const int line = scale_line(w.scale_type), step = w.code == Code::INT4 ? 8 : 4, size = w.fold * w.folds_per_group;
  const F16x shift = splat(static_cast<float>(w.zero()));
  for (int k = 0; k < w.k_pad; k += step, codes += 64) {
    const int group = k / size;
    const F16x scale = load_scale(scales + group * line, w.scale_type);
    const F16x minimum = w.has_min ? load_scale(mins + group * line, w.scale_type) : zero();
    auto put = [&](Bytes bytes, int at) {
      store(out + (at + 0) * 16, add(mul(sub(byte_lane<0>(bytes), shift), scale), minimum));
      store(out + (at + 1) * 16, add(mul(sub(byte_lane<1>(bytes), shift), scale), minimum));
      store(out + (at + 2) * 16, add(mul(sub(byte_lane<2>(bytes), shift), scale), minimum));
      store(out + (at + 3) * 16, add(mul(sub(byte_lane<3>(bytes), shift), scale), minimum));
    };
    const Bytes bytes = load_bytes(codes);
    if (w.code == Code::INT4) {
      put(low_nibbles(bytes), k);
      put(high_nibbles(bytes), k + 4);
    } else {
      put(bytes, k);
    }
  }
}

// Sixteen rows, [k_pad][16] floats: every run of 32 columns becomes its Walsh-Hadamard transform, without its factor.
inline void turn_columns(float* columns, int k_pad) {
  for (int begin = 0; begin < k_pad; begin += 32)
    for (int apart = 16; apart; apart /= 2)
      for (int i = 0; i < 32; ++i) {
        if (i & apart) continue;
        float *first = columns + (begin + i) * 16, *second = first + apart * 16;
        const F16x x = load(first), y = load(second);
        store(first, add(x, y));
        store(second, sub(x, y));
      }
}

// Sixteen rows, turned, in int8, each with its own scale: max|w| / 127, and round-half-even(w * (127 / max|w|)) + 128.
// The scales have the factor of both turns, theirs and the inputs': 1/32, exact.
inline void widen(const Weight& w, int panel, float* scratch, uint8_t* codes, float* scales) {
  dequantise_panel(w, panel, scratch);
  for (int k = w.k; k < w.k_pad; ++k) store(scratch + k * 16, zero());
  turn_columns(scratch, w.k_pad);
  F16x most = zero();
  for (int k = 0; k < w.k_pad; ++k) most = max(most, abs(load(scratch + k * 16)));
  store(scales, mul(most, splat(1.0f / 127.0f / 32.0f)));
  float greatest[16], inverse[16];
  store(greatest, most);
  for (int i = 0; i < 16; ++i) inverse[i] = greatest[i] > 0.0f ? 127.0f / greatest[i] : 0.0f;
  const F16x factor = load(inverse), centre = splat(128.0f);
  auto code = [&](int k) { return to_int(add(round(mul(load(scratch + k * 16), factor)), centre)); };
  for (int k = 0; k < w.k_pad; k += 4, codes += 64) {
    const I16x low = iadd(code(k), shift_left<8>(code(k + 1)));
    const I16x high = iadd(shift_left<16>(code(k + 2)), shift_left<24>(code(k + 3)));
    const I16x four = iadd(low, high);
    std::memcpy(codes, &four, sizeof four);
  }
}

inline void float_panel(Code code, const uint8_t* panel, int k_pad, const float* x, size_t x_stride, int count,
                        float* out) {
  for_tiles(count, [&](auto m, int r) {
    float_tile_any<1, decltype(m)::value>(code, panel, 0, k_pad, x + r * x_stride, x_stride, out + r * 16, 0);
  });
}

// ---- linear ----------------------------------------------------------------------------------------------------

MIAOTUI_INLINE F16x soften(F16x x, float cap) {
  return cap == 0.0f ? x : mul(splat(cap), tanh_lanes(div(x, splat(cap))));
}

// The first of equals stays, and so does anything beside a NaN.
MIAOTUI_INLINE void note_greatest(const Greatest& greatest, int row, int panel, F16x y) {
  float *value = greatest.value + row * 16, *at = greatest.panel + row * 16;
  const F16x most = load(value);
  store(at, where_greater(y, most, splat(static_cast<float>(panel)), load(at)));
  store(value, max(y, most));
}

// A panel's results on their way out: rows of `to`, `stride` floats apart. `row0` is the first one's place in the step.
inline void finish(const LinearArgs& args, int panel, int row0, int rows, const float* result, const float* up,
                   float* to, size_t stride) {
  const Epilogue& e = args.epilogue;
  const int at = panel * kRowsPerPanel, left = args.weight->n - at, n = left < 16 ? left : 16;
  const bool bare = n == 16 && !e.bias && e.softcap == 0.0f;  // most of the time
  if (bare && up && args.act == Act::Silu && !args.up_bias && !e.add && e.scale == 1.0f && !args.greatest.value) {
    for (int r = 0; r < rows; ++r)
      store(to + r * stride, mul(act_lanes(load(result + r * 16), Act::Silu), load(up + r * 16)));
    return;
  }
  if (bare && !up && args.act == Act::None) {
    const F16x scale = splat(e.scale);
    for (int r = 0; r < rows; ++r) {
      F16x y = mul(load(result + r * 16), scale);
      if (e.add) y = add(y, load(e.add + (row0 + r) * e.add_stride + at));
      if (!args.only_greatest) store(to + r * stride, y);
      if (args.greatest.value) note_greatest(args.greatest, row0 + r, panel, y);
    }
    return;
  }
  const F16x bias = e.bias ? load_n(e.bias + at, n) : zero();
  const F16x up_bias = args.up_bias ? load_n(args.up_bias + at, n) : zero();
  const F16x scale = splat(e.scale);
  for (int r = 0; r < rows; ++r) {
    F16x y = add(load(result + r * 16), bias);
    if (up)
      y = mul(act_lanes(y, args.act), add(load(up + r * 16), up_bias));
    else
      y = act_lanes(y, args.act);
    y = mul(y, scale);
    if (e.add) y = add(y, load_n(e.add + (row0 + r) * e.add_stride + at, n));
    y = soften(y, e.softcap);
    if (!args.only_greatest) store_n(to + r * stride, y, n);
    if (!args.greatest.value) continue;
    float lanes[16];
    for (float& lane : lanes) lane = -__builtin_inff();
    store_n(lanes, y, n);
    note_greatest(args.greatest, row0 + r, panel, load(lanes));
  }
}

inline void finish(const LinearArgs& args, int panel, int row0, int rows, const float* result, const float* up) {
  const Epilogue& e = args.epilogue;
  finish(args, panel, row0, rows, result, up, e.out + row0 * e.out_stride + panel * kRowsPerPanel, e.out_stride);
}

constexpr int kRowChunk = 48;            // rows whose results wait for the epilogue at once; a multiple of every tile
constexpr int kFirstLevel = 28 << 10;    // bytes of activations that stay beside a panel in the first-level cache
constexpr int kSecondLevel = 384 << 10;  // bytes of panels that stay in the second-level cache

MIAOTUI_INLINE void round_group(float most, F16x& a, F16x& b) {
  const F16x inverse = splat(most > 0.0f ? 127.0f / most : 0.0f);
  a = round(mul(a, inverse)), b = round(mul(b, inverse));
}

// Four groups at once share their reductions: a and b become whole floats, low and high their sums.
MIAOTUI_INLINE void round_four(F16x (&a)[4], F16x (&b)[4], float (&most)[4], float (&low)[4], float (&high)[4]) {
  reduce_max_four(max(abs(a[0]), abs(b[0])), max(abs(a[1]), abs(b[1])), max(abs(a[2]), abs(b[2])),
                  max(abs(a[3]), abs(b[3])), most);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) round_group(most[i], a[i], b[i]);
  reduce_add_four(a[0], a[1], a[2], a[3], low);
  reduce_add_four(b[0], b[1], b[2], b[3], high);
}

// Group g of N neighbouring rows from `row` on: their codes (as whole floats), whose sums are low and high.
template <int N>
MIAOTUI_INLINE void put_groups(const QuantRows& tile, int g, int m, int row, const float (&most)[N], const F16x (&a)[N],
                               const F16x (&b)[N], const float (&low)[N], const float (&high)[N]) {
  const int at = g * m + row, at16 = 2 * g * m + row;
  float scale[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    store_int8(tile.q + (at + i) * 32, to_int(a[i]));
    store_int8(tile.q + (at + i) * 32 + 16, to_int(b[i]));
    scale[i] = most[i] * (1.0f / 127.0f);
  }
  for (int i = 0; i < N; ++i) tile.scale[at + i] = scale[i];
  for (int i = 0; i < N; ++i) tile.minus32[at + i] = -8 * static_cast<int32_t>(low[i] + high[i]);
  if (tile.totals)
    for (int i = 0; i < N; ++i) tile.total32[at + i] = scale[i] * (low[i] + high[i]);
  if (!tile.halves) return;
  for (int i = 0; i < N; ++i) {
    tile.minus16[at16 + i] = -8 * static_cast<int32_t>(low[i]);
    tile.minus16[at16 + m + i] = -8 * static_cast<int32_t>(high[i]);
    tile.total16[at16 + i] = scale[i] * low[i];
    tile.total16[at16 + m + i] = scale[i] * high[i];
  }
}

MIAOTUI_INLINE void put_group(const QuantRows& tile, int g, int m, int row, float most, F16x a, F16x b, float low,
                              float high) {
  put_groups<1>(tile, g, m, row, {most}, {a}, {b}, {low}, {high});
}

// Rows of 32 values, side by side, become group `group` of as many rows.
inline void quantise_columns(const float* values, const QuantRows& to, int group) {
  for_tiles(to.rows, [&](auto size, int row) {
    constexpr int M = decltype(size)::value;
    const QuantRows tile = to.from(row, M);
    const float* x = values + row * 32;
    constexpr int kFours = M / 4 * 4;
    for (int r = 0; r < kFours; r += 4, x += 4 * 32) {
      F16x a[4], b[4];
      float most[4], low[4], high[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) a[i] = load(x + i * 32), b[i] = load(x + i * 32 + 16);
      round_four(a, b, most, low, high);
      put_groups<4>(tile, group, M, r, most, a, b, low, high);
    }
    for (int r = kFours; r < M; ++r, x += 32) {
      F16x a = load(x), b = load(x + 16);
      const float most = reduce_max(max(abs(a), abs(b)));
      round_group(most, a, b);
      put_group(tile, group, M, r, most, a, b, reduce_add(a), reduce_add(b));
    }
  });
}

// Group `group` of 64 of the row, rounded to whole floats; `sum` is theirs. The last one of a row may be a half.
MIAOTUI_INLINE void put_wide_group(const QuantRows& tile, int group, int m, int row, float most, const F16x (&x)[4],
                                   float sum) {
  const int at = 2 * group * m + row, halves = 2 * group + 2 <= tile.k_pad / 32 ? 2 : 1;
  for (int half = 0; half < halves; ++half) {
    store_int8(tile.q + (at + half * m) * 32, to_int(x[2 * half]));
    store_int8(tile.q + (at + half * m) * 32 + 16, to_int(x[2 * half + 1]));
  }
  tile.scale[at] = most * (1.0f / 127.0f);
  tile.minus32[at] = -128 * static_cast<int32_t>(sum);
}

// One group of `left` values, at most 64, its runs of 32 turned first as the weights were.
MIAOTUI_INLINE void quantise_wide_group(const float* values, int left, const QuantRows& tile, int group, int m,
                                        int row) {
  F16x x[4], most = zero(), sum = zero();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int n = left - i * 16;
    x[i] = n >= 16 ? load(values + i * 16) : n > 0 ? load_n(values + i * 16, n) : zero();
  }
  turn_pair(x[0], x[1]), turn_pair(x[2], x[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) most = max(most, abs(x[i]));
  const float greatest = reduce_max(most);
  round_group(greatest, x[0], x[1]), round_group(greatest, x[2], x[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sum = add(sum, x[i]);
  put_wide_group(tile, group, m, row, greatest, x, reduce_add(sum));
}

// Four whole groups, `apart` values from one to the next, turned too, share their reductions. put(i, most, x, sum) for
// each.
template <typename F>
MIAOTUI_INLINE void quantise_wide_four(const float* values, int apart, F&& put) {
  F16x x[4][4], greatest[4], sum[4];
  float most[4], total[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[g][i] = load(values + g * apart + i * 16);
    turn_pair(x[g][0], x[g][1]), turn_pair(x[g][2], x[g][3]);
    greatest[g] = max(max(abs(x[g][0]), abs(x[g][1])), max(abs(x[g][2]), abs(x[g][3])));
  }
  reduce_max_four(greatest[0], greatest[1], greatest[2], greatest[3], most);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    round_group(most[g], x[g][0], x[g][1]), round_group(most[g], x[g][2], x[g][3]);
    sum[g] = add(add(x[g][0], x[g][1]), add(x[g][2], x[g][3]));
  }
  reduce_add_four(sum[0], sum[1], sum[2], sum[3], total);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) put(g, most[g], x[g], total[g]);
}

// Rows of 64 places, `columns` of them filled, side by side, become group `group` of 64 of as many rows.
inline void quantise_wide_columns(const float* values, int columns, const QuantRows& to, int group) {
  for_tiles(to.rows, [&](auto size, int row) {
    constexpr int M = decltype(size)::value;
    const QuantRows tile = to.from(row, M);
    const float* x = values + row * 64;
    int r = 0;
    for (; columns == 64 && r + 4 <= M; r += 4)
      quantise_wide_four(x + r * 64, 64, [&](int i, float most, const F16x(&q)[4], float sum) {
        put_wide_group(tile, group, M, r + i, most, q, sum);
      });
    for (; r < M; ++r) quantise_wide_group(x + r * 64, columns, tile, group, M, r);
  });
}

// panels(begin, end, row, rows): in blocks of panels that the second-level cache holds, whole groups of `unit`, and
// chunks of rows that the first holds: weights come from memory once, and what a tile reads is near.
template <typename F>
MIAOTUI_INLINE void for_blocks(const LinearArgs& args, int first, int last, int unit, F&& panels) {
  const Weight& w = *args.weight;
  const int touched = w.k_pad + w.k_pad / 32 * 12;  // of a row: codes, scales, sums
  const int fitting = kFirstLevel / touched / kMaxTile * kMaxTile;
  const int chunk = fitting < kMaxTile ? kMaxTile : fitting > kRowChunk ? kRowChunk : fitting;
  const size_t bytes = (w.panel_bytes + w.panel_scale_bytes) * (args.up ? 2 : 1);
  const int most = bytes >= kSecondLevel ? 1 : static_cast<int>(kSecondLevel / bytes);
  const int blocks = (last - first + most - 1) / most;
  const int block = blocks ? ((last - first + blocks - 1) / blocks + unit - 1) / unit * unit : unit;
  for (int begin = first; begin < last; begin += block)
    for (int row = 0; row < args.rows; row += chunk)
      panels(begin, begin + block < last ? begin + block : last, row,
             args.rows - row < chunk ? args.rows - row : chunk);
}

inline void linear_int(const LinearArgs& args, int first, int last, float* result, float* up, float* pair) {
  const Weight& w = *args.weight;
  for_blocks(args, first, last, 2, [&](int begin, int end, int row, int rows) {
    const QuantRows quant = args.quant.from(row, rows);
    for (int panel = begin; panel < end; ++panel) {
      int_panel(args, w, panel, quant, rows, row == 0, result);
      if (args.up) int_panel(args, *args.up, panel, quant, rows, row == 0, up);
      if (!args.handed) {
        finish(args, panel, row, rows, result, args.up ? up : nullptr);
        continue;
      }
      finish(args, panel, row, rows, result, args.up ? up : nullptr, pair + panel % 2 * 16, 32);
      if (panel % 2) quantise_columns(pair, args.handed->from(row, rows), panel / 2);
    }
  });
}

inline void linear_wide(const LinearArgs& args, int first, int last, float* scratch) {
  const Weight& w = *args.weight;
  constexpr size_t kResult = kRowChunk * 16;
  float *result = scratch, *up = result + 2 * kResult, *four = up + 2 * kResult;
  for_blocks(args, first, last, 4, [&](int begin, int end, int row, int rows) {
    const QuantRows quant = args.quant.from(row, rows);
    for (int panel = begin; panel < end; panel += kWidePanels) {
      const int panels = end - panel < kWidePanels ? end - panel : kWidePanels;
      wide_panels(w, panel, panels, quant, rows, row == 0, args.ahead, result, kResult);
      if (args.up) wide_panels(*args.up, panel, panels, quant, rows, row == 0, args.ahead, up, kResult);
      for (int p = 0; p < panels; ++p) {
        const float *of_gate = result + p * kResult, *of_up = args.up ? up + p * kResult : nullptr;
        const int at = (panel + p) % 4, done = panel + p + 1;
        if (!args.handed) {
          finish(args, panel + p, row, rows, of_gate, of_up);
          continue;
        }
        finish(args, panel + p, row, rows, of_gate, of_up, four + at * 16, 64);
        if (at == 3 || done == w.panels)
          quantise_wide_columns(four, done % 4 == 2 ? 32 : 64, args.handed->from(row, rows), (panel + p) / 4);
      }
    }
  });
}

struct FloatPanel {
  Code code;
  const uint8_t* data;
};

// The panel as the float tiles read it; integer panels are dequantised into `scratch`.
inline FloatPanel float_form(const Weight& w, int panel, float* scratch) {
  if (!w.integer()) return {w.code, w.codes + panel * w.panel_bytes};
  dequantise_panel(w, panel, scratch);
  return {Code::F32, reinterpret_cast<const uint8_t*>(scratch)};
}

// One row and dense weights: four panels at once, so that four chains hide the latency of fma.
inline int dense_gemv(const LinearArgs& args, int first, int last) {
  const Weight& w = *args.weight;
  float out[4 * 16];
  for (; first + 4 <= last; first += 4) {
    float_tile_any<4, 1>(w.code, w.codes + first * w.panel_bytes, w.panel_bytes, w.k_pad, args.x, args.x_stride, out,
                         16);
    for (int p = 0; p < 4; ++p) finish(args, first + p, 0, 1, out + p * 16, nullptr);
  }
  return first;
}

inline void linear_float(const LinearArgs& args, int first, int last, float* result, float* up, float* scratch) {
  const Weight& w = *args.weight;
  if (args.rows == 1 && !w.integer() && !args.up) first = dense_gemv(args, first, last);
  for (int panel = first; panel < last; ++panel) {
    const FloatPanel main = float_form(w, panel, scratch);
    const FloatPanel second = args.up ? float_form(*args.up, panel, scratch + w.k_pad * 16) : FloatPanel{};
    for (int row = 0; row < args.rows; row += kRowChunk) {
      const int rows = args.rows - row < kRowChunk ? args.rows - row : kRowChunk;
      const float* x = args.x + row * args.x_stride;
      float_panel(main.code, main.data, w.k_pad, x, args.x_stride, rows, result);
      if (args.up) float_panel(second.code, second.data, w.k_pad, x, args.x_stride, rows, up);
      finish(args, panel, row, rows, result, args.up ? up : nullptr);
    }
  }
}

inline void linear(const LinearArgs& args, int first, int last, float* scratch) {
  float *result = scratch, *up = result + kRowChunk * 16;
  float* after = up + kRowChunk * 16;
  if (args.integer && args.weight->wide() && (args.weight->inputs == Inputs::By64 || args.rows > kStreamingRows))
    return linear_wide(args, first, last, scratch);
  if (args.integer) return linear_int(args, first, last, result, up, after);
  linear_float(args, first, last, result, up, after);
}

// ---- rows ------------------------------------------------------------------------------------------------------

template <typename F>
MIAOTUI_INLINE void lanes_of(int n, F&& each) {
  int i = 0;
  for (; i + 16 <= n; i += 16) each(i, 16);
  if (i < n) each(i, n - i);
}

inline void norm(const float* x, const float* weight, const float* bias, const float* added, float eps, int n,
                 bool layer, float* out) {
  float mean = 0.0f;
  if (layer) {
    F16x total = zero();
    lanes_of(n, [&](int i, int m) { total = add(total, load_n(x + i, m)); });
    mean = reduce_add(total) / static_cast<float>(n);
  }
  F16x square = zero();
  const F16x centre = splat(mean);
  lanes_of(n, [&](int i, int m) {
    F16x d = load_n(x + i, m);
    if (layer) {
      float lane[16] = {};
      store_n(lane, sub(d, centre), m);
      d = load(lane);
    }
    square = fma(d, d, square);
  });
  const F16x factor = splat(1.0f / std::sqrt(reduce_add(square) / static_cast<float>(n) + eps));
  lanes_of(n, [&](int i, int m) {
    F16x y = mul(mul(sub(load_n(x + i, m), centre), factor), load_n(weight + i, m));
    if (bias) y = add(y, load_n(bias + i, m));
    if (added) y = add(y, load_n(added + i, m));
    store_n(out + i, y, m);
  });
}

inline float most_of(const float* x, int n) {
  F16x most = zero();
  lanes_of(n, [&](int i, int m) { most = max(most, abs(load_n(x + i, m))); });
  return reduce_max(most);
}

// One group of at most 32 whose largest value is given; returns the sum of its codes.
MIAOTUI_INLINE int32_t quantise_group(const float* x, int left, float most, const QuantRows& tile, int g, int m,
                                      int row) {
  F16x a = load_n(x, left >= 16 ? 16 : left < 0 ? 0 : left);
  F16x b = left > 16 ? load_n(x + 16, left >= 32 ? 16 : left - 16) : zero();
  round_group(most, a, b);
  const float low = reduce_add(a), high = reduce_add(b);
  put_group(tile, g, m, row, most, a, b, low, high);
  return static_cast<int32_t>(low + high);
}

// The tile that row `row` lies in, whose place there it becomes.
inline QuantRows tile_of(const QuantRows& rows, int& row) {
  int begin = row / kMaxTile * kMaxTile, m = next_tile(rows.rows - begin);
  while (begin + m <= row) begin += m, m = next_tile(rows.rows - begin);
  row -= begin;
  return rows.from(begin, m);
}

// Dynamic int8, symmetric: scale = max|x| / 127, q = round-half-even(x * (127 / max|x|)), per 32 or 64 elements or by
// token.
inline void quantise(const float* x, int k, const QuantRows& to, int row, Inputs inputs) {
  const QuantRows tile = tile_of(to, row);
  const int m = tile.rows;
  const int groups = to.k_pad / 32, whole = k / 32;
  if (inputs == Inputs::By64) {
    int g = 0;
    for (; g + 4 <= k / 64; g += 4)
      quantise_wide_four(x + g * 64, 64, [&](int i, float most, const F16x(&q)[4], float sum) {
        put_wide_group(tile, g + i, m, row, most, q, sum);
      });
    for (; g * 2 < groups; ++g) quantise_wide_group(x + g * 64, k - g * 64 < 64 ? k - g * 64 : 64, tile, g, m, row);
    return;
  }
  if (inputs == Inputs::ByToken) {
    const float most = most_of(x, k);
    int32_t sum = 0;
    for (int g = 0; g < groups; ++g) sum += quantise_group(x + g * 32, k - g * 32, most, tile, g, m, row);
    tile.minus_row[row] = -128 * sum;
    return;
  }
  int g = 0;
  for (; g + 4 <= whole; g += 4) {
    F16x a[4], b[4];
    float most[4], low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[i] = load(x + (g + i) * 32), b[i] = load(x + (g + i) * 32 + 16);
    round_four(a, b, most, low, high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) put_group(tile, g + i, m, row, most[i], a[i], b[i], low[i], high[i]);
  }
  for (; g < groups; ++g) {
    const float* at = x + g * 32;
    const int left = k - g * 32;
    quantise_group(at, left, most_of(at, left < 0 ? 0 : left < 32 ? left : 32), tile, g, m, row);
  }
}

inline void activate(const float* gate, const float* up, int n, Act act, float* out) {
  lanes_of(n, [&](int i, int m) {
    F16x y = act_lanes(load_n(gate + i, m), act);
    if (up) y = mul(y, load_n(up + i, m));
    store_n(out + i, y, m);
  });
}

inline float one_scale(const uint8_t* p, ScaleType type, int lane) {
  if (type == ScaleType::F32) return reinterpret_cast<const float*>(p)[lane];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(p)[lane];
  if (type == ScaleType::F16) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline float one_dense(const Weight& w, const uint8_t* panel, int lane, int k) {
  if (w.code == Code::F32) return reinterpret_cast<const float*>(panel)[k * 16 + lane];
  const uint16_t* p = reinterpret_cast<const uint16_t*>(panel);
  if (w.code == Code::F16) return half_to_float(p[k * 16 + lane]);
  const uint32_t wide = static_cast<uint32_t>(p[(k / 2 * 16 + lane) * 2 + k % 2]) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline float one_integer(const Weight& w, int panel, int lane, int k) {
  const uint8_t* codes = w.codes + panel * w.panel_bytes;
  int code;
  if (w.code == Code::INT4) {
    const uint8_t byte = codes[(k / 8 * 16 + lane) * 4 + k % 4];
    code = k % 8 < 4 ? byte & 15 : byte >> 4;
  } else {
    code = codes[(k / 4 * 16 + lane) * 4 + k % 4];
  }
  const size_t line = panel * w.panel_scale_bytes + k / (w.fold * w.folds_per_group) * scale_line(w.scale_type);
  const float scale = one_scale(w.scales + line, w.scale_type, lane);
  if (w.has_min) return scale * static_cast<float>(code) + one_scale(w.mins + line, w.scale_type, lane);
  return scale * static_cast<float>(code - w.zero());
}

inline void dequantise_row(const Weight& w, int row, float factor, float* out) {
  const int panel = row / 16, lane = row % 16;
  if (w.integer()) {
    for (int k = 0; k < w.k; ++k) out[k] = one_integer(w, panel, lane, k) * factor;
    return;
  }
  const uint8_t* codes = w.codes + panel * w.panel_bytes;
  for (int k = 0; k < w.k; ++k) out[k] = one_dense(w, codes, lane, k) * factor;
}
