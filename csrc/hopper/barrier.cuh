// Who waits for whom: barriers in shared memory that count arrivals and bytes, rings of stages, named barriers, turns.
//
// With -DFLASHMOE_WATCHDOG every wait on a barrier in shared memory is bounded: see watchdog.cuh.
#pragma once

#include <cstdint>

#include "hopper/shared_memory.cuh"
#ifdef FLASHMOE_WATCHDOG
#include "hopper/watchdog.cuh"
#endif

namespace flashmoe::hopper {

// A barrier in shared memory. A phase completes when `arrivals` have come and all expected bytes; phases alternate in
// parity, and a wait returns once the phase of its parity is complete. Of a fresh barrier, that of parity 1 is.
struct Barrier {
  uint64_t word;

  // By one thread; then fence_barrier_init() by it and __syncthreads() by all, before anyone else uses the barrier.
  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(arrivals) : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word)) : "memory");
  }

  // One arrival, and `bytes` that copies will bring (fewer than 2^20): of all boxes of the stage, with the parts of them
  // that lie outside the tensor.
  __device__ __forceinline__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }

  // One arrival, when this thread's copy_async until now have landed. Every copying thread counts among the arrivals.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&word)) : "memory");
  }

  __device__ __forceinline__ bool completed(uint32_t parity) {
    uint32_t result;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(result)
        : "r"(shared_address(&word)), "r"(parity)
        : "memory");
    return result;
  }

  __device__ __forceinline__ void wait(uint32_t parity) {
#ifdef FLASHMOE_WATCHDOG
    watched_wait([&] { return completed(parity); }, shared_address(&word), parity);
#else
    while (!completed(parity)) {}
#endif
  }
};

// What init wrote, made visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Lanes of a warp that arrive for it where __syncwarp has ordered them. racecheck does not know that it does, and takes what
// the others read for a race: for it (-DFLASHMOE_RACECHECK) each arrives.
#ifdef FLASHMOE_RACECHECK
constexpr int SPEAKERS = 32;
#else
constexpr int SPEAKERS = 1;
#endif

// ---------------------------------------------------------------------------------------------------------------- ring

// Where a producer or a consumer is on its way round a ring. Runs on across the tiles of a persistent kernel.
template <int STAGES>
struct Step {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// STAGES buffers that producers fill and consumers empty. Both take every stage in turn and agree on how many there are:
//
//   producer: acquire(step); full[step.stage].arrive_expecting(bytes); copies to full[step.stage]; step.next()
//   consumer: wait(step); use of the data; release(step); step.next()
template <int STAGES>
struct Ring {
  Barrier full[STAGES], empty[STAGES];

  // `consumers` arrive at each release: one lane of every consuming warp. One thread for a whole warpgroup will do only
  // right after a wgmma_wait of all of it; a warp that read by ordinary loads has to arrive itself.
  __device__ __forceinline__ void init(uint32_t producers, uint32_t consumers) {
    for (int i = 0; i < STAGES; ++i) full[i].init(producers), empty[i].init(consumers);
  }
  __device__ __forceinline__ void acquire(Step<STAGES> step) { empty[step.stage].wait(step.phase ^ 1); }
  __device__ __forceinline__ void wait(Step<STAGES> step) { full[step.stage].wait(step.phase); }
  __device__ __forceinline__ void release(Step<STAGES> step) { empty[step.stage].arrive(); }
};

// ------------------------------------------------------------------------------------------------------ named barriers

// The hardware's 16 barriers, of which 0 is __syncthreads. Each use in a kernel has its id in one enum of that kernel;
// `threads`, a multiple of 32, counts all that take part, whether they wait (sync) or not (arrive).
template <typename Id>
__device__ __forceinline__ void barrier_sync(Id id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(int(id)), "r"(threads) : "memory");
}
template <typename Id>
__device__ __forceinline__ void barrier_arrive(Id id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(int(id)), "r"(threads) : "memory");
}

// WARPGROUPS take turns, over and over, each as often as the others: one issues its products while the next one does
// arithmetic. Takes the ids FIRST ... FIRST + WARPGROUPS - 1.
template <int FIRST, int WARPGROUPS>
struct Turns {
  // Once in a kernel, not once in a tile: gives the first turn to warpgroup 0.
  static __device__ __forceinline__ void start(int warpgroup) {
    if (warpgroup == WARPGROUPS - 1) barrier_arrive(FIRST, 256);
  }
  static __device__ __forceinline__ void wait(int warpgroup) { barrier_sync(FIRST + warpgroup, 256); }
  static __device__ __forceinline__ void pass(int warpgroup) {
    barrier_arrive(FIRST + (warpgroup + 1) % WARPGROUPS, 256);
  }
};

}  // namespace flashmoe::hopper
