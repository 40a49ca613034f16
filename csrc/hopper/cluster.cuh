// Two blocks that run side by side and share what they load: a copy lands in the shared memory of both.
//
// A stage that both blocks fill is free when the consumers of both have released it: PairRing's releases go to both
// blocks, so a producer that acquired a stage may copy into its peer's too. Each block expects the bytes of its own stage,
// whoever brings them; they may come before it has said so. Before the first use of the other block's memory, and before
// either ends, all threads of both meet: cluster_sync().
#pragma once

#include <cstdint>

#include <cuda.h>

#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"

namespace flashmoe::hopper {

constexpr int PAIR = 2;                     // blocks
constexpr uint16_t BOTH = (1 << PAIR) - 1;  // as a mask

// This block's: 0 or 1.
__device__ __forceinline__ uint32_t rank_in_pair() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// By all threads of both blocks that have not ended.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where a block of the pair has what is at `address` here.
__device__ __forceinline__ uint32_t address_in(uint32_t rank, uint32_t address) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// Says that copies may overwrite what this thread has read, and nothing of what it has written. An arrival that tells the
// other block of memory too is a fence for the whole GPU, which as often as a stage is released costs a fifth of a product's
// time.
__device__ __forceinline__ void arrive_in(uint32_t rank, Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(rank, shared_address(&barrier.word)))
               : "memory");
}

// After store_in, which those who wait_for_pair then see.
__device__ __forceinline__ void arrive_after_stores_in(uint32_t rank, Barrier& barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   address_in(rank, shared_address(&barrier.word)))
               : "memory");
}

__device__ __forceinline__ void store_in(uint32_t rank, int* to, int value) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address_in(rank, shared_address(to))), "r"(value) : "memory");
}

// For the other block's arrive_after_stores_in.
__device__ __forceinline__ void wait_for_pair(Barrier& barrier, uint32_t parity) {
  const auto completed = [&] {
    uint32_t result;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(result)
        : "r"(shared_address(&barrier.word)), "r"(parity)
        : "memory");
    return bool(result);
  };
#ifdef FLASHMOE_WATCHDOG
  watched_wait(completed, shared_address(&barrier.word), parity);
#else
  while (!completed()) {}
#endif
}

// Into both blocks, at the same place, and completing on both blocks' barriers.
__device__ __forceinline__ void tma_load_both(void* tile, const CUtensorMap* map, Barrier& barrier, Keep keep, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "h"(BOTH), "l"(keep)
      : "memory");
}
__device__ __forceinline__ void tma_load_both(void* tile, const CUtensorMap* map, Barrier& barrier, Keep keep, int x, int y,
                                              int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "h"(BOTH), "l"(keep)
      : "memory");
}

// A Ring whose stages both blocks fill. Consumers count those of one block.
template <int STAGES>
struct PairRing {
  Barrier full[STAGES], empty[STAGES];

  __device__ __forceinline__ void init(uint32_t producers, uint32_t consumers) {
    for (int i = 0; i < STAGES; ++i) full[i].init(producers), empty[i].init(PAIR * consumers);
  }
  __device__ __forceinline__ void acquire(Step<STAGES> step) { empty[step.stage].wait(step.phase ^ 1); }
  __device__ __forceinline__ void wait(Step<STAGES> step) { full[step.stage].wait(step.phase); }
  // By two threads for each consumer, with 0 and 1.
  __device__ __forceinline__ void release(Step<STAGES> step, uint32_t rank) { arrive_in(rank, empty[step.stage]); }
};

}  // namespace flashmoe::hopper
