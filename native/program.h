// A decoder's step, recorded once and replayed natively: a flat list of ops with resolved pointers.
//
// Recording (from Python) names arena offsets, weights and switches. run() replays every op on the pool in one call;
// nothing is allocated. Between two ops stands a barrier unless the first says that none is needed.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "memory.h"
#include "pack.h"
#include "pool.h"
#include "step.h"

namespace miaotui {

struct Limits {
  int max_tokens = 0, max_seqs = 0, max_rows = 0, max_model_len = 0;
};

// What an op sees of the step that is running.
struct Context {
  StepView step;
  int threads = 1;
  const Kernels* kernels = nullptr;
  const AttentionKernels* attention = nullptr;
  uint8_t* workspace = nullptr;   // shared by all threads: a linear's prepared rows
  uint8_t* handed = nullptr;      // likewise: rows that a linear hands on quantised
  std::vector<uint8_t*> scratch;  // one for each thread
  uint8_t* attention_scratch = nullptr;
  Ahead* ahead = nullptr;  // one for each thread: what it reads of the cache in the next attention
  Greatest greatest;       // of the logits: [threads][max_rows][16]
  int greatest_rows = 0;   // max_rows

  Greatest greatest_of(int thread) const {
    const size_t at = static_cast<size_t>(thread) * static_cast<size_t>(greatest_rows) * 16;
    return {greatest.value + at, greatest.panel + at};
  }
};

class Op {
 public:
  explicit Op(std::string name) : name(std::move(name)) {}
  virtual ~Op() = default;
  // Phases of this step, with a barrier between them. The same answer on every thread.
  virtual int phases(const Context&) const { return 1; }
  virtual void run(const Context& context, int phase, int thread) const = 0;
  // Asks for the bytes [from, to) of what this op will read, in its order, for the thread that will read them; false
  // where there are none.
  virtual bool prefetch(const Context&, int, size_t, size_t) const { return false; }
  virtual size_t workspace_bytes(const Limits&) const { return 0; }
  virtual size_t handed_bytes(const Limits&) const { return 0; }
  virtual size_t scratch_bytes() const { return 0; }
  virtual size_t attention_bytes(const Limits&, int) const { return 0; }

  // After every thread has run the last op of a step, on one of them.
  virtual void after(const Context&) {}

  // Names the panels [first, last) of every weight that a thread always reads: read(weight, first, last). Threads in
  // turn read all panels, in ascending order.
  using Read = std::function<void(const Weight&, int, int)>;
  virtual void reads(const Context&, int /*thread*/, const Read&) const {}

  virtual bool streams_weights() const { return false; }
  // From now on, note the greatest of each row of results; false where it cannot.
  virtual bool note_greatest() { return false; }
  // The cache that it reads whole; null if it reads none, or a part.
  virtual const LayerCache* reads_cache() const { return nullptr; }

  std::string name;
  bool barrier = true;  // after the last phase
};

// Rows a multiple of 2 KB apart would meet in a few sets of the caches.
inline int64_t row_stride(int64_t width) { return width % 512 ? width : width + 16; }

// A float32 matrix in the arena; `stride` floats from row to row.
struct Buffer {
  float* data = nullptr;
  int64_t width = 0;
  int64_t stride = 0;
};

struct NormParams {
  std::vector<float> weight, bias;
  float eps = 0.0f;
  bool layer = false;
};

struct Isa {
  const char* name;
  const Kernels* kernels;
  const AttentionKernels* attention;
};

// Those this CPU can run, best first; none better than the environment's MIAOTUI_ISA, if that is one of them.
const std::vector<Isa>& available_isas();

class Program {
 public:
  Program(std::shared_ptr<Pool> pool, const Isa& isa, Limits limits, size_t arena_floats);

  float* arena(size_t offset) const { return reinterpret_cast<float*>(arena_.data()) + offset; }
  void add(std::unique_ptr<Op> op) { ops_.push_back(std::move(op)); }
  Op* last() const { return ops_.empty() ? nullptr : ops_.back().get(); }
  void keep(std::shared_ptr<PackedWeight> weight) { weights_.push_back(std::move(weight)); }
  // A layer's cache pointer that allocate_cache() will set; the args live as long as the program.
  void needs_cache(int layer, LayerCache* cache, size_t bytes);
  void finish();  // sizes the workspaces; afterwards no op may be added

  // The step's arrays stay the caller's; throws std::invalid_argument when it exceeds the limits.
  void run(const StepView& step);

  // Greedy steps, `steps` at the most, of sequences that have one new token each: in the next step it is the greatest
  // of its logits. `chosen` [steps][seqs] gets these; the last step is the first in which one of them is among `ends`.
  // Returns the number of steps. The block table must have room for all of them; throws std::invalid_argument where the
  // greatest are not noted.
  int run_on(const StepView& first, int steps, const std::vector<int32_t>& ends, int32_t* chosen);
  bool notes_greatest() const { return context_.greatest.value != nullptr; }

  // The column of the greatest of row `row` of the last run's logits, the first of equals, 0 where none is a number; -1
  // where that is not known.
  int likeliest(int row) const;

  // Room for `blocks` blocks of every layer, zeroed and untouched.
  void allocate_cache(int64_t blocks);
  void copy_block(int64_t from, int64_t to);
  void read_block(int64_t block, uint8_t* content) const;  // block_bytes() of them, layer after layer
  void write_block(int64_t block, const uint8_t* content);
  size_t block_bytes() const;  // over all layers
  int64_t blocks() const { return blocks_; }

  const Limits& limits() const { return limits_; }
  int threads() const { return pool_->threads(); }
  void set_profiling(bool on);
  // (op name, seconds of thread 0 with its barrier, runs) since profiling was set.
  std::vector<std::pair<std::string, double>> profile() const;
  long profiled_runs() const { return profiled_runs_; }

 private:
  void replay(int thread);
  void settle();  // moves weights to the memory beside the threads that read them
  void look_ahead();
  uint8_t* block_at(int64_t block) const;  // throws std::out_of_range

  std::shared_ptr<Pool> pool_;
  Limits limits_;
  Memory arena_, workspace_, handed_, scratch_, attention_scratch_, greatest_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<const Op*> next_linear_;         // behind op i, if op i is a linear itself
  std::vector<const LayerCache*> next_cache_;  // what the next op that reads the cache, from op i on, reads of it
  std::vector<size_t> runs_;  // where the blocks of this step's sequences lie in every layer's cache, cut to pieces
  std::unique_ptr<Ahead[]> ahead_;
  std::vector<std::shared_ptr<PackedWeight>> weights_;
  struct LayerSlot {
    std::vector<LayerCache*> users;
    size_t bytes = 0;  // of one block
  };
  std::vector<LayerSlot> layers_;
  Memory cache_;
  int64_t blocks_ = 0;
  std::vector<int32_t> seq_of_token_;
  std::vector<int32_t> ids_, positions_, lengths_;  // of a step that runs on
  Context context_;
  bool profiling_ = false;
  long profiled_runs_ = 0;
  std::vector<double> seconds_;
};

}  // namespace miaotui
