// Rotary embedding, q/k norm and writing into the cache. Included after attention_impl.h, in the same namespace.
//
// Each element is computed by itself from its own token, so that results do not depend on the batch.

// cos and sin of a float32 angle in double: reduction by pi/2, Taylor series to r^13 and r^14 (error below 1e-12).
MIAOTUI_INLINE void cos_sin(double angle, double& c, double& s) {
  const double turns = angle * 0.63661977236758134308, magic = 6755399441055744.0;  // rounds to an integer
  const double n = (turns + magic) - magic;
  const double r = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  const double z = r * r;
  double ps = 1.6059043836821613e-10, pc = -1.1470745597729725e-11;
  ps = ps * z - 2.5052108385441720e-08;
  ps = ps * z + 2.7557319223985893e-06;
  ps = ps * z - 1.9841269841269841e-04;
  ps = ps * z + 8.3333333333333333e-03;
  ps = ps * z - 1.6666666666666667e-01;
  ps = ps * z * r + r;
  pc = pc * z + 2.0876756987868099e-09;
  pc = pc * z - 2.7557319223985888e-07;
  pc = pc * z + 2.4801587301587302e-05;
  pc = pc * z - 1.3888888888888889e-03;
  pc = pc * z + 4.1666666666666667e-02;
  pc = pc * z - 0.5;
  pc = pc * z + 1.0;
  const int64_t quarter = static_cast<int64_t>(n) & 3;
  const double a = quarter & 1 ? ps : pc, b = quarter & 1 ? pc : ps;
  c = quarter == 1 || quarter == 2 ? -a : a;
  s = quarter >= 2 ? -b : b;
}

inline void rope_angles(const RopeAnglesArgs& args, int thread, int threads) {
  const int64_t tokens = args.step->tokens;
  for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t) {
    const float position = static_cast<float>(args.step->positions[t]);
    for (int i = 0; i < args.half; ++i) {
      double c, s;
      cos_sin(static_cast<double>(position * args.inv_freq[i]), c, s);
      args.cos[t * args.half + i] = static_cast<float>(c) * args.factor;
      args.sin[t * args.half + i] = static_cast<float>(s) * args.factor;
    }
  }
}

inline __attribute__((noinline)) void turn(float* x, const float* __restrict cos, const float* __restrict sin, int half,
                                           bool interleaved) {
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  float* __restrict low = x;
  float* __restrict high = x + half;
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const F16x a = load(low + i), b = load(high + i), c = load(cos + i), s = load(sin + i);
    store(low + i, sub(mul(a, c), mul(b, s)));
    store(high + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i] + a * sin[i];
  }
}

// x = x / sqrt(mean(x²) + eps) · weight, in place.
inline __attribute__((noinline)) void rms_norm(float* x, const float* weight, int n, float eps) {
  F16x squares = zero();
  for (int i = 0; i < n; i += 16) {
    const F16x v = load_n(x + i, least(16, n - i));
    squares = fma(v, v, squares);
  }
  const F16x factor = splat(1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(n) + eps));
  for (int i = 0; i < n; i += 16) {
    const int m = least(16, n - i);
    store_n(x + i, mul(mul(load_n(x + i, m), factor), load_n(weight + i, m)), m);
  }
}

// Heads [first, end) of q or k in one row: norm, then turn.
inline void norm_and_turn(const RopeCacheArgs& args, float* x, int heads, int64_t token, const float* weight, int width,
                          float eps) {
  if (weight && width != args.head_dim) rms_norm(x, weight, width, eps);
  for (int h = 0; h < heads; ++h) {
    float* head = x + h * args.head_dim;
    if (weight && width == args.head_dim) rms_norm(head, weight, width, eps);
    if (args.cos) turn(head, args.cos + token * args.half, args.sin + token * args.half, args.half, args.interleaved);
  }
}

// The K tile into which a token's kv head goes; its V tile follows.
template <typename T>
uint8_t* tiles_of(const RopeCacheArgs& args, int64_t token, int kv_head, int dp) {
  const StepView& step = *args.step;
  const int64_t row = static_cast<int64_t>(step.seq_of_token[token]) * step.table_stride;
  const size_t block = static_cast<size_t>(step.block_table[row + step.positions[token] / kBlockSize]);
  return args.cache.base + block * args.cache.block_stride + static_cast<size_t>(kv_head) * 2 * T::tile_bytes(dp);
}

template <typename T>
void write_cache(const RopeCacheArgs& args, int64_t token, int kv_head, const float* k, const float* v) {
  const int dp = (args.head_dim + 15) / 16 * 16, offset = args.step->positions[token] % kBlockSize;
  uint8_t* keys = tiles_of<T>(args, token, kv_head, dp);
  T::put(keys, keys + T::tile_bytes(dp), k, v, offset, args.head_dim, dp);
}

constexpr int kTokensAhead = 2;

// A token that continues another sequence than the one before it writes into a block that no one has touched for a
// step, every position in a line of its own: the tiles are asked for early. Attention reads them next.
template <typename T>
void prefetch_cache(const RopeCacheArgs& args, int64_t token, int first, int count) {
  const StepView& step = *args.step;
  if (token >= step.tokens || step.seq_of_token[token] == step.seq_of_token[token - 1]) return;
  const int dp = (args.head_dim + 15) / 16 * 16;
  const uint8_t* tiles = tiles_of<T>(args, token, first, dp);
  for (size_t i = 0; i < static_cast<size_t>(count) * 2 * T::tile_bytes(dp); i += 64)
    __builtin_prefetch(tiles + i, 1, 2);
}

// A unit of work is a kv head of a token with its group of q heads, or the whole token if a norm spans all heads.
template <typename T>
void rope_units(const RopeCacheArgs& args, int thread, int threads) {
  const bool wide =
      (args.q_norm && args.q_norm_width != args.head_dim) || (args.k_norm && args.k_norm_width != args.head_dim);
  const int parts = wide ? 1 : args.kv_heads, kv = args.kv_heads / parts, q = args.heads / parts, dim = args.head_dim;
  const int64_t units = static_cast<int64_t>(args.step->tokens) * parts;
  for (int64_t u = units * thread / threads; u < units * (thread + 1) / threads; ++u) {
    const int64_t token = u / parts;
    const int part = static_cast<int>(u % parts);
    float* row = args.qkv + token * args.stride;
    float* k = row + (args.heads + part * kv) * dim;
    const float* v = k + args.kv_heads * dim;
    prefetch_cache<T>(args, token + kTokensAhead, part * kv, kv);
    norm_and_turn(args, row + part * q * dim, q, token, args.q_norm, args.q_norm_width, args.q_eps);
    norm_and_turn(args, k, kv, token, args.k_norm, args.k_norm_width, args.k_eps);
    for (int h = 0; h < kv; ++h) write_cache<T>(args, token, part * kv + h, k + h * dim, v + h * dim);
  }
}

inline void rope_and_cache(const RopeCacheArgs& args, int thread, int threads) {
  switch (args.cache.type) {
    case CacheType::fp32: return rope_units<Fp32>(args, thread, threads);
    case CacheType::bf16: return rope_units<Bf16>(args, thread, threads);
    case CacheType::int8: return rope_units<Int8>(args, thread, threads);
  }
}

inline void attention(const AttentionArgs& args, int thread, int threads) {
  switch (args.cache.type) {
    case CacheType::fp32: return attend<Fp32>(args, thread, threads);
    case CacheType::bf16: return attend<Bf16>(args, thread, threads);
    case CacheType::int8: return attend<Int8>(args, thread, threads);
  }
}
