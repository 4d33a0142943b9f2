// The passes over a whole row, over sixteen lanes. Included inside a per-instruction-set namespace.

// exp for x ≤ 0; 0 below −87.6.
MIAOTUI_INLINE F16x weight_lanes(F16x x) { return exp_within(max(x, splat(-88.0f))); }

inline float largest(const float* row, int n) {
  F16x m[4] = {splat(-__builtin_inff()), splat(-__builtin_inff()), splat(-__builtin_inff()), splat(-__builtin_inff())};
  int i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) m[j] = max(m[j], load(row + i + 16 * j));
  float best = reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
  for (; i < n; ++i) best = row[i] > best ? row[i] : best;
  return best;
}

inline int greater(const float* row, int n, float than) {
  int count = 0;
  for (int i = 0; i < n; ++i) count += row[i] > than;
  return count;
}

inline void weigh(const float* row, int n, float scale, float top, float* weights, float* sums, float* peaks) {
  const F16x by = splat(scale), from = splat(top);
  int run = 0;
  for (int i = 0; i + kRun <= n; i += kRun, ++run) {
    F16x w[4];
    for (int j = 0; j < 4; ++j) {
      w[j] = weight_lanes(sub(mul(load(row + i + 16 * j), by), from));
      store(weights + i + 16 * j, w[j]);
    }
    sums[run] = reduce_add(add(add(w[0], w[1]), add(w[2], w[3])));
    peaks[run] = reduce_max(max(max(w[0], w[1]), max(w[2], w[3])));
  }
  if (n % kRun == 0) return;
  float sum = 0.0f, peak = 0.0f;
  for (int i = run * kRun; i < n; ++i) {
    float lanes[16];
    store(lanes, weight_lanes(sub(mul(splat(row[i]), by), from)));
    weights[i] = lanes[0];
    sum += lanes[0];
    peak = lanes[0] > peak ? lanes[0] : peak;
  }
  sums[run] = sum;
  peaks[run] = peak;
}

inline int above(const float* weights, const float* peaks, int n, float least, float* sums) {
  int32_t counts[16] = {};
  int run = 0, rest = 0;
  for (int i = 0; i + kRun <= n; i += kRun, ++run) {
    sums[run] = 0.0f;
    if (!(peaks[run] >= least)) continue;
    float kept[16] = {};
    for (int j = 0; j < kRun; j += 16) {
      for (int lane = 0; lane < 16; ++lane) {
        const float w = weights[i + j + lane];
        kept[lane] += w >= least ? w : 0.0f;
        counts[lane] += w >= least;
      }
    }
    sums[run] = reduce_add(load(kept));
  }
  if (n % kRun != 0) {
    sums[run] = 0.0f;
    for (int i = run * kRun; i < n; ++i) {
      sums[run] += weights[i] >= least ? weights[i] : 0.0f;
      rest += weights[i] >= least;
    }
  }
  for (int32_t count : counts) rest += count;
  return rest;
}
