// ep_plan, ep_dispatch and ep_combine on CUDA: checks, allocation, registration. flashmoe_train/ops/expert_parallel has their
// schemas.
#include <climits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding.h"
#include "expert_parallel/exchange.h"

namespace flashmoe {
namespace {

using torch::headeronly::toString;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

constexpr int MOST_BLOCKS = 128;  // that push: all of them have to be on the GPU at once, beside others

void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> shape, ScalarType type,
                 const Tensor& first) {
  check_device(name, x, first);
  bool fits = x.dim() == int64_t(shape.size()) && x.scalar_type() == type;
  int64_t i = 0, stride = 1;
  std::string wanted;
  for (const int64_t size : shape) {
    fits = fits && x.size(i++) == size;
    wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  }
  for (i = x.dim() - 1; i >= 0 && fits; --i) {
    fits = x.size(i) <= 1 || x.stride(i) == stride;
    stride *= x.size(i);
  }
  STD_TORCH_CHECK(fits, name, " must be [", wanted, "] in ", toString(type), ", contiguous, found ", text(x), " in ",
                  toString(x.scalar_type()));
}

// Rows of 16-bit numbers that 16-byte accesses can reach.
void check_rows(const char* name, const Tensor& x) {
  check_matrix(name, x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, name,
                  " must be BFloat16 or Half, found ", toString(x.scalar_type()));
  STD_TORCH_CHECK(x.size(1) >= 8 && x.size(1) % 8 == 0, name, " must have a multiple of 8 columns, found ", text(x));
}

std::tuple<Tensor, Tensor> plan(const Tensor& ids, int64_t experts, int64_t world) {
  STD_TORCH_CHECK(ids.is_cuda(), "ids must be on a CUDA device like the other tensors");
  check_indices("ids", ids, 2, ids);
  STD_TORCH_CHECK(ids.size(1) >= 1 && ids.numel() <= INT_MAX,
                  "ids must be [tokens, experts per token] with fewer than 2^31 entries, found ", text(ids));
  STD_TORCH_CHECK(world >= 1 && experts >= 1 && experts <= INT_MAX && experts % world == 0,
                  "experts must be a multiple of the ranks, found ", experts, " for ", world);
  const DeviceGuard guard(ids.get_device_index());
  const Tensor slots = torch::stable::contiguous(ids);
  Tensor position = new_empty(ids, {ids.size(0), world}), counts = new_empty(ids, {world});
  check_launch(exchange_plan({slots.const_data_ptr<int32_t>(), position.mutable_data_ptr<int32_t>(),
                              counts.mutable_data_ptr<int32_t>(), ids.size(0), int(ids.size(1)), int(experts),
                              int(world)},
                             current_stream(ids)));
  return {position, counts};
}

// What both directions are given, checked.
Link link_of(const Tensor& rows, const Tensor& signals, const Tensor& state, const Tensor& distance,
             const Tensor& report, int64_t rank, int64_t channel, int64_t layer, double timeout) {
  const int64_t world = distance.numel();
  STD_TORCH_CHECK(world >= 2 && world <= MOST_RANKS, "peer memory connects 2 to ", MOST_RANKS, " ranks, found ", world);
  STD_TORCH_CHECK(rank >= 0 && rank < world, "rank must be one of the ", world, " ranks, found ", rank);
  STD_TORCH_CHECK(channel >= 0 && channel < CHANNELS, "channel must be one of ", CHANNELS, ", found ", channel);
  STD_TORCH_CHECK(timeout > 0 && timeout < 1e6, "timeout must be positive seconds, found ", timeout);
  check_shape("distance", distance, {world}, ScalarType::Long, rows);
  check_shape("signals", signals, {CHANNELS, SIGNALS, world}, ScalarType::Int, rows);
  check_shape("state", state, {STATE_WORDS}, ScalarType::Int, rows);
  STD_TORCH_CHECK(!report.is_cuda() && report.scalar_type() == ScalarType::Int && report.numel() == REPORT_WORDS,
                  "report must be ", int(REPORT_WORDS), " Int in host memory, found ", text(report));
  return {distance.const_data_ptr<int64_t>(),
          signals.mutable_data_ptr<int32_t>(),
          state.mutable_data_ptr<int32_t>(),
          report.mutable_data_ptr<int32_t>(),
          int64_t(timeout * 1e9),
          int(world),
          int(rank),
          int(channel),
          int(layer)};
}

void check_sending(int64_t blocks, int64_t read) {
  STD_TORCH_CHECK(blocks >= 1 && blocks <= MOST_BLOCKS, "blocks must be 1 to ", MOST_BLOCKS, ", found ", blocks);
  STD_TORCH_CHECK(read >= 0 && read < 1 << CHANNELS, "read must be a set of ", CHANNELS, " channels, found ", read);
}

// As 16-byte accesses want it.
Tensor aligned(const Tensor& x) {
  const bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(0) * x.element_size() % 16 == 0;
  return fits ? x : torch::stable::clone(x);
}

std::tuple<Tensor, Tensor, Tensor> dispatch(const Tensor& x, const Tensor& position, const Tensor& counts,
                                            const std::optional<Tensor>& ids, const std::optional<Tensor>& weights,
                                            const Tensor& rows, const Tensor& routing, const Tensor& signals,
                                            const Tensor& state, const Tensor& distance, const Tensor& report,
                                            int64_t rank, int64_t channel, int64_t layer, int64_t here, double timeout,
                                            int64_t blocks, int64_t read) {
  check_rows("x", x);
  const DeviceGuard guard(x.get_device_index());
  DispatchParams p{};
  p.link = link_of(x, signals, state, distance, report, rank, channel, layer, timeout);
  const int64_t world = p.link.world, tokens = x.size(0);
  STD_TORCH_CHECK(rows.dim() == 3 && routing.dim() == 3, "rows and routing must have 3 dimensions, found ", text(rows),
                  ", ", text(routing));
  const int64_t places = rows.size(1), slots = routing.size(2) / 2;
  check_shape("rows", rows, {world, places, x.size(1)}, x.scalar_type(), x);
  check_shape("routing", routing, {world, places, 2 * slots}, ScalarType::Int, x);
  check_shape("position", position, {tokens, world}, ScalarType::Int, x);
  check_shape("counts", counts, {world}, ScalarType::Int, x);
  check_sending(blocks, read);
  STD_TORCH_CHECK(tokens <= places, "x must be of at most ", places, " tokens, found ", tokens);
  STD_TORCH_CHECK(ids.has_value() == weights.has_value(), "ids and weights go together");
  if (ids) {
    check_shape("ids", *ids, {tokens, slots}, ScalarType::Int, x);
    check_shape("weights", *weights, {tokens, slots}, ScalarType::Float, x);
    p.ids = ids->const_data_ptr<int32_t>(), p.weights = weights->const_data_ptr<float>();
  }
  const Tensor source = aligned(x);
  p.x = source.const_data_ptr();
  p.position = position.const_data_ptr<int32_t>(), p.counts = counts.const_data_ptr<int32_t>();
  p.rows = rows.mutable_data_ptr(), p.routing = routing.mutable_data_ptr<int32_t>();
  p.tokens = tokens, p.places = places;
  p.x_stride_bytes = source.stride(0) * source.element_size(), p.row_bytes = x.size(1) * x.element_size();
  p.slots = int(slots), p.blocks = int(blocks), p.read = int(read);
  const cudaStream_t stream = current_stream(x);
  check_launch(exchange_dispatch(p, stream));

  const int64_t received = ids ? world * places : 0;
  Tensor own_counts = new_empty(counts, {world});
  Tensor own_ids = new_empty(counts, {received, slots});
  Tensor own_weights = new_empty(counts, {received, slots}, ScalarType::Float);
  check_launch(exchange_wait(p.link, stream));
  check_launch(exchange_receive({p.link, ids ? p.routing : nullptr, own_counts.mutable_data_ptr<int32_t>(),
                                 own_ids.mutable_data_ptr<int32_t>(), own_weights.mutable_data_ptr<float>(), places,
                                 int(slots), int(here)},
                                stream));
  return {own_counts, own_ids, own_weights};
}

std::tuple<Tensor, Tensor> combine(const Tensor& rows, const Tensor& position, const Tensor& arrived,
                                   const std::optional<Tensor>& values, const std::optional<Tensor>& ids,
                                   const Tensor& sums, const Tensor& slot_values, const Tensor& signals,
                                   const Tensor& state, const Tensor& distance, const Tensor& report, int64_t rank,
                                   int64_t channel, int64_t layer, int64_t here, double timeout, int64_t blocks,
                                   int64_t read) {
  check_rows("rows", rows);
  const DeviceGuard guard(rows.get_device_index());
  ReturnParams p{};
  p.link = link_of(rows, signals, state, distance, report, rank, channel, layer, timeout);
  const int64_t world = p.link.world;
  STD_TORCH_CHECK(sums.dim() == 3 && slot_values.dim() == 3 && position.dim() == 2,
                  "sums and slot_values must have 3 dimensions, position 2, found ", text(sums), ", ",
                  text(slot_values), ", ", text(position));
  const int64_t places = sums.size(1), slots = slot_values.size(2), tokens = position.size(0);
  STD_TORCH_CHECK(rows.size(0) == world * places, "rows must be [", world * places, ", d], found ", text(rows));
  check_shape("sums", sums, {world, places, rows.size(1)}, rows.scalar_type(), rows);
  check_shape("slot_values", slot_values, {world, places, slots}, ScalarType::Float, rows);
  check_shape("position", position, {tokens, world}, ScalarType::Int, rows);
  check_shape("arrived", arrived, {world}, ScalarType::Int, rows);
  check_sending(blocks, read);
  STD_TORCH_CHECK(here >= 1, "here must be at least 1, found ", here);
  STD_TORCH_CHECK(values.has_value() == ids.has_value(), "values and ids go together");
  const Tensor source = aligned(rows);
  Tensor out = new_empty(rows, {tokens, rows.size(1)});
  Tensor dslots = new_empty(rows, {values ? tokens : 0, slots}, ScalarType::Float);
  SumParams s{};
  if (values) {
    check_shape("values", *values, {world * places, slots}, ScalarType::Float, rows);
    check_shape("ids", *ids, {tokens, slots}, ScalarType::Int, rows);
    p.values = values->const_data_ptr<float>(), s.ids = ids->const_data_ptr<int32_t>();
  }
  p.rows = source.const_data_ptr(), p.arrived = arrived.const_data_ptr<int32_t>();
  p.sums = sums.mutable_data_ptr(), p.slot_values = slot_values.mutable_data_ptr<float>();
  p.places = places, p.rows_stride_bytes = source.stride(0) * source.element_size();
  p.row_bytes = rows.size(1) * rows.element_size();
  p.slots = int(slots), p.blocks = int(blocks), p.read = int(read);
  const cudaStream_t stream = current_stream(rows);
  check_launch(exchange_return(p, stream));
  check_launch(exchange_wait(p.link, stream));

  s.link = p.link, s.rows = p.rows, s.values = p.values, s.sums = p.sums, s.slot_values = p.slot_values;
  s.position = position.const_data_ptr<int32_t>();
  s.out = out.mutable_data_ptr(), s.dslots = dslots.mutable_data_ptr<float>();
  s.tokens = tokens, s.places = places, s.rows_stride_bytes = p.rows_stride_bytes, s.row_bytes = p.row_bytes;
  s.slots = int(slots), s.here = int(here), s.half = rows.scalar_type() == ScalarType::Half;
  check_launch(exchange_sum(s, stream));
  return {out, dslots};
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("ep_plan", TORCH_BOX(&flashmoe::plan));
  m.impl("ep_dispatch", TORCH_BOX(&flashmoe::dispatch));
  m.impl("ep_combine", TORCH_BOX(&flashmoe::combine));
}
