#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace miaotui {
namespace {

struct Candidate {
  float weight;
  int id;
};

// Kept are the weights above `weight`, and of those equal to it the ids up to `id`; `splits`: others are equal to it.
struct Cut {
  float weight;
  int id;
  bool splits = false;
};

struct Held {
  int count;
  double mass;
};

// Thresholds that are tried in turn, from a few of the likeliest to everything.
constexpr float kLooks[] = {0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-18f, 0x1p-30f, 0.0f};
constexpr float kAboveAll = 2.0f;
constexpr int kFew = 256;  // candidates that are sorted rather than halved again

float halfway(float low, float high) {  // between their bits: weights are not negative
  uint32_t a, b;
  std::memcpy(&a, &low, 4);
  std::memcpy(&b, &high, 4);
  a += (b - a) / 2;
  std::memcpy(&low, &a, 4);
  return low;
}

// A row's weights and, of each run of them, the sum and the largest. Each thread keeps its own, so that nothing is
// allocated for a draw.
class Weights {
 public:
  // Of row · scale. `total` is their sum.
  void weigh(const SamplingKernels& kernels, const float* row, int n, float scale) {
    kernels_ = &kernels;
    n_ = n;
    const size_t runs = static_cast<size_t>((n + kRun - 1) / kRun);
    if (weights_.size() < static_cast<size_t>(n)) {
      weights_.resize(static_cast<size_t>(n));
      candidates_.resize(static_cast<size_t>(n) + 1);
    }
    sums_.resize(runs), peaks_.resize(runs);
    kernels.weigh(row, n, scale, kernels.largest(row, n) * scale, weights_.data(), sums_.data(), peaks_.data());
    total = summed();
  }

  // How many weigh at least `least`, and how much together. Their sums remain for draw().
  Held above(float least) {
    const int count = kernels_->above(weights_.data(), peaks_.data(), n_, least, sums_.data());
    return {count, summed()};
  }

  // Those that weigh at least `low` and less than `high`, in order of ids. Each is written and then counted or not,
  // without a branch: hence the one place more than there are tokens.
  int collect(float low, float high) {
    int count = 0;
    for (size_t run = 0; run < peaks_.size(); ++run) {
      if (!(peaks_[run] >= low)) continue;
      for (int i = first_of(run), end = end_of(run); i < end; ++i) {
        const float w = weights_[static_cast<size_t>(i)];
        candidates_[static_cast<size_t>(count)] = {w, i};
        count += static_cast<int>(w >= low) & static_cast<int>(w < high);
      }
    }
    return count;
  }
  Candidate* candidates() { return candidates_.data(); }

  // The candidates among which the likeliest tokens first satisfy enough(count, mass): those above them are `before`.
  template <typename Enough>
  int bracket(const Enough& enough, Held& before) {
    float low = 0.0f, high = kAboveAll;
    Held inside{0, 0.0};
    before = inside;
    for (float look : kLooks) {
      low = look;
      inside = above(low);
      if (enough(inside.count, inside.mass)) break;
      high = low;
      before = inside;
    }
    while (inside.count - before.count > kFew) {
      const float middle = halfway(low, high);
      if (middle == low) break;
      const Held half = above(middle);
      if (enough(half.count, half.mass))
        low = middle, inside = half;
      else
        high = middle, before = half;
    }
    return collect(low, high);
  }

  // The first token, in order of ids, at which the sum of what `cut` keeps exceeds uniform of the whole.
  int draw(const Cut& cut, double uniform) {
    const bool all = cut.weight <= 0.0f;
    if (!all) keep(cut);
    const double wanted = uniform * (all ? total : summed());
    double height = 0.0, below = 0.0;
    size_t run = 0;  // in which it is exceeded; should rounding let none exceed it, the last that holds anything
    for (size_t r = 0; r < sums_.size() && !(height > wanted); ++r) {
      if (sums_[r] == 0.0f) continue;
      run = r, below = height;
      height += sums_[r];
    }
    int last = first_of(run);
    for (int i = last, end = end_of(run); i < end; ++i) {
      const float w = weights_[static_cast<size_t>(i)];
      if (w == 0.0f || w < cut.weight || (w == cut.weight && i > cut.id)) continue;
      below += w;
      last = i;
      if (below > wanted) return i;
    }
    return last;
  }

  double total = 0.0;

 private:
  int first_of(size_t run) const { return static_cast<int>(run) * kRun; }
  int end_of(size_t run) const { return std::min(n_, first_of(run) + kRun); }

  double summed() const {
    double sum = 0.0;
    for (float s : sums_) sum += s;
    return sum;
  }

  // The sums of what `cut` keeps.
  void keep(const Cut& cut) {
    above(cut.weight);
    if (!cut.splits) return;
    for (int i = cut.id + 1; i < n_; ++i)
      if (weights_[static_cast<size_t>(i)] == cut.weight) sums_[static_cast<size_t>(i / kRun)] -= cut.weight;
  }

  const SamplingKernels* kernels_ = nullptr;
  int n_ = 0;
  std::vector<float> weights_, sums_, peaks_;
  std::vector<Candidate> candidates_;
};

// The weight of the k-th likeliest token.
float weight_of_rank(Weights& weights, int k) {
  Held before;
  const int count = weights.bracket([k](int held, double) { return held >= k; }, before);
  Candidate* all = weights.candidates();
  std::nth_element(all, all + (k - before.count - 1), all + count,
                   [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; });
  return all[k - before.count - 1].weight;
}

// What keeps the fewest of the likeliest tokens that hold `wanted`; of equals those with the smaller ids.
Cut nucleus(Weights& weights, double wanted) {
  Held before;
  const int count = weights.bracket([wanted](int, double mass) { return mass >= wanted; }, before);
  Candidate* all = weights.candidates();
  std::sort(all, all + count, [](const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
  });
  for (int i = 0; i < count; ++i) {
    before.mass += all[i].weight;
    if (before.mass >= wanted || i == count - 1)
      return {all[i].weight, all[i].id, i + 1 < count && all[i + 1].weight == all[i].weight};
  }
  return {0.0f, 0};  // there are no weights: the logits are not numbers
}

Weights& scratch() {
  thread_local Weights weights;
  return weights;
}

}  // namespace

int likeliest(const SamplingKernels& kernels, const float* row, int n) {
  constexpr int kStretch = 1024;
  float best = -std::numeric_limits<float>::infinity();
  int begin = 0;
  for (int i = 0; i < n; i += kStretch) {
    const float most = kernels.largest(row + i, std::min(kStretch, n - i));
    if (most > best) best = most, begin = i;
  }
  for (int i = begin; i < std::min(n, begin + kStretch); ++i)
    if (row[i] == best) return i;
  return begin;  // nothing is greater than -inf
}

int draw(const SamplingKernels& kernels, const float* row, int n, const Control& control) {
  Weights& weights = scratch();
  weights.weigh(kernels, row, n, control.inverse_temperature);
  Cut cut{control.min_p, n};
  double held = weights.total;
  if (control.top_k > 0 && control.top_k < n) cut.weight = std::max(cut.weight, weight_of_rank(weights, control.top_k));
  if (control.top_p < 1.0) {
    if (cut.weight > 0.0f) held = weights.above(cut.weight).mass;
    cut = nucleus(weights, control.top_p * held);
  }
  return weights.draw(cut, control.uniform);
}

void score(const SamplingKernels& kernels, const float* row, int n, int token, int top, double* logprob, int32_t* rank,
           int32_t* ids, double* logprobs) {
  Weights& weights = scratch();
  weights.weigh(kernels, row, n, 1.0f);
  const double norm = static_cast<double>(kernels.largest(row, n)) + std::log(weights.total);
  *logprob = row[token] - norm;
  *rank = kernels.greater(row, n, row[token]) + 1;
  if (top < 1) return;
  const float least = top < n ? weight_of_rank(weights, top) : 0.0f;
  const int count = weights.collect(least, kAboveAll);
  Candidate* all = weights.candidates();
  std::partial_sort(all, all + std::min(top, count), all + count, [row](const Candidate& a, const Candidate& b) {
    return row[a.id] > row[b.id] || (row[a.id] == row[b.id] && a.id < b.id);
  });
  for (int i = 0; i < top; ++i) {
    ids[i] = i < count ? all[i].id : 0;
    logprobs[i] = row[ids[i]] - norm;
  }
}

}  // namespace miaotui
