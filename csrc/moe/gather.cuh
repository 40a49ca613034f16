// Tokens become rows of their experts beside the products that read these rows: copied by warps that have nothing else to do,
// in the order of the rows, which is that of the tiles. Permuting them before takes a pass over memory in which
// nothing is multiplied.
//
// Whoever copies counts what has arrived; the producer's thread waits for the count before it loads. Both take their
// work in order from counters in global memory, from whatever block they run in, so no block waits for one that has not begun.
#pragma once

#include "hopper/barrier.cuh"
#include "moe/experts.h"
#include "moe/rows.cuh"

namespace flashmoe {
namespace {

constexpr int BATCH = 8;   // rows that a warp copies before it says so
constexpr int ASKING = 8;  // stages between the producer's looks at what has arrived

// As the device has it; in units of 16 bytes.
struct Copies {
  const uint4* tokens;
  uint4* rows;
  int64_t token_stride, row_stride;
  int width;
  const int32_t* row_slot;
  int slots;
  int32_t* claimed;  // rows that warps have taken
  int32_t* arrived;  // batches of each GATHER_CHUNK rows
};

// A warp, with others; `total` rows in all.
__device__ __forceinline__ void copy_rows(const Copies& c, int total) {
  constexpr int UNITS = 8, TOGETHER = 2;  // of a lane and a row, and rows: under way at a time
  const int lane = threadIdx.x % 32;
  const auto claim = [&] { return lane == 0 ? atomicAdd(c.claimed, BATCH) : 0; };
  const auto slot_of_lane = [&](int first) {
    return lane < BATCH && first + lane < total ? c.row_slot[first + lane] : -1;
  };
  // What is claimed next, and its slots, take their time, during which rows are copied.
  int first = __shfl_sync(ALL, claim(), 0), claimed = claim(), slot = slot_of_lane(first);
  while (first < total) {
    const int next = __shfl_sync(ALL, claimed, 0), next_slot = slot_of_lane(next);
    claimed = claim();
    const int own = slot < 0 ? -1 : slot / c.slots;
    for (int i = 0; i < BATCH; i += TOGETHER) {
      const uint4* from[TOGETHER];
      uint4* to[TOGETHER];
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        const int token = __shfl_sync(ALL, own, i + t);
        from[t] = token < 0 ? nullptr : c.tokens + token * c.token_stride;
        to[t] = c.rows + (first + i + t) * c.row_stride;
      }
      for (int begin = lane; begin < c.width; begin += UNITS * 32) {
        uint4 unit[TOGETHER][UNITS];
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t)
#pragma unroll
          for (int u = 0; u < UNITS; ++u)
            if (from[t] && begin + u * 32 < c.width) unit[t][u] = from[t][begin + u * 32];
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t)
#pragma unroll
          for (int u = 0; u < UNITS; ++u)
            if (from[t] && begin + u * 32 < c.width) to[t][begin + u * 32] = unit[t][u];
      }
    }
    // TMA reads them: by another proxy, on any multiprocessor.
    asm volatile("fence.proxy.async.global;" ::: "memory");
    __syncwarp();
    if (lane == 0)
      asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(c.arrived + first / GATHER_CHUNK) : "memory");
    first = next, slot = next_slot;
  }
}

// What the producer's thread knows to have arrived: rows begin ... end.
struct Arrived {
  const Copies& copies;
  int total, begin = 0, end = 0;

  // Until TMA may load rows first ... last - 1.
  __device__ __forceinline__ void await(int first, int last) {
    last = min(last, total);
    if (!copies.claimed || (first >= begin && last <= end)) return;
    if (first < begin || first > end) begin = end = first / GATHER_CHUNK * GATHER_CHUNK;
    while (end < last) {
#ifdef FLASHMOE_WATCHDOG
      hopper::watched_wait([&] { return more(); }, uint32_t(end), uint32_t(total));
#else
      while (!more()) {}
#endif
    }
  }

  // Whether the next chunk has arrived too. Asked now and then, so that who waits has not to ask.
  __device__ __forceinline__ bool more() {
    if (!copies.claimed || end >= total) return false;
    int count;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(count)
                 : "l"(copies.arrived + end / GATHER_CHUNK)
                 : "memory");
    if (count < (min(GATHER_CHUNK, total - end) + BATCH - 1) / BATCH) return false;
    asm volatile("fence.proxy.async.global;" ::: "memory");
    end += GATHER_CHUNK;
    return true;
  }
};

inline Copies copies_of(const Gather& gather, const Matrix& rows, int columns) {
  if (!gather.progress) return {};
  return {static_cast<const uint4*>(gather.tokens.data), static_cast<uint4*>(rows.data), gather.tokens.stride / 8,
          rows.stride / 8, columns / 8, gather.row_slot, gather.slots, gather.progress, gather.progress + 1};
}

}  // namespace
}  // namespace flashmoe
