// moe_forward, moe_backward and its two parts on CUDA: checks, allocation, the order of the kernels.
// flashmoe_train/ops/moe/experts.py has their schemas.
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

// Of w1.
int64_t size_of(const Tensor& w1, int dimension) {
  STD_TORCH_CHECK(w1.dim() == 3, "w1 must be [experts, hidden dim, model dim], found ", text(w1));
  return w1.size(dimension);
}

// What the operators are given, checked, and in the form that kernels read.
struct Layer {
  Tensor x, w1, w2, w3, offsets, row_slot, slot_row;  // row_slot, slot_row undefined: x is rows
  std::optional<Tensor> weights;
  bool routed, combine;  // with tokens and a plan; weights multiply the experts' outputs
  Experts experts;

  // Without weights of experts: gradients of these alone.
  Layer(const Tensor& x, int64_t count, int64_t hidden, const Tensor& offsets, const std::optional<Tensor>& row_slot,
        const std::optional<Tensor>& slot_row)
      : x(x), routed(row_slot.has_value()), combine(false) {
    check_matrix("x", x);
    check_hopper("moe", x.get_device_index());
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "x must be bfloat16 or float16 for the compiled kernels, found ", toString(type));
    const int64_t dim = x.size(1);
    STD_TORCH_CHECK(dim > 0 && hidden > 0 && dim % 8 == 0 && hidden % 8 == 0 && hidden <= INT32_MAX / 2,
                    "the compiled kernels take a model dim and a hidden dim that are multiples of 8, found ", dim, " and ",
                    hidden);
    STD_TORCH_CHECK(count >= 1 && count <= MOST_EXPERTS, "the compiled kernels take 1 to ", MOST_EXPERTS,
                    " experts, found ", count);
    check_indices("offsets", offsets, 1, x);
    STD_TORCH_CHECK(offsets.size(0) == count + 1, "offsets must be [experts + 1] = [", count + 1, "], found ", text(offsets));
    STD_TORCH_CHECK(row_slot.has_value() == slot_row.has_value(), "row_slot and slot_row must be given together");
    if (routed) {
      check_indices("row_slot", *row_slot, 1, x);
      check_indices("slot_row", *slot_row, 2, x);
      STD_TORCH_CHECK(slot_row->size(0) == x.size(0), "slot_row must have a row per token of x, found ", text(*slot_row),
                      " and ", text(x));
      this->row_slot = torch::stable::contiguous(*row_slot), this->slot_row = torch::stable::contiguous(*slot_row);
    }
    this->offsets = torch::stable::contiguous(offsets);
    const int64_t rows = routed ? row_slot->size(0) : x.size(0);
    STD_TORCH_CHECK(rows <= INT32_MAX, "the compiled kernels take fewer than 2^31 rows, found ", rows);
    experts = {this->offsets.const_data_ptr<int32_t>(), rows, int(count), int(dim), int(hidden),
               type == ScalarType::Half};
  }

  Layer(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3, const std::optional<Tensor>& weights,
        const Tensor& offsets, const std::optional<Tensor>& row_slot, const std::optional<Tensor>& slot_row,
        const std::string& score_mode)
      : Layer(x, size_of(w1, 0), size_of(w1, 1), offsets, row_slot, slot_row) {
    combine = score_mode == "combine";
    check_expert_weights("w1", w1, x, experts.count, experts.hidden, experts.dim);
    check_expert_weights("w2", w2, x, experts.count, experts.dim, experts.hidden);
    check_expert_weights("w3", w3, x, experts.count, experts.hidden, experts.dim);
    STD_TORCH_CHECK(combine || score_mode == "activation",
                    "score_mode must be one of ('combine', 'activation'), found '", score_mode, "'");
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

void check_like(const char* name, const Tensor& tensor, const Tensor& x, int64_t rows, int64_t columns) {
  check_matrix(name, tensor);
  check_device(name, tensor, x);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, name, " must be [", rows, ", ", columns, "], found ",
                  text(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have x's dtype ", toString(x.scalar_type()),
                  ", found ", toString(tensor.scalar_type()));
}

// The parts of backward, in the order in which they depend on each other. All launch on one stream.
struct Backward {
  const Layer& layer;
  const cudaStream_t stream;
  const Tensor claims;
  int32_t* claimed;  // by the next launch

  Backward(const Layer& layer, const Tensor& x)
      : layer(layer), stream(current_stream(x)), claims(layer.zeros(2 + 2 * layer.chunks())),
        claimed(claims.mutable_data_ptr<int32_t>()) {}

  // (dh, a), and dweights, which are zeros before: slots without a row, and rows of nobody, have no gradient.
  std::tuple<Tensor, Tensor> activations(const Tensor& dtokens, const Tensor& h, Tensor& dweights) {
    const Experts& e = layer.experts;
    const Tensor readable_h = readable(h);
    Tensor a = layer.matrix_of(e.hidden);
    {
      const Tensor dy = layer.rows_of(dtokens);
      check_launch(moe_down_backward({e, claimed++, matrix(dy), weights_of(layer.w2), matrix(a)}, stream));
    }
    Tensor dh = layer.matrix_of(2 * e.hidden);
    check_launch(moe_activation_backward({e, matrix(readable_h), layer.row_weights(), matrix(dh), matrix(a),
                                          layer.weights ? dweights.mutable_data_ptr<float>() : nullptr},
                                         stream));
    return {dh, a};
  }

  Tensor tokens(const Tensor& dh) {
    Tensor drows = layer.matrix_of(layer.experts.dim);
    check_launch(moe_up_backward(
        {layer.experts, claimed++, matrix(dh), weights_of(layer.w1), weights_of(layer.w3), matrix(drows)}, stream));
    return layer.tokens_of(drows, std::nullopt, stream);
  }

  void down(const Tensor& dtokens, const Tensor& a, const Tensor& dw2, GradientSums to) {
    layer.each_chunk(dtokens, [&](const Matrix& dy, int first, int columns) {
      check_launch(moe_weight_gradient_down(
          {layer.experts, claimed++, columns, dy, matrix(a), weights_of(dw2, first), to}, stream));
    });
  }

  void up(const Tensor& x, const Tensor& dh, const Tensor& dw1, const Tensor& dw3, GradientSums to) {
    layer.each_chunk(x, [&](const Matrix& rows, int first, int columns) {
      check_launch(moe_weight_gradient_up({layer.experts, claimed++, columns, matrix(dh), rows, weights_of(dw1, 0, first),
                                           weights_of(dw3, 0, first), to},
                                          stream));
    });
  }
};

// Zeros, for what is not written.
Tensor dweights_of(const Tensor& x, const std::optional<Tensor>& weights) {
  Tensor found = weights ? new_empty(*weights, weights->sizes()) : new_empty(x, {0}, ScalarType::Float);
  return torch::stable::zero_(found);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3,
    const std::optional<Tensor>& weights, const Tensor& h, const Tensor& offsets, const std::optional<Tensor>& row_slot,
    const std::optional<Tensor>& slot_row, const std::string& score_mode) {
  const Layer layer(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode);
  const Experts& e = layer.experts;
  check_like("dout", dout, x, x.size(0), x.size(1));
  check_like("h", h, x, e.rows, int64_t(2) * e.hidden);
  const DeviceGuard guard(x.get_device_index());
  Backward part(layer, x);
  Tensor dweights = dweights_of(x, weights);
  if (e.rows == 0) {
    const auto zeros = [](const Tensor& w) {
      Tensor dw = gradient_of(w);
      return torch::stable::zero_(dw);
    };
    return {layer.tokens_of(layer.matrix_of(e.dim), std::nullopt, part.stream), dweights, zeros(w1), zeros(w2), zeros(w3)};
  }

  // In the order in which the fewest bytes are alive at once: dx comes before dw1 and dw3, its rows are gone when these are
  // there. dw2 takes a's place, so it comes first where it is the smaller one, else last, when dh is gone too.
  const Tensor dtokens = readable(dout);
  auto [dh, a] = part.activations(dtokens, h, dweights);
  Tensor dx, dw1, dw2, dw3;
  const auto finish_down = [&, &a = a] {
    dw2 = gradient_of(w2);
    part.down(dtokens, a, dw2, {});
    a = Tensor();
  };
  const bool down_first = layer.rows_outweigh_gradients();
  if (down_first) finish_down();
  dx = part.tokens(dh);
  dw1 = gradient_of(w1), dw3 = gradient_of(w3);
  part.up(x, dh, dw1, dw3, {});
  dh = Tensor();
  if (!down_first) finish_down();
  return {dx, dweights, dw1, dw2, dw3};
}

// The same in two parts. First what others wait for, and what the second needs of it.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_data(
    const Tensor& dout, const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w3,
    const std::optional<Tensor>& weights, const Tensor& h, const Tensor& offsets, const std::optional<Tensor>& row_slot,
    const std::optional<Tensor>& slot_row, const std::string& score_mode) {
  const Layer layer(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode);
  const Experts& e = layer.experts;
  check_like("dout", dout, x, x.size(0), x.size(1));
  check_like("h", h, x, e.rows, int64_t(2) * e.hidden);
  const DeviceGuard guard(x.get_device_index());
  Backward part(layer, x);
  Tensor dweights = dweights_of(x, weights);
  if (e.rows == 0)
    return {layer.tokens_of(layer.matrix_of(e.dim), std::nullopt, part.stream), dweights, layer.matrix_of(2 * e.hidden),
            layer.matrix_of(e.hidden)};
  auto [dh, a] = part.activations(readable(dout), h, dweights);
  return {part.tokens(dh), dweights, dh, a};
}

// TMA adds to rows that begin at multiples of 16 bytes; a copy would not be what was given.
void check_sum(const char* name, const Tensor& sum, const Tensor& x, int64_t experts, int64_t rows, int64_t columns) {
  check_device(name, sum, x);
  STD_TORCH_CHECK(sum.dim() == 3 && sum.size(0) == experts && sum.size(1) == rows && sum.size(2) == columns, name,
                  " must be [", experts, ", ", rows, ", ", columns, "], found ", text(sum));
  STD_TORCH_CHECK(sum.scalar_type() == ScalarType::Float || sum.scalar_type() == x.scalar_type(), name,
                  " must be Float or of x's dtype ", toString(x.scalar_type()), ", found ", toString(sum.scalar_type()));
  const int64_t elements = 16 / sum.element_size();
  STD_TORCH_CHECK(sum.stride(2) == 1 && sum.stride(1) >= columns && sum.stride(1) % elements == 0 &&
                      (experts == 1 || (sum.stride(0) >= rows * sum.stride(1) && sum.stride(0) % elements == 0)) &&
                      reinterpret_cast<uintptr_t>(sum.const_data_ptr()) % 16 == 0,
                  name, " must have contiguous rows that begin at multiples of 16 bytes, found strides (", sum.stride(0), ", ",
                  sum.stride(1), ", ", sum.stride(2), ")");
}

void weight_gradients(Tensor dw1, Tensor dw2, Tensor dw3, const Tensor& dout, const Tensor& x, const Tensor& dh,
                      const Tensor& a, const Tensor& offsets, const std::optional<Tensor>& row_slot,
                      const std::optional<Tensor>& slot_row, bool accumulate) {
  check_matrix("x", x);
  STD_TORCH_CHECK(dw1.dim() == 3, "dw1 must be [experts, hidden dim, model dim], found ", text(dw1));
  const int64_t count = dw1.size(0), hidden = dw1.size(1), dim = x.size(1);
  check_sum("dw1", dw1, x, count, hidden, dim);
  check_sum("dw2", dw2, x, count, dim, hidden);
  check_sum("dw3", dw3, x, count, hidden, dim);
  for (const auto& [name, sum] : {std::tuple("dw2", &dw2), std::tuple("dw3", &dw3)})
    STD_TORCH_CHECK(sum->scalar_type() == dw1.scalar_type(), name, " must have dw1's dtype ", toString(dw1.scalar_type()),
                    ", found ", toString(sum->scalar_type()));
  const Layer layer(x, count, hidden, offsets, row_slot, slot_row);
  const Experts& e = layer.experts;
  check_like("dout", dout, x, x.size(0), x.size(1));
  check_like("dh", dh, x, e.rows, 2 * hidden);
  check_like("a", a, x, e.rows, hidden);
  const DeviceGuard guard(x.get_device_index());
  if (e.rows == 0) {
    if (!accumulate)
      for (Tensor* sum : {&dw1, &dw2, &dw3}) torch::stable::zero_(*sum);
    return;
  }
  Backward part(layer, x);
  const GradientSums to{dw1.scalar_type() == ScalarType::Float, accumulate};
  part.down(readable(dout), readable(a), dw2, to);
  part.up(x, readable(dh), dw1, dw3, to);
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("moe_forward", TORCH_BOX(&flashmoe::forward));
  m.impl("moe_backward", TORCH_BOX(&flashmoe::backward));
  m.impl("moe_backward_data", TORCH_BOX(&flashmoe::backward_data));
  m.impl("moe_weight_gradients_", TORCH_BOX(&flashmoe::weight_gradients));
}
