// Draws and log-probabilities of many rows in one call, without the GIL.
#include "sampling_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "program.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace miaotui {
namespace {

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out1 = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const SamplingKernels& kernels_for(const std::string& isa) {
#ifdef MIAOTUI_X86
  for (const Isa& known : available_isas()) {
    if (isa != known.name) continue;
    if (isa == "avx2" || isa == "avxvnni") return *sampling_kernels_avx2();
    if (isa != "portable") return *sampling_kernels_avx512();
  }
#endif
  if (isa != "portable") throw std::invalid_argument("this CPU has no " + isa);
  return *sampling_kernels_portable();
}

void check(const Rows& logits, const In<int32_t>& rows) {
  if (logits.shape(1) < 1 || logits.stride(1) != 1) throw std::invalid_argument("logits must lie close in a row");
  for (size_t i = 0; i < rows.shape(0); ++i)
    if (rows.data()[i] < 0 || static_cast<size_t>(rows.data()[i]) >= logits.shape(0))
      throw std::out_of_range("no such row of logits");
}

template <typename... Arrays>
void check_lengths(size_t count, const Arrays&... arrays) {
  if (((arrays.shape(0) != count) || ...)) throw std::invalid_argument("the arrays differ in length");
}

// f(i) for every i below `count`, on the pool's threads or the caller's.
template <typename F>
void for_rows(Pool* pool, size_t count, F&& f) {
  if (!pool) {
    for (size_t i = 0; i < count; ++i) f(i);
    return;
  }
  pool->each([&](int thread) {
    int first, last;
    share_of(static_cast<int>(count), thread, pool->threads(), first, last);
    for (int i = first; i < last; ++i) f(static_cast<size_t>(i));
  });
}

void likeliest_rows(Pool* pool, Rows logits, In<int32_t> rows, Out1<int32_t> tokens, const std::string& isa) {
  check(logits, rows);
  check_lengths(rows.shape(0), tokens);
  const SamplingKernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  for_rows(pool, rows.shape(0), [&](size_t i) {
    const float* row = logits.data() + rows.data()[i] * logits.stride(0);
    tokens.data()[i] = likeliest(kernels, row, static_cast<int>(logits.shape(1)));
  });
}

void draw_rows(Pool* pool, Rows logits, In<int32_t> rows, In<float> inverse_temperature, In<int32_t> top_k,
               In<double> top_p, In<float> min_p, In<double> uniform, Out1<int32_t> tokens, const std::string& isa) {
  check(logits, rows);
  check_lengths(rows.shape(0), inverse_temperature, top_k, top_p, min_p, uniform, tokens);
  const SamplingKernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  for_rows(pool, rows.shape(0), [&](size_t i) {
    const Control control{inverse_temperature.data()[i], top_k.data()[i], top_p.data()[i], min_p.data()[i],
                          uniform.data()[i]};
    tokens.data()[i] =
        draw(kernels, logits.data() + rows.data()[i] * logits.stride(0), static_cast<int>(logits.shape(1)), control);
  });
}

void score_rows(Pool* pool, Rows logits, In<int32_t> rows, In<int32_t> tokens, Out1<double> logprob, Out1<int32_t> rank,
                Out2<int32_t> ids, Out2<double> logprobs, const std::string& isa) {
  check(logits, rows);
  check_lengths(rows.shape(0), tokens, logprob, rank, ids, logprobs);
  const size_t top = ids.shape(1), n = logits.shape(1);
  if (logprobs.shape(1) != top || top > n) throw std::invalid_argument("more are wanted than there are");
  for (size_t i = 0; i < tokens.shape(0); ++i)
    if (tokens.data()[i] < 0 || static_cast<size_t>(tokens.data()[i]) >= n) throw std::out_of_range("no such token");
  const SamplingKernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  for_rows(pool, rows.shape(0), [&](size_t i) {
    score(kernels, logits.data() + rows.data()[i] * logits.stride(0), static_cast<int>(n), tokens.data()[i],
          static_cast<int>(top), logprob.data() + i, rank.data() + i, ids.data() + i * top, logprobs.data() + i * top);
  });
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("likeliest_rows", &likeliest_rows, "pool"_a.none(), "logits"_a, "rows"_a, "tokens"_a, "isa"_a,
        "The greatest of each of `rows` of logits, of equals the first, into `tokens`.");
  m.def("draw_rows", &draw_rows, "pool"_a.none(), "logits"_a, "rows"_a, "inverse_temperature"_a, "top_k"_a, "top_p"_a,
        "min_p"_a, "uniform"_a, "tokens"_a, "isa"_a, "A token for each of `rows` of logits, into `tokens`.");
  m.def("score_rows", &score_rows, "pool"_a.none(), "logits"_a, "rows"_a, "tokens"_a, "logprob"_a, "rank"_a, "ids"_a,
        "logprobs"_a, "isa"_a,
        "Log-probability and rank of a token of each row, and the likeliest ones, into the last four.");
}

}  // namespace miaotui
