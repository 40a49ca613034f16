// What the kernels that move rows share: packs of elements, blocks of warps, rows of nobody.
#pragma once

#include <cassert>
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "moe/moe.h"

namespace flashmoe {

// N neighbouring elements, moved by one instruction: 16 bytes wherever addresses allow.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T element[N];
};

// The type of sums of T.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline bool aligned_to_16(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

// Eight warps a block, each with work of its own.
constexpr dim3 WARPS(32, 8);

inline unsigned blocks(int64_t warps) { return unsigned((warps + WARPS.y - 1) / WARPS.y); }

constexpr unsigned ALL = 0xffffffff;  // lanes

// Over the lanes of a warp, by the same tree whatever the launch: repeats bitwise. All get the result.
template <typename Sum>
__device__ Sum warp_sum(Sum x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
  return x;
}

// One warp zeros columns begin ... end of those of 32 rows, from `first` on, whose bits are set in `nobodys`: as a rule
// none are.
template <typename Unit>
__device__ void zero_rows(Unit* rows, int64_t width, int64_t first, unsigned nobodys, int64_t begin, int64_t end) {
  for (; nobodys; nobodys &= nobodys - 1) {
    Unit* row = rows + (first + __ffs(nobodys) - 1) * width;
    for (int64_t column = begin + threadIdx.x; column < end; column += 32) row[column] = Unit{};
  }
}

// Calls function(T()) for the element type.
template <typename Function>
cudaError_t for_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::bfloat16: return function(__nv_bfloat16());
    case DType::float16: return function(__half());
    case DType::float32: return function(float());
    case DType::float64: return function(double());
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashmoe
