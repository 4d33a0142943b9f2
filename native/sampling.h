// From a row of logits to a token, or to log-probabilities: the native twin of engine/draws.py, to the token.
#pragma once

#include <cstdint>

namespace miaotui {

// Elements whose weights are summed and compared together; a run of them that holds nothing of interest is skipped.
constexpr int kRun = 64;

// What depends on the instruction set.
struct SamplingKernels {
  const char* name;
  float (*largest)(const float* row, int n);
  int (*greater)(const float* row, int n, float than);  // how many are
  // weights[i] = exp(row[i] · scale − top) for rows whose largest row[i] · scale is top; 0 where that is below e^−87.
  // sums and peaks hold the sum and the largest of each run.
  void (*weigh)(const float* row, int n, float scale, float top, float* weights, float* sums, float* peaks);
  // How many weights are at least `least`, and into sums their sum in each run.
  int (*above)(const float* weights, const float* peaks, int n, float least, float* sums);
};

const SamplingKernels* sampling_kernels_portable();
#ifdef MIAOTUI_X86
const SamplingKernels* sampling_kernels_avx2();
const SamplingKernels* sampling_kernels_avx512();
#endif

// The greatest of the row, of equals the first; what is not a number is passed over.
int likeliest(const SamplingKernels& kernels, const float* row, int n);

// One draw. top_k 0 and top_p 1 and min_p 0 keep everything; `uniform` in [0, 1).
struct Control {
  float inverse_temperature = 1.0f;
  int top_k = 0;
  double top_p = 1.0;
  float min_p = 0.0f;
  double uniform = 0.0;
};

// The first token, in order of ids, at which the summed weight of those that min-p, top-k and top-p keep exceeds
// uniform · total. Always a token of the row; one of weight 0 only when there is no other.
int draw(const SamplingKernels& kernels, const float* row, int n, const Control& control);

// Natural log-probability and rank (from 1) of `token`, and the `top` likeliest, best first, of equals the smaller id.
void score(const SamplingKernels& kernels, const float* row, int n, int token, int top, double* logprob, int32_t* rank,
           int32_t* ids, double* logprobs);

}  // namespace miaotui
