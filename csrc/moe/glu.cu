// GLU: silu(gate) * up between the experts' products, times the weight of the row; and the gradient of that.
//
// Bound by memory: every element once. One warp per row, in few registers: what is under way at a time is the loads of many
// warps. Rows from offsets[E] on belong to nobody and become zero without being read: what lies there may be NaN.
#include <cmath>

#include "moe/rows.cuh"

namespace flashmoe {
namespace {

template <typename Sum>
__device__ Sum sigmoid(Sum x) {
  return Sum(1) / (Sum(1) + std::exp(-x));
}

template <typename T, int N>
__global__ void __launch_bounds__(256) glu_kernel(GluParams p) {
  using Sum = Accumulator<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.row_count) return;
  T* out = static_cast<T*>(p.out) + row * p.dim;
  if (row >= *p.used) {
    for (int64_t column = threadIdx.x * N; column < p.dim; column += 32 * N)
      *reinterpret_cast<Pack<T, N>*>(out + column) = Pack<T, N>{};
    return;
  }
  const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
  const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
  const Sum weight = p.row_weight ? static_cast<const Sum*>(p.row_weight)[row] : Sum(1);
#pragma unroll 1
  for (int64_t column = threadIdx.x * N; column < p.dim; column += 32 * N) {
    const Pack<T, N> gates = *reinterpret_cast<const Pack<T, N>*>(gate + column);
    const Pack<T, N> ups = *reinterpret_cast<const Pack<T, N>*>(up + column);
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Sum g = static_cast<Sum>(gates.element[j]), u = static_cast<Sum>(ups.element[j]);
      result.element[j] = static_cast<T>(g * sigmoid(g) * u * weight);
    }
    *reinterpret_cast<Pack<T, N>*>(out + column) = result;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(256) glu_backward_kernel(GluBackwardParams p) {
  using Sum = Accumulator<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.row_count) return;
  T* dgate = static_cast<T*>(p.dgate) + row * p.dim;
  T* dup = static_cast<T*>(p.dup) + row * p.dim;
  Sum* dweight = p.row_weight ? static_cast<Sum*>(p.drow_weight) + row : nullptr;
  if (row >= *p.used) {
    for (int64_t column = threadIdx.x * N; column < p.dim; column += 32 * N) {
      *reinterpret_cast<Pack<T, N>*>(dgate + column) = Pack<T, N>{};
      *reinterpret_cast<Pack<T, N>*>(dup + column) = Pack<T, N>{};
    }
    if (dweight && threadIdx.x == 0) *dweight = 0;
    return;
  }
  const T* dout = static_cast<const T*>(p.dout) + row * p.dout_stride;
  const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
  const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
  const Sum weight = p.row_weight ? static_cast<const Sum*>(p.row_weight)[row] : Sum(1);
  Sum product = 0;
#pragma unroll 1
  for (int64_t column = threadIdx.x * N; column < p.dim; column += 32 * N) {
    const Pack<T, N> gradients = *reinterpret_cast<const Pack<T, N>*>(dout + column);
    const Pack<T, N> gates = *reinterpret_cast<const Pack<T, N>*>(gate + column);
    const Pack<T, N> ups = *reinterpret_cast<const Pack<T, N>*>(up + column);
    Pack<T, N> of_gate, of_up;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Sum d = static_cast<Sum>(gradients.element[j]);
      const Sum g = static_cast<Sum>(gates.element[j]), u = static_cast<Sum>(ups.element[j]);
      const Sum s = sigmoid(g);
      product += d * (g * s * u);
      of_gate.element[j] = static_cast<T>(d * weight * u * s * (1 + g * (1 - s)));
      of_up.element[j] = static_cast<T>(d * weight * (g * s));
    }
    *reinterpret_cast<Pack<T, N>*>(dgate + column) = of_gate;
    *reinterpret_cast<Pack<T, N>*>(dup + column) = of_up;
  }
  if (!dweight) return;
  product = warp_sum(product);
  if (threadIdx.x == 0) *dweight = product;
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------- launch

cudaError_t moe_glu(const GluParams& p, cudaStream_t stream) {
  if (p.row_count == 0) return cudaSuccess;
  return for_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / sizeof(T);
    const bool aligned = aligned_to_16(p.gate, p.gate_stride * sizeof(T)) &&
                         aligned_to_16(p.up, p.up_stride * sizeof(T)) && aligned_to_16(p.out, p.dim * sizeof(T));
    if (aligned)
      glu_kernel<T, N><<<blocks(p.row_count), WARPS, 0, stream>>>(p);
    else
      glu_kernel<T, 1><<<blocks(p.row_count), WARPS, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t moe_glu_backward(const GluBackwardParams& p, cudaStream_t stream) {
  if (p.row_count == 0) return cudaSuccess;
  return for_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / sizeof(T);
    const bool aligned = aligned_to_16(p.dout, p.dout_stride * sizeof(T)) &&
                         aligned_to_16(p.gate, p.gate_stride * sizeof(T)) &&
                         aligned_to_16(p.up, p.up_stride * sizeof(T)) && aligned_to_16(p.dgate, p.dim * sizeof(T)) &&
                         aligned_to_16(p.dup, p.dim * sizeof(T));
    if (aligned)
      glu_backward_kernel<T, N><<<blocks(p.row_count), WARPS, 0, stream>>>(p);
    else
      glu_backward_kernel<T, 1><<<blocks(p.row_count), WARPS, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace flashmoe
