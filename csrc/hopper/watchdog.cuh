// Turns a kernel that hangs into a report, in builds with -DFLASHMOE_WATCHDOG: a wait on a barrier in shared memory that
// lasts too long notes where it is, in memory that the host can read, and goes on with whatever data is there.
//
// Results of such a run are worthless. Control flow stays as it was unless it depends on what was waited for, so named
// barriers, which cannot be watched, are passed as often as in a healthy run. Not a trap: with one, ptxas drops the register budget of setmaxnreg, spills and serialises.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe::hopper {

// One warp that waited in vain; `recorded` is set last. A struct of eight 32-bit words to whoever reads it from Python.
struct Hang {
  uint32_t recorded, block[3], thread, barrier, parity, reserved;  // barrier: its address in shared memory
};
constexpr int HANGS = 64;

// In ns. Whoever gives up stays a little, or it might set free those that would have reported next.
constexpr uint32_t PATIENCE = 500'000'000, STAY = 20'000'000, LATER_PATIENCE = 100'000;

static __constant__ Hang* hangs;  // HANGS of them in host memory, or null
static __device__ unsigned hang_count;

__device__ __forceinline__ uint32_t nanoseconds() {
  uint32_t result;
  asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(result));
  return result;
}

// By one thread of those of the warp that wait.
__device__ __forceinline__ void record_hang(uint32_t barrier, uint32_t parity) {
  if (threadIdx.x % 32 + 1 != __ffs(__activemask())) return;
  const unsigned slot = atomicAdd(&hang_count, 1);
  if (slot >= HANGS || !hangs) return;
  volatile Hang& hang = hangs[slot];
  hang.block[0] = blockIdx.x, hang.block[1] = blockIdx.y, hang.block[2] = blockIdx.z;
  hang.thread = threadIdx.x, hang.barrier = barrier, hang.parity = parity;
  __threadfence_system();
  hang.recorded = 1;
}

// Waits that begin after somebody has given up are short and not recorded: they are consequences.
template <typename Completed>
__device__ __forceinline__ void watched_wait(Completed completed, uint32_t barrier, uint32_t parity) {
  if (completed()) return;
  const bool later = *static_cast<volatile unsigned*>(&hang_count);
  const uint32_t start = nanoseconds(), patience = later ? LATER_PATIENCE : PATIENCE;
  while (!completed()) {
    if (nanoseconds() - start < patience) continue;
    if (later) return;
    record_hang(barrier, parity);
    while (!completed() && nanoseconds() - start < PATIENCE + STAY) {}
    return;
  }
}

// Host: before a launch, from the file that has the kernel (each has records of its own). Returns the HANGS records, all
// empty, which can be read while the kernel runs; null if CUDA fails.
inline Hang* watchdog() {
  static Hang* records = nullptr;
  if (!records && cudaHostAlloc(&records, HANGS * sizeof(Hang), cudaHostAllocMapped)) return nullptr;
  for (int i = 0; i < HANGS; ++i) records[i] = {};
  const unsigned none = 0;
  if (cudaMemcpyToSymbol(hangs, &records, sizeof records) || cudaMemcpyToSymbol(hang_count, &none, sizeof none))
    return nullptr;
  return records;
}

}  // namespace flashmoe::hopper
