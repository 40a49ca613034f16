// The attention operators on CUDA: checks, allocation, registration. flashmoe_train/ops/attention has their schemas.
#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "attention/attention.h"
#include "binding.h"

namespace flashmoe {
namespace {

using torch::headeronly::toString;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

void check_heads(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [batch, seq, heads, head_dim], found ", text(x));
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be bfloat16 or float16 for the compiled kernel, found ", toString(type));
  STD_TORCH_CHECK(type == q.scalar_type(), "q, k and v must have one dtype, found ", name, " ", toString(type), " and q ",
                  toString(q.scalar_type()));
  STD_TORCH_CHECK(x.size(0) == q.size(0), "q, k and v must have one batch size, found ", name, " ", text(x), " and q ",
                  text(q));
  STD_TORCH_CHECK(x.stride(3) == 1, name, " must have a contiguous last dimension, found stride ", x.stride(3));
  STD_TORCH_CHECK(x.size(1) <= ATTENTION_LONGEST, name, " must have a sequence of at most 2^29, found ", text(x));
  check_device(name, x, q);
}

// Of the same shape and place as the forward's out, in any strides.
void check_like_out(const char* name, const Tensor& x, const Tensor& q, const Tensor& v) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2) &&
                      x.size(3) == v.size(3),
                  name, " must be [", q.size(0), ", ", q.size(1), ", ", q.size(2), ", ", v.size(3), "], found ", text(x));
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, " must have q's dtype ", toString(q.scalar_type()), ", found ",
                  toString(x.scalar_type()));
  check_device(name, x, q);
}

// What the kernels are compiled for, of q and k / of v; KERNEL_HEAD_DIMS in checks.py is the same.
struct HeadDims {
  int64_t dim, dim_v;
};
constexpr HeadDims HEAD_DIMS[] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

// Before the launch, whose errors have other reasons.
void check_head_dims(int64_t dim, int64_t dim_v) {
  std::string allowed;
  for (const auto& [d, v] : HEAD_DIMS) {
    if (dim == d && dim_v == v) return;
    allowed += std::to_string(d) + "/" + std::to_string(v) + ", ";
  }
  STD_TORCH_CHECK(false, "the attention kernel takes head dims of q and k / of v ", allowed, "found ", dim, "/", dim_v);
}

AttentionStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

int narrowed(int64_t window) { return int(std::clamp<int64_t>(window, -1, std::numeric_limits<int>::max())); }

// What both operators are given, checked, and in the form that kernels read.
struct Inputs {
  Tensor q, k, v, query_bounds, key_bounds;  // bounds undefined: no documents
  AttentionProblem problem{};

  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, int64_t window_left,
         int64_t window_right, const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k) {
    STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device like the other tensors");
    check_hopper("attention", q.get_device_index());
    check_heads("q", q, q);
    check_heads("k", k, q);
    check_heads("v", v, q);
    STD_TORCH_CHECK(k.size(3) == q.size(3), "q and k must have one head_dim, found q ", text(q), " and k ", text(k));
    check_head_dims(q.size(3), v.size(3));
    STD_TORCH_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2),
                    "k and v must agree in batch, seq and heads, found k ", text(k), " and v ", text(v));
    STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0,
                    "the heads of q must be a multiple of those of k, found ", q.size(2), " and ", k.size(2));
    STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale must be positive for the compiled kernel, found ", softmax_scale);
    STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                    "cu_seqlens_q and cu_seqlens_k must be given together");
    const DeviceGuard guard(q.get_device_index());
    AttentionProblem& p = problem;
    if (cu_seqlens_q) {
      check_indices("cu_seqlens_q", *cu_seqlens_q, 1, q);
      check_indices("cu_seqlens_k", *cu_seqlens_k, 1, q);
      STD_TORCH_CHECK(cu_seqlens_q->size(0) >= 1 && cu_seqlens_q->size(0) == cu_seqlens_k->size(0),
                      "cu_seqlens_q and cu_seqlens_k must count the same documents, found ", text(*cu_seqlens_q), " and ",
                      text(*cu_seqlens_k));
      STD_TORCH_CHECK(q.size(0) == 1, "with cu_seqlens the batch size must be 1, found q ", text(q));
      query_bounds = torch::stable::contiguous(*cu_seqlens_q), key_bounds = torch::stable::contiguous(*cu_seqlens_k);
      p.query_bounds = query_bounds.const_data_ptr<int32_t>(), p.key_bounds = key_bounds.const_data_ptr<int32_t>();
      p.documents = int(query_bounds.size(0)) - 1;
    }
    p.batch = int(q.size(0)), p.queries = int(q.size(1)), p.keys = int(k.size(1));
    p.heads = int(q.size(2)), p.kv_heads = int(k.size(2)), p.dim = int(q.size(3)), p.dim_v = int(v.size(3));
    p.left = narrowed(window_left), p.right = narrowed(window_right);
    p.scale = float(softmax_scale);
    p.type = q.scalar_type() == ScalarType::Half ? AttentionType::float16 : AttentionType::bfloat16;
    if (p.batch == 0 || p.queries == 0 || p.heads == 0 || p.keys == 0) return;
    this->q = readable(q), this->k = readable(k), this->v = readable(v);
    p.q = this->q.const_data_ptr(), p.k = this->k.const_data_ptr(), p.v = this->v.const_data_ptr();
    p.q_strides = strides_of(this->q), p.k_strides = strides_of(this->k), p.v_strides = strides_of(this->v);
  }

  // Nobody sees anything: nothing is launched, and the tensors here are undefined.
  bool empty() const { return problem.q == nullptr; }
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                                   int64_t window_left, int64_t window_right, const std::optional<Tensor>& cu_seqlens_q,
                                   const std::optional<Tensor>& cu_seqlens_k, bool /*deterministic: always*/) {
  const Inputs inputs(q, k, v, softmax_scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k);
  const DeviceGuard guard(q.get_device_index());
  Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse = new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (inputs.empty()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }

  AttentionForwardParams p{};
  static_cast<AttentionProblem&>(p) = inputs.problem;
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.out_strides = strides_of(out);
  const Tensor workspace = new_empty(q, {attention_forward_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(attention_forward(p, current_stream(q)));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, double softmax_scale,
                                            int64_t window_left, int64_t window_right,
                                            const std::optional<Tensor>& cu_seqlens_q,
                                            const std::optional<Tensor>& cu_seqlens_k, bool deterministic) {
  const Inputs inputs(q, k, v, softmax_scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k);
  check_like_out("dout", dout, q, v);
  check_like_out("out", out, q, v);
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(2) && lse.size(2) == q.size(1),
                  "lse must be [", q.size(0), ", ", q.size(2), ", ", q.size(1), "], found ", text(lse));
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "lse must be Float, found ", toString(lse.scalar_type()));
  check_device("lse", lse, q);
  const DeviceGuard guard(q.get_device_index());
  Tensor dq = new_empty(q, q.sizes()), dk = new_empty(k, k.sizes()), dv = new_empty(v, v.sizes());
  if (inputs.empty()) {
    for (Tensor* gradient : {&dq, &dk, &dv}) torch::stable::zero_(*gradient);
    return {dq, dk, dv};
  }

  const Tensor readable_out = readable(out), readable_dout = readable(dout);
  const Tensor contiguous_lse = torch::stable::contiguous(lse);
  AttentionBackwardParams p{};
  static_cast<AttentionProblem&>(p) = inputs.problem;
  p.out = readable_out.const_data_ptr(), p.dout = readable_dout.const_data_ptr();
  p.lse = contiguous_lse.const_data_ptr<float>();
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.out_strides = strides_of(readable_out), p.dout_strides = strides_of(readable_dout);
  p.deterministic = deterministic;
  const Tensor workspace = new_empty(q, {attention_backward_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(attention_backward(p, current_stream(q)));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&flashmoe::forward));
  m.impl("attention_backward", TORCH_BOX(&flashmoe::backward));
}
