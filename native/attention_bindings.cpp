// For tests: one layer's rope, cache and attention on numpy arrays, with a chosen instruction set.
#include "attention_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"

namespace nb = nanobind;

namespace miaotui {
namespace {

template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Optional = std::optional<Array<T>>;

std::vector<std::string> attention_isas() {
  std::vector<std::string> names{"portable"};
#ifdef MIAOTUI_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.emplace_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    names.emplace_back("avx512");
    if (__builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512bf16");
  }
#endif
  return names;
}

const AttentionKernels& kernels(const std::string& isa) {
  for (const std::string& name : attention_isas()) {
    if (name != isa) continue;
    if (name == "portable") return *attention_kernels_portable();
#ifdef MIAOTUI_X86
    if (name == "avx2") return *attention_kernels_avx2();
    if (name == "avx512") return *attention_kernels_avx512();
    if (name == "avx512bf16") return *attention_kernels_avx512bf16();
#endif
  }
  throw std::invalid_argument("this machine has no instruction set " + isa);
}

void on_threads(int threads, const std::function<void(int)>& work) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
}

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};

std::unique_ptr<uint8_t, Free> aligned(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(p));
}

/// Runs one layer of a step. qkv [tokens][(heads + 2 kv_heads) · head_dim] is changed in place, as is the cache
/// [blocks][cache_layer_bytes]; out is [tokens][heads · head_dim]. Returns whether a merge phase was needed.
bool run_attention(const std::string& isa, int threads, Array<float> qkv, Array<uint8_t> cache, Array<float> out,
                   Array<const int32_t> positions, Array<const int32_t> query_start, Array<const int32_t> context_len,
                   Array<const int32_t> block_table, int heads, int kv_heads, int head_dim, int cache_type, float scale,
                   float softcap, int window, Optional<const float> inv_freq, float factor, bool interleaved,
                   Optional<const float> q_norm, Optional<const float> k_norm, float eps, int max_model_len) {
  const AttentionKernels& isa_kernels = kernels(isa);
  StepView step;
  step.tokens = static_cast<int32_t>(positions.size());
  step.seqs = static_cast<int32_t>(context_len.size());
  step.table_stride = static_cast<int32_t>(block_table.shape(1));
  step.positions = positions.data();
  step.query_start = query_start.data();
  step.context_len = context_len.data();
  step.block_table = block_table.data();
  std::vector<int32_t> seq_of_token(positions.size());
  for (int32_t s = 0; s < step.seqs; ++s)
    for (int32_t t = step.query_start[s]; t < step.query_start[s + 1]; ++t) seq_of_token[t] = s;
  step.seq_of_token = seq_of_token.data();

  // The cache and the scratch must lie on 64-byte lines, which numpy does not promise.
  const size_t layer_bytes = cache_layer_bytes(static_cast<CacheType>(cache_type), kv_heads, head_dim);
  if (cache.size() % layer_bytes != 0) throw std::invalid_argument("cache must be whole blocks");
  auto copy = aligned(cache.size());
  std::copy_n(cache.data(), cache.size(), copy.get());
  auto scratch = aligned(attention_scratch_bytes(heads, kv_heads, head_dim, max_model_len, threads));

  const int half = inv_freq ? static_cast<int>(inv_freq->size()) : 0;
  std::vector<float> cos(positions.size() * half + 1), sin(cos.size());
  RopeAnglesArgs angles;
  angles.step = &step;
  angles.inv_freq = inv_freq ? inv_freq->data() : nullptr;
  angles.half = half;
  angles.factor = factor;
  angles.cos = cos.data();
  angles.sin = sin.data();

  RopeCacheArgs rope;
  rope.step = &step;
  rope.qkv = qkv.data();
  rope.stride = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
  rope.heads = heads;
  rope.kv_heads = kv_heads;
  rope.head_dim = head_dim;
  rope.cos = inv_freq ? cos.data() : nullptr;
  rope.sin = inv_freq ? sin.data() : nullptr;
  rope.half = half;
  rope.interleaved = interleaved;
  rope.q_norm = q_norm ? q_norm->data() : nullptr;
  rope.k_norm = k_norm ? k_norm->data() : nullptr;
  rope.q_norm_width = q_norm ? static_cast<int32_t>(q_norm->size()) : 0;
  rope.k_norm_width = k_norm ? static_cast<int32_t>(k_norm->size()) : 0;
  rope.q_eps = rope.k_eps = eps;
  rope.cache.type = static_cast<CacheType>(cache_type);
  rope.cache.base = copy.get();
  rope.cache.block_stride = layer_bytes;

  AttentionArgs args;
  args.step = &step;
  args.q = rope.qkv;
  args.q_stride = rope.stride;
  args.out = out.data();
  args.out_stride = static_cast<int64_t>(heads) * head_dim;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = head_dim;
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  args.cache = rope.cache;
  args.scratch = scratch.get();

  const bool merge = attention_needs_merge(args, threads);
  if (inv_freq) on_threads(threads, [&](int t) { isa_kernels.rope_angles(angles, t, threads); });
  on_threads(threads, [&](int t) { isa_kernels.rope_and_cache(rope, t, threads); });
  on_threads(threads, [&](int t) { isa_kernels.attention(args, t, threads); });
  if (merge) on_threads(threads, [&](int t) { isa_kernels.attention_merge(args, t, threads); });
  std::copy_n(copy.get(), cache.size(), cache.data());
  return merge;
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_isas", &attention_isas, "Instruction sets of this machine that the attention kernels know.");
  m.def(
      "cache_layer_bytes",
      [](int type, int kv_heads, int head_dim) {
        return cache_layer_bytes(static_cast<CacheType>(type), kv_heads, head_dim);
      },
      nb::arg("cache_type"), nb::arg("kv_heads"), nb::arg("head_dim"), "Bytes of one block of one layer's cache.");
  m.def("run_attention", &run_attention, nb::arg("isa"), nb::arg("threads"), nb::arg("qkv"), nb::arg("cache"),
        nb::arg("out"), nb::arg("positions"), nb::arg("query_start"), nb::arg("context_len"), nb::arg("block_table"),
        nb::kw_only(), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("cache_type"),
        nb::arg("scale"), nb::arg("softcap") = 0.0f, nb::arg("window") = 0, nb::arg("inv_freq").none() = nb::none(),
        nb::arg("factor") = 1.0f, nb::arg("interleaved") = false, nb::arg("q_norm").none() = nb::none(),
        nb::arg("k_norm").none() = nb::none(), nb::arg("eps") = 1e-6f, nb::arg("max_model_len"),
        "For tests: rope, cache and attention of one layer. Returns whether threads shared an item.");
}

}  // namespace miaotui
