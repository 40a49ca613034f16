// Tiles in shared memory, and how ordinary threads write them.
//
// One layout for everything: a tile of 2-byte elements is slabs of 64 columns, a slab is rows of 128 bytes and begins at a
// multiple of 1024 bytes. Within each 1024 bytes, 16-byte chunks trade places (128-byte swizzle) so that neither rows nor
// columns meet in a bank. TMA writes a slab with a box of 64 columns; wgmma reads it as either operand.
#pragma once

#include <cstdint>

#include "hopper/wgmma.cuh"

namespace flashmoe::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory. It begins where a slab may as long as the kernel has no static shared memory.
template <typename Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ __align__(1024) unsigned char flashmoe_shared_storage[];
  return *reinterpret_cast<Storage*>(flashmoe_shared_storage);
}

// Of an element, in bytes from the tile's begin.
__host__ __device__ __forceinline__ constexpr uint32_t tile_offset(int rows, int row, int column) {
  return column / 64 * rows * 128 + row * 128 + ((column / 8 % 8 ^ row % 8) << 4) + column % 8 * 2;
}

// By every thread that wrote tiles by ordinary stores, stmatrix or copy_async, then a barrier; after it wgmma or a TMA
// store may read them. Likewise between ordinary stores and the TMA load that overwrites them; reads need a barrier only.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices: lane l brings the address of 16 bytes, row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// A warpgroup's accumulators, 64 rows of 2 * COUNT columns, into rows `row` ... row + 63 of a tile.
template <typename T, int COUNT>
__device__ __forceinline__ void store_accumulators(const float (&d)[COUNT], uint32_t tile, int rows, int row) {
  const int lane = threadIdx.x % 32;
  row += threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < COUNT; i += 8)  // 16 columns
    stmatrix(tile + tile_offset(rows, row, i * 2 + lane / 16 * 8), pack<T>(d[i], d[i + 1]), pack<T>(d[i + 2], d[i + 3]),
             pack<T>(d[i + 4], d[i + 5]), pack<T>(d[i + 6], d[i + 7]));
}

// A warp's 16 bytes a thread, at their place in what neighbouring lanes write.
__device__ __forceinline__ void store_shared(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

// 16 bytes, or as many zeros where `valid` is false: `source` is then not read but still has to be an address. Lands by the
// generic proxy: a consumer that feeds wgmma waits for the barrier, then fence_proxy_async().
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

}  // namespace flashmoe::hopper
