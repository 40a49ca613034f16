// ep_plan, ep_dispatch, ep_combine and ep_release on CUDA: checks, registration. flashmoe_train/ops/expert_parallel has their
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

// What whoever tells others something is given, checked.
Link link_of(const Tensor& first, const Tensor& signals, const Tensor& state, const Tensor& distance, int64_t rank) {
  const int64_t world = distance.numel();
  STD_TORCH_CHECK(world >= 2 && world <= MOST_RANKS, "peer memory connects 2 to ", MOST_RANKS, " ranks, found ", world);
  STD_TORCH_CHECK(rank >= 0 && rank < world, "rank must be one of the ", world, " ranks, found ", rank);
  check_shape("distance", distance, {world}, ScalarType::Long, first);
  check_shape("signals", signals, {CHANNELS, SIGNALS, world}, ScalarType::Int, first);
  check_shape("state", state, {STATE_WORDS}, ScalarType::Int, first);
  Link link{};
  link.distance = distance.const_data_ptr<int64_t>();
  link.signals = signals.mutable_data_ptr<int32_t>(), link.state = state.mutable_data_ptr<int32_t>();
  link.world = int(world), link.rank = int(rank);
  return link;
}

// What both directions are given besides.
void waits_for(Link& link, const Tensor& report, int64_t channel, int64_t layer, double timeout) {
  STD_TORCH_CHECK(channel >= 0 && channel < CHANNELS, "channel must be one of ", CHANNELS, ", found ", channel);
  STD_TORCH_CHECK(timeout > 0 && timeout < 1e6, "timeout must be positive seconds, found ", timeout);
  STD_TORCH_CHECK(!report.is_cuda() && report.scalar_type() == ScalarType::Int && report.numel() == REPORT_WORDS,
                  "report must be ", int(REPORT_WORDS), " Int in host memory, found ", text(report));
  link.report = report.mutable_data_ptr<int32_t>(), link.patience = int64_t(timeout * 1e9);
  link.channel = int(channel), link.layer = int(layer);
}

void check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks >= 1 && blocks <= MOST_BLOCKS, "blocks must be 1 to ", MOST_BLOCKS, ", found ", blocks);
}

void check_channels(int64_t read) {
  STD_TORCH_CHECK(read >= 0 && read < 1 << CHANNELS, "read must be a set of ", CHANNELS, " channels, found ", read);
}

// As 16-byte accesses want it.
Tensor aligned(const Tensor& x) {
  const bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(0) * x.element_size() % 16 == 0;
  return fits ? x : torch::stable::clone(x);
}

void dispatch(const Tensor& x, const Tensor& position, const Tensor& counts, const std::optional<Tensor>& ids,
              const std::optional<Tensor>& weights, const Tensor& rows, const Tensor& routing, const Tensor& arrived,
              const std::optional<Tensor>& arrived_ids, const std::optional<Tensor>& arrived_weights,
              const Tensor& signals, const Tensor& state, const Tensor& distance, const Tensor& report, int64_t rank,
              int64_t channel, int64_t layer, int64_t here, double timeout, int64_t blocks, int64_t read) {
  check_rows("x", x);
  const DeviceGuard guard(x.get_device_index());
  DispatchParams p{};
  p.link = link_of(x, signals, state, distance, rank);
  waits_for(p.link, report, channel, layer, timeout);
  const int64_t world = p.link.world, tokens = x.size(0);
  STD_TORCH_CHECK(rows.dim() == 3 && routing.dim() == 3, "rows and routing must have 3 dimensions, found ", text(rows),
                  ", ", text(routing));
  const int64_t places = rows.size(1), slots = routing.size(2) / 2;
  check_shape("rows", rows, {world, places, x.size(1)}, x.scalar_type(), x);
  check_shape("routing", routing, {world, places, 2 * slots}, ScalarType::Int, x);
  check_shape("position", position, {tokens, world}, ScalarType::Int, x);
  check_shape("counts", counts, {world}, ScalarType::Int, x);
  check_blocks(blocks), check_channels(read);
  STD_TORCH_CHECK(tokens <= places, "x must be of at most ", places, " tokens, found ", tokens);
  ReceiveParams r{};
  check_shape("arrived", arrived, {world}, ScalarType::Int, x);
  const bool routed = ids.has_value();
  STD_TORCH_CHECK(weights.has_value() == routed && arrived_ids.has_value() == routed &&
                      arrived_weights.has_value() == routed,
                  "ids and weights go together, and with those that arrive");
  if (routed) {
    check_shape("ids", *ids, {tokens, slots}, ScalarType::Int, x);
    check_shape("weights", *weights, {tokens, slots}, ScalarType::Float, x);
    check_shape("arrived_ids", *arrived_ids, {world * places, slots}, ScalarType::Int, x);
    check_shape("arrived_weights", *arrived_weights, {world * places, slots}, ScalarType::Float, x);
    p.ids = ids->const_data_ptr<int32_t>(), p.weights = weights->const_data_ptr<float>();
    r.ids = arrived_ids->mutable_data_ptr<int32_t>(), r.weights = arrived_weights->mutable_data_ptr<float>();
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
  check_launch(exchange_wait(p.link, stream));
  r.link = p.link, r.routing = routed ? p.routing : nullptr, r.counts = arrived.mutable_data_ptr<int32_t>();
  r.places = places, r.slots = int(slots), r.here = int(here);
  check_launch(exchange_receive(r, stream));
}

void combine(const Tensor& rows, const Tensor& position, const Tensor& arrived, const std::optional<Tensor>& values,
             const std::optional<Tensor>& ids, const Tensor& sums, const Tensor& slot_values, const Tensor& out,
             const std::optional<Tensor>& dslots, const Tensor& signals, const Tensor& state, const Tensor& distance,
             const Tensor& report, int64_t rank, int64_t channel, int64_t layer, int64_t here, double timeout,
             int64_t blocks, int64_t read) {
  check_rows("rows", rows);
  const DeviceGuard guard(rows.get_device_index());
  ReturnParams p{};
  p.link = link_of(rows, signals, state, distance, rank);
  waits_for(p.link, report, channel, layer, timeout);
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
  check_blocks(blocks), check_channels(read);
  STD_TORCH_CHECK(here >= 1, "here must be at least 1, found ", here);
  STD_TORCH_CHECK(values.has_value() == ids.has_value() && values.has_value() == dslots.has_value(),
                  "values, ids and dslots go together");
  check_shape("out", out, {tokens, rows.size(1)}, rows.scalar_type(), rows);
  const Tensor source = aligned(rows);
  SumParams s{};
  if (values) {
    check_shape("values", *values, {world * places, slots}, ScalarType::Float, rows);
    check_shape("ids", *ids, {tokens, slots}, ScalarType::Int, rows);
    check_shape("dslots", *dslots, {tokens, slots}, ScalarType::Float, rows);
    p.values = values->const_data_ptr<float>(), s.ids = ids->const_data_ptr<int32_t>();
    s.dslots = dslots->mutable_data_ptr<float>();
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
  s.out = out.mutable_data_ptr();
  s.tokens = tokens, s.places = places, s.rows_stride_bytes = p.rows_stride_bytes, s.row_bytes = p.row_bytes;
  s.slots = int(slots), s.here = int(here), s.half = rows.scalar_type() == ScalarType::Half;
  check_launch(exchange_sum(s, stream));
}

void release(const Tensor& signals, const Tensor& state, const Tensor& distance, int64_t rank, int64_t read) {
  STD_TORCH_CHECK(signals.is_cuda(), "signals must be on a CUDA device like the other tensors");
  const DeviceGuard guard(signals.get_device_index());
  const Link link = link_of(signals, signals, state, distance, rank);
  check_channels(read);
  check_launch(exchange_release(link, int(read), current_stream(signals)));
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("ep_plan", TORCH_BOX(&flashmoe::plan));
  m.impl("ep_dispatch", TORCH_BOX(&flashmoe::dispatch));
  m.impl("ep_combine", TORCH_BOX(&flashmoe::combine));
  m.impl("ep_release", TORCH_BOX(&flashmoe::release));
}
