// The ops a Program is made of. Each is a few pointers and sizes, and a run() that does one thread's share.
#pragma once

#include <optional>

#include "program.h"

namespace miaotui {

// Up to this many rows every thread prepares (norms, quantises) them for itself, which is cheaper than a barrier.
constexpr int kPreparedByEach = kStreamingRows;

// From so many rows on a linear multiplies the recoded weights, if it has them.
constexpr int kWideFrom = 16;

// Asks for the bytes [from, to) of the codes of panels [first, last), and the scales that go with them; false where
// there are none.
bool ask_for(const Weight& w, int first, int last, size_t from, size_t to);

// Input rows in the forms that kernels read: float32 padded to k_pad, quantised, or both.
struct PreparedRows {
  const float* x = nullptr;
  int64_t x_stride = 0;
  QuantRows quant;

  static size_t bytes(int rows, int k_pad, bool floats, bool integers);
  // Laid out in `memory`; without `floats` the rows are read where they are, at x.
  static PreparedRows in(uint8_t* memory, int rows, int k_pad, bool floats, bool integers, const float* x,
                         int64_t x_stride);
};

struct EmbedOp : Op {
  EmbedOp() : Op("embed") {}
  void run(const Context& c, int, int thread) const override;
  const Weight* table = nullptr;
  float scale = 1.0f;
  Buffer out;
};

struct AnglesOp : Op {
  AnglesOp() : Op("rope_angles") {}
  void run(const Context& c, int, int thread) const override;
  std::vector<float> inv_freq;
  float factor = 1.0f;
  Buffer cos, sin;
};

struct NormOp : Op {
  NormOp() : Op("norm") {}
  void run(const Context& c, int, int thread) const override;
  NormParams norm;
  Buffer in, add, out;  // add.data may be null
  bool of_logits = false;
};

struct SelectOp : Op {
  SelectOp() : Op("select_rows") {}
  void run(const Context& c, int, int thread) const override;
  Buffer in, out;
};

struct ActivateOp : Op {
  ActivateOp() : Op("activate") {}
  void run(const Context& c, int, int thread) const override;
  Buffer in, out;
  Act act = Act::None;
  bool gated = false;  // in is [gate | up], each as wide as out
  bool of_logits = false;
};

// out = epilogue(norm?(in) @ parts^T). With `gated`, parts are gate and up and out is act(gate) * up.
struct LinearOp : Op {
  struct Part {
    const Weight* weight = nullptr;
    const Weight* wide = nullptr;  // integers recoded for steps of kWideFrom rows and more; null in all parts if in one
    std::vector<float> bias;
    int64_t column = 0;  // where its rows begin in out
  };

  LinearOp() : Op("linear") {}
  int phases(const Context& c) const override { return prepares(c) && rows(c) > kPreparedByEach ? 2 : 1; }
  void run(const Context& c, int phase, int thread) const override;
  bool prefetch(const Context& c, int thread, size_t from, size_t to) const override;
  void reads(const Context& c, int thread, const Read& read) const override;
  bool streams_weights() const override { return true; }
  bool note_greatest() override { return greatest = of_logits && !gated && parts.size() == 1; }
  size_t workspace_bytes(const Limits& limits) const override;
  size_t handed_bytes(const Limits& limits) const override;
  size_t scratch_bytes() const override;

  std::vector<Part> parts;
  std::optional<NormParams> norm;
  std::vector<int32_t> perm;  // column j of the weights meets element perm[j] of the input; empty: as it comes
  Buffer in, add, out;
  float scale = 1.0f, softcap = 0.0f;
  Act act = Act::None;
  bool gated = false, of_logits = false;
  bool quantised = true;  // integer weights meet int8 activations; false is the exact float32 path
  bool hands_on = false;  // out goes quantised to the next linear, which takes it `handed`
  bool handed = false;
  const LinearOp* next = nullptr;  // where hands_on goes
  bool greatest = false;           // each row's is noted

 protected:
  int rows(const Context& c) const { return of_logits ? c.step.rows : c.step.tokens; }
  bool wide(const Context& c) const { return parts[0].wide && rows(c) >= kWideFrom; }
  bool any_integer() const;
  bool any_float() const;
  bool float_rows() const;  // whether float rows must be written (normed, permuted or padded) rather than read in place
  bool prepares(const Context&) const { return !handed && (any_integer() || float_rows()); }
  void share(const Context& c, int thread, int& first, int& last) const;  // of all parts' panels, counted through
  // f(part, first, last) for the panels [first, last) of all parts, counted through; with `gated` those of the gate.
  template <typename F>
  void for_parts(int first, int last, F&& f) const;
  const Weight& weight_of(const Context& c, const Part& part) const { return wide(c) ? *part.wide : *part.weight; }
  int k_pad() const { return parts[0].weight->k_pad; }
  PreparedRows prepared_in(uint8_t* memory, int rows) const;
  PreparedRows handed_in(uint8_t* memory, int rows) const;  // what the linear before hands to this one
  void leave_out(QuantRows& rows) const;                    // the sums that none of its weights asks for
  size_t prepared_bytes(int rows) const;
  void prepare(const Context& c, const PreparedRows& to, int first, int last, float* rows) const;
  LinearArgs arguments(const Context& c, const PreparedRows& from, int thread) const;
  void multiply(const Context& c, const PreparedRows& from, int thread, float* scratch) const;
  void multiply(const Context& c, LinearArgs& args, int first, int last, float* scratch) const;
};

// A routed MLP: each token through the top_k experts of its router row, their results weighted and added in ascending
// order of expert. Tokens are sorted by expert first, so that each expert's weights are read once for all its tokens.
struct ExpertsOp : Op {
  ExpertsOp() : Op("experts") {}
  int phases(const Context&) const override { return 7; }
  void run(const Context& c, int phase, int thread) const override;
  size_t workspace_bytes(const Limits& limits) const override;
  size_t scratch_bytes() const override;

  std::vector<const Weight*> gate, up, down;
  Buffer x, router, add, out;
  int top_k = 1;
  bool normalise = false, quantised = true;
  Act act = Act::Silu;

 private:
  struct Work;  // the workspace, laid out for one step
  int experts() const { return static_cast<int>(gate.size()); }
  size_t lay_out(Work& work, uint8_t* memory, int tokens) const;
  void route(const Context& c, const Work& work, int thread) const;
  void sort(const Context& c, const Work& work) const;
  void prepare(const Context& c, const Work& work, const PreparedRows& to, const Buffer& from, bool gathered,
               int thread) const;
  void multiply(const Context& c, const Work& work, bool second, int thread) const;
  void combine(const Context& c, const Work& work, int thread) const;
};

struct RopeCacheOp : Op {
  RopeCacheOp() : Op("rope_and_cache") {}
  void run(const Context& c, int, int thread) const override;
  RopeCacheArgs args;  // step is filled in for each run
  std::vector<float> q_norm, k_norm;
};

struct AttentionOp : Op {
  AttentionOp() : Op("attention") {}
  int phases(const Context& c) const override;
  void run(const Context& c, int phase, int thread) const override;
  size_t attention_bytes(const Limits& limits, int threads) const override;
  const LayerCache* reads_cache() const override { return args.window ? nullptr : &args.cache; }
  AttentionArgs args;  // step and scratch are filled in for each run
};

}  // namespace miaotui
