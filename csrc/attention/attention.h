// The attention kernels as the host sees them: what each computes, its parameters, its launch. No PyTorch here.
//
//   B batch    S queries    L keys    H heads    G heads of keys, each for H / G heads of queries
//   D head dim of queries and keys    V head dim of values
//
// Every tensor has a contiguous last dimension; its other strides are free but for TMA's rule: multiples of 16 bytes, as its
// address, and not 0 (an expanded tensor has to be copied).
//
// Packed documents: B is 1, and S and L are cut where `query_bounds` and `key_bounds` say. Documents do not see each other;
// below, S and L are then a document's own. Whatever the bounds are, nothing outside the tensors is read or written.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe {

// Of [B, S, H, D], in elements.
struct AttentionStrides {
  int64_t batch, row, head;
};

enum class AttentionType { bfloat16, float16 };

// What forward and backward are given.
struct AttentionProblem {
  const void* q;  // [B, S, H, D]
  const void* k;  // [B, L, G, D]
  const void* v;  // [B, L, G, V]
  const int32_t* query_bounds;  // [documents + 1], or null
  const int32_t* key_bounds;
  AttentionStrides q_strides, k_strides, v_strides;
  int batch, queries, keys, heads, kv_heads, dim, dim_v, documents;
  int left, right;
  float scale;  // positive
  AttentionType type;
};
constexpr int ATTENTION_LONGEST = 1 << 29;  // S and L at most

// D / V are 64/64, 96/96, 128/128, 192/128 or 256/256; S, L >= 1. Both throw std::runtime_error for tensors that TMA cannot
// take.

// out = softmax(scale * q kT) v for every head; lse = the logarithm of a query's sum of exp(scale * q kT) over the keys
// that it sees: query i those from i + L - S - left to i + L - S + right, a negative window being unbounded. A query that
// sees no key, or is in no document, has out 0 and lse -infinity.
struct AttentionForwardParams : AttentionProblem {
  void* out;   // [B, S, H, V]
  float* lse;  // [B, H, S], contiguous, natural logarithm
  AttentionStrides out_strides;
  void* workspace;  // attention_forward_workspace() bytes, of any content
};
cudaError_t attention_forward(const AttentionForwardParams& params, cudaStream_t stream);
int64_t attention_forward_workspace(const AttentionForwardParams& params);

// Gradients of out with respect to q, k and v, given that of the loss with respect to out. Of queries that see no key and
// keys that no query sees they are 0. Sums over queries and over the heads that share a key are in float32; those over keys
// have no fixed order unless `deterministic`.
struct AttentionBackwardParams : AttentionProblem {
  const void* out;   // [B, S, H, V]
  const void* dout;  // [B, S, H, V]
  const float* lse;  // [B, H, S], contiguous
  void *dq, *dk, *dv;  // like q, k and v, contiguous
  AttentionStrides out_strides, dout_strides;
  bool deterministic;
  void* workspace;  // attention_backward_workspace() bytes, of any content, at a multiple of 256
};
cudaError_t attention_backward(const AttentionBackwardParams& params, cudaStream_t stream);
int64_t attention_backward_workspace(const AttentionBackwardParams& params);

}  // namespace flashmoe
