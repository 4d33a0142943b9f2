// A head that is read by way of its screen where nothing but each row's greatest logit is wanted.
#pragma once

#include "program_ops.h"
#include "screen.h"

namespace miaotui {

// With more rows than these, panels that some row needs are too many.
constexpr int kScreenedRows = 2;

struct ScreenedOp : LinearOp {
  int phases(const Context& c) const override { return screens(c) ? 2 : LinearOp::phases(c); }
  void run(const Context& c, int phase, int thread) const override;
  bool prefetch(const Context& c, int thread, size_t from, size_t to) const override;
  void reads(const Context& c, int thread, const Read& read) const override;
  void after(const Context& c) override;
  size_t workspace_bytes(const Limits& limits) const override;
  size_t scratch_bytes() const override;
  const Weight& head() const { return *parts[0].weight; }
  // Whether the next step asks it, if it is greedy and small.
  bool screening() const { return screen && greatest && !resting_; }
  // Whether a screen finds what this op computes: one plain matrix whose inputs are float32, or int8 in groups of 32.
  bool can_be_screened() const;

  std::shared_ptr<const Screen> screen;  // null: as any other linear

 private:
  struct Own;     // a thread's scratch
  struct Shared;  // the workspace
  bool screens(const Context& c) const {
    return screening() && c.step.greedy && rows(c) >= 1 && rows(c) <= kScreenedRows;
  }
  bool integers() const { return quantised && head().integer(); }
  Own lay_out(uint8_t* memory, int count) const;
  Shared lay_out_shared(uint8_t* memory, int threads) const;
  void lift(const Context& c, const Own& own, int row) const;
  void bound(const Context& c, const Own& own, const Shared& shared, int thread) const;
  void settle(const Context& c, const Own& own, const Shared& shared, int thread) const;
  void multiply_noted(const Context& c, const Own& own, int thread, int count) const;

  float share_ = 0.0f;  // of the panels that were multiplied, on average over the last steps
  int resting_ = 0;     // steps to go without the screen, which did not pay
};

}  // namespace miaotui
