// Warpgroup matrix products: D[64, N] (float32, registers) = A[64, 16] * B[16, N] (+ D), bf16 or fp16, asynchronous.
//
// Tiles lie in shared memory as shared_memory.cuh says; one image serves as either operand, contracted over its columns
// (K_MAJOR) or over its rows (MN_MAJOR). A batch is written
//
//   wgmma_fence();  wgmma<T, ...>(...) for every 16 of K;  wgmma_commit();  ...  wgmma_wait<0>();  pin(d);
//
// by all 128 threads of a warpgroup. Until its wait, d, the registers of A and the tiles are off limits.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flashmoe::hopper {

// --------------------------------------------------------------------------------------------------------- descriptors

// Where an operand lies in shared memory; all in bytes. `address` is that of a tile of 64-column slabs, plus offsets below.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         1ull << 62;  // 128-byte swizzle
}

// Contracted over columns. The next 16 of K: 32 bytes on, and after 4 of them in the next slab. Rows: 128 bytes, by 8.
__device__ __forceinline__ uint64_t k_major(uint32_t address) { return descriptor(address, 16, 1024); }

// Contracted over rows. The next 16 of K: 2048 bytes on. M or N: `slab` = rows * 128 bytes for every 64 columns.
__device__ __forceinline__ uint64_t mn_major(uint32_t address, uint32_t slab) {
  return descriptor(address, slab, 1024);
}

// Nothing carries out of the address field: shared memory ends at 227 KB, the field at 256 KB.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// ------------------------------------------------------------------------------------------------------------ ordering

// Before a batch, and again before every batch whose d or A registers ordinary code has written since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING of the newest batches are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After a wait, for d before it is read and for A before it is overwritten: the compiler knows nothing of asynchronous
// registers and may otherwise move that across the wait. It does not warn.
template <int COUNT>
__device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void pin(uint32_t (&a)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// ----------------------------------------------------------------------------------------------------------- fragments

// d[4 * j + e] of a warpgroup's thread is row fragment_row + 8 * (e / 2), column 8 * j + fragment_column + e % 2.
__device__ __forceinline__ int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
__device__ __forceinline__ int fragment_column(int thread) { return thread % 4 * 2; }

// Two neighbours of a row, as A and stores want them. Accumulators packed in order are the A operand of a next product:
// a[i] of the k-th 16 columns is pack(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]).
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t result;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Of four packed pairs of a row, from 32 neighbouring columns of accumulators, to eight neighbouring elements: those of
// columns 8 * (thread % 4) ... + 7. For stores of 16 bytes without shared memory. By all 32 lanes.
__device__ __forceinline__ uint4 quad_transpose(const uint32_t* pairs) {
  uint32_t x[4] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & bit)) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, lane & bit ? x[i] : x[i | bit], bit);
        (lane & bit ? x[i] : x[i | bit]) = other;
      }
  return {x[0], x[1], x[2], x[3]};
}

// ------------------------------------------------------------------------------------------------------------ products

enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

// X of 0 ... n - 1 with a separator between.
#define FLASHMOE_EIGHT(X, S, a, b, c, d, e, f, g, h) \
  X(a) S() X(b) S() X(c) S() X(d) S() X(e) S() X(f) S() X(g) S() X(h)
#define FLASHMOE_8(X, S) FLASHMOE_EIGHT(X, S, 0, 1, 2, 3, 4, 5, 6, 7)
#define FLASHMOE_16(X, S) FLASHMOE_8(X, S) S() FLASHMOE_EIGHT(X, S, 8, 9, 10, 11, 12, 13, 14, 15)
#define FLASHMOE_24(X, S) FLASHMOE_16(X, S) S() FLASHMOE_EIGHT(X, S, 16, 17, 18, 19, 20, 21, 22, 23)
#define FLASHMOE_32(X, S) FLASHMOE_24(X, S) S() FLASHMOE_EIGHT(X, S, 24, 25, 26, 27, 28, 29, 30, 31)
#define FLASHMOE_40(X, S) FLASHMOE_32(X, S) S() FLASHMOE_EIGHT(X, S, 32, 33, 34, 35, 36, 37, 38, 39)
#define FLASHMOE_48(X, S) FLASHMOE_40(X, S) S() FLASHMOE_EIGHT(X, S, 40, 41, 42, 43, 44, 45, 46, 47)
#define FLASHMOE_56(X, S) FLASHMOE_48(X, S) S() FLASHMOE_EIGHT(X, S, 48, 49, 50, 51, 52, 53, 54, 55)
#define FLASHMOE_64(X, S) FLASHMOE_56(X, S) S() FLASHMOE_EIGHT(X, S, 56, 57, 58, 59, 60, 61, 62, 63)
#define FLASHMOE_72(X, S) FLASHMOE_64(X, S) S() FLASHMOE_EIGHT(X, S, 64, 65, 66, 67, 68, 69, 70, 71)
#define FLASHMOE_80(X, S) FLASHMOE_72(X, S) S() FLASHMOE_EIGHT(X, S, 72, 73, 74, 75, 76, 77, 78, 79)
#define FLASHMOE_88(X, S) FLASHMOE_80(X, S) S() FLASHMOE_EIGHT(X, S, 80, 81, 82, 83, 84, 85, 86, 87)
#define FLASHMOE_96(X, S) FLASHMOE_88(X, S) S() FLASHMOE_EIGHT(X, S, 88, 89, 90, 91, 92, 93, 94, 95)
#define FLASHMOE_104(X, S) FLASHMOE_96(X, S) S() FLASHMOE_EIGHT(X, S, 96, 97, 98, 99, 100, 101, 102, 103)
#define FLASHMOE_112(X, S) FLASHMOE_104(X, S) S() FLASHMOE_EIGHT(X, S, 104, 105, 106, 107, 108, 109, 110, 111)
#define FLASHMOE_120(X, S) FLASHMOE_112(X, S) S() FLASHMOE_EIGHT(X, S, 112, 113, 114, 115, 116, 117, 118, 119)
#define FLASHMOE_128(X, S) FLASHMOE_120(X, S) S() FLASHMOE_EIGHT(X, S, 120, 121, 122, 123, 124, 125, 126, 127)

#define FLASHMOE_NAME(i) "%" #i
#define FLASHMOE_NAME_SEPARATOR() ","
#define FLASHMOE_OPERAND(i) "+f"(d[i])
#define FLASHMOE_OPERAND_SEPARATOR() ,

// The instruction up to its last operands, which say how A and B are read.
#define FLASHMOE_TEXT(N, COUNT, TYPE, A, B, ACCUMULATE)                \
  "{.reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0;\n"               \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" \
  FLASHMOE_##COUNT(FLASHMOE_NAME, FLASHMOE_NAME_SEPARATOR) "}, " A ", %" #B ", p, 1, 1, "

#define FLASHMOE_SS(N, COUNT, TYPE, ACCUMULATE, B, MAJOR_B, A, MAJOR_A)                              \
  asm volatile(FLASHMOE_TEXT(N, COUNT, TYPE, "%" #A, B, ACCUMULATE) "%" #MAJOR_A ", %" #MAJOR_B ";}" \
               : FLASHMOE_##COUNT(FLASHMOE_OPERAND, FLASHMOE_OPERAND_SEPARATOR)                      \
               : "r"(int(accumulate)), "l"(b), "n"(int(B_MAJOR)), "l"(a), "n"(int(A_MAJOR)))

#define FLASHMOE_RS(N, COUNT, TYPE, ACCUMULATE, B, MAJOR_B, A0, A1, A2, A3)                          \
  asm volatile(FLASHMOE_TEXT(N, COUNT, TYPE, "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}", B, ACCUMULATE) \
               "%" #MAJOR_B ";}"                                                                     \
               : FLASHMOE_##COUNT(FLASHMOE_OPERAND, FLASHMOE_OPERAND_SEPARATOR)                      \
               : "r"(int(accumulate)), "l"(b), "n"(int(B_MAJOR)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))

template <int COUNT>
struct Products;

// One N: its COUNT = N / 2 accumulators a thread, then the numbers of the operands after them.
#define FLASHMOE_WGMMA(N, COUNT, I0, I1, I2, I3, I4, I5, I6)                                                       \
  template <>                                                                                                      \
  struct Products<COUNT> {                                                                                         \
    template <typename T, Major A_MAJOR, Major B_MAJOR>                                                            \
    static __device__ __forceinline__ void ss(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {        \
      if constexpr (std::is_same_v<T, __half>)                                                                     \
        FLASHMOE_SS(N, COUNT, "f16", I0, I1, I2, I3, I4);                                                          \
      else                                                                                                         \
        FLASHMOE_SS(N, COUNT, "bf16", I0, I1, I2, I3, I4);                                                         \
    }                                                                                                              \
    template <typename T, Major B_MAJOR>                                                                           \
    static __device__ __forceinline__ void rs(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate) { \
      if constexpr (std::is_same_v<T, __half>)                                                                     \
        FLASHMOE_RS(N, COUNT, "f16", I0, I1, I2, I3, I4, I5, I6);                                                  \
      else                                                                                                         \
        FLASHMOE_RS(N, COUNT, "bf16", I0, I1, I2, I3, I4, I5, I6);                                                 \
    }                                                                                                              \
  };

FLASHMOE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
FLASHMOE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
FLASHMOE_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
FLASHMOE_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
FLASHMOE_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
FLASHMOE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
FLASHMOE_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
FLASHMOE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
FLASHMOE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef FLASHMOE_WGMMA
#undef FLASHMOE_RS
#undef FLASHMOE_SS
#undef FLASHMOE_TEXT
#undef FLASHMOE_EIGHT
#undef FLASHMOE_8
#undef FLASHMOE_16
#undef FLASHMOE_24
#undef FLASHMOE_32
#undef FLASHMOE_40
#undef FLASHMOE_48
#undef FLASHMOE_56
#undef FLASHMOE_64
#undef FLASHMOE_72
#undef FLASHMOE_80
#undef FLASHMOE_88
#undef FLASHMOE_96
#undef FLASHMOE_104
#undef FLASHMOE_112
#undef FLASHMOE_120
#undef FLASHMOE_128
#undef FLASHMOE_NAME
#undef FLASHMOE_NAME_SEPARATOR
#undef FLASHMOE_OPERAND
#undef FLASHMOE_OPERAND_SEPARATOR

// N = 2 * COUNT. `accumulate` is false where d holds nothing yet: the first 16 of K. Nobody has to zero it.
template <typename T, Major A_MAJOR, Major B_MAJOR, int COUNT>
__device__ __forceinline__ void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
  Products<COUNT>::template ss<T, A_MAJOR, B_MAJOR>(d, a, b, accumulate);
}

// A from registers, four a thread, as pack() makes them.
template <typename T, Major B_MAJOR, int COUNT>
__device__ __forceinline__ void wgmma(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate) {
  Products<COUNT>::template rs<T, B_MAJOR>(d, a, b, accumulate);
}

}  // namespace flashmoe::hopper
