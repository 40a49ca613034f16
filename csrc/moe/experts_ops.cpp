// moe_forward and moe_backward on CUDA: checks, allocation, the order of the kernels. flashmoe_train/ops/moe/experts.py has
// their schemas.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding.h"
#include "moe/experts.h"
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

// Columns of d that are permuted at a time for a gradient of weights, in which each is on its own: a half; a quarter where the
// gradients are larger than the rows, and memory is theirs. Fewer need less memory, but each chunk is a launch, which reads
// the other operand anew and ends with idle multiprocessors. A multiple of both sides of a tile, so that only the last chunk
// has tiles that are not whole.
constexpr int LEAST_CHUNK = 512, CHUNK_MULTIPLE = 256;

void check_expert_weights(const char* name, const Tensor& w, const Tensor& x, int64_t experts, int64_t rows,
                          int64_t columns) {
  check_device(name, w, x);
  STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == experts && w.size(1) == rows && w.size(2) == columns, name, " must be [",
                  experts, ", ", rows, ", ", columns, "], found ", text(w));
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), name, " must have x's dtype ", toString(x.scalar_type()), ", found ",
                  toString(w.scalar_type()));
  STD_TORCH_CHECK(w.size(2) <= 1 || w.stride(2) == 1, name, " must have a contiguous last dimension, found stride ",
                  w.stride(2));
}

// What both operators are given, checked, and in the form that kernels read.
struct Layer {
  Tensor x, w1, w2, w3, offsets, row_slot, slot_row;  // row_slot, slot_row undefined: x is rows
  std::optional<Tensor> weights;
  bool routed, combine;  // with tokens and a plan; weights multiply the experts' outputs
  Experts experts;

  Layer(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3, const std::optional<Tensor>& weights,
        const Tensor& offsets, const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row,
        const std::string& score_mode)
      : x(x), routed(row_slot.has_value()), combine(score_mode == "combine") {
    check_matrix("x", x);
    check_hopper("moe", x.get_device_index());
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "x must be bfloat16 or float16 for the compiled kernels, found ", toString(type));
    STD_TORCH_CHECK(w1.dim() == 3, "w1 must be [experts, hidden dim, model dim], found ", text(w1));
    const int64_t count = w1.size(0), hidden = w1.size(1), dim = x.size(1);
    STD_TORCH_CHECK(dim > 0 && hidden > 0 && dim % 8 == 0 && hidden % 8 == 0 && hidden <= INT32_MAX / 2,
                    "the compiled kernels take a model dim and a hidden dim that are multiples of 8, found ", dim, " and ",
                    hidden);
    STD_TORCH_CHECK(count >= 1 && count <= MOST_EXPERTS, "the compiled kernels take 1 to ", MOST_EXPERTS,
                    " experts, found ", count);
    check_expert_weights("w1", w1, x, count, hidden, dim);
    check_expert_weights("w2", w2, x, count, dim, hidden);
    check_expert_weights("w3", w3, x, count, hidden, dim);
    check_indices("offsets", offsets, 1, x);
    STD_TORCH_CHECK(offsets.size(0) == count + 1, "offsets must be [experts + 1] = [", count + 1, "], found ", text(offsets));
    STD_TORCH_CHECK(score_mode == "combine" || score_mode == "activation",
                    "score_mode must be one of ('combine', 'activation'), found '", score_mode, "'");
    STD_TORCH_CHECK(row_slot.has_value() == slot_row.has_value(), "row_slot and slot_row must be given together");
    if (routed) {
      check_indices("row_slot", *row_slot, 1, x);
      check_indices("slot_row", *slot_row, 2, x);
      STD_TORCH_CHECK(slot_row->size(0) == x.size(0), "slot_row must have a row per token of x, found ", text(*slot_row),
                      " and ", text(x));
      this->row_slot = torch::stable::contiguous(*row_slot), this->slot_row = torch::stable::contiguous(*slot_row);
    }
    if (weights) {
      STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float, "weights must be Float, found ",
                      toString(weights->scalar_type()));
      check_device("weights", *weights, x);
      const bool fits = routed ? weights->dim() == 2 && weights->size(0) == slot_row->size(0) &&
                                     weights->size(1) == slot_row->size(1)
                               : weights->dim() == 1 && weights->size(0) == x.size(0);
      STD_TORCH_CHECK(fits, "weights must be one for each slot, or row, found ", text(*weights));
      STD_TORCH_CHECK(routed || !combine, "weights of rows multiply the activation: score_mode must be 'activation'");
      this->weights = torch::stable::contiguous(*weights);
    }
    this->w1 = readable(w1), this->w2 = readable(w2), this->w3 = readable(w3);
    this->offsets = torch::stable::contiguous(offsets);
    const int64_t rows = routed ? row_slot->size(0) : x.size(0);
    STD_TORCH_CHECK(rows <= INT32_MAX, "the compiled kernels take fewer than 2^31 rows, found ", rows);
    experts = {this->offsets.const_data_ptr<int32_t>(), rows, int(count), int(dim), int(hidden),
               type == ScalarType::Half};
  }

  Tensor matrix_of(int64_t columns) const { return new_empty(x, {experts.rows, columns}); }

  Tensor zeros(int64_t count) const {
    Tensor found = new_empty(x, {count}, ScalarType::Int);
    torch::stable::zero_(found);
    return found;
  }

  RowWeights row_weights() const {
    return {weights ? weights->const_data_ptr<float>() : nullptr, routed ? row_slot.const_data_ptr<int32_t>() : nullptr};
  }

  // Tokens, or their gradients, as rows.
  Tensor rows_of(const Tensor& tokens) const {
    return routed ? permute_tokens(tokens, row_slot, slot_row) : readable(tokens);
  }

  bool rows_outweigh_gradients() const { return int64_t(experts.count) * experts.dim <= experts.rows; }

  int chunk() const {
    const int parts = rows_outweigh_gradients() ? 2 : 4, part = (experts.dim + parts - 1) / parts;
    return std::min(std::max(LEAST_CHUNK, (part + CHUNK_MULTIPLE - 1) / CHUNK_MULTIPLE * CHUNK_MULTIPLE), experts.dim);
  }
  int chunks() const { return routed ? (experts.dim + chunk() - 1) / chunk() : 1; }

  // Rows of tokens for gradients of weights, by chunks of columns, one after the other in the same memory:
  // visit(rows, first column, columns). What is rows already is one chunk.
  template <typename Visit>
  void each_chunk(const Tensor& tokens, Visit visit) const {
    const Tensor source = readable(tokens);
    if (!routed) return visit(matrix(source), 0, experts.dim);
    const int width = chunk();
    Tensor rows = matrix_of(width);
    for (int first = 0; first < experts.dim; first += width) {
      const int columns = std::min(width, experts.dim - first);
      permute_columns(source, first, columns, row_slot, slot_row, rows.mutable_data_ptr());
      visit(Matrix{rows.mutable_data_ptr(), columns}, first, columns);
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

Tensor gradient_of(const Tensor& w) { return new_empty(w, w.sizes()); }

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3,
                                   const std::optional<Tensor>& weights, const Tensor& offsets,
                                   const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row,
                                   const std::string& score_mode) {
  const Layer layer(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Experts& e = layer.experts;
  Tensor h = layer.matrix_of(2 * e.hidden);
  if (e.rows == 0) return {layer.tokens_of(layer.matrix_of(e.dim), std::nullopt, stream), h};

  const Tensor claims = layer.zeros(2);
  int32_t* const claimed = claims.mutable_data_ptr<int32_t>();
  Tensor y;
  {
    Tensor a = layer.matrix_of(e.hidden);
    {
      const Tensor rows = layer.rows_of(x);
      const RowWeights scores = layer.combine ? RowWeights{} : layer.row_weights();
      check_launch(moe_up({e, claimed, matrix(rows), weights_of(layer.w1), weights_of(layer.w3), scores, matrix(h), matrix(a)}, stream));
    }
    y = layer.matrix_of(e.dim);
    check_launch(moe_down({e, claimed + 1, matrix(a), weights_of(layer.w2), matrix(y)}, stream));
  }
  return {layer.tokens_of(y, layer.combine ? layer.weights : std::nullopt, stream), h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3,
    const std::optional<Tensor>& weights, const Tensor& h, const Tensor& offsets, const std::optional<Tensor>& row_slot,
    const std::optional<Tensor>& slot_row, const std::string& score_mode) {
  const Layer layer(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode);
  const Experts& e = layer.experts;
  for (const auto& [name, tensor, rows, columns] :
       {std::tuple("dout", &dout, x.size(0), x.size(1)), std::tuple("h", &h, e.rows, int64_t(2) * e.hidden)}) {
    check_matrix(name, *tensor);
    check_device(name, *tensor, x);
    STD_TORCH_CHECK(tensor->size(0) == rows && tensor->size(1) == columns, name, " must be [", rows, ", ", columns,
                    "], found ", text(*tensor));
    STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), name, " must have x's dtype ", toString(x.scalar_type()),
                    ", found ", toString(tensor->scalar_type()));
  }
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  // Slots without a row, and rows of nobody, have no gradient.
  Tensor dweights = weights ? new_empty(*weights, weights->sizes()) : new_empty(x, {0}, ScalarType::Float);
  torch::stable::zero_(dweights);
  if (e.rows == 0) {
    const auto zeros = [](const Tensor& w) {
      Tensor dw = gradient_of(w);
      return torch::stable::zero_(dw);
    };
    return {layer.tokens_of(layer.matrix_of(e.dim), std::nullopt, stream), dweights, zeros(w1), zeros(w2), zeros(w3)};
  }

  // In the order in which the fewest bytes are alive at once.
  const Tensor dtokens = readable(dout), readable_h = readable(h), claims = layer.zeros(2 + 2 * layer.chunks());
  int32_t* claimed = claims.mutable_data_ptr<int32_t>();  // by the next launch
  Tensor a = layer.matrix_of(e.hidden);
  {
    const Tensor dy = layer.rows_of(dtokens);
    check_launch(moe_down_backward({e, claimed++, matrix(dy), weights_of(layer.w2), matrix(a)}, stream));
  }
  Tensor dh = layer.matrix_of(2 * e.hidden);
  check_launch(moe_activation_backward({e, matrix(readable_h), layer.row_weights(), matrix(dh), matrix(a),
                                        weights ? dweights.mutable_data_ptr<float>() : nullptr},
                                       stream));

  // dx comes before dw1 and dw3: its rows are gone when these are there. dw2 takes a's place, so it comes first where it is
  // the smaller one, else last, when dh is gone too.
  Tensor dx, dw1, dw2, dw3;
  const auto finish_down = [&] {
    dw2 = gradient_of(w2);
    layer.each_chunk(dtokens, [&](const Matrix& dy, int first, int columns) {
      check_launch(moe_weight_gradient_down({e, claimed++, columns, dy, matrix(a), weights_of(dw2, first)}, stream));
    });
    a = Tensor();
  };
  const bool down_first = layer.rows_outweigh_gradients();
  if (down_first) finish_down();
  {
    Tensor drows = layer.matrix_of(e.dim);
    check_launch(moe_up_backward({e, claimed++, matrix(dh), weights_of(layer.w1), weights_of(layer.w3), matrix(drows)}, stream));
    dx = layer.tokens_of(drows, std::nullopt, stream);
  }
  dw1 = gradient_of(w1), dw3 = gradient_of(w3);
  layer.each_chunk(x, [&](const Matrix& rows, int first, int columns) {
    check_launch(moe_weight_gradient_up({e, claimed++, columns, matrix(dh), rows, weights_of(dw1, 0, first),
                                         weights_of(dw3, 0, first)},
                                        stream));
  });
  dh = Tensor();
  if (!down_first) finish_down();
  return {dx, dweights, dw1, dw2, dw3};
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("moe_forward", TORCH_BOX(&flashmoe::forward));
  m.impl("moe_backward", TORCH_BOX(&flashmoe::backward));
}
