// The mixture-of-experts operators on CUDA: checks, allocation, registration. flashmoe_train/ops/moe has their schemas.
#include <climits>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding.h"
#include "moe/moe.h"
#include "moe/operators.h"

namespace flashmoe {
namespace {

using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: return DType::float32;  // check_matrix let nothing else pass
  }
}

// The type of sums, weights and statistics behind x.
ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_weights(const Tensor& weights, const Tensor& slot_row, const Tensor& rows) {
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == slot_row.size(0) && weights.size(1) == slot_row.size(1),
                  "weights must be ", text(slot_row), ", found ", text(weights));
  const ScalarType wanted = wide_type(rows);
  STD_TORCH_CHECK(weights.scalar_type() == wanted, "weights must be ", torch::headeronly::toString(wanted), ", found ",
                  torch::headeronly::toString(weights.scalar_type()));
  check_device("weights", weights, rows);
}

int check_slots(const Tensor& slot_row) {
  STD_TORCH_CHECK(slot_row.numel() <= INT_MAX && slot_row.size(1) <= INT_MAX,
                  "slot_row must have fewer than 2^31 entries, found ", text(slot_row));
  return static_cast<int>(slot_row.size(1));
}

std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& ids, int64_t experts) {
  STD_TORCH_CHECK(ids.is_cuda(), "ids must be on a CUDA device like the other tensors");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(1) >= 1, "ids must be [tokens, experts per token], found ", text(ids));
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "ids must be int32 or int64, found ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(ids.numel() <= INT_MAX, "ids must have fewer than 2^31 entries, found ", text(ids));
  STD_TORCH_CHECK(experts >= 1, "num_experts must be at least 1, found ", experts);
  STD_TORCH_CHECK(experts <= ROUTE_PLAN_EXPERTS, "num_experts must be at most ", ROUTE_PLAN_EXPERTS,
                  " on a GPU, found ", experts);
  const DeviceGuard guard(ids.get_device_index());
  const Tensor slots = torch::stable::contiguous(ids);
  Tensor offsets = new_empty(ids, {experts + 1}, ScalarType::Int);
  Tensor row_slot = new_empty(ids, {ids.numel()}, ScalarType::Int);
  Tensor slot_row = new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor counts = new_empty(ids, {route_plan_chunks(ids.numel()), experts}, ScalarType::Int);
  RoutePlanParams p{};
  p.ids = slots.const_data_ptr();
  p.offsets = offsets.mutable_data_ptr<int32_t>();
  p.row_slot = row_slot.mutable_data_ptr<int32_t>();
  p.slot_row = slot_row.mutable_data_ptr<int32_t>();
  p.counts = counts.mutable_data_ptr<int32_t>();
  p.slots = static_cast<int>(ids.numel()), p.experts = static_cast<int>(experts);
  p.wide_ids = type == ScalarType::Long;
  check_launch(route_plan(p, current_stream(ids)));
  return {offsets, row_slot, slot_row};
}

ScoreFunction score_function_of(const std::string& name) {
  STD_TORCH_CHECK(name == "softmax" || name == "sigmoid" || name == "topk_softmax",
                  "score_function must be one of ('softmax', 'sigmoid', 'topk_softmax'), found '", name, "'");
  return name == "softmax"   ? ScoreFunction::softmax
         : name == "sigmoid" ? ScoreFunction::sigmoid
                             : ScoreFunction::topk_softmax;
}

void check_logits(const Tensor& logits, int64_t sequences) {
  check_matrix("logits", logits);
  STD_TORCH_CHECK(logits.size(1) <= ROUTER_EXPERTS, "logits must be of at most ", ROUTER_EXPERTS,
                  " experts on a GPU, found ", text(logits));
  STD_TORCH_CHECK(logits.size(0) <= INT_MAX, "logits must be of fewer than 2^31 tokens, found ", text(logits));
  STD_TORCH_CHECK(sequences >= 1 && sequences <= INT_MAX && logits.size(0) % sequences == 0,
                  "sequences must divide the ", logits.size(0), " tokens, found ", sequences);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk(const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k,
                                                const std::string& score_function, bool renormalize, double scale,
                                                int64_t groups, int64_t limited, int64_t sequences) {
  check_logits(logits, sequences);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == experts, "bias must be [experts] = [", experts, "], found ",
                    text(*bias));
    check_device("bias", *bias, logits);
  }
  STD_TORCH_CHECK(groups >= 1 && experts % groups == 0 && (groups == 1 || experts >= 2 * groups),
                  "groups must divide the ", experts, " experts into groups of at least 2, found ", groups);
  STD_TORCH_CHECK(limited >= 1 && limited <= groups, "limited_groups must be between 1 and groups = ", groups,
                  ", found ", limited);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= experts / groups * limited, "top_k must be between 1 and ",
                  experts / groups * limited, ", found ", top_k);
  const ScalarType wide = wide_type(logits);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor added = bias ? torch::stable::contiguous(torch::stable::to(*bias, wide)) : Tensor();
  Tensor weights = new_empty(logits, {tokens, top_k}, wide);
  Tensor ids = new_empty(logits, {tokens, top_k}, ScalarType::Int);
  Tensor score_sums = new_empty(logits, {sequences, experts}, wide);
  Tensor counts = new_empty(logits, {sequences, experts}, ScalarType::Int);
  const int64_t parts = router_parts(tokens, sequences, experts);
  Tensor part_sums = parts == 1 ? score_sums : new_empty(logits, {sequences, parts, experts}, wide);
  Tensor part_counts = parts == 1 ? counts : new_empty(logits, {sequences, parts, experts}, ScalarType::Int);
  RouterParams p{};
  p.logits = logits.const_data_ptr();
  p.bias = bias ? added.const_data_ptr() : nullptr;
  p.weights = weights.mutable_data_ptr();
  p.ids = ids.mutable_data_ptr<int32_t>();
  p.score_sums = score_sums.mutable_data_ptr();
  p.counts = counts.mutable_data_ptr<int32_t>();
  p.part_sums = part_sums.mutable_data_ptr();
  p.part_counts = part_counts.mutable_data_ptr<int32_t>();
  p.tokens = tokens, p.logits_stride = logits.stride(0), p.sequences = sequences;
  p.experts = static_cast<int>(experts), p.slots = static_cast<int>(top_k);
  p.groups = static_cast<int>(groups), p.limited_groups = static_cast<int>(limited);
  p.parts = static_cast<int>(parts);
  p.scale = scale, p.renormalize = renormalize, p.function = score_function_of(score_function);
  p.dtype = dtype_of(logits);
  check_launch(router_topk(p, current_stream(logits)));
  return {weights, ids, score_sums, counts};
}

Tensor topk_backward(const Tensor& dweights, const std::optional<Tensor>& dscore_sums, const Tensor& logits,
                     const Tensor& ids, const std::string& score_function, bool renormalize, double scale,
                     int64_t sequences) {
  check_logits(logits, sequences);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const ScalarType wide = wide_type(logits);
  check_indices("ids", ids, 2, logits);
  STD_TORCH_CHECK(ids.size(0) == tokens && ids.size(1) <= INT_MAX && (ids.numel() == 0 || experts > 0),
                  "ids must have one row per token of logits, found ", text(ids), ", logits ", text(logits));
  check_device("dweights", dweights, logits);
  STD_TORCH_CHECK(dweights.dim() == 2 && dweights.size(0) == tokens && dweights.size(1) == ids.size(1) &&
                      dweights.scalar_type() == wide,
                  "dweights must be ", text(ids), " in ", torch::headeronly::toString(wide), ", found ",
                  text(dweights), " ", torch::headeronly::toString(dweights.scalar_type()));
  if (dscore_sums) {
    check_device("dscore_sums", *dscore_sums, logits);
    STD_TORCH_CHECK(dscore_sums->dim() == 2 && dscore_sums->size(0) == sequences && dscore_sums->size(1) == experts &&
                        dscore_sums->scalar_type() == wide,
                    "dscore_sums must be [", sequences, ", ", experts, "] in ", torch::headeronly::toString(wide),
                    ", found ", text(*dscore_sums), " ", torch::headeronly::toString(dscore_sums->scalar_type()));
  }
  const DeviceGuard guard(logits.get_device_index());
  const Tensor index = torch::stable::contiguous(ids), gradients = torch::stable::contiguous(dweights);
  const Tensor sums = dscore_sums ? torch::stable::contiguous(*dscore_sums) : Tensor();
  Tensor dlogits = new_empty(logits, {tokens, experts});
  RouterBackwardParams p{};
  p.dweights = gradients.const_data_ptr();
  p.dscore_sums = dscore_sums ? sums.const_data_ptr() : nullptr;
  p.logits = logits.const_data_ptr();
  p.ids = index.const_data_ptr<int32_t>();
  p.dlogits = dlogits.mutable_data_ptr();
  p.tokens = tokens, p.logits_stride = logits.stride(0), p.sequences = sequences;
  p.experts = static_cast<int>(experts), p.slots = static_cast<int>(ids.size(1));
  p.scale = scale, p.renormalize = renormalize, p.function = score_function_of(score_function);
  p.dtype = dtype_of(logits);
  check_launch(router_topk_backward(p, current_stream(logits)));
  return dlogits;
}

}  // namespace

void permute_columns(const Tensor& x, int64_t first, int64_t columns, const Tensor& row_slot, const Tensor& slot_row,
                     void* rows) {
  PermuteParams p{};
  p.element_size = static_cast<int>(x.element_size());
  p.x = static_cast<const char*>(x.const_data_ptr()) + first * p.element_size;
  p.row_slot = row_slot.const_data_ptr<int32_t>();
  p.slot_row = slot_row.const_data_ptr<int32_t>();
  p.rows = rows;
  p.tokens = x.size(0), p.row_count = row_slot.size(0), p.dim = columns, p.x_stride = x.stride(0);
  p.slots = check_slots(slot_row);
  check_launch(moe_permute(p, current_stream(x)));
}

Tensor permute_tokens(const Tensor& x, const Tensor& row_slot, const Tensor& slot_row) {
  check_matrix("x", x);
  check_indices("row_slot", row_slot, 1, x);
  check_indices("slot_row", slot_row, 2, x);
  STD_TORCH_CHECK(slot_row.size(0) == x.size(0), "slot_row must have one row per token of x, found ", text(slot_row),
                  ", x ", text(x));
  const DeviceGuard guard(x.get_device_index());
  const Tensor slots = torch::stable::contiguous(row_slot), index = torch::stable::contiguous(slot_row);
  Tensor rows = new_empty(x, {row_slot.size(0), x.size(1)});
  permute_columns(x, 0, x.size(1), slots, index, rows.mutable_data_ptr());
  return rows;
}

Tensor combine_rows(const Tensor& rows, const Tensor& slot_row, const std::optional<Tensor>& weights) {
  check_matrix("rows", rows);
  check_indices("slot_row", slot_row, 2, rows);
  if (weights) check_weights(*weights, slot_row, rows);
  const DeviceGuard guard(rows.get_device_index());
  const Tensor index = torch::stable::contiguous(slot_row);
  const Tensor factors = weights ? torch::stable::contiguous(*weights) : Tensor();
  Tensor out = new_empty(rows, {slot_row.size(0), rows.size(1)});
  CombineParams p{};
  p.rows = rows.const_data_ptr();
  p.slot_row = index.const_data_ptr<int32_t>();
  p.weights = weights ? factors.const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.tokens = slot_row.size(0), p.row_count = rows.size(0), p.dim = rows.size(1), p.rows_stride = rows.stride(0);
  p.slots = check_slots(slot_row);
  p.dtype = dtype_of(rows);
  check_launch(moe_combine(p, current_stream(rows)));
  return out;
}

namespace {

std::tuple<Tensor, Tensor> combine_backward(const Tensor& dout, const Tensor& rows, const Tensor& slot_row,
                                            const Tensor& weights) {
  check_matrix("rows", rows);
  check_matrix("dout", dout);
  check_indices("slot_row", slot_row, 2, rows);
  check_weights(weights, slot_row, rows);
  check_device("dout", dout, rows);
  STD_TORCH_CHECK(dout.size(0) == slot_row.size(0) && dout.size(1) == rows.size(1) &&
                      dout.scalar_type() == rows.scalar_type(),
                  "dout must be [", slot_row.size(0), ", ", rows.size(1), "] in the dtype of rows, found ", text(dout),
                  " ", torch::headeronly::toString(dout.scalar_type()));
  const DeviceGuard guard(rows.get_device_index());
  const Tensor index = torch::stable::contiguous(slot_row), factors = torch::stable::contiguous(weights);
  Tensor drows = new_empty(rows, {rows.size(0), rows.size(1)});
  Tensor dweights = new_empty(weights, {weights.size(0), weights.size(1)});
  Tensor row_slot = new_empty(rows, {rows.size(0)}, ScalarType::Int);
  CombineBackwardParams p{};
  p.dout = dout.const_data_ptr();
  p.rows = rows.const_data_ptr();
  p.slot_row = index.const_data_ptr<int32_t>();
  p.weights = factors.const_data_ptr();
  p.drows = drows.mutable_data_ptr();
  p.dweights = dweights.mutable_data_ptr();
  p.row_slot = row_slot.mutable_data_ptr<int32_t>();
  p.tokens = slot_row.size(0), p.row_count = rows.size(0), p.dim = rows.size(1);
  p.dout_stride = dout.stride(0), p.rows_stride = rows.stride(0);
  p.slots = check_slots(slot_row);
  p.dtype = dtype_of(rows);
  check_launch(moe_combine_backward(p, current_stream(rows)));
  return {drows, dweights};
}

// Of x, which must be as gate is.
void check_like_gate(const char* name, const Tensor& x, const Tensor& gate) {
  check_matrix(name, x);
  check_device(name, x, gate);
  STD_TORCH_CHECK(x.size(0) == gate.size(0) && x.size(1) == gate.size(1) && x.scalar_type() == gate.scalar_type(), name,
                  " must be ", text(gate), " in the dtype of gate, ", torch::headeronly::toString(gate.scalar_type()),
                  ", found ", text(x), " ", torch::headeronly::toString(x.scalar_type()));
}

void check_glu(const Tensor& gate, const Tensor& up, const Tensor& offsets, const std::optional<Tensor>& row_weight) {
  check_matrix("gate", gate);
  check_like_gate("up", up, gate);
  check_indices("offsets", offsets, 1, gate);
  STD_TORCH_CHECK(offsets.size(0) >= 1, "offsets must be [experts + 1], found ", text(offsets));
  if (!row_weight) return;
  STD_TORCH_CHECK(row_weight->dim() == 1 && row_weight->size(0) == gate.size(0), "row_weight must be [", gate.size(0),
                  "], found ", text(*row_weight));
  STD_TORCH_CHECK(row_weight->scalar_type() == wide_type(gate), "row_weight must be ",
                  torch::headeronly::toString(wide_type(gate)), ", found ",
                  torch::headeronly::toString(row_weight->scalar_type()));
  check_device("row_weight", *row_weight, gate);
}

// The address of offsets[E].
const int32_t* used_rows(const Tensor& offsets) {
  return offsets.const_data_ptr<int32_t>() + (offsets.size(0) - 1) * offsets.stride(0);
}

Tensor glu(const Tensor& gate, const Tensor& up, const Tensor& offsets, const std::optional<Tensor>& row_weight) {
  check_glu(gate, up, offsets, row_weight);
  const DeviceGuard guard(gate.get_device_index());
  const Tensor factors = row_weight ? torch::stable::contiguous(*row_weight) : Tensor();
  Tensor out = new_empty(gate, {gate.size(0), gate.size(1)});
  GluParams p{};
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.used = used_rows(offsets);
  p.row_weight = row_weight ? factors.const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.row_count = gate.size(0), p.dim = gate.size(1), p.gate_stride = gate.stride(0), p.up_stride = up.stride(0);
  p.dtype = dtype_of(gate);
  check_launch(moe_glu(p, current_stream(gate)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> glu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up,
                                                const Tensor& offsets, const std::optional<Tensor>& row_weight) {
  check_glu(gate, up, offsets, row_weight);
  check_like_gate("dout", dout, gate);
  const DeviceGuard guard(gate.get_device_index());
  const Tensor factors = row_weight ? torch::stable::contiguous(*row_weight) : Tensor();
  Tensor dgate = new_empty(gate, {gate.size(0), gate.size(1)});
  Tensor dup = new_empty(gate, {gate.size(0), gate.size(1)});
  Tensor drow_weight = new_empty(gate, {row_weight ? gate.size(0) : 0}, wide_type(gate));
  GluBackwardParams p{};
  p.dout = dout.const_data_ptr();
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.used = used_rows(offsets);
  p.row_weight = row_weight ? factors.const_data_ptr() : nullptr;
  p.dgate = dgate.mutable_data_ptr();
  p.dup = dup.mutable_data_ptr();
  p.drow_weight = drow_weight.mutable_data_ptr();
  p.row_count = gate.size(0), p.dim = gate.size(1);
  p.dout_stride = dout.stride(0), p.gate_stride = gate.stride(0), p.up_stride = up.stride(0);
  p.dtype = dtype_of(gate);
  check_launch(moe_glu_backward(p, current_stream(gate)));
  return {dgate, dup, drow_weight};
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("route_plan", TORCH_BOX(&flashmoe::plan));
  m.impl("router_topk", TORCH_BOX(&flashmoe::topk));
  m.impl("router_topk_backward", TORCH_BOX(&flashmoe::topk_backward));
  m.impl("moe_glu", TORCH_BOX(&flashmoe::glu));
  m.impl("moe_glu_backward", TORCH_BOX(&flashmoe::glu_backward));
  m.impl("moe_permute", TORCH_BOX(&flashmoe::permute_tokens));
  m.impl("moe_combine", TORCH_BOX(&flashmoe::combine_rows));
  m.impl("moe_combine_backward", TORCH_BOX(&flashmoe::combine_backward));
}
