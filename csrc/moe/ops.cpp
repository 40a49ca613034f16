// The mixture-of-experts operators on CUDA: checks, allocation, registration. flashmoe_train/ops/moe has their schemas.
#include <climits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding.h"
#include "moe/moe.h"

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

void check_weights(const Tensor& weights, const Tensor& slot_row, const Tensor& rows) {
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == slot_row.size(0) && weights.size(1) == slot_row.size(1),
                  "weights must be ", text(slot_row), ", found ", text(weights));
  const ScalarType wanted = rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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
  STD_TORCH_CHECK(ids.is_cuda(), "ids must be on a CUDA device");
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

Tensor permute(const Tensor& x, const Tensor& row_slot, const Tensor& slot_row) {
  check_matrix("x", x);
  check_indices("row_slot", row_slot, 1, x);
  check_indices("slot_row", slot_row, 2, x);
  STD_TORCH_CHECK(slot_row.size(0) == x.size(0), "slot_row must have one row per token of x, found ", text(slot_row),
                  ", x ", text(x));
  const DeviceGuard guard(x.get_device_index());
  const Tensor slots = torch::stable::contiguous(row_slot), index = torch::stable::contiguous(slot_row);
  Tensor rows = new_empty(x, {row_slot.size(0), x.size(1)});
  PermuteParams p{};
  p.x = x.const_data_ptr();
  p.row_slot = slots.const_data_ptr<int32_t>();
  p.slot_row = index.const_data_ptr<int32_t>();
  p.rows = rows.mutable_data_ptr();
  p.tokens = x.size(0), p.row_count = row_slot.size(0), p.dim = x.size(1), p.x_stride = x.stride(0);
  p.slots = check_slots(slot_row);
  p.element_size = static_cast<int>(x.element_size());
  check_launch(moe_permute(p, current_stream(x)));
  return rows;
}

Tensor combine(const Tensor& rows, const Tensor& slot_row, const std::optional<Tensor>& weights) {
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

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("route_plan", TORCH_BOX(&flashmoe::plan));
  m.impl("moe_permute", TORCH_BOX(&flashmoe::permute));
  m.impl("moe_combine", TORCH_BOX(&flashmoe::combine));
  m.impl("moe_combine_backward", TORCH_BOX(&flashmoe::combine_backward));
}
