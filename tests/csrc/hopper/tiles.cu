// How tiles get into and out of shared memory: TMA, bulk copies, stmatrix, copy_async. Tiles are compared byte by byte with
// the layout that Python computes from its definition.
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"
#include "selftest.h"

namespace flashmoe::hopper {
namespace {

constexpr uint32_t TILE_BYTES = 64 * 1024;

struct alignas(1024) Storage {
  uint4 tile[TILE_BYTES / 16];
  Barrier barrier;
};

// Bytes that are no part of a result stay 0xff: NaN.
__device__ void poison(Storage& s) {
  for (uint32_t i = threadIdx.x; i < TILE_BYTES / 16; i += blockDim.x) s.tile[i] = uint4{~0u, ~0u, ~0u, ~0u};
}

__device__ void dump(const Storage& s, void* out) {
  for (uint32_t i = threadIdx.x; i < TILE_BYTES / 16; i += blockDim.x) static_cast<uint4*>(out)[i] = s.tile[i];
}

// ----------------------------------------------------------------------------------------------------------------- TMA

struct MapArguments {
  const void* base;
  int64_t element_type, rank;    // 0 bfloat16, 1 float16
  int64_t size[4], box[4], stride[4];
  int64_t at[4];                 // the box's coordinates
  int64_t keep;
};

CUtensorMap map_of(const MapArguments& m) {
  const MapElement element = m.element_type ? MAP_FLOAT16 : MAP_BFLOAT16;
  const auto d = [&](int i) { return MapDimension{m.size[i], m.box[i], m.stride[i]}; };
  switch (m.rank) {
    case 2: return tensor_map("x", m.base, element, {d(0), d(1)});
    case 3: return tensor_map("x", m.base, element, {d(0), d(1), d(2)});
    case 4: return tensor_map("x", m.base, element, {d(0), d(1), d(2), d(3)});
    default: return tensor_map("x", m.base, element, {d(0)});
  }
}

__global__ void __launch_bounds__(128) load_kernel(const __grid_constant__ CUtensorMap map, MapArguments m, void* out) {
  Storage& s = shared_storage<Storage>();
  poison(s);
  if (threadIdx.x == 0) {
    prefetch_map(&map);
    s.barrier.init(1);
    fence_barrier_init();
  }
  fence_proxy_async();  // the copy engine overwrites what ordinary stores wrote
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t bytes = 2;
    for (int i = 0; i < m.rank; ++i) bytes *= m.box[i];
    const Keep keep = m.keep == 0 ? Keep::normal : m.keep == 1 ? Keep::briefly : Keep::longest;
    const int x = m.at[0], y = m.at[1], z = m.at[2], w = m.at[3];
    s.barrier.arrive_expecting(bytes);
    if (m.rank == 2) tma_load(s.tile, &map, s.barrier, keep, x, y);
    if (m.rank == 3) tma_load(s.tile, &map, s.barrier, keep, x, y, z);
    if (m.rank == 4) tma_load(s.tile, &map, s.barrier, keep, x, y, z, w);
  }
  s.barrier.wait(0);
  dump(s, out);
}

// The image of a tile, as load_kernel dumps it, into the tensor.
__global__ void __launch_bounds__(128)
    store_kernel(const __grid_constant__ CUtensorMap map, MapArguments m, const uint4* image) {
  Storage& s = shared_storage<Storage>();
  for (uint32_t i = threadIdx.x; i < TILE_BYTES / 16; i += blockDim.x) s.tile[i] = image[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int x = m.at[0], y = m.at[1], z = m.at[2], w = m.at[3];
    if (m.rank == 2) tma_store(&map, s.tile, x, y);
    if (m.rank == 3) tma_store(&map, s.tile, x, y, z);
    if (m.rank == 4) tma_store(&map, s.tile, x, y, z, w);
    tma_commit();
    tma_wait_read<0>();
  }
  __syncthreads();
  poison(s);
  if (threadIdx.x == 0) tma_wait<0>();
}

__global__ void __launch_bounds__(128) bulk_load_kernel(const void* source, uint32_t bytes, void* out) {
  Storage& s = shared_storage<Storage>();
  poison(s);
  if (threadIdx.x == 0) {
    s.barrier.init(1);
    fence_barrier_init();
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    s.barrier.arrive_expecting(bytes);
    bulk_load(s.tile, source, bytes, s.barrier);
  }
  s.barrier.wait(0);
  dump(s, out);
}

// ------------------------------------------------------------------------------------------------------ ordinary stores

template <typename T, int N>
__global__ void __launch_bounds__(128) accumulators_kernel(const float* source, int rows, int row, void* out) {
  Storage& s = shared_storage<Storage>();
  poison(s);
  __syncthreads();
  float d[N / 2];
  const float* own = source + fragment_row(threadIdx.x) * N + fragment_column(threadIdx.x);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = own[i % 4 / 2 * 8 * N + i / 4 * 8 + i % 2];
  store_accumulators<T>(d, shared_address(s.tile), rows, row);
  __syncthreads();
  dump(s, out);
}

// Rows of 128 columns, gathered into a tile; zeros where a row's index is negative. Every thread copies, and arrives.
__global__ void __launch_bounds__(128) gather_kernel(const __nv_bfloat16* x, const int* index, int rows, void* out) {
  Storage& s = shared_storage<Storage>();
  poison(s);
  if (threadIdx.x == 0) {
    s.barrier.init(blockDim.x);
    fence_barrier_init();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) {
    const int row = i / 16, column = i % 16 * 8;
    copy_async(shared_address(s.tile) + tile_offset(rows, row, column), x + max(index[row], 0) * 128 + column,
               index[row] >= 0);
  }
  s.barrier.arrive_after_copies();
  s.barrier.wait(0);
  dump(s, out);
}

template <typename Kernel, typename... Arguments>
cudaError_t one_block(Kernel kernel, Arguments... arguments) {
  return launch(kernel, {dim3(1), dim3(128), sizeof(Storage)}, arguments...);
}

}  // namespace
}  // namespace flashmoe::hopper

using namespace flashmoe::hopper;

EXPORT const char* hopper_error() { return last_error.c_str(); }
EXPORT int hopper_tensor_map(const MapArguments* m) {
  return run([&] { return map_of(*m), cudaSuccess; });
}
EXPORT int hopper_load(const MapArguments* m, void* out) {
  return run([&] { return one_block(load_kernel, map_of(*m), *m, out); });
}
EXPORT int hopper_store(const MapArguments* m, const uint4* image) {
  return run([&] { return one_block(store_kernel, map_of(*m), *m, image); });
}
EXPORT int hopper_bulk_load(const void* source, uint32_t bytes, void* out) {
  return run([&] { return one_block(bulk_load_kernel, source, bytes, out); });
}
EXPORT int hopper_store_accumulators(int fp16, int n, const float* source, int rows, int row, void* out) {
  return run([&] {
    switch (n * 2 + fp16) {
      case 128: return one_block(accumulators_kernel<__nv_bfloat16, 64>, source, rows, row, out);
      case 129: return one_block(accumulators_kernel<__half, 64>, source, rows, row, out);
      case 352: return one_block(accumulators_kernel<__nv_bfloat16, 176>, source, rows, row, out);
      case 353: return one_block(accumulators_kernel<__half, 176>, source, rows, row, out);
      default: return cudaErrorInvalidValue;
    }
  });
}
EXPORT int hopper_gather(const __nv_bfloat16* x, const int* index, int rows, void* out) {
  return run([&] { return one_block(gather_kernel, x, index, rows, out); });
}
