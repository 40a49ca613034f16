// The attention kernels as the host sees them: what each computes, its parameters, its launch. No PyTorch here.
//
//   B batch    S queries    L keys    H heads    G heads of keys, each for H / G heads of queries    D head dim
//
// Every tensor has a contiguous last dimension; its other strides are free but for TMA's rule: multiples of 16 bytes, as its
// address, and not 0 (an expanded tensor has to be copied).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe {

// Of [B, S, H, D], in elements.
struct AttentionStrides {
  int64_t batch, row, head;
};

// out = softmax(scale * q kT) v for every head; lse = the logarithm of a query's sum of exp(scale * q kT) over the keys
// that it sees. Causal: query i sees keys 0 ... i + L - S. A query that sees no key has out 0 and lse -infinity.
struct AttentionForwardParams {
  const void* q;       // [B, S, H, D] bfloat16
  const void* k;       // [B, L, G, D]
  const void* v;       // [B, L, G, D]
  void* out;           // [B, S, H, D]
  float* lse;          // [B, H, S], contiguous, natural logarithm
  int32_t* next_tile;  // one number, workspace
  AttentionStrides q_strides, k_strides, v_strides, out_strides;
  int batch, queries, keys, heads, kv_heads, dim;
  float scale;  // positive
  bool causal;
};
// dim 128, L >= 1. Throws std::runtime_error for tensors that TMA cannot take.
cudaError_t attention_forward(const AttentionForwardParams& params, cudaStream_t stream);

}  // namespace flashmoe
