// Reductions, and how kernels follow one another.
#include "hopper/launch.cuh"
#include "hopper/reduce.cuh"
#include "hopper/wgmma.cuh"
#include "selftest.h"

namespace flashmoe::hopper {
namespace {

// sums[i] += terms[i], by every block.
__global__ void __launch_bounds__(128) add_kernel(const float4* terms, float* sums, int count) {
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x)
    add_to_global(sums + 4 * i, terms[i].x, terms[i].y, terms[i].z, terms[i].w);
}

// out: maximum and sum over each quad, and 2^x.
__global__ void __launch_bounds__(128) reduce_kernel(const float* x, float* maximum, float* sum, float* power) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  maximum[i] = quad_max(x[i]), sum[i] = quad_sum(x[i]), power[i] = exp2_fast(x[i]);
}

// out: what a quad has of 8 columns a thread; pairs: [128, 4], as the threads of a warpgroup have them of 32 columns.
__global__ void __launch_bounds__(128) transpose_kernel(const uint32_t* pairs, uint4* out) {
  out[threadIdx.x] = quad_transpose(pairs + threadIdx.x * 4);
}

// How often each lane of 4 warps is elected in 3 calls.
__global__ void __launch_bounds__(128) elected_kernel(int* out) {
  out[threadIdx.x] = 0;
  for (int i = 0; i < 3; ++i)
    if (elected()) ++out[threadIdx.x];
}

__device__ int64_t nanoseconds_now() {
  int64_t result;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(result));
  return result;
}

// times[0] and times[1]: when the first kernel ended and when the second began.
__global__ void first_kernel(int* data, int64_t* times) {
  launch_next();
  const int64_t begin = nanoseconds_now();
  while (nanoseconds_now() - begin < 300'000) {}
  data[threadIdx.x] = threadIdx.x;  // after the next kernel was let in: it has to wait all the same
  if (threadIdx.x == 0) times[0] = nanoseconds_now();
}
__global__ void second_kernel(const int* data, int* copy, int64_t* times) {
  const int64_t begin = nanoseconds_now();
  wait_for_previous();
  copy[threadIdx.x] = *const_cast<const volatile int*>(data + threadIdx.x);
  if (threadIdx.x == 0) times[1] = begin;
}

}  // namespace
}  // namespace flashmoe::hopper

using namespace flashmoe::hopper;

EXPORT int hopper_add(const float4* terms, float* sums, int count, int blocks) {
  return run([&] { return launch(add_kernel, {dim3(blocks), dim3(128)}, terms, sums, count); });
}
EXPORT int hopper_reduce(const float* x, int blocks, float* maximum, float* sum, float* power) {
  return run([&] { return launch(reduce_kernel, {dim3(blocks), dim3(128)}, x, maximum, sum, power); });
}
EXPORT int hopper_transpose(const uint32_t* pairs, uint4* out) {
  return run([&] { return launch(transpose_kernel, {dim3(1), dim3(128)}, pairs, out); });
}
EXPORT int hopper_elected(int* out) {
  return run([&] { return launch(elected_kernel, {dim3(1), dim3(128)}, out); });
}
EXPORT int hopper_follow(int overlap, int* data, int* copy, int64_t* times) {
  return run([&] {
    if (const cudaError_t error = launch(first_kernel, {dim3(1), dim3(128)}, data, times)) return error;
    return launch(second_kernel, {dim3(1), dim3(128), 0, nullptr, overlap != 0}, data, copy, times);
  });
}
