// wgmma in every way that kernels use it: D[128, N] = A[128, K] * B[K, N] by two warpgroups, K = 128.
//
// An operand contracted over its columns (K-major) arrives as [M or N, K], one contracted over its rows as [K, M or N];
// ordinary stores put it into shared memory in the layout of tiles. What a slab has beyond N is NaN.
#pragma once

#include <utility>

#include "hopper/launch.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/wgmma.cuh"
#include "selftest.h"

namespace flashmoe::hopper {

constexpr int M = 128, K = 128;
constexpr int REGISTERS = 2;  // beside K_MAJOR and MN_MAJOR: A from registers

struct ProductParams {
  const void *a, *b;
  float* d;
  uint64_t flip_a, flip_b;  // bits of the descriptors to flip
  bool unswizzled;          // tiles are stored without the swizzle
};

template <typename T>
__device__ void fill(T* tile, const T* source, int rows, int columns, bool unswizzled) {
  const int padded = (columns + 63) / 64 * 64;
  for (int i = threadIdx.x; i < rows * padded; i += blockDim.x) {
    const int row = i / padded, column = i % padded;
    const uint32_t plain = column / 64 * rows * 128 + row * 128 + column % 64 * 2;
    const uint32_t offset = unswizzled ? plain : tile_offset(rows, row, column);
    const unsigned short nan = 0xffff;
    T* element = reinterpret_cast<T*>(reinterpret_cast<char*>(tile) + offset);
    *element = column < columns ? source[row * columns + column] : *reinterpret_cast<const T*>(&nan);
  }
}

// Of the k-th 16 of K, for an operand of `rows` in M or N, of which it takes those from `begin` on.
template <int MAJOR>
__device__ uint64_t at(uint32_t tile, int rows, int begin, int k) {
  if constexpr (MAJOR == K_MAJOR) return advance(k_major(tile + begin * 128), k / 4 * rows * 128 + k % 4 * 32);
  return advance(mn_major(tile + begin / 64 * K * 128, K * 128), k * 16 * 128);
}

template <typename T, int N, int A, int B>
__global__ void __launch_bounds__(256, 1) wgmma_kernel(ProductParams p) {
  T* a_tile = &shared_storage<T>();
  T* b_tile = a_tile + M * K;
  if (A != REGISTERS) fill(a_tile, static_cast<const T*>(p.a), A == K_MAJOR ? M : K, A == K_MAJOR ? K : M, p.unswizzled);
  fill(b_tile, static_cast<const T*>(p.b), B == K_MAJOR ? N : K, B == K_MAJOR ? K : N, p.unswizzled);
  fence_proxy_async();
  __syncthreads();

  const int begin = threadIdx.x / 128 * 64, thread = threadIdx.x % 128;
  const int row = begin + fragment_row(thread), column = fragment_column(thread);
  uint32_t a[A == REGISTERS ? K / 4 : 1];
  if constexpr (A == REGISTERS) {  // as if it were the accumulators of [64, K]
    const auto element = [&](int i) {
      return float(static_cast<const T*>(p.a)[(row + i % 4 / 2 * 8) * K + i / 4 * 8 + column + i % 2]);
    };
#pragma unroll
    for (int i = 0; i < K / 4; ++i) a[i] = pack<T>(element(2 * i), element(2 * i + 1));
  }
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = __int_as_float(0x7fffffff);  // NaN, which the first product must not add

  wgmma_fence();
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    const uint64_t b = at<B>(shared_address(b_tile), N, 0, k) ^ p.flip_b;
    if constexpr (A == REGISTERS)
      wgmma<T, Major(B)>(d, &a[4 * k], b, k > 0);
    else
      wgmma<T, Major(A), Major(B)>(d, at<A>(shared_address(a_tile), M, begin, k) ^ p.flip_a, b, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  if constexpr (A == REGISTERS) pin(a);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) p.d[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}

// Launches the kernel of n, a and b where it is that of N, A and B; `error` stays as it is otherwise. There is more shared
// memory than tiles: most wrong descriptors then read something wrong, where they would end the process at its bounds.
template <typename T, int N, int A, int B>
void launch_if(const ProductParams& p, int n, int a, int b, cudaError_t& error) {
  const size_t bytes = (M * K + K * ((N + 63) / 64 * 64)) * sizeof(T) + 96 * 1024;
  if (n == N && a == A && b == B) error = launch(wgmma_kernel<T, N, A, B>, {dim3(1), dim3(256), bytes}, p);
}

template <typename T, int... N>
cudaError_t product(const ProductParams& p, int n, int a, int b, std::integer_sequence<int, N...>) {
  cudaError_t error = cudaErrorInvalidValue;
  (launch_if<T, N, K_MAJOR, K_MAJOR>(p, n, a, b, error), ...);
  (launch_if<T, N, K_MAJOR, MN_MAJOR>(p, n, a, b, error), ...);
  (launch_if<T, N, MN_MAJOR, K_MAJOR>(p, n, a, b, error), ...);
  (launch_if<T, N, MN_MAJOR, MN_MAJOR>(p, n, a, b, error), ...);
  (launch_if<T, N, REGISTERS, K_MAJOR>(p, n, a, b, error), ...);
  (launch_if<T, N, REGISTERS, MN_MAJOR>(p, n, a, b, error), ...);
  return error;
}

using TestedN = std::integer_sequence<int, 32, 64, 80, 96, 112, 128, 176, 192, 256>;

}  // namespace flashmoe::hopper
