// The experts' matrix products as the host sees them: what each computes, its parameters, its launch. No PyTorch here.
//
//   R rows, sorted by expert    E experts    d model dim    n hidden dim of an expert
//
// Expert e owns rows offsets[e] ... offsets[e + 1]; rows from offsets[E] on belong to nobody: they may hold anything and
// are not written. d and n are multiples of 8. Addresses and strides are multiples of 16 bytes, as TMA wants it. Sums are in
// float32, results are rounded once. One writer for every element and a fixed order of sums: results repeat bitwise.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe {

// [rows, columns] with contiguous columns; strides in elements.
struct Matrix {
  void* data;
  int64_t stride;
};

// [E, rows, columns] with contiguous columns.
struct Weights {
  void* data;
  int64_t row_stride, expert_stride;
};

// What all of them are given.
struct Experts {
  const int32_t* offsets;  // [E + 1]; whatever its values are, nothing outside the tensors is touched
  int64_t rows;            // R
  int count, dim, hidden;  // E, d, n
  bool half;               // float16, else bfloat16
};
constexpr int MOST_EXPERTS = 4096;

// `claimed`, one number of each launch, counts the tiles that blocks have taken: 0 before.

// The router's weight of a row, in float32: weights[row_slot[row]], weights[row] without row_slot, 1 without weights.
struct RowWeights {
  const float* weights;
  const int32_t* row_slot;
};

// Tokens that a launch copies to their experts' rows, beside its products and ahead of them. Without `progress` the rows are
// what is given.
constexpr int GATHER_CHUNK = 1024;  // rows whose arrival is counted together
struct Gather {
  Matrix tokens;            // [T, columns of the rows]
  const int32_t* row_slot;  // [R]: row r is a copy of token row_slot[r] / slots
  int slots;
  int32_t* progress;        // gather_counters(R) numbers, 0 before
};
constexpr int64_t gather_counters(int64_t rows) { return 1 + (rows + GATHER_CHUNK - 1) / GATHER_CHUNK; }

// h = [x w1T, x w3T], a = silu(gate) * up * weight, from the rounded h.
struct MoEUpParams {
  Experts experts;
  int32_t* claimed;
  Gather gather;    // of x
  Matrix x;         // [R, d]
  Weights w1, w3;   // [E, n, d]
  RowWeights weights;
  Matrix h;         // [R, 2 n]: gate, up
  Matrix a;         // [R, n]
};
cudaError_t moe_up(const MoEUpParams& params, cudaStream_t stream);

// y = a w2T.
struct MoEDownParams {
  Experts experts;
  int32_t* claimed;
  Matrix a;    // [R, n]
  Weights w2;  // [E, d, n]
  Matrix y;    // [R, d]
};
cudaError_t moe_down(const MoEDownParams& params, cudaStream_t stream);

// da = dy w2, the gradient of the unweighted activation where dy is that of the row's weighted output.
struct MoEDownBackwardParams {
  Experts experts;
  int32_t* claimed;
  Gather gather;  // of dy
  Matrix dy;      // [R, d]
  Weights w2;     // [E, d, n]
  Matrix da;      // [R, n]
};
cudaError_t moe_down_backward(const MoEDownBackwardParams& params, cudaStream_t stream);

// From da and h: dh, dweights; and the weighted activation, in da's place.
struct MoEActivationBackwardParams {
  Experts experts;
  Matrix h;  // [R, 2 n]
  RowWeights weights;
  Matrix dh;        // [R, 2 n]
  Matrix a;         // [R, n]: da, then the activation
  float* dweights;  // like weights, of which rows of nobody are not written; or null
};
cudaError_t moe_activation_backward(const MoEActivationBackwardParams& params, cudaStream_t stream);

// dx = dgate w1 + dup w3.
struct MoEUpBackwardParams {
  Experts experts;
  int32_t* claimed;
  Matrix dh;       // [R, 2 n]
  Weights w1, w3;  // [E, n, d]
  Matrix dx;       // [R, d]
};
cudaError_t moe_up_backward(const MoEUpBackwardParams& params, cudaStream_t stream);

// Gradients of weights, zeros for experts without rows. Each column of d is on its own in them: what is given, and written,
// may be any `columns` of d's.

// Where they go.
struct GradientSums {
  bool wide;  // float32, else the operands' dtype
  bool add;   // to what is there
};

// dw2 = dyT a of every expert.
struct MoEWeightGradientDownParams {
  Experts experts;
  int32_t* claimed;
  Gather gather;  // of dy
  int columns;
  Matrix dy;    // [R, columns]
  Matrix a;     // [R, n]
  Weights dw2;  // [E, columns, n]
  GradientSums to;
};
cudaError_t moe_weight_gradient_down(const MoEWeightGradientDownParams& params, cudaStream_t stream);

// dw1 = dgateT x, dw3 = dupT x.
struct MoEWeightGradientUpParams {
  Experts experts;
  int32_t* claimed;
  Gather gather;     // of x
  int columns;
  Matrix dh;         // [R, 2 n]
  Matrix x;          // [R, columns]
  Weights dw1, dw3;  // [E, n, columns]
  GradientSums to;
};
cudaError_t moe_weight_gradient_up(const MoEWeightGradientUpParams& params, cudaStream_t stream);

// Zeros in the rows that belong to nobody, of a result that others will read.
struct ZeroNobodysParams {
  const int32_t* end;  // offsets + E
  void* x;             // [R, columns], contiguous
  int64_t rows, row_bytes;
};
cudaError_t moe_zero_nobodys(const ZeroNobodysParams& params, cudaStream_t stream);

}  // namespace flashmoe
