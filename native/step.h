// One step's work as index arrays: what every kernel that depends on the batch is given.
#pragma once

#include <cstdint>

namespace miaotui {

/// Positions in one block of the KV cache.
constexpr int32_t kBlockSize = 16;

/// A step: `seqs` sequences, each with a run of new tokens that are its last ones. The arrays are the caller's and stay
/// valid during the step. Sequence s owns rows query_start[s] .. query_start[s + 1]; after the step it is
/// context_len[s] long, so that its first new row stands at position context_len[s] − (number of its rows).
struct StepView {
  int32_t tokens = 0;
  int32_t seqs = 0;
  int32_t rows = 0;                       ///< number of logits rows
  bool greedy = false;                    ///< nothing is wanted of a logits row but its greatest
  int32_t table_stride = 0;               ///< entries from one sequence's row of block_table to the next
  const int32_t* token_ids = nullptr;     ///< [tokens]
  const int32_t* positions = nullptr;     ///< [tokens]
  const int32_t* seq_of_token = nullptr;  ///< [tokens]
  const int32_t* query_start = nullptr;   ///< [seqs + 1]
  const int32_t* context_len = nullptr;   ///< [seqs]
  const int32_t* block_table = nullptr;   ///< [seqs][table_stride]; entry i holds positions 16i .. 16i + 15
  const int32_t* logits_rows = nullptr;   ///< [rows]
};

}  // namespace miaotui
