// moe_forward and the parts of its backward on CUDA: checks, allocation, the order of the kernels.
// flashmoe_train/ops/moe/experts.py has their schemas.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding.h"
#include "moe/experts.h"
#include "moe/moe.h"
#include "moe/operators.h"

namespace flashmoe {
namespace {

using torch::headeronly::toString;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

Matrix matrix(const Tensor& x) { return {const_cast<void*>(x.const_data_ptr()), x.stride(0)}; }

// From some row and column on.
Weights weights_of(const Tensor& w, int64_t row = 0, int64_t column = 0) {
  const char* const data = static_cast<const char*>(w.const_data_ptr());
  return {const_cast<char*>(data + (row * w.stride(1) + column) * w.element_size()), w.stride(1), w.stride(0)};
}

// Columns of d that are permuted at a time for a gradient of weights, in which each is on its own: all, or where the gradients
// are most of the memory a half, of long ones a quarter (docs/kernels/moe.md). Each chunk is a launch, which reads the other
// operand anew and ends with idle multiprocessors. A multiple of both sides of a tile, so that only the last chunk has
// tiles that are not whole.
constexpr int LEAST_CHUNK = 512, CHUNK_MULTIPLE = 256;
constexpr double LONG = 1e12;  // FLOPs of the gradients of w1 and w3

// From this hidden dim on tokens are copied to their rows beside the products that read them, which take long enough then; below
// it they are permuted before.
constexpr int LEAST_HIDDEN_BESIDE = 768;

// Kernels count a little beyond: by tiles, and by batches of rows that copying warps claim.
constexpr int64_t MOST_ROWS = INT32_MAX - (1 << 16);

// Named in errors: what else has to be like it.
struct First {
  const char* name;
  const Tensor& tensor;
};

void check_dtype(const char* name, const Tensor& tensor, const First& first) {
  STD_TORCH_CHECK(tensor.scalar_type() == first.tensor.scalar_type(), name, " must have ", first.name, "'s dtype ",
                  toString(first.tensor.scalar_type()), ", found ", toString(tensor.scalar_type()));
}

void check_like(const char* name, const Tensor& tensor, const First& first, int64_t rows, int64_t columns) {
  check_matrix(name, tensor);
  check_device(name, tensor, first.tensor);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, name, " must be [", rows, ", ", columns, "], found ",
                  text(tensor));
  check_dtype(name, tensor, first);
}

void check_expert_weights(const char* name, const Tensor& w, const First& first, int64_t experts, int64_t rows,
                          int64_t columns) {
  check_device(name, w, first.tensor);
  STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == experts && w.size(1) == rows && w.size(2) == columns, name, " must be [",
                  experts, ", ", rows, ", ", columns, "], found ", text(w));
  check_dtype(name, w, first);
  STD_TORCH_CHECK(w.size(2) <= 1 || w.stride(2) == 1, name, " must have a contiguous last dimension, found stride ",
                  w.stride(2));
}

// Of w1, or of w2: [experts, rows, columns].
int64_t size_of(const char* name, const Tensor& w, const char* shape, int dimension) {
  STD_TORCH_CHECK(w.dim() == 3, name, " must be ", shape, ", found ", text(w));
  return w.size(dimension);
}
constexpr char UP[] = "[experts, hidden dim, model dim]", DOWN[] = "[experts, model dim, hidden dim]";

// Where rows come from and go to; without row_slot and slot_row what is given is rows already.
struct Plan {
  const Tensor& offsets;
  const std::optional<Tensor>& row_slot;
  const std::optional<Tensor>& slot_row;
};

// What the operators are given, checked, and in the form that kernels read.
struct Layer {
  First first;
  Tensor offsets, row_slot, slot_row;
  std::optional<Tensor> weights;
  bool routed;     // with a plan
  int64_t tokens;  // rows where there is no plan
  Experts experts;

  Layer(const First& first, int64_t count, int64_t dim, int64_t hidden, const Plan& plan)
      : first(first), routed(plan.row_slot.has_value()) {
    const Tensor& x = first.tensor;
    check_matrix(first.name, x);
    check_hopper("moe", x.get_device_index());
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, first.name,
                    " must be bfloat16 or float16 for the compiled kernels, found ", toString(type));
    STD_TORCH_CHECK(dim > 0 && hidden > 0 && dim % 8 == 0 && hidden % 8 == 0 && hidden <= INT32_MAX / 2,
                    "the compiled kernels take a model dim and a hidden dim that are multiples of 8, found ", dim, " and ",
                    hidden);
    STD_TORCH_CHECK(count >= 1 && count <= MOST_EXPERTS, "the compiled kernels take 1 to ", MOST_EXPERTS,
                    " experts, found ", count);
    check_indices("offsets", plan.offsets, 1, x);
    STD_TORCH_CHECK(plan.offsets.size(0) == count + 1, "offsets must be [experts + 1] = [", count + 1, "], found ",
                    text(plan.offsets));
    STD_TORCH_CHECK(plan.row_slot.has_value() == plan.slot_row.has_value(), "row_slot and slot_row must be given together");
    if (routed) {
      check_indices("row_slot", *plan.row_slot, 1, x);
      check_indices("slot_row", *plan.slot_row, 2, x);
      row_slot = torch::stable::contiguous(*plan.row_slot), slot_row = torch::stable::contiguous(*plan.slot_row);
    }
    offsets = torch::stable::contiguous(plan.offsets);
    tokens = routed ? slot_row.size(0) : x.size(0);
    const int64_t rows = routed ? row_slot.size(0) : x.size(0);
    STD_TORCH_CHECK(rows <= MOST_ROWS, "the compiled kernels take at most ", MOST_ROWS, " rows, found ", rows);
    experts = {offsets.const_data_ptr<int32_t>(), rows, int(count), int(dim), int(hidden), type == ScalarType::Half};
  }

  void check_tokens(const char* name, const Tensor& x) const {
    check_matrix(name, x);
    STD_TORCH_CHECK(!routed || slot_row.size(0) == x.size(0), "slot_row must have a row per token of ", name, ", found ",
                    text(slot_row), " and ", text(x));
    check_like(name, x, first, tokens, experts.dim);
  }

  void check_rows(const char* name, const Tensor& rows, int64_t columns) const {
    check_like(name, rows, first, experts.rows, columns);
  }

  // Whether they multiply the experts' outputs.
  bool take_weights(const std::optional<Tensor>& given, const std::string& score_mode) {
    const bool combine = score_mode == "combine";
    STD_TORCH_CHECK(combine || score_mode == "activation",
                    "score_mode must be one of ('combine', 'activation'), found '", score_mode, "'");
    if (given) {
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float, "weights must be Float, found ",
                      toString(given->scalar_type()));
      check_device("weights", *given, first.tensor);
      const bool fits = routed ? given->dim() == 2 && given->size(0) == slot_row.size(0) && given->size(1) == slot_row.size(1)
                               : given->dim() == 1 && given->size(0) == tokens;
      STD_TORCH_CHECK(fits, "weights must be one for each slot, or row, found ", text(*given));
      STD_TORCH_CHECK(routed || !combine, "weights of rows multiply the activation: score_mode must be 'activation'");
      weights = torch::stable::contiguous(*given);
    }
    return combine;
  }

  Tensor matrix_of(int64_t columns) const { return new_empty(first.tensor, {experts.rows, columns}); }

  // Whether products copy tokens to their rows themselves, beside what they multiply, or find them permuted.
  bool copied_beside() const { return routed && experts.hidden >= LEAST_HIDDEN_BESIDE; }

  // What `launches` kernels count with, zeros: tiles claimed, and if they copy tokens how many of them have.
  struct Counters {
    Tensor numbers;
    int64_t each;

    int32_t* claimed(int64_t launch) const { return numbers.mutable_data_ptr<int32_t>() + launch * each; }
  };
  Counters counters(int64_t launches, bool copying, cudaStream_t stream) const {
    copying &= copied_beside();
    const int64_t each = 1 + (copying ? gather_counters(experts.rows) : 0), count = launches * each;
    Tensor numbers = new_empty(first.tensor, {count}, ScalarType::Int);
    if (copying)
      check_launch(moe_prepare_gather({row_slot.const_data_ptr<int32_t>(), slot_row.const_data_ptr<int32_t>(),
                                       numbers.mutable_data_ptr<int32_t>(), slot_row.size(0), experts.rows, count,
                                       int(slot_row.size(1))},
                                      stream));
    else torch::stable::zero_(numbers);
    return {numbers, each};
  }

  RowWeights row_weights() const {
    return {weights ? weights->const_data_ptr<float>() : nullptr, routed ? row_slot.const_data_ptr<int32_t>() : nullptr};
  }

  // Of tokens, or their gradients, the columns from `column` on, for a launch that has these counters.
  Gather gather_of(const Tensor& tokens, int32_t* claimed, int64_t column = 0) const {
    if (!copied_beside()) return {};
    void* const data = static_cast<char*>(const_cast<void*>(tokens.const_data_ptr())) + column * tokens.element_size();
    return {{data, tokens.stride(0)}, row_slot.const_data_ptr<int32_t>(), std::max(int(slot_row.size(1)), 1), claimed + 1};
  }
  // Tokens as rows, or where a launch puts them.
  Tensor rows_of(const Tensor& tokens) const {
    if (!routed) return tokens;
    return copied_beside() ? matrix_of(experts.dim) : permute_tokens(tokens, row_slot, slot_row);
  }

  // For the gradients that come last, when all of them are alive.
  int last_chunk() const {
    const Experts& e = experts;
    const bool most_of_memory = int64_t(e.count) * e.dim > e.rows;
    const int parts = !most_of_memory ? 1 : 4.0 * e.rows * e.hidden * e.dim < LONG ? 2 : 4;
    const int part = (e.dim + parts - 1) / parts;
    return std::min(std::max(LEAST_CHUNK, (part + CHUNK_MULTIPLE - 1) / CHUNK_MULTIPLE * CHUNK_MULTIPLE), e.dim);
  }
  // For that of w2, which comes last where experts are wider than the model, else before the others are there.
  int down_chunk() const { return experts.hidden > experts.dim ? last_chunk() : experts.dim; }

  // Rows of tokens for gradients of weights, by chunks of `width` columns, one after the other in the same memory:
  // visit(counter of claimed tiles, what to gather, rows, first column, columns). What is rows already is one chunk.
  template <typename Visit>
  void each_chunk(const Tensor& tokens, int width, cudaStream_t stream, Visit visit) const {
    const Tensor source = readable(tokens);
    const Counters counters = this->counters(routed ? (experts.dim + width - 1) / width : 1, true, stream);
    if (!routed) return visit(counters.claimed(0), Gather{}, matrix(source), 0, experts.dim);
    Tensor rows = matrix_of(width);
    for (int i = 0, begin = 0; begin < experts.dim; ++i, begin += width) {
      const int columns = std::min(width, experts.dim - begin);
      if (!copied_beside()) permute_columns(source, begin, columns, row_slot, slot_row, rows.mutable_data_ptr());
      visit(counters.claimed(i), gather_of(source, counters.claimed(i), begin), Matrix{rows.mutable_data_ptr(), columns}, begin,
            columns);
    }
  }

  // Rows summed over each token's slots; rows themselves where they are what was asked for.
  Tensor tokens_of(const Tensor& rows, const std::optional<Tensor>& factors, cudaStream_t stream) const {
    if (routed) return combine_rows(rows, slot_row, factors);
    if (experts.rows > 0)
      check_launch(moe_zero_nobodys({experts.offsets + experts.count, rows.mutable_data_ptr(), experts.rows,
                                     rows.size(1) * int64_t(2)},
                                    stream));
    return rows;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3,
                                   const std::optional<Tensor>& weights, const Tensor& offsets,
                                   const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row,
                                   const std::string& score_mode) {
  check_matrix("x", x);
  Layer layer({"x", x}, size_of("w1", w1, UP, 0), x.size(1), size_of("w1", w1, UP, 1), {offsets, row_slot, slot_row});
  const Experts& e = layer.experts;
  layer.check_tokens("x", x);
  check_expert_weights("w1", w1, layer.first, e.count, e.hidden, e.dim);
  check_expert_weights("w2", w2, layer.first, e.count, e.dim, e.hidden);
  check_expert_weights("w3", w3, layer.first, e.count, e.hidden, e.dim);
  const bool combine = layer.take_weights(weights, score_mode);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  Tensor h = layer.matrix_of(2 * e.hidden);
  if (e.rows == 0) return {layer.tokens_of(layer.matrix_of(e.dim), std::nullopt, stream), h};

  const Tensor x_ = readable(x), w1_ = readable(w1), w2_ = readable(w2), w3_ = readable(w3);
  const Layer::Counters counters = layer.counters(2, true, stream);
  Tensor y;
  {
    Tensor a = layer.matrix_of(e.hidden);
    {
      const Tensor rows = layer.rows_of(x_);
      const RowWeights scores = combine ? RowWeights{} : layer.row_weights();
      check_launch(moe_up({e, counters.claimed(0), layer.gather_of(x_, counters.claimed(0)), matrix(rows), weights_of(w1_),
                           weights_of(w3_), scores, matrix(h), matrix(a)},
                          stream));
    }
    y = layer.matrix_of(e.dim);
    check_launch(moe_down({e, counters.claimed(1), matrix(a), weights_of(w2_), matrix(y)}, stream));
  }
  return {layer.tokens_of(y, combine ? layer.weights : std::nullopt, stream), h};
}

// Zeros, for what is not written: slots without a row, and rows of nobody, have no gradient.
Tensor dweights_of(const Tensor& like, const std::optional<Tensor>& weights) {
  Tensor found = weights ? new_empty(*weights, weights->sizes()) : new_empty(like, {0}, ScalarType::Float);
  return torch::stable::zero_(found);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> down_backward(const Tensor& dout, const Tensor& w2,
                                                         const std::optional<Tensor>& weights, const Tensor& h,
                                                         const Tensor& offsets, const std::optional<Tensor>& row_slot,
                                                         const std::optional<Tensor>& slot_row,
                                                         const std::string& score_mode, bool keep_rows) {
  Layer layer({"dout", dout}, size_of("w2", w2, DOWN, 0), size_of("w2", w2, DOWN, 1), size_of("w2", w2, DOWN, 2),
              {offsets, row_slot, slot_row});
  const Experts& e = layer.experts;
  layer.check_tokens("dout", dout);
  check_expert_weights("w2", w2, layer.first, e.count, e.dim, e.hidden);
  layer.take_weights(weights, score_mode);
  layer.check_rows("h", h, int64_t(2) * e.hidden);
  const DeviceGuard guard(dout.get_device_index());
  const cudaStream_t stream = current_stream(dout);
  Tensor a = layer.matrix_of(e.hidden), dweights = dweights_of(dout, weights);
  Tensor dy = new_empty(dout, {0, int64_t(e.dim)});
  if (e.rows == 0) return {layer.matrix_of(2 * e.hidden), a, dweights, dy};

  const Tensor readable_h = readable(h);
  {
    const Tensor dout_ = readable(dout), w2_ = readable(w2), rows = layer.rows_of(dout_);
    const Layer::Counters counters = layer.counters(1, true, stream);
    check_launch(moe_down_backward({e, counters.claimed(0), layer.gather_of(dout_, counters.claimed(0)), matrix(rows),
                                    weights_of(w2_), matrix(a)},
                                   stream));
    if (keep_rows && layer.routed) dy = rows;
  }
  Tensor dh = layer.matrix_of(2 * e.hidden);
  check_launch(moe_activation_backward({e, matrix(readable_h), layer.row_weights(), matrix(dh), matrix(a),
                                        layer.weights ? dweights.mutable_data_ptr<float>() : nullptr},
                                       stream));
  return {dh, a, dweights, dy};
}

Tensor up_backward(const Tensor& dh, const Tensor& w1, const Tensor& w3, const Tensor& offsets,
                   const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row) {
  const Layer layer({"dh", dh}, size_of("w1", w1, UP, 0), size_of("w1", w1, UP, 2), size_of("w1", w1, UP, 1),
                    {offsets, row_slot, slot_row});
  const Experts& e = layer.experts;
  layer.check_rows("dh", dh, int64_t(2) * e.hidden);
  check_expert_weights("w1", w1, layer.first, e.count, e.hidden, e.dim);
  check_expert_weights("w3", w3, layer.first, e.count, e.hidden, e.dim);
  const DeviceGuard guard(dh.get_device_index());
  const cudaStream_t stream = current_stream(dh);
  Tensor rows = layer.matrix_of(e.dim);
  if (e.rows > 0) {
    const Tensor dh_ = readable(dh), w1_ = readable(w1), w3_ = readable(w3);
    const Layer::Counters counters = layer.counters(1, false, stream);
    check_launch(moe_up_backward(
        {e, counters.claimed(0), matrix(dh_), weights_of(w1_), weights_of(w3_), matrix(rows)}, stream));
  }
  return layer.tokens_of(rows, std::nullopt, stream);
}

// TMA adds to rows that begin at multiples of 16 bytes; a copy would not be what was given.
void check_sum(const char* name, const Tensor& sum, const Layer& layer, int64_t rows, int64_t columns) {
  const Tensor& x = layer.first.tensor;
  const int64_t experts = layer.experts.count;
  check_device(name, sum, x);
  STD_TORCH_CHECK(sum.dim() == 3 && sum.size(0) == experts && sum.size(1) == rows && sum.size(2) == columns, name,
                  " must be [", experts, ", ", rows, ", ", columns, "], found ", text(sum));
  STD_TORCH_CHECK(sum.scalar_type() == ScalarType::Float || sum.scalar_type() == x.scalar_type(), name,
                  " must be Float or of ", layer.first.name, "'s dtype ", toString(x.scalar_type()), ", found ",
                  toString(sum.scalar_type()));
  const int64_t elements = 16 / sum.element_size();
  STD_TORCH_CHECK(sum.stride(2) == 1 && sum.stride(1) >= columns && sum.stride(1) % elements == 0 &&
                      (experts == 1 || (sum.stride(0) >= rows * sum.stride(1) && sum.stride(0) % elements == 0)) &&
                      reinterpret_cast<uintptr_t>(sum.const_data_ptr()) % 16 == 0,
                  name, " must have contiguous rows that begin at multiples of 16 bytes, found strides (", sum.stride(0), ", ",
                  sum.stride(1), ", ", sum.stride(2), ")");
}

// Whether there are rows. Without any the sums are what they were, or zeros where they are not added to.
bool has_rows(const Layer& layer, bool accumulate, std::initializer_list<Tensor*> sums) {
  if (layer.experts.rows > 0) return true;
  if (!accumulate)
    for (Tensor* sum : sums) torch::stable::zero_(*sum);
  return false;
}

GradientSums to(const Tensor& sum, bool accumulate) { return {sum.scalar_type() == ScalarType::Float, accumulate}; }

void weight_gradient_down(Tensor dw2, const Tensor& dout, const Tensor& a, const Tensor& offsets,
                          const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row, bool accumulate) {
  check_matrix("dout", dout);
  const Layer layer({"dout", dout}, size_of("dw2", dw2, DOWN, 0), dout.size(1), size_of("dw2", dw2, DOWN, 2),
                    {offsets, row_slot, slot_row});
  const Experts& e = layer.experts;
  layer.check_tokens("dout", dout);
  layer.check_rows("a", a, e.hidden);
  check_sum("dw2", dw2, layer, e.dim, e.hidden);
  const DeviceGuard guard(dout.get_device_index());
  if (!has_rows(layer, accumulate, {&dw2})) return;
  const Tensor a_ = readable(a);
  const cudaStream_t stream = current_stream(dout);
  layer.each_chunk(dout, layer.down_chunk(), stream, [&](int32_t* claimed, const Gather& gather, const Matrix& dy, int begin,
                                                         int columns) {
    check_launch(moe_weight_gradient_down(
        {e, claimed, gather, columns, dy, matrix(a_), weights_of(dw2, begin), to(dw2, accumulate)}, stream));
  });
}

void weight_gradient_up(Tensor dw1, Tensor dw3, const Tensor& x, const Tensor& dh, const Tensor& offsets,
                        const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row, bool accumulate) {
  check_matrix("x", x);
  const Layer layer({"x", x}, size_of("dw1", dw1, UP, 0), x.size(1), size_of("dw1", dw1, UP, 1),
                    {offsets, row_slot, slot_row});
  const Experts& e = layer.experts;
  layer.check_tokens("x", x);
  layer.check_rows("dh", dh, int64_t(2) * e.hidden);
  check_sum("dw1", dw1, layer, e.hidden, e.dim);
  check_sum("dw3", dw3, layer, e.hidden, e.dim);
  check_dtype("dw3", dw3, {"dw1", dw1});
  const DeviceGuard guard(x.get_device_index());
  if (!has_rows(layer, accumulate, {&dw1, &dw3})) return;
  const Tensor dh_ = readable(dh);
  const cudaStream_t stream = current_stream(x);
  layer.each_chunk(x, layer.last_chunk(), stream, [&](int32_t* claimed, const Gather& gather, const Matrix& rows, int begin,
                                                      int columns) {
    check_launch(moe_weight_gradient_up({e, claimed, gather, columns, matrix(dh_), rows, weights_of(dw1, 0, begin),
                                         weights_of(dw3, 0, begin), to(dw1, accumulate)},
                                        stream));
  });
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("moe_forward", TORCH_BOX(&flashmoe::forward));
  m.impl("moe_down_backward", TORCH_BOX(&flashmoe::down_backward));
  m.impl("moe_up_backward", TORCH_BOX(&flashmoe::up_backward));
  m.impl("moe_weight_gradient_down_", TORCH_BOX(&flashmoe::weight_gradient_down));
  m.impl("moe_weight_gradient_up_", TORCH_BOX(&flashmoe::weight_gradient_up));
}
