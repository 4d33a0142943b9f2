#include "program_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace miaotui {
namespace {

const float* or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

}  // namespace

size_t PreparedRows::bytes(int rows, int k_pad, bool floats, bool integers) {
  const size_t n = static_cast<size_t>(rows), k = static_cast<size_t>(k_pad);
  return (floats ? round_up(n * k * sizeof(float), 64) : 0) +
         (integers ? round_up(n * QuantRows::bytes(k_pad), 64) : 0);
}

PreparedRows PreparedRows::in(uint8_t* memory, int rows, int k_pad, bool floats, bool integers, const float* x,
                              int64_t x_stride) {
  PreparedRows to{x, x_stride, {}};
  const size_t n = static_cast<size_t>(rows), k = static_cast<size_t>(k_pad);
  if (floats) {
    to.x = reinterpret_cast<float*>(memory);
    to.x_stride = static_cast<int64_t>(k);
    memory += round_up(n * k * sizeof(float), 64);
  }
  if (integers) {
    const size_t groups = n * (k / 32);
    float* f = reinterpret_cast<float*>(memory + n * k);
    int32_t* i = reinterpret_cast<int32_t*>(f + 4 * groups);
    to.quant = {
        reinterpret_cast<int8_t*>(memory), f, i, f + groups, i + groups, f + 2 * groups, i + 3 * groups, k_pad, rows};
  }
  return to;
}

void EmbedOp::run(const Context& c, int, int thread) const {
  int first, last;
  share_of(c.step.tokens, thread, c.threads, first, last);
  for (int t = first; t < last; ++t)
    c.kernels->dequantise_row(*table, c.step.token_ids[t], scale, out.data + t * out.stride);
}

void AnglesOp::run(const Context& c, int, int thread) const {
  RopeAnglesArgs args;
  args.step = &c.step;
  args.inv_freq = inv_freq.data();
  args.half = static_cast<int32_t>(inv_freq.size());
  args.factor = factor;
  args.cos = cos.data;
  args.sin = sin.data;
  c.attention->rope_angles(args, thread, c.threads);
}

void NormOp::run(const Context& c, int, int thread) const {
  int first, last;
  share_of(of_logits ? c.step.rows : c.step.tokens, thread, c.threads, first, last);
  for (int t = first; t < last; ++t)
    c.kernels->norm(in.data + t * in.stride, norm.weight.data(), or_null(norm.bias),
                    add.data ? add.data + t * add.stride : nullptr, norm.eps, static_cast<int>(in.width), norm.layer,
                    out.data + t * out.stride);
}

void SelectOp::run(const Context& c, int, int thread) const {
  int first, last;
  share_of(c.step.rows, thread, c.threads, first, last);
  for (int r = first; r < last; ++r)
    std::memcpy(out.data + r * out.stride, in.data + c.step.logits_rows[r] * in.stride,
                sizeof(float) * static_cast<size_t>(in.width));
}

void ActivateOp::run(const Context& c, int, int thread) const {
  int first, last;
  share_of(of_logits ? c.step.rows : c.step.tokens, thread, c.threads, first, last);
  for (int t = first; t < last; ++t) {
    const float* row = in.data + t * in.stride;
    c.kernels->activate(row, gated ? row + out.width : nullptr, static_cast<int>(out.width), act,
                        out.data + t * out.stride);
  }
}

// ---- linear ----------------------------------------------------------------------------------------------------

bool LinearOp::any_integer() const {
  return quantised && std::any_of(parts.begin(), parts.end(), [](const Part& p) { return p.weight->integer(); });
}

bool LinearOp::any_float() const {
  return !quantised || std::any_of(parts.begin(), parts.end(), [](const Part& p) { return !p.weight->integer(); });
}

bool LinearOp::float_rows() const { return any_float() && (norm || !perm.empty() || k_pad() != in.width); }

size_t LinearOp::prepared_bytes(int rows) const {
  return PreparedRows::bytes(rows, k_pad(), float_rows(), any_integer());
}

PreparedRows LinearOp::prepared_in(uint8_t* memory, int rows) const {
  PreparedRows to = PreparedRows::in(memory, rows, k_pad(), float_rows(), any_integer(), in.data, in.stride);
  leave_out(to.quant);
  return to;
}

PreparedRows LinearOp::handed_in(uint8_t* memory, int rows) const {
  PreparedRows to = PreparedRows::in(memory, rows, k_pad(), false, true, nullptr, 0);
  leave_out(to.quant);
  return to;
}

void LinearOp::leave_out(QuantRows& rows) const {
  rows.totals = std::any_of(parts.begin(), parts.end(), [](const Part& p) { return p.weight->has_min; });
  rows.halves = std::any_of(parts.begin(), parts.end(), [](const Part& p) { return p.weight->fold == 16; });
}

size_t LinearOp::workspace_bytes(const Limits& limits) const {
  return prepared_bytes(of_logits ? limits.max_rows : limits.max_tokens);
}

// A thread's scratch: two float rows, the rows it prepares for itself, and what the kernel asks for.
size_t LinearOp::scratch_bytes() const {
  return 2 * static_cast<size_t>(k_pad()) * sizeof(float) + prepared_bytes(kPreparedByEach) +
         linear_scratch_bytes(k_pad()) + 64;
}

// Rows first..last of the input: normed, permuted, padded and quantised, whichever are called for.
void LinearOp::prepare(const Context& c, const PreparedRows& to, int first, int last, float* rows) const {
  const int k = static_cast<int>(in.width), padded = k_pad();
  float *normed = rows, *permuted = rows + padded;
  for (int t = first; t < last; ++t) {
    const float* x = in.data + t * in.stride;
    if (norm) {
      c.kernels->norm(x, norm->weight.data(), or_null(norm->bias), nullptr, norm->eps, k, norm->layer, normed);
      x = normed;
    }
    if (!perm.empty()) {
      for (int j = 0; j < k; ++j) permuted[j] = x[perm[static_cast<size_t>(j)]];
      x = permuted;
    }
    if (float_rows()) {
      float* kept = const_cast<float*>(to.x) + t * to.x_stride;
      std::memcpy(kept, x, sizeof(float) * static_cast<size_t>(k));
      std::fill(kept + k, kept + padded, 0.0f);
    }
    if (any_integer()) c.kernels->quantise(x, k, to.quant, t, weight_of(c, parts[0]).inputs);
  }
}

size_t LinearOp::handed_bytes(const Limits& limits) const {
  if (hands_on && !next) throw std::invalid_argument("no op takes what is handed on");
  const int most = of_logits ? limits.max_rows : limits.max_tokens;
  return hands_on ? PreparedRows::bytes(most, static_cast<int>(out.width), false, true) : 0;
}

// The same memory goes to the same thread at every step. Panels whose results are handed on go by whole groups of
// columns: 32, or 64 where the next linear's weights are recoded.
void LinearOp::share(const Context& c, int thread, int& first, int& last) const {
  int total = 0;
  for (const Part& part : parts) total += part.weight->panels;
  if (gated) total = parts[0].weight->panels;
  const int unit = !hands_on ? 1 : wide(c) ? 4 : 2;
  share_of((total + unit - 1) / unit, thread, c.threads, first, last);
  first *= unit, last = std::min(last * unit, total);
}

LinearArgs LinearOp::arguments(const Context& c, const PreparedRows& from, int thread) const {
  LinearArgs args;
  args.rows = rows(c);
  args.x = from.x;
  args.x_stride = static_cast<size_t>(from.x_stride);
  args.quant = from.quant;
  args.ahead = c.ahead + thread;
  if (greatest) args.greatest = c.greatest_of(thread);
  return args;
}

void LinearOp::multiply(const Context& c, const PreparedRows& from, int thread, float* scratch) const {
  LinearArgs args = arguments(c, from, thread);
  QuantRows handed_on;
  if (hands_on) handed_on = next->handed_in(c.handed, args.rows).quant, args.handed = &handed_on;
  args.only_greatest = greatest && c.step.greedy;
  if (greatest) std::fill_n(args.greatest.value, args.rows * 16, -std::numeric_limits<float>::infinity());
  int first, last;
  share(c, thread, first, last);
  multiply(c, args, first, last, scratch);
}

template <typename F>
void LinearOp::for_parts(int first, int last, F&& f) const {
  int begin = 0;
  for (size_t i = 0; i < (gated ? 1 : parts.size()); ++i) {
    const int panels = parts[i].weight->panels;
    const int from = std::max(first - begin, 0), to = std::min(last - begin, panels);
    begin += panels;
    if (from < to) f(parts[i], from, to);
  }
}

// Panels [first, last) of all parts, counted through.
void LinearOp::multiply(const Context& c, LinearArgs& args, int first, int last, float* scratch) const {
  for_parts(first, last, [&](const Part& part, int from_panel, int to_panel) {
    args.weight = &weight_of(c, part);
    args.integer = quantised && part.weight->integer();
    args.act = act;
    if (gated) {
      args.up = &weight_of(c, parts[1]);
      args.up_bias = or_null(parts[1].bias);
    }
    args.epilogue.bias = or_null(part.bias);
    args.epilogue.add = add.data ? add.data + part.column : nullptr;
    args.epilogue.add_stride = static_cast<size_t>(add.stride);
    args.epilogue.scale = scale;
    args.epilogue.softcap = softcap;
    args.epilogue.out = out.data + part.column;
    args.epilogue.out_stride = static_cast<size_t>(out.stride);
    c.kernels->linear(args, from_panel, to_panel, scratch);
  });
}

void LinearOp::reads(const Context& c, int thread, const Read& read) const {
  int first, last;
  share(c, thread, first, last);
  for_parts(first, last, [&](const Part& part, int from_panel, int to_panel) {
    read(weight_of(c, part), from_panel, to_panel);
    if (gated) read(weight_of(c, parts[1]), from_panel, to_panel);
  });
}

bool ask_for(const Weight& w, int first, int last, size_t from, size_t to) {
  if (first >= last) return false;
  const size_t bytes = static_cast<size_t>(last - first) * w.panel_bytes, end = std::min(to, bytes);
  const uint8_t* codes = w.codes + static_cast<size_t>(first) * w.panel_bytes;
  for (size_t i = from; i < end; i += 64) __builtin_prefetch(codes + i, 0, 2);
  const size_t scales = static_cast<size_t>(first) * w.panel_scale_bytes;
  for (size_t i = from * w.panel_scale_bytes / w.panel_bytes / 64 * 64; i < end * w.panel_scale_bytes / w.panel_bytes;
       i += 64) {
    __builtin_prefetch(w.scales + scales + i, 0, 2);
    if (w.has_min) __builtin_prefetch(w.mins + scales + i, 0, 2);
  }
  return from < bytes;
}

bool LinearOp::prefetch(const Context& c, int thread, size_t from, size_t to) const {
  if (c.step.tokens > kPreparedByEach) return false;
  int first, last;
  share(c, thread, first, last);
  bool any = false;
  for_parts(first, last, [&](const Part& part, int from_panel, int to_panel) {
    if (gated) {  // of the gate's, and as much of the up's
      for (const Part& each : parts) any |= ask_for(*each.weight, from_panel, to_panel, from / 2, to / 2);
      return;
    }
    const size_t bytes = static_cast<size_t>(to_panel - from_panel) * part.weight->panel_bytes;
    if (to > 0) any |= ask_for(*part.weight, from_panel, to_panel, from, to);
    from = from > bytes ? from - bytes : 0, to = to > bytes ? to - bytes : 0;
  });
  return any;
}

void LinearOp::run(const Context& c, int phase, int thread) const {
  const int count = rows(c);
  uint8_t* scratch = c.scratch[static_cast<size_t>(thread)];
  float* row = reinterpret_cast<float*>(scratch);
  uint8_t* own = scratch + round_up(2 * static_cast<size_t>(k_pad()) * sizeof(float), 64);
  float* kernel_scratch = reinterpret_cast<float*>(own + prepared_bytes(kPreparedByEach));
  if (handed) return multiply(c, handed_in(c.handed, count), thread, kernel_scratch);
  if (!prepares(c)) return multiply(c, prepared_in(nullptr, 0), thread, kernel_scratch);
  if (count <= kPreparedByEach) {
    const PreparedRows mine = prepared_in(own, count);
    prepare(c, mine, 0, count, row);
    return multiply(c, mine, thread, kernel_scratch);
  }
  const PreparedRows shared = prepared_in(c.workspace, count);
  if (phase == 0) {
    int first, last;
    share_of(count, thread, c.threads, first, last);
    return prepare(c, shared, first, last, row);
  }
  multiply(c, shared, thread, kernel_scratch);
}

// ---- experts ---------------------------------------------------------------------------------------------------

// Entry i is one (token, rank) pair; entries of one expert are neighbours, tokens ascending within it.
struct ExpertsOp::Work {
  int32_t* chosen;       // [tokens][top_k] experts, ascending
  float* probability;    // [tokens][top_k]
  int32_t* first_entry;  // [experts + 1]
  int32_t* token_of;     // [entries]
  int32_t* entry_of;     // [tokens][top_k]
  PreparedRows input, hidden_rows;
  Buffer hidden, result;
};

size_t ExpertsOp::lay_out(Work& w, uint8_t* memory, int tokens) const {
  uint8_t* const begin = memory;
  const size_t entries = static_cast<size_t>(tokens) * static_cast<size_t>(top_k);
  auto take = [&memory](size_t bytes) {
    uint8_t* at = memory;
    memory += round_up(bytes, 64);
    return at;
  };
  w.chosen = reinterpret_cast<int32_t*>(take(entries * 4));
  w.probability = reinterpret_cast<float*>(take(entries * 4));
  w.token_of = reinterpret_cast<int32_t*>(take(entries * 4));
  w.entry_of = reinterpret_cast<int32_t*>(take(entries * 4));
  w.first_entry = reinterpret_cast<int32_t*>(take((gate.size() + 1) * 4));
  const int count = static_cast<int>(entries), k = gate[0]->k_pad, width = gate[0]->n, wide = down[0]->k_pad;
  w.input = PreparedRows::in(take(PreparedRows::bytes(count, k, true, true)), count, k, true, true, nullptr, 0);
  w.hidden = {reinterpret_cast<float*>(take(entries * static_cast<size_t>(width) * 4)), width, width};
  w.hidden_rows =
      PreparedRows::in(take(PreparedRows::bytes(count, wide, true, true)), count, wide, true, true, nullptr, 0);
  w.result = {reinterpret_cast<float*>(take(entries * static_cast<size_t>(out.width) * 4)), out.width, out.width};
  return static_cast<size_t>(memory - begin);
}

size_t ExpertsOp::workspace_bytes(const Limits& limits) const {
  Work work;
  return lay_out(work, nullptr, limits.max_tokens);
}

size_t ExpertsOp::scratch_bytes() const {
  return linear_scratch_bytes(std::max(gate[0]->k_pad, down[0]->k_pad)) + gate.size() * 8 + 64;
}

// Softmax over all experts in float32, then the top_k greatest; the lower index wins a tie.
void ExpertsOp::route(const Context& c, const Work& w, int thread) const {
  int first, last;
  share_of(c.step.tokens, thread, c.threads, first, last);
  float* p = reinterpret_cast<float*>(c.scratch[static_cast<size_t>(thread)]);
  for (int t = first; t < last; ++t) {
    const float* row = router.data + t * router.stride;
    const float most = *std::max_element(row, row + experts());
    float total = 0.0f;
    for (int e = 0; e < experts(); ++e) total += p[e] = std::exp(row[e] - most);
    int32_t* chosen = w.chosen + t * top_k;
    float* probability = w.probability + t * top_k;
    float sum = 0.0f;
    for (int r = 0; r < top_k; ++r) {
      const int32_t best = static_cast<int32_t>(std::max_element(p, p + experts()) - p);
      const float value = p[best] / total;
      p[best] = -1.0f;  // taken
      sum += value;
      int at = r;  // kept in ascending order of expert
      for (; at > 0 && chosen[at - 1] > best; --at) chosen[at] = chosen[at - 1], probability[at] = probability[at - 1];
      chosen[at] = best, probability[at] = value;
    }
    for (int r = 0; normalise && r < top_k; ++r) probability[r] /= sum;
  }
}

void ExpertsOp::sort(const Context& c, const Work& w) const {
  const int entries = c.step.tokens * top_k;
  std::fill(w.first_entry, w.first_entry + experts() + 1, 0);
  for (int i = 0; i < entries; ++i) ++w.first_entry[w.chosen[i] + 1];
  for (int e = 0; e < experts(); ++e) w.first_entry[e + 1] += w.first_entry[e];
  int32_t* next = reinterpret_cast<int32_t*>(c.scratch[0]);
  std::copy(w.first_entry, w.first_entry + experts(), next);
  for (int i = 0; i < entries; ++i) {
    const int entry = next[w.chosen[i]]++;
    w.token_of[entry] = i / top_k;
    w.entry_of[i] = entry;
  }
}

void ExpertsOp::prepare(const Context& c, const Work& w, const PreparedRows& to, const Buffer& from, bool gathered,
                        int thread) const {
  int first, last;
  share_of(c.step.tokens * top_k, thread, c.threads, first, last);
  const int k = static_cast<int>(from.width);
  for (int e = 0; e < experts(); ++e) {
    const int begin = w.first_entry[e], count = w.first_entry[e + 1] - begin;
    const QuantRows quant = to.quant.from(begin, count);
    for (int i = std::max(first, begin); i < std::min(last, begin + count); ++i) {
      const float* row = from.data + (gathered ? w.token_of[i] : i) * from.stride;
      float* kept = const_cast<float*>(to.x) + i * to.x_stride;
      std::memcpy(kept, row, sizeof(float) * static_cast<size_t>(k));
      std::fill(kept + k, kept + to.x_stride, 0.0f);
      c.kernels->quantise(row, k, quant, i - begin, (gathered ? gate : down)[0]->inputs);
    }
  }
}

// All experts' panels counted through, so that threads share the work whichever experts were chosen.
void ExpertsOp::multiply(const Context& c, const Work& w, bool second, int thread) const {
  const PreparedRows& rows = second ? w.hidden_rows : w.input;
  const Buffer& to = second ? w.result : w.hidden;
  const std::vector<const Weight*>& weights = second ? down : gate;
  const int panels = weights[0]->panels;
  int active = 0, first, last, begin = 0;
  for (int e = 0; e < experts(); ++e) active += w.first_entry[e + 1] > w.first_entry[e];
  share_of(active * panels, thread, c.threads, first, last);
  for (int e = 0; e < experts(); ++e) {
    const int entry = w.first_entry[e], count = w.first_entry[e + 1] - entry;
    if (count == 0) continue;
    const int from_panel = std::max(first - begin, 0), to_panel = std::min(last - begin, panels);
    begin += panels;
    if (from_panel >= to_panel) continue;
    LinearArgs args;
    args.weight = weights[static_cast<size_t>(e)];
    if (!second) args.up = up[static_cast<size_t>(e)], args.act = act;
    args.rows = count;
    args.integer = quantised && args.weight->integer();
    args.x = rows.x + entry * rows.x_stride;
    args.x_stride = static_cast<size_t>(rows.x_stride);
    args.quant = rows.quant.from(entry, count);
    args.epilogue.out = to.data + entry * to.stride;
    args.epilogue.out_stride = static_cast<size_t>(to.stride);
    c.kernels->linear(args, from_panel, to_panel, reinterpret_cast<float*>(c.scratch[static_cast<size_t>(thread)]));
  }
}

void ExpertsOp::combine(const Context& c, const Work& w, int thread) const {
  int first, last;
  share_of(c.step.tokens, thread, c.threads, first, last);
  for (int t = first; t < last; ++t) {
    float* to = out.data + t * out.stride;
    const float* added = add.data ? add.data + t * add.stride : nullptr;
    for (int64_t j = 0; j < out.width; ++j) {
      float sum = 0.0f;
      for (int r = 0; r < top_k; ++r) {
        const int i = t * top_k + r;
        sum += w.probability[i] * w.result.data[w.entry_of[i] * w.result.stride + j];
      }
      to[j] = added ? added[j] + sum : sum;
    }
  }
}

void ExpertsOp::run(const Context& c, int phase, int thread) const {
  Work w;
  lay_out(w, c.workspace, c.step.tokens);
  switch (phase) {
    case 0: return route(c, w, thread);
    case 1: return thread == 0 ? sort(c, w) : void();
    case 2: return prepare(c, w, w.input, x, true, thread);
    case 3: return multiply(c, w, false, thread);
    case 4: return prepare(c, w, w.hidden_rows, w.hidden, false, thread);
    case 5: return multiply(c, w, true, thread);
    default: return combine(c, w, thread);
  }
}

// ---- attention -------------------------------------------------------------------------------------------------

void RopeCacheOp::run(const Context& c, int, int thread) const {
  RopeCacheArgs now = args;
  now.step = &c.step;
  now.q_norm = or_null(q_norm);
  now.k_norm = or_null(k_norm);
  c.attention->rope_and_cache(now, thread, c.threads);
}

int AttentionOp::phases(const Context& c) const {
  AttentionArgs now = args;
  now.step = &c.step;
  return attention_needs_merge(now, c.threads) ? 2 : 1;
}

void AttentionOp::run(const Context& c, int phase, int thread) const {
  AttentionArgs now = args;
  now.step = &c.step;
  now.scratch = c.attention_scratch;
  if (phase == 0)
    c.attention->attention(now, thread, c.threads);
  else
    c.attention->attention_merge(now, thread, c.threads);
}

size_t AttentionOp::attention_bytes(const Limits& limits, int threads) const {
  return attention_scratch_bytes(args.heads, args.kv_heads, args.head_dim, limits.max_model_len, threads);
}

}  // namespace miaotui
