// The ops a Program is made of. Each is a few pointers and sizes, and a run() that does one thread's share.
#pragma once

#include <optional>

#include "program.h"

namespace miaotui {

// Up to this many rows every thread prepares (norms, quantises) them for itself, which is cheaper than a barrier.
constexpr int kPreparedByEach = 4;

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
};

// out = epilogue(norm?(in) @ parts^T). With `gated`, parts are gate and up and out is act(gate) * up.
struct LinearOp : Op {
  struct Part {
    const Weight* weight = nullptr;
    std::vector<float> bias;
    int64_t column = 0;  // where its rows begin in out
  };

  LinearOp() : Op("linear") {}
  int phases(const Context& c) const override { return prepares(c) && rows(c) > kPreparedByEach ? 2 : 1; }
  void run(const Context& c, int phase, int thread) const override;
  size_t workspace_bytes(const Limits& limits) const override;
  size_t scratch_bytes() const override;

  std::vector<Part> parts;
  std::optional<NormParams> norm;
  std::vector<int32_t> perm;  // column j of the weights meets element perm[j] of the input; empty: as it comes
  Buffer in, add, out;
  float scale = 1.0f, softcap = 0.0f;
  Act act = Act::None;
  bool gated = false, of_logits = false;
  bool quantised = true;  // integer weights meet int8 activations; false is the exact float32 path

 private:
  struct Prepared {
    const float* x = nullptr;
    int64_t x_stride = 0;
    QuantRows quant;
  };
  int rows(const Context& c) const { return of_logits ? c.step.rows : c.step.tokens; }
  bool any_integer() const;
  bool any_float() const;
  bool float_rows() const;  // whether float rows must be written (normed, permuted or padded) rather than read in place
  bool prepares(const Context&) const { return any_integer() || float_rows(); }
  int k_pad() const { return parts[0].weight->k_pad; }
  Prepared prepared_in(uint8_t* memory, int rows) const;
  size_t prepared_bytes(int rows) const;
  void prepare(const Context& c, const Prepared& to, int first, int last, float* rows) const;
  void multiply(const Context& c, const Prepared& from, int thread, float* scratch) const;
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
  AttentionArgs args;  // step and scratch are filled in for each run
};

}  // namespace miaotui
