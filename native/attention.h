// Rotary embedding, the KV cache and attention over it: the kernels' interface, one table per instruction set.
//
// The cache. A layer's cache is `base + block · block_stride`; a block holds 16 positions of every kv head, per head a
// K tile then a V tile, each a multiple of 64 bytes. D is head_dim, Dp is D rounded up to 16:
//   fp32  K float [Dp][16]            V float [16][Dp]
//   bf16  K bf16 [Dp/2][16][2]        V bf16 [8][Dp][2]   (pairs of d; pairs of positions)
//   int8  K int8 [Dp/4][16][4] + float scale[16]   V int8 [8][Dp][2] + float scale[16]   (one scale per position
//   and head)
// The memory must come zeroed (padding stays zero) and hold only finite values afterwards.
//
// The order of every sum is fixed by a token's own position: positions are cut into chunks of kChunk aligned at 0, each
// chunk gives (max, sum, output), and chunks are merged in ascending order. A token's result has therefore the same
// bits in any batch, with any cut of the prompt and any number of threads.
//
// The phases of one layer, with a barrier of all threads between them:
//   rope_and_cache | attention | attention_merge, the last only if attention_needs_merge(args, threads)
// and once per step and per distinct Rope, before the first layer: rope_angles. Every function is called by all threads
// with its own `thread` in 0 .. threads − 1 and does its share; the order of phases is the only synchronisation needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step.h"

namespace miaotui {

enum class CacheType : int32_t { fp32 = 0, bf16 = 1, int8 = 2 };

/// Positions in one unit of the softmax.
constexpr int32_t kChunk = 128;

/// Bytes of one layer's share of a block: kv_heads · (K tile + V tile). A multiple of 64.
size_t cache_layer_bytes(CacheType type, int32_t kv_heads, int32_t head_dim);

/// One layer's part of the KV cache; base and block_stride are multiples of 64.
struct LayerCache {
  CacheType type = CacheType::bf16;
  uint8_t* base = nullptr;
  size_t block_stride = 0;
};

/// cos and sin [tokens][half] of float32(position · inv_freq), times factor. half is rotary_dim / 2.
struct RopeAnglesArgs {
  const StepView* step = nullptr;
  const float* inv_freq = nullptr;  ///< [half]
  int32_t half = 0;
  float factor = 1.0f;
  float* cos = nullptr;
  float* sin = nullptr;
};

/// qkv rows are [q heads | k kv_heads | v kv_heads], each head_dim wide. q and k are normed and turned in place, then k
/// and v are written into the cache.
struct RopeCacheArgs {
  const StepView* step = nullptr;
  float* qkv = nullptr;
  int64_t stride = 0;  ///< floats from one row to the next
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  const float* cos = nullptr;  ///< [tokens][half]; null: no rotation
  const float* sin = nullptr;
  int32_t half = 0;
  bool interleaved = false;       ///< pairs (2i, 2i + 1) rather than (i, i + half)
  const float* q_norm = nullptr;  ///< RMS norm weight; null: none
  const float* k_norm = nullptr;
  int32_t q_norm_width = 0;  ///< head_dim, or heads · head_dim: one norm over all heads
  int32_t k_norm_width = 0;  ///< head_dim, or kv_heads · head_dim
  float q_eps = 0.0f;
  float k_eps = 0.0f;
  LayerCache cache;
};

/// Causal softmax attention of q [tokens][heads · head_dim] into out, of the same shape. q and out may not overlap.
struct AttentionArgs {
  const StepView* step = nullptr;
  const float* q = nullptr;
  int64_t q_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  ///< 0: none
  int32_t window = 0;    ///< a position sees the last `window` positions, itself included; 0: all
  LayerCache cache;
  uint8_t* scratch = nullptr;  ///< attention_scratch_bytes, 64-byte aligned, shared by all threads; one per Program
};

/// Bytes of `scratch` for any step of this shape. Most of it is touched only by long contexts split over threads.
size_t attention_scratch_bytes(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t max_model_len, int threads);

/// Whether this step's attention was split inside a sequence, so that attention_merge must follow. Depends on the step,
/// heads, kv_heads and window alone: one answer serves every layer that shares these. Any thread may ask.
bool attention_needs_merge(const AttentionArgs& args, int threads);

struct AttentionKernels {
  void (*rope_angles)(const RopeAnglesArgs& args, int thread, int threads);
  void (*rope_and_cache)(const RopeCacheArgs& args, int thread, int threads);
  void (*attention)(const AttentionArgs& args, int thread, int threads);
  void (*attention_merge)(const AttentionArgs& args, int thread, int threads);
};

/// One table per instruction set. The caller checks that the CPU has it.
const AttentionKernels* attention_kernels_portable();
const AttentionKernels* attention_kernels_avx2();
const AttentionKernels* attention_kernels_avx512();
const AttentionKernels* attention_kernels_avx512bf16();

}  // namespace miaotui
