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

// What attention_forward is compiled for, of q and k / of v; KERNEL_HEAD_DIMS in checks.py are the same.
constexpr int64_t HEAD_DIMS[][2] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

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

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                                   int64_t window_left, int64_t window_right, const std::optional<Tensor>& cu_seqlens_q,
                                   const std::optional<Tensor>& cu_seqlens_k, bool /*deterministic: always*/) {
  STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device like the other tensors");
  check_hopper("attention", q.get_device_index());
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_heads("v", v, q);
  STD_TORCH_CHECK(k.size(3) == q.size(3), "q and k must have one head_dim, found q ", text(q), " and k ", text(k));
  check_head_dims(q.size(3), v.size(3));
  STD_TORCH_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), "k and v must agree in batch, seq and heads, found k ",
                  text(k), " and v ", text(v));
  STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "the heads of q must be a multiple of those of k, found ",
                  q.size(2), " and ", k.size(2));
  STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale must be positive for the compiled kernel, found ", softmax_scale);
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                  "cu_seqlens_q and cu_seqlens_k must be given together");
  Tensor query_bounds, key_bounds;
  const DeviceGuard guard(q.get_device_index());
  if (cu_seqlens_q) {
    check_indices("cu_seqlens_q", *cu_seqlens_q, 1, q);
    check_indices("cu_seqlens_k", *cu_seqlens_k, 1, q);
    STD_TORCH_CHECK(cu_seqlens_q->size(0) >= 1 && cu_seqlens_q->size(0) == cu_seqlens_k->size(0),
                    "cu_seqlens_q and cu_seqlens_k must count the same documents, found ", text(*cu_seqlens_q), " and ",
                    text(*cu_seqlens_k));
    STD_TORCH_CHECK(q.size(0) == 1, "with cu_seqlens the batch size must be 1, found q ", text(q));
    query_bounds = torch::stable::contiguous(*cu_seqlens_q), key_bounds = torch::stable::contiguous(*cu_seqlens_k);
  }

  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2);
  Tensor out = new_empty(q, {batch, queries, heads, v.size(3)});
  Tensor lse = new_empty(q, {batch, heads, queries}, ScalarType::Float);
  if (batch == 0 || queries == 0 || heads == 0) return {out, lse};
  if (k.size(1) == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }

  const Tensor readable_q = readable(q), readable_k = readable(k), readable_v = readable(v);
  AttentionForwardParams p{};
  p.q = readable_q.const_data_ptr(), p.k = readable_k.const_data_ptr(), p.v = readable_v.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.q_strides = strides_of(readable_q), p.k_strides = strides_of(readable_k), p.v_strides = strides_of(readable_v);
  p.out_strides = strides_of(out);
  p.batch = int(batch), p.queries = int(queries), p.keys = int(k.size(1));
  p.heads = int(heads), p.kv_heads = int(k.size(2)), p.dim = int(q.size(3)), p.dim_v = int(v.size(3));
  p.left = narrowed(window_left), p.right = narrowed(window_right);
  p.scale = float(softmax_scale);
  p.type = q.scalar_type() == ScalarType::Half ? AttentionType::float16 : AttentionType::bfloat16;
  if (cu_seqlens_q) {
    p.query_bounds = query_bounds.const_data_ptr<int32_t>(), p.key_bounds = key_bounds.const_data_ptr<int32_t>();
    p.documents = int(query_bounds.size(0)) - 1;
  }
  const Tensor workspace = new_empty(q, {attention_forward_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(attention_forward(p, current_stream(q)));
  return {out, lse};
}

}  // namespace
}  // namespace flashmoe

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) { m.impl("attention_forward", TORCH_BOX(&flashmoe::forward)); }
