// The probes' inner loops over sixteen lanes; included like kernels_impl.h.

// Unknown to the optimiser: keeps a value alive, or hides where it came from.
template <typename T>
MIAOTUI_INLINE void keep(T& value) {
  __asm__ volatile("" : : "r"(&value) : "memory");
}

inline double probe_read(const unsigned char* data, long bytes) {
  F16x a = zero(), b = zero(), c = zero(), d = zero();
  const float* p = reinterpret_cast<const float*>(data);
  for (long i = 0; i + 64 <= bytes / 4; i += 64) {
    a = max(a, load(p + i)), b = max(b, load(p + i + 16));
    c = max(c, load(p + i + 32)), d = max(d, load(p + i + 48));
  }
  a = max(max(a, b), max(c, d));
  keep(a);
  return static_cast<double>(bytes);
}

constexpr int kChains = kMaxTile >= 12 ? 12 : 6;

#ifdef MIAOTUI_SHORT_SUMS
struct DotChain {  // as INT4 is multiplied, whose sums are of sixteen bits
  ShortSums sum;
  MIAOTUI_INLINE void begin(int i, const uint8_t* codes, const int8_t* four) {
    sum = short_dot(load_bytes(codes + i), spread(four));
  }
  MIAOTUI_INLINE void add(Bytes w, const int8_t* four) { sum = short_dot(sum, w, spread(four)); }
  MIAOTUI_INLINE I16x value() const { return iadd(isplat(0), sum); }
};
#else
struct DotChain {
  I16x sum;
  MIAOTUI_INLINE void begin(int i, const uint8_t*, const int8_t* four) { sum = isplat(four[i]); }
  MIAOTUI_INLINE void add(Bytes w, const int8_t* four) { sum = dot4(sum, w, four); }
  MIAOTUI_INLINE I16x value() const { return sum; }
};
#endif

inline double probe_dot(long rounds) {
  alignas(64) uint8_t codes[64 + kChains];
  alignas(64) int8_t four[64];
  std::memset(codes, 3, sizeof codes);
  std::memset(four, 1, sizeof four);
  keep(codes), keep(four);  // chains that begin alike would be merged into one
  const Bytes w = load_bytes(codes);
  DotChain chain[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) chain[i].begin(i, codes, four);
  for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) chain[i].add(w, four);
  F16x total = zero();  // one value to keep: taking every chain's address would put the chains into memory
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) total = add(total, to_float(chain[i].value()));
  keep(total);
  return static_cast<double>(rounds) * kChains * 64 * 2;
}

inline double probe_fma(long rounds) {
  alignas(64) float starts[kChains * 16];
  for (int i = 0; i < kChains * 16; ++i) starts[i] = static_cast<float>(i);
  keep(starts);  // chains that begin alike would be merged into one
  const F16x x = splat(starts[1]), y = splat(starts[1] * 0.5f);
  F16x sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = load(starts + i * 16);
  for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], y, x);
  F16x total = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) total = add(total, sum[i]);
  keep(total);
  return static_cast<double>(rounds) * kChains * 16 * 2;
}
