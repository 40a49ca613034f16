// The mixture-of-experts kernels as the host sees them: what each computes, its parameters, its launch. No PyTorch here.
//
//   T tokens    K slots (experts) per token    R rows, sorted by expert    d model dim
//
// Slot (t, k) is computed in row slot_row[t, k]; row r computes slot row_slot[r] = t * K + k; -1 is nobody. Matrices have
// a contiguous last dimension and a stride, in elements, from row to row.
//
// Index values are asserted on the device: that they are in range everywhere; that the maps are each other's inverse by
// permute; that no two slots share a row by combine's gradient, which would have two writers there.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe {

enum class DType { bfloat16, float16, float32, float64 };

enum class ScoreFunction { softmax, sigmoid, topk_softmax };

// The experts of each token and their weights, with statistics per sequence; flashmoe_train/ops/moe/router.py says which.
constexpr int ROUTER_EXPERTS = 8192;  // at most: a token's scores have to fit into shared memory
struct RouterParams {
  const void* logits;    // [T, E]
  const void* bias;      // [E] in float32 (float64 for float64 logits), or null
  void* weights;         // [T, K] in float32 (float64)
  int32_t* ids;          // [T, K]
  void* score_sums;      // [sequences, E] in float32 (float64)
  int32_t* counts;       // [sequences, E]
  void* part_sums;       // [sequences, parts, E], workspace; the results themselves if there is one part
  int32_t* part_counts;  // [sequences, parts, E], too
  int64_t tokens, logits_stride, sequences;
  int experts, slots;  // E, K
  int groups, limited_groups;
  int parts;  // router_parts(T, sequences, E)
  double scale;
  bool renormalize;
  ScoreFunction function;
  DType dtype;  // of the logits
};
int64_t router_parts(int64_t tokens, int64_t sequences, int64_t experts);
cudaError_t router_topk(const RouterParams& params, cudaStream_t stream);

struct RouterBackwardParams {
  const void* dweights;     // [T, K] in float32 (float64)
  const void* dscore_sums;  // [sequences, E] in float32 (float64), or null
  const void* logits;       // [T, E]
  const int32_t* ids;       // [T, K]
  void* dlogits;            // [T, E], contiguous
  int64_t tokens, logits_stride, sequences;
  int experts, slots;  // E, K
  double scale;
  bool renormalize;
  ScoreFunction function;
  DType dtype;  // of logits and dlogits
};
cudaError_t router_topk_backward(const RouterBackwardParams& params, cudaStream_t stream);

// The plan that the maps come from: offsets[e] ... offsets[e + 1] are the rows of expert e, in the order of their slots.
// Slots with an id outside 0 <= id < E have no row; rows from offsets[E] on are nobody's.
constexpr int ROUTE_PLAN_EXPERTS = 8192;  // at most: their counts have to fit into shared memory
struct RoutePlanParams {
  const void* ids;    // [T, K], contiguous: int64 or int32
  int32_t* offsets;   // [E + 1]
  int32_t* row_slot;  // [R]
  int32_t* slot_row;  // [T, K]
  int32_t* counts;    // [route_plan_chunks(R), E], workspace
  int slots;          // R = T * K
  int experts;        // E
  bool wide_ids;      // int64
};
int64_t route_plan_chunks(int64_t slots);
cudaError_t route_plan(const RoutePlanParams& params, cudaStream_t stream);

// rows[r] = x[row_slot[r] / K], zero where row_slot[r] is -1. Bytes are copied as they are, whatever the type.
struct PermuteParams {
  const void* x;            // [T, d]
  const int32_t* row_slot;  // [R]
  const int32_t* slot_row;  // [T, K], its inverse
  void* rows;               // [R, d], contiguous
  int64_t tokens, row_count, dim, x_stride;
  int slots;                // K
  int element_size;         // bytes: 2, 4 or 8
};
cudaError_t moe_permute(const PermuteParams& params, cudaStream_t stream);

// For kernels that gather tokens themselves: zeros the numbers that they count with, and asserts, as permute does, that
// the maps are each other's inverse. They cannot: a trap costs them their registers.
struct PrepareGatherParams {
  const int32_t* row_slot;  // [R]
  const int32_t* slot_row;  // [T, K]
  int32_t* counters;
  int64_t tokens, row_count, counter_count;
  int slots;  // K
};
cudaError_t moe_prepare_gather(const PrepareGatherParams& params, cudaStream_t stream);

// out[t] = sum over k, in order, of weights[t, k] * rows[slot_row[t, k]], in float32 (float64 for float64 rows).
struct CombineParams {
  const void* rows;         // [R, d]
  const int32_t* slot_row;  // [T, K]
  const void* weights;      // [T, K] in float32 (float64 for float64 rows), or null: all one
  void* out;                // [T, d], contiguous
  int64_t tokens, row_count, dim, rows_stride;
  int slots;                // K
  DType dtype;              // of rows and out
};
cudaError_t moe_combine(const CombineParams& params, cudaStream_t stream);

// drows[slot_row[t, k]] = weights[t, k] * dout[t], zero in rows of nobody; dweights[t, k] = rows[slot_row[t, k]] . dout[t],
// zero in slots without a row.
struct CombineBackwardParams {
  const void* dout;         // [T, d]
  const void* rows;         // [R, d]
  const int32_t* slot_row;  // [T, K]
  const void* weights;      // [T, K]
  void* drows;              // [R, d], contiguous
  void* dweights;           // [T, K]
  int32_t* row_slot;        // [R], workspace: becomes the inverse of slot_row
  int64_t tokens, row_count, dim, dout_stride, rows_stride;
  int slots;                // K
  DType dtype;              // of dout, rows and drows
};
cudaError_t moe_combine_backward(const CombineBackwardParams& params, cudaStream_t stream);

// out = silu(gate) * up * row_weight in float32 (float64), rounded once; zero in rows from *used on, which are not read.
struct GluParams {
  const void* gate;        // [R, n]
  const void* up;          // [R, n]
  const int32_t* used;     // how many rows belong to somebody: offsets[E]
  const void* row_weight;  // [R] in float32 (float64 for float64 rows), or null: all one
  void* out;               // [R, n], contiguous
  int64_t row_count, dim, gate_stride, up_stride;
  DType dtype;  // of gate, up and out
};
cudaError_t moe_glu(const GluParams& params, cudaStream_t stream);

struct GluBackwardParams {
  const void* dout;        // [R, n]
  const void* gate;        // [R, n]
  const void* up;          // [R, n]
  const int32_t* used;     // as above
  const void* row_weight;  // [R], or null
  void* dgate;             // [R, n], contiguous
  void* dup;               // [R, n], contiguous
  void* drow_weight;       // [R], written if there is a row_weight
  int64_t row_count, dim, dout_stride, gate_stride, up_stride;
  DType dtype;  // of all but the weights
};
cudaError_t moe_glu_backward(const GluBackwardParams& params, cudaStream_t stream);

}  // namespace flashmoe
