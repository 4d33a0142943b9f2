#include "program_ops.h"

#include <algorithm>
#include <cstring>

namespace miaotui {
namespace {

const float* or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

}  // namespace

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
  share_of(c.step.tokens, thread, c.threads, first, last);
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
  const size_t n = static_cast<size_t>(rows), k = static_cast<size_t>(k_pad());
  return (float_rows() ? round_up(n * k * sizeof(float), 64) : 0) +
         (any_integer() ? round_up(n * QuantRows::bytes(k_pad()), 64) : 0);
}

LinearOp::Prepared LinearOp::prepared_in(uint8_t* memory, int rows) const {
  Prepared to{in.data, in.stride, {}};
  const size_t n = static_cast<size_t>(rows), k = static_cast<size_t>(k_pad());
  if (float_rows()) {
    to.x = reinterpret_cast<float*>(memory);
    to.x_stride = static_cast<int64_t>(k);
    memory += round_up(n * k * sizeof(float), 64);
  }
  if (any_integer()) {
    to.quant.k_pad = k_pad();
    to.quant.q = reinterpret_cast<int8_t*>(memory);
    to.quant.scale = reinterpret_cast<float*>(memory + n * k);
    to.quant.minus32 = reinterpret_cast<int32_t*>(to.quant.scale + n * (k / 32));
    to.quant.minus16 = to.quant.minus32 + n * (k / 32);
  }
  return to;
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
void LinearOp::prepare(const Context& c, const Prepared& to, int first, int last, float* rows) const {
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
    if (any_integer()) c.kernels->quantise(x, k, to.quant.row(t));
  }
}

// One thread's share of all parts' panels, counted through: the same memory goes to the same thread at every step.
void LinearOp::multiply(const Context& c, const Prepared& from, int thread, float* scratch) const {
  LinearArgs args;
  args.rows = rows(c);
  args.x = from.x;
  args.x_stride = static_cast<size_t>(from.x_stride);
  args.quant = from.quant;
  int total = 0, first, last;
  for (const Part& part : parts) total += part.weight->panels;
  if (gated) total = parts[0].weight->panels;
  share_of(total, thread, c.threads, first, last);
  int begin = 0;
  for (size_t i = 0; i < (gated ? 1 : parts.size()); ++i) {
    const Part& part = parts[i];
    const int from_panel = std::max(first - begin, 0), to_panel = std::min(last - begin, part.weight->panels);
    begin += part.weight->panels;
    if (from_panel >= to_panel) continue;
    args.weight = part.weight;
    args.integer = quantised && part.weight->integer();
    args.act = act;
    if (gated) {
      args.up = parts[1].weight;
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
  }
}

void LinearOp::run(const Context& c, int phase, int thread) const {
  const int count = rows(c);
  uint8_t* scratch = c.scratch[static_cast<size_t>(thread)];
  float* row = reinterpret_cast<float*>(scratch);
  uint8_t* own = scratch + round_up(2 * static_cast<size_t>(k_pad()) * sizeof(float), 64);
  float* kernel_scratch = reinterpret_cast<float*>(own + prepared_bytes(kPreparedByEach));
  if (!prepares(c)) return multiply(c, prepared_in(nullptr, 0), thread, kernel_scratch);
  if (count <= kPreparedByEach) {
    const Prepared mine = prepared_in(own, kPreparedByEach);
    prepare(c, mine, 0, count, row);
    return multiply(c, mine, thread, kernel_scratch);
  }
  const Prepared shared = prepared_in(c.workspace, count);
  if (phase == 0) {
    int first, last;
    share_of(count, thread, c.threads, first, last);
    return prepare(c, shared, first, last, row);
  }
  multiply(c, shared, thread, kernel_scratch);
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
