// What Python sees of the CPU backend. Sizes and types are checked here; the kernels trust them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attention_bindings.h"
#include "pack.h"
#include "probes.h"
#include "program_ops.h"
#include "sampling_bindings.h"
#include "screened_op.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace miaotui;

namespace {

template <typename T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Weights = std::vector<std::shared_ptr<PackedWeight>>;

const Isa& isa_named(const std::string& name) {
  for (const Isa& isa : available_isas())
    if (name == isa.name) return isa;
  throw std::invalid_argument("this CPU has no " + name);
}

Act act_named(const std::string& name) {
  if (name == "none") return Act::None;
  if (name == "silu") return Act::Silu;
  if (name == "gelu") return Act::Gelu;
  if (name == "gelu_tanh") return Act::GeluTanh;
  if (name == "relu2") return Act::Relu2;
  throw std::invalid_argument("no activation " + name);
}

ScaleType scale_type_named(const std::string& name) {
  if (name == "float16") return ScaleType::F16;
  if (name == "bfloat16") return ScaleType::BF16;
  if (name == "float32") return ScaleType::F32;
  throw std::invalid_argument("no scale type " + name);
}

const char* code_name(Code code) {
  switch (code) {
    case Code::F32: return "float32";
    case Code::F16: return "float16";
    case Code::BF16: return "bfloat16";
    case Code::INT8: return "int8";
    case Code::INT4: return "int4";
  }
  return "";
}

std::vector<float> floats(const std::optional<Array1<float>>& a) {
  if (!a) return {};
  return std::vector<float>(a->data(), a->data() + a->shape(0));
}

// (memory node, its processors)
using SeatTuple = std::pair<int, std::vector<int>>;

std::vector<Seat> seats_of(const std::vector<SeatTuple>& given) {
  std::vector<Seat> seats;
  for (const auto& [node, cpus] : given) seats.push_back({node, cpus});
  return seats;
}

void new_pool(Pool* self, int threads, const std::vector<SeatTuple>& seats) {
  new (self) Pool(threads, seats_of(seats));
}

// ---- weights ---------------------------------------------------------------------------------------------------

std::shared_ptr<PackedWeight> dense_weight(Pool& pool, Heap& heap,
                                           nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu> data,
                                           const std::string& type) {
  const Code code = type == "float32" ? Code::F32 : type == "float16" ? Code::F16 : Code::BF16;
  const size_t item = code == Code::F32 ? 4 : 2;
  if (data.itemsize() != item) throw std::invalid_argument("the array's item size does not fit " + type);
  const int n = static_cast<int>(data.shape(0)), k = static_cast<int>(data.shape(1));
  nb::gil_scoped_release release;
  return std::make_shared<PackedWeight>(pack_dense(pool, heap, data.data(), code, n, k));
}

std::shared_ptr<PackedWeight> gguf_weight(Pool& pool, Heap& heap, Array2<uint8_t> rows, const std::string& kind,
                                          int width) {
  const size_t block = kind == "Q8_0" ? 34 : kind == "Q4_1" ? 20 : 18;
  if (rows.shape(1) * 32 != block * static_cast<size_t>(width)) throw std::invalid_argument("rows of the wrong size");
  nb::gil_scoped_release release;
  return std::make_shared<PackedWeight>(
      pack_gguf(pool, heap, rows.data(), kind, static_cast<int>(rows.shape(0)), width, rows.shape(1)));
}

std::shared_ptr<PackedWeight> grouped_weight(Pool& pool, Heap& heap, Array2<uint8_t> codes, Array2<float> scale,
                                             std::optional<Array2<float>> minimum, int bits, int group,
                                             const std::string& scale_type, bool by_token) {
  const int n = static_cast<int>(codes.shape(0)), k = static_cast<int>(codes.shape(1));
  const size_t groups = static_cast<size_t>((k + group - 1) / group);
  if (scale.shape(0) != codes.shape(0) || scale.shape(1) != groups)
    throw std::invalid_argument("scale of a wrong shape");
  if (minimum && (minimum->shape(0) != codes.shape(0) || minimum->shape(1) != groups))
    throw std::invalid_argument("minimum of a wrong shape");
  const ScaleType type = scale_type_named(scale_type);
  nb::gil_scoped_release release;
  auto packed = std::make_shared<PackedWeight>(pack_grouped(
      pool, heap, codes.data(), scale.data(), minimum ? minimum->data() : nullptr, bits, group, type, n, k));
  packed->view.inputs = by_token ? Inputs::ByToken : Inputs::By32;
  return packed;
}

std::shared_ptr<PackedWeight> wide_weight(Pool& pool, Heap& heap, const PackedWeight& from, const std::string& isa) {
  if (!from.view.integer() || from.view.inputs != Inputs::By32)
    throw std::invalid_argument("only integer weights whose inputs are quantised by 32 are recoded");
  nb::gil_scoped_release release;
  return std::make_shared<PackedWeight>(pack_wide(pool, heap, *isa_named(isa).kernels, from));
}

std::shared_ptr<Screen> screen_of(Pool& pool, Heap& heap, const PackedWeight& head, const std::string& isa) {
  nb::gil_scoped_release release;
  return std::make_shared<Screen>(make_screen(pool, heap, *isa_named(isa).kernels, head.view));
}

// (code, scale type, minima, rows, width, padded width, fold, folds a group, groups, input by token): with the panels'
// bytes all that there is to a weight.
using Form = std::tuple<int, int, bool, int, int, int, int, int, int, bool>;

Form form_of(const PackedWeight& packed) {
  const Weight& w = packed.view;
  return {static_cast<int>(w.code),
          static_cast<int>(w.scale_type),
          w.has_min,
          w.n,
          w.k,
          w.k_pad,
          w.fold,
          w.folds_per_group,
          w.groups,
          w.inputs == Inputs::ByToken};
}

std::shared_ptr<PackedWeight> mapped_weight(const Form& form, nb::object array) {
  const auto bytes = nb::cast<Array1<uint8_t>>(array);
  Weight w;
  int code, scale_type;
  bool by_token;
  std::tie(code, scale_type, w.has_min, w.n, w.k, w.k_pad, w.fold, w.folds_per_group, w.groups, by_token) = form;
  w.inputs = by_token ? Inputs::ByToken : Inputs::By32;
  const bool sound = code >= 0 && code <= static_cast<int>(Code::INT8) && scale_type >= 0 && scale_type <= 2 &&
                     w.n > 0 && w.k > 0 && w.k_pad >= w.k && w.k_pad % 32 == 0 && (w.fold == 16 || w.fold == 32) &&
                     w.folds_per_group > 0 && w.groups >= 0;
  if (!sound) throw std::invalid_argument("no such packed weight");
  w.code = static_cast<Code>(code), w.scale_type = static_cast<ScaleType>(scale_type);
  if (w.integer() && static_cast<int64_t>(w.groups) * w.fold * w.folds_per_group < w.k)
    throw std::invalid_argument("too few groups for the width");
  auto owner = std::make_shared<nb::object>(std::move(array));
  return std::make_shared<PackedWeight>(packed_at(w, bytes.data(), bytes.shape(0), std::move(owner)));
}

nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> raw_bytes(nb::handle self) {
  const PackedWeight& packed = nb::cast<const PackedWeight&>(self);
  return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(packed.view.codes, {packed.bytes()}, self);
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> dequantised(const PackedWeight& packed) {
  const Weight& w = packed.view;
  float* out = new float[static_cast<size_t>(w.n) * w.k];
  for (int row = 0; row < w.n; ++row)
    kernels_portable()->dequantise_row(w, row, 1.0f, out + static_cast<size_t>(row) * w.k);
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::ndarray<nb::numpy, float, nb::ndim<2>>(out, {static_cast<size_t>(w.n), static_cast<size_t>(w.k)}, owner);
}

// ---- recording -------------------------------------------------------------------------------------------------

// (offset in the arena, width); rows lie `width` apart.
using Place = std::pair<size_t, int64_t>;

Buffer buffer_at(const Program& program, const Place& place) {
  return {program.arena(place.first), place.second, row_stride(place.second)};
}

Buffer buffer_at(const Program& program, const std::optional<Place>& place) {
  return place ? buffer_at(program, *place) : Buffer{};
}

std::optional<NormParams> norm_params(const std::optional<Array1<float>>& weight,
                                      const std::optional<Array1<float>>& bias, float eps, bool layer) {
  if (!weight) return std::nullopt;
  return NormParams{floats(weight), floats(bias), eps, layer};
}

void record_embed(Program& program, const std::shared_ptr<PackedWeight>& table, float scale, const Place& out) {
  auto op = std::make_unique<EmbedOp>();
  op->table = &table->view;
  op->scale = scale;
  op->out = buffer_at(program, out);
  program.keep(table);
  program.add(std::move(op));
}

void record_angles(Program& program, Array1<float> inv_freq, float factor, const Place& cos, const Place& sin) {
  auto op = std::make_unique<AnglesOp>();
  op->inv_freq.assign(inv_freq.data(), inv_freq.data() + inv_freq.shape(0));
  op->factor = factor;
  op->cos = buffer_at(program, cos);
  op->sin = buffer_at(program, sin);
  op->barrier = false;  // recorded before the embedding, whose barrier serves both
  program.add(std::move(op));
}

void record_norm(Program& program, const Place& in, Array1<float> weight, std::optional<Array1<float>> bias, float eps,
                 bool layer, const std::optional<Place>& add, const Place& out, bool of_logits) {
  auto op = std::make_unique<NormOp>();
  op->norm = *norm_params(weight, bias, eps, layer);
  op->in = buffer_at(program, in);
  op->add = buffer_at(program, add);
  op->out = buffer_at(program, out);
  op->of_logits = of_logits;
  program.add(std::move(op));
}

void record_select(Program& program, const Place& in, const Place& out) {
  auto op = std::make_unique<SelectOp>();
  op->in = buffer_at(program, in);
  op->out = buffer_at(program, out);
  program.add(std::move(op));
}

void record_activate(Program& program, const Place& in, const std::string& act, bool gated, const Place& out,
                     bool of_logits) {
  auto op = std::make_unique<ActivateOp>();
  op->of_logits = of_logits;
  op->in = buffer_at(program, in);
  op->out = buffer_at(program, out);
  op->act = act_named(act);
  op->gated = gated;
  program.add(std::move(op));
}

void record_linear(Program& program, const std::string& name, const Place& in, const Weights& weights,
                   const std::vector<int64_t>& columns, const std::vector<std::optional<Array1<float>>>& biases,
                   std::optional<Array1<float>> norm_weight, std::optional<Array1<float>> norm_bias, float norm_eps,
                   bool norm_layer, const std::optional<Place>& add, float scale, float softcap, const std::string& act,
                   bool gated, bool quantised, bool of_logits, std::optional<Array1<int32_t>> perm, bool hands_on,
                   bool handed, const Weights& wide, const Place& out) {
  auto op = of_logits ? std::make_unique<ScreenedOp>() : std::make_unique<LinearOp>();
  op->name = name;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i]->view.k != in.second) throw std::invalid_argument("a weight's width differs from its input's");
    op->parts.push_back({&weights[i]->view, nullptr, floats(biases.at(i)), columns.at(i)});
    program.keep(weights[i]);
    if (wide.empty()) continue;
    const Weight& recoded = wide.at(i)->view;
    const Weight& own = weights[i]->view;
    if (recoded.n != own.n || recoded.k_pad != own.k_pad || recoded.wide() != own.integer())
      throw std::invalid_argument("recoded weights of another matrix");
    op->parts.back().wide = &recoded;
    program.keep(wide[i]);
  }
  if (gated && (weights.size() != 2 || weights[0]->view.n != weights[1]->view.n))
    throw std::invalid_argument("a gated linear has a gate and an up of one height");
  op->norm = norm_params(norm_weight, norm_bias, norm_eps, norm_layer);
  if (perm) {
    if (perm->shape(0) != static_cast<size_t>(in.second))
      throw std::invalid_argument("a permutation of a wrong length");
    op->perm.assign(perm->data(), perm->data() + perm->shape(0));
  }
  op->in = buffer_at(program, in);
  op->add = buffer_at(program, add);
  op->out = buffer_at(program, out);
  op->scale = scale;
  op->softcap = softcap;
  op->act = act_named(act);
  op->gated = gated;
  op->quantised = quantised;
  op->of_logits = of_logits;
  op->hands_on = hands_on;
  op->handed = handed;
  bool integer = quantised;
  for (const auto& weight : weights) integer = integer && weight->view.integer();
  const Inputs inputs = weights[0]->view.inputs;
  for (const auto& weight : weights)
    if (weight->view.inputs != inputs) throw std::invalid_argument("parts whose inputs are coded differently");
  if ((hands_on || handed) && inputs != Inputs::By32)
    throw std::invalid_argument("what is handed on is quantised by groups, on both sides");
  if ((hands_on || handed) && (!integer || perm)) throw std::invalid_argument("only integer linears hand on");
  if (hands_on && (weights[0]->view.n % 32 != 0 || out.second != weights[0]->view.n))
    throw std::invalid_argument("what is handed on comes in whole groups of 32 columns of one part");
  if (handed) {
    auto* before = dynamic_cast<LinearOp*>(program.last());
    if (!before || !before->hands_on || before->out.width != in.second)
      throw std::invalid_argument("the op before hands nothing on, or something else");
    before->next = op.get();
  }
  program.add(std::move(op));
}

void record_experts(Program& program, const Place& x, const Place& router, const Weights& gate, const Weights& up,
                    const Weights& down, int top_k, bool normalise, const std::string& act, bool quantised,
                    const std::optional<Place>& add, const Place& out) {
  auto op = std::make_unique<ExpertsOp>();
  const size_t count = gate.size();
  if (count < 1 || up.size() != count || down.size() != count || top_k < 1 || static_cast<size_t>(top_k) > count)
    throw std::invalid_argument("experts and top_k do not fit together");
  auto take = [&](const Weights& from, std::vector<const Weight*>& to) {
    for (const auto& weight : from) {
      if (weight->view.n != from[0]->view.n || weight->view.k != from[0]->view.k)
        throw std::invalid_argument("experts differ in shape");
      to.push_back(&weight->view);
      program.keep(weight);
    }
  };
  take(gate, op->gate), take(up, op->up), take(down, op->down);
  op->x = buffer_at(program, x), op->router = buffer_at(program, router);
  op->add = buffer_at(program, add), op->out = buffer_at(program, out);
  op->top_k = top_k, op->normalise = normalise, op->quantised = quantised;
  for (const auto* group : {&op->gate, &op->up, &op->down})
    for (const Weight* weight : *group)
      if (weight->inputs != (group == &op->down ? op->down : op->gate)[0]->inputs)
        throw std::invalid_argument("experts whose inputs are coded differently");
  op->act = act_named(act);
  program.add(std::move(op));
}

struct CacheShape {
  int layer, heads, kv_heads, head_dim;
  CacheType type;
};

void record_rope_cache(Program& program, const CacheShape& shape, const Place& qkv, const std::optional<Place>& cos,
                       const std::optional<Place>& sin, bool interleaved, std::optional<Array1<float>> q_norm,
                       float q_eps, std::optional<Array1<float>> k_norm, float k_eps) {
  auto op = std::make_unique<RopeCacheOp>();
  RopeCacheArgs& a = op->args;
  const Buffer in = buffer_at(program, qkv);
  a.qkv = in.data, a.stride = in.stride;
  a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_dim = shape.head_dim;
  if (cos) a.cos = program.arena(cos->first), a.sin = program.arena(sin->first), a.half = static_cast<int>(cos->second);
  a.interleaved = interleaved;
  op->q_norm = floats(q_norm), op->k_norm = floats(k_norm);
  a.q_norm_width = static_cast<int>(op->q_norm.size()), a.k_norm_width = static_cast<int>(op->k_norm.size());
  a.q_eps = q_eps, a.k_eps = k_eps;
  a.cache.type = shape.type;
  program.needs_cache(shape.layer, &a.cache, cache_layer_bytes(shape.type, shape.kv_heads, shape.head_dim));
  program.add(std::move(op));
}

void record_attention(Program& program, const CacheShape& shape, const Place& q, float scale, float softcap, int window,
                      const Place& out) {
  auto op = std::make_unique<AttentionOp>();
  AttentionArgs& a = op->args;
  const Buffer in = buffer_at(program, q), to = buffer_at(program, out);
  a.q = in.data, a.q_stride = in.stride, a.out = to.data, a.out_stride = to.stride;
  a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_dim = shape.head_dim;
  a.scale = scale, a.softcap = softcap, a.window = window;
  a.cache.type = shape.type;
  program.needs_cache(shape.layer, &a.cache, cache_layer_bytes(shape.type, shape.kv_heads, shape.head_dim));
  program.add(std::move(op));
}

ScreenedOp* head_of(Program& program) { return dynamic_cast<ScreenedOp*>(program.last()); }

// What a screen would read of the head, as a share of what that is; none where it cannot have one.
std::optional<float> screen_share(Program& program) {
  const ScreenedOp* head = head_of(program);
  if (!head || !head->can_be_screened()) return std::nullopt;
  return coarse_share(head->head());
}

void screen_head(Program& program, std::shared_ptr<Screen> screen) {
  ScreenedOp* head = head_of(program);
  if (!head || !head->can_be_screened() || screen->coarse.view.n != head->head().n ||
      screen->coarse.view.k != head->head().k_pad + 2 * kApart)
    throw std::invalid_argument("a screen of another head");
  head->screen = std::move(screen);
}

bool screening(Program& program) {
  const ScreenedOp* head = head_of(program);
  return head && head->screening();
}

// ---- running ---------------------------------------------------------------------------------------------------

StepView step_of(const Array1<int32_t>& tokens, const Array1<int32_t>& positions, const Array1<int32_t>& query_start,
                 const Array1<int32_t>& context_len, const Array2<int32_t>& block_table,
                 const Array1<int32_t>& logits_rows, bool greedy) {
  StepView step;
  step.tokens = static_cast<int32_t>(tokens.shape(0));
  step.seqs = static_cast<int32_t>(context_len.shape(0));
  step.rows = static_cast<int32_t>(logits_rows.shape(0));
  step.table_stride = static_cast<int32_t>(block_table.shape(1));
  if (positions.shape(0) != tokens.shape(0) || query_start.shape(0) != context_len.shape(0) + 1 ||
      block_table.shape(0) != context_len.shape(0))
    throw std::invalid_argument("the step's arrays do not fit together");
  step.token_ids = tokens.data(), step.positions = positions.data(), step.query_start = query_start.data();
  step.context_len = context_len.data(), step.block_table = block_table.data(), step.logits_rows = logits_rows.data();
  step.greedy = greedy;
  return step;
}

void run(Program& program, Array1<int32_t> tokens, Array1<int32_t> positions, Array1<int32_t> query_start,
         Array1<int32_t> context_len, Array2<int32_t> block_table, Array1<int32_t> logits_rows, bool greedy) {
  const StepView step = step_of(tokens, positions, query_start, context_len, block_table, logits_rows, greedy);
  nb::gil_scoped_release release;
  program.run(step);
}

int run_on(Program& program, Array1<int32_t> tokens, Array1<int32_t> positions, Array1<int32_t> query_start,
           Array1<int32_t> context_len, Array2<int32_t> block_table, Array1<int32_t> logits_rows,
           const std::vector<int32_t>& ends, nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> chosen) {
  const StepView step = step_of(tokens, positions, query_start, context_len, block_table, logits_rows, true);
  if (chosen.shape(1) != context_len.shape(0)) throw std::invalid_argument("chosen has a column for each sequence");
  nb::gil_scoped_release release;
  return program.run_on(step, static_cast<int>(chosen.shape(0)), ends, chosen.data());
}

// None where one of them was not noted.
std::optional<std::vector<int>> likeliest(const Program& program, std::vector<int> rows) {
  for (int& row : rows)
    if ((row = program.likeliest(row)) < 0) return std::nullopt;
  return rows;
}

using BlockBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check_block_bytes(const Program& program, size_t bytes) {
  if (bytes != program.block_bytes()) throw std::invalid_argument("a cache block has another size");
}

void read_block(const Program& program, int64_t block, BlockBytes content) {
  check_block_bytes(program, content.shape(0));
  nb::gil_scoped_release release;
  program.read_block(block, content.data());
}

void write_block(Program& program, int64_t block, Array1<uint8_t> content) {
  check_block_bytes(program, content.shape(0));
  nb::gil_scoped_release release;
  program.write_block(block, content.data());
}

nb::ndarray<nb::numpy, float> view(nb::handle self, const Place& place, size_t rows) {
  Program& program = nb::cast<Program&>(self);
  const size_t shape[] = {rows, static_cast<size_t>(place.second)};
  const int64_t strides[] = {row_stride(place.second), 1};
  return nb::ndarray<nb::numpy, float>(program.arena(place.first), 2, shape, self, strides);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The CPU backend's kernels: panels of packed weights and the recorded program that runs over them.";

  nb::class_<Pool>(module, "Pool", "Threads that spin briefly for work and then park.")
      .def("__init__", &new_pool, "threads"_a, "seats"_a = std::vector<SeatTuple>{},
           nb::call_guard<nb::gil_scoped_release>(), "seats: (memory node, its processors) for each thread, or none.")
      .def_prop_ro("threads", &Pool::threads);

  nb::class_<Heap>(module, "Heap", "Memory on huge pages where weights lie in the order in which they are packed.")
      .def(nb::init<>());

  nb::class_<Screen>(module, "Screen", "A head in 4 bits that bounds its logits.")
      .def_static("of", &screen_of, "pool"_a, "heap"_a, "head"_a, "isa"_a)
      .def_static("again", &screen_again, "coarse"_a, "facts"_a, "Of the parts of one that was made before.")
      .def_ro("coarse", &Screen::coarse)
      .def_ro("facts", &Screen::facts);

  nb::class_<PackedWeight>(module, "PackedWeight", "A matrix in the kernels' panels of 16 rows.")
      .def_static("dense", &dense_weight, "pool"_a, "heap"_a, "data"_a, "type"_a)
      .def_static("gguf", &gguf_weight, "pool"_a, "heap"_a, "rows"_a, "kind"_a, "width"_a)
      .def_static("grouped", &grouped_weight, "pool"_a, "heap"_a, "codes"_a, "scale"_a, "minimum"_a.none(), "bits"_a,
                  "group"_a, "scale_type"_a, "by_token"_a)
      .def_static("wide", &wide_weight, "pool"_a, "heap"_a, "weight"_a, "isa"_a, "As INT8 with one scale a row.")
      .def_static("mapped", &mapped_weight, "form"_a, "data"_a, "Over bytes that were packed before; they stay mapped.")
      .def_prop_ro("by_token", [](const PackedWeight& packed) { return packed.view.inputs == Inputs::ByToken; })
      .def_prop_ro("form", &form_of)
      .def_prop_ro("raw", [](nb::handle self) { return raw_bytes(self); })
      .def("dequantise", &dequantised, "The exact values, float32 [out, in].")
      .def_prop_ro("shape", [](const PackedWeight& p) { return std::pair(p.view.n, p.view.k); })
      .def_prop_ro("nbytes", &PackedWeight::bytes)
      .def_prop_ro("code", [](const PackedWeight& p) { return code_name(p.view.code); });

  nb::class_<CacheShape>(module, "CacheShape")
      .def(
          "__init__",
          [](CacheShape* self, int layer, int heads, int kv_heads, int head_dim, const std::string& type) {
            const CacheType t = type == "fp32" ? CacheType::fp32 : type == "bf16" ? CacheType::bf16 : CacheType::int8;
            new (self) CacheShape{layer, heads, kv_heads, head_dim, t};
          },
          "layer"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "type"_a);

  nb::class_<Program>(module, "Program", "A step recorded once; run() replays it in one call without the GIL.")
      .def(
          "__init__",
          [](Program* self, std::shared_ptr<Pool> pool, const std::string& isa, int max_tokens, int max_seqs,
             int max_rows, int max_model_len, size_t arena_floats) {
            new (self)
                Program(std::move(pool), isa_named(isa), {max_tokens, max_seqs, max_rows, max_model_len}, arena_floats);
          },
          "pool"_a, "isa"_a, "max_tokens"_a, "max_seqs"_a, "max_rows"_a, "max_model_len"_a, "arena_floats"_a)
      .def("embed", &record_embed, "table"_a, "scale"_a, "out"_a)
      .def("angles", &record_angles, "inv_freq"_a, "factor"_a, "cos"_a, "sin"_a)
      .def("norm", &record_norm, "x"_a, "weight"_a, "bias"_a.none(), "eps"_a, "layer"_a, "add"_a.none(), "out"_a,
           "of_logits"_a)
      .def("select_rows", &record_select, "x"_a, "out"_a)
      .def("activate", &record_activate, "x"_a, "act"_a, "gated"_a, "out"_a, "of_logits"_a)
      .def("linear", &record_linear, "name"_a, "x"_a, "weights"_a, "columns"_a, "biases"_a, "norm_weight"_a.none(),
           "norm_bias"_a.none(), "norm_eps"_a, "norm_layer"_a, "add"_a.none(), "scale"_a, "softcap"_a, "act"_a,
           "gated"_a, "quantised"_a, "of_logits"_a, "perm"_a.none(), "hands_on"_a, "handed"_a, "wide"_a, "out"_a)
      .def("experts", &record_experts, "x"_a, "router"_a, "gate"_a, "up"_a, "down"_a, "top_k"_a, "normalise"_a, "act"_a,
           "quantised"_a, "add"_a.none(), "out"_a)
      .def("rope_and_cache", &record_rope_cache, "shape"_a, "qkv"_a, "cos"_a.none(), "sin"_a.none(), "interleaved"_a,
           "q_norm"_a.none(), "q_eps"_a, "k_norm"_a.none(), "k_eps"_a)
      .def("attention", &record_attention, "shape"_a, "q"_a, "scale"_a, "softcap"_a, "window"_a, "out"_a)
      .def("finish", &Program::finish)
      .def("allocate_cache", &Program::allocate_cache, "blocks"_a)
      .def("copy_block", &Program::copy_block, "source"_a, "destination"_a)
      .def("read_block", &read_block, "block"_a, "content"_a)
      .def("write_block", &write_block, "block"_a, "content"_a)
      .def_prop_ro("block_bytes", &Program::block_bytes)
      .def("run", &run, "tokens"_a, "positions"_a, "query_start"_a, "context_len"_a, "block_table"_a, "logits_rows"_a,
           "greedy"_a = false)
      .def("run_on", &run_on, "tokens"_a, "positions"_a, "query_start"_a, "context_len"_a, "block_table"_a,
           "logits_rows"_a, "ends"_a, "chosen"_a, "Greedy steps; the number of rows of `chosen` that were filled.")
      .def_prop_ro("notes_greatest", &Program::notes_greatest, "Whether greedy steps can run on.")
      .def("screen_share", &screen_share, "What a screen would read of the head, of what that is; None: it has none.")
      .def("screen", &screen_head, "screen"_a, "Before finish().")
      .def_prop_ro("screening", &screening, "Whether a greedy step of one row goes by way of the screen.")
      .def("likeliest", &likeliest, "rows"_a,
           "Each row's greatest column of the last run's logits, the first of equals; None where one is not known.")
      .def(
          "view", [](nb::handle self, const Place& place, size_t rows) { return view(self, place, rows); }, "place"_a,
          "rows"_a, "Rows of a buffer as an array that shares its memory.")
      .def("set_profiling", &Program::set_profiling, "on"_a)
      .def("profile", &Program::profile)
      .def_prop_ro("profiled_runs", &Program::profiled_runs);

  module.def("row_stride", &row_stride, "width"_a, "Floats from one row of a buffer to the next.");
  module.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa& isa : available_isas()) names.emplace_back(isa.name);
        return names;
      },
      "Instruction sets this CPU can run, best first.");
  module.def(
      "probe_bandwidth",
      [](int threads, double megabytes, double seconds, const std::vector<SeatTuple>& seats) {
        return probe_bandwidth(threads, megabytes, seconds, seats_of(seats));
      },
      "threads"_a, "megabytes"_a, "seconds"_a, "seats"_a = std::vector<SeatTuple>{},
      nb::call_guard<nb::gil_scoped_release>(), "Read bandwidth over `megabytes` in all, GB/s, in each round.");
  module.def("probe_int8", &probe_int8, "threads"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Peak of the int8 dot product, 10^12 multiplies and adds a second (two an element).");
  module.def("probe_fp32", &probe_fp32, "threads"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Peak of float32 fused multiply-add, TFLOP/s.");
  bind_attention(module);
  bind_sampling(module);
}
