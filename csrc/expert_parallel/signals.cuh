// What ranks tell each other: flags in shared memory, waits that end, and the last block of a launch.
#pragma once

#include "expert_parallel/exchange.h"

namespace flashmoe {

// The same place in rank w's memory.
template <typename T>
__device__ __forceinline__ T* at(const Link& link, int w, T* own) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(own) + link.distance[w]);
}

__device__ __forceinline__ int32_t* signal(const Link& link, int channel, Signal which, int rank) {
  return link.signals + (channel * SIGNALS + which) * link.world + rank;
}

__device__ __forceinline__ int32_t& word(const Link& link, int channel, int which) {
  return link.state[2 * channel + which];
}

__device__ __forceinline__ int32_t load_acquire(const int32_t* flag) {
  int32_t value;
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int32_t* flag, int32_t value) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ int64_t nanoseconds() {
  int64_t result;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(result));
  return result;
}

// By one thread: until rank w's signal has reached `epoch`, or patience ends.
__device__ __forceinline__ void await(const Link& link, Signal which, int w, int32_t epoch) {
  const int32_t* flag = signal(link, link.channel, which, w);
  if (load_acquire(flag) - epoch >= 0) return;
  const int64_t begin = nanoseconds();
  while (load_acquire(flag) - epoch < 0) {
    if (*static_cast<volatile int32_t*>(link.state + FAILED)) return;
    if (nanoseconds() - begin < link.patience) continue;
    if (atomicExch(link.state + FAILED, 1)) return;
    volatile int32_t* report = link.report;
    report[MISSING] = w, report[LAYER] = link.layer, report[AWAITED] = which, report[CHANNEL] = link.channel;
    __threadfence_system();
    report[RECORDED] = 1;
    return;
  }
}

// By all threads of all blocks, after all they have read and written: true in the block that is last. What all blocks wrote
// may then be announced to other ranks by any of its threads.
__device__ __forceinline__ bool last_block(const Link& link) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    int32_t* done = &word(link, link.channel, DONE);
    last = atomicAdd(done, 1) == int(gridDim.x) - 1;
    if (last) *done = 0;
    __threadfence_system();
  }
  __syncthreads();
  return last;
}

}  // namespace flashmoe
