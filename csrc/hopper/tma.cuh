// Bulk copies between global and shared memory, by one thread for all (tensor_map.h makes the maps).
//
// Loads complete on a Barrier that expects their bytes; wgmma may follow without a fence. Coordinates count elements, the
// innermost first. What lies outside the tensor, before it too, is loaded as zeros that count as bytes; it is not stored,
// but a store that begins before the tensor is an illegal instruction. "Outside" is outside the tensor: a box over the end
// of a document or an expert takes, or overwrites, its neighbour.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "hopper/barrier.cuh"

namespace flashmoe::hopper {

// How long the L2 cache keeps what is loaded: data of one use first out, what all blocks share last.
enum class Keep : uint64_t { normal = 0x1000000000000000, briefly = 0x12f0000000000000, longest = 0x14f0000000000000 };

// At the start of a kernel: a map comes from memory the first time.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(void* tile, const CUtensorMap* map, Barrier& barrier, Keep keep, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], "
      "[%2], %5;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "l"(keep)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* tile, const CUtensorMap* map, Barrier& barrier, Keep keep, int x, int y,
                                         int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5}], [%2], %6;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "l"(keep)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* tile, const CUtensorMap* map, Barrier& barrier, Keep keep, int x, int y,
                                         int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5, %6}], [%2], %7;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(keep)
      : "memory");
}

// Neighbouring bytes, without a map: 16-byte addresses and a multiple of 16 bytes.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// Stores: the writers of the tile call fence_proxy_async() and meet at a barrier first. The thread that issued them commits
// and waits: nobody else can.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* tile, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(tile)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* tile, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(tile)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* tile, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(tile)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// Adds instead, each element by itself atomically, in the type that the map says.
__device__ __forceinline__ void tma_add(const CUtensorMap* map, const void* tile, int x, int y, int z) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(tile)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Adds neighbouring floats to as many in global memory, each by itself atomically and in whatever order; else like a store.
__device__ __forceinline__ void bulk_add(float* sums, const float* terms, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(sums),
               "r"(shared_address(terms)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the tiles of all but the PENDING newest groups may be overwritten.
template <int PENDING>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Until their data is in global memory: before a flag tells others of it.
template <int PENDING>
__device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace flashmoe::hopper
