// What softmax and sums over blocks need: reductions over the four threads that hold a row of a fragment, sums in memory.
#pragma once

#include <cuda_runtime.h>

namespace flashmoe::hopper {

// Over a quad: the four neighbouring lanes that share a row of wgmma's accumulators. All get the result.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// 2^x: 2 ulp, 0 for -infinity, subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Adds to four neighbours in global memory, 16-byte aligned, each by itself atomically and in whatever order. Nobody waits;
// the sums are complete when the kernel is.
__device__ __forceinline__ void add_to_global(float* sums, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

}  // namespace flashmoe::hopper
