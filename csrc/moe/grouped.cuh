// What the matrix products of experts share: tiles of 128 rows by 256 columns, a ring of stages that one thread fills, sums in
// the registers of two warpgroups of 64 rows each.
//
// Everything that depends on the routing is read on the device: grids have a block for every multiprocessor, blocks take
// tiles one by one, in order, and find them in the experts' offsets. So the tiles under way are neighbours at all times and
// share rows and weights in the L2 cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include "hopper/barrier.cuh"
#include "hopper/cluster.cuh"
#include "hopper/launch.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "moe/experts.h"
#include "moe/gather.cuh"

namespace flashmoe {
namespace {

using namespace hopper;

// --------------------------------------------------------------------------------------------------------------- sizes

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256;
constexpr int DEPTH = 64;  // of a stage: what is contracted at a time
constexpr int STAGES = 4;  // 192 KB
constexpr int THREADS = 384;
// The producer's warpgroup has one thread that loads, and where tokens are gathered three warps that copy them. Registers move
// within what the launch gives: more would be waited for forever.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int COPYING_REGISTERS = 104, BESIDE_COPYING_REGISTERS = 200;
constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8 * (THREADS / 128);  // of a thread of each warpgroup
static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= LAUNCH_REGISTERS);
static_assert(COPYING_REGISTERS + 2 * BESIDE_COPYING_REGISTERS <= LAUNCH_REGISTERS);
constexpr int COUNT = TILE_COLUMNS / 2;  // accumulators of a thread

constexpr int TILES = 2;  // that somebody is at work on: the producer, and consumers
constexpr int SLABS = 2;  // for results on their way to memory, 64 by 64, of each warpgroup

template <typename T, typename Tile>
struct Shared {
  alignas(1024) T a[STAGES][TILE_ROWS * DEPTH];
  alignas(1024) T b[STAGES][TILE_COLUMNS * DEPTH];
  alignas(1024) T results[TILE_ROWS / 64][SLABS][64 * 64];
  Tile tiles[TILES];
  int claims[TILES];  // of the second block, written by the first
  PairRing<STAGES> ring;
  Ring<TILES> tile_ring, claim_ring;
};

enum BarrierId { WARPGROUP = 1, CONSUMERS = 3 };  // named barriers: one for each warpgroup, one for both

constexpr uint32_t STAGE_BYTES = (TILE_ROWS + TILE_COLUMNS) * DEPTH * 2;

// By all threads.
template <typename T, typename Tile>
__device__ __forceinline__ void prepare(Shared<T, Tile>& shared) {
  if (threadIdx.x == 0) {
    shared.ring.init(1, 8);
    shared.tile_ring.init(1, 8);
    shared.claim_ring.init(1, 1);
    fence_barrier_init();
  }
  cluster_sync();
}

// The rows of an expert. Whatever the offsets are, they lie within the tensors.
struct Rows {
  int first, count;
};
__device__ __forceinline__ Rows rows_of(const int32_t* offsets, int expert, int rows) {
  const int first = max(0, min(rows, offsets[expert])), end = max(0, min(rows, offsets[expert + 1]));
  return {first, max(0, end - first)};
}
// Of all experts.
__device__ __forceinline__ int total_rows(const int32_t* offsets, int experts, int rows) {
  return max(0, min(rows, offsets[experts]));
}

// --------------------------------------------------------------------------------------------------------------- tiles

// Where the index-th of `high` times `columns` pairs of tiles lies: 8 rows of pairs at a time, column by column, so that
// those under way are a block of about as many rows as columns.
struct Place {
  int row, column;
};
__device__ __forceinline__ Place place_of(int index, int high, int columns) {
  constexpr int TOGETHER = 8;
  const int first = index / (TOGETHER * columns) * TOGETHER, together = min(TOGETHER, high - first);
  index -= first * columns;
  return {first + index % together, index / together};
}

// The pair of tiles that both blocks take next: the first one claims, and tells the second.
template <typename T, typename Tile>
__device__ __forceinline__ int agreed(Shared<T, Tile>& shared, Step<TILES> step, uint32_t rank, int index) {
  Ring<TILES>& ring = shared.claim_ring;
  if (rank == 0) {
    ring.acquire(step);
    store_in(1, &shared.claims[step.stage], index);
    arrive_after_stores_in(1, ring.full[step.stage]);
  } else {
    wait_for_pair(ring.full[step.stage], step.phase);
    index = shared.claims[step.stage];
    arrive_in(0, ring.empty[step.stage]);
  }
  return index;
}

// The producer's thread: every tile of this block, found by its pair's index, published, and loaded. `find(index, tile)` is
// false when there is no pair any more; the tile is then marked by `steps` -1.
template <typename T, typename Tile, typename Find, typename Load>
__device__ __forceinline__ void each_tile_published(Shared<T, Tile>& shared, uint32_t rank, int32_t* claimed, Find find,
                                                    Load load) {
  Step<TILES> step;
  Step<STAGES> stage;
  const int pairs = int(gridDim.x) / PAIR;
  int taken = int(blockIdx.x) / PAIR - pairs;  // by all pairs before, beyond each one's first
  // The claim takes its time: it is under way while the last stages wait for room. Not earlier: whoever claims early may be
  // the last to begin. Nothing is computed from it here: an addition would wait for it at once.
  const auto claim = [&] {
    if (rank == 0) taken = atomicAdd(claimed, 1);
  };
  for (;;) {
    Tile tile;
    if (!find(agreed(shared, step, rank, pairs + taken), tile)) tile.steps = -1;
    shared.tile_ring.acquire(step);
    shared.tiles[step.stage] = tile;
    shared.tile_ring.full[step.stage].arrive();
    step.next();
    if (tile.steps < 0) return;
    if (tile.steps == 0) claim();
    for (int k = 0; k < tile.steps; ++k, stage.next()) {
      if (k == max(0, tile.steps - STAGES)) claim();
      shared.ring.acquire(stage);
      shared.ring.full[stage.stage].arrive_expecting(STAGE_BYTES);
      load(tile, k, stage.stage, shared.ring.full[stage.stage]);
    }
  }
}

// The consumers' threads: the same tiles.
template <typename T, typename Tile, typename Visit>
__device__ __forceinline__ void each_tile(Shared<T, Tile>& shared, Visit visit) {
  Step<TILES> step;
  for (;; step.next()) {
    shared.tile_ring.wait(step);
    Tile tile = shared.tiles[step.stage];
    // From one lane, so that the compiler knows it to be the same in all.
    tile.steps = __shfl_sync(0xffffffff, tile.steps, 0);
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared.tile_ring.release(step);
    if (tile.steps < 0) break;
    visit(tile);
  }
  tma_wait_read<0>();  // the block's memory may go
}

// ---------------------------------------------------------------------------------------------------------------- sums

// The products of a tile, stage by stage. A warpgroup without rows lets the stages pass.
template <Major A_MAJOR, Major B_MAJOR, typename T, typename Tile, typename Visit>
__device__ __forceinline__ void multiply(float (&d)[COUNT], Shared<T, Tile>& shared, Step<STAGES>& step, int steps, uint64_t a,
                                         uint64_t b, bool active, Visit visit) {
  constexpr int A_NEXT = A_MAJOR == K_MAJOR ? 32 : 2048, B_NEXT = B_MAJOR == K_MAJOR ? 32 : 2048;  // bytes, 16 of K
  const uint32_t lane = threadIdx.x % 32;
  const auto release = [&](Step<STAGES> stage) {
    if (lane < PAIR) shared.ring.release(stage, lane);
  };
  Step<STAGES> previous = step;
  for (int k = 0; k < steps; ++k) {
    shared.ring.wait(step);
    visit(k, step.stage);
    if (active) {
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < DEPTH / 16; ++i)
        wgmma<T, A_MAJOR, B_MAJOR>(d, advance(a, step.stage * sizeof shared.a[0] + i * A_NEXT),
                                   advance(b, step.stage * sizeof shared.b[0] + i * B_NEXT), k > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<1>();
    }
    if (k > 0) release(previous);
    previous = step;
    step.next();
  }
  wgmma_wait<0>();
  pin(d);
  if (steps > 0) release(previous);
}

// 128 bytes of each of a warpgroup's 64 rows into one of its slabs, by `write(its address)`; and from there to memory by TMA:
// `put` by one thread. While a slab leaves, the next one is written, or the next tile computed. Each staging is followed by
// one sending.
template <typename T, typename Tile, typename Write>
__device__ __forceinline__ T* stage(Shared<T, Tile>& shared, int warpgroup, int& slab, Write write) {
  T* const results = shared.results[warpgroup][slab];
  slab = (slab + 1) % SLABS;
  if (threadIdx.x % 128 == 0) tma_wait_read<SLABS - 1>();
  barrier_sync(WARPGROUP + warpgroup, 128);
  write(shared_address(results));
  fence_proxy_async();
  barrier_sync(WARPGROUP + warpgroup, 128);
  return results;
}
// 64 columns of results, packed.
template <typename T, typename Tile>
__device__ __forceinline__ T* stage(const uint32_t (&pairs)[16], Shared<T, Tile>& shared, int warpgroup, int& slab) {
  return stage(shared, warpgroup, slab, [&](uint32_t results) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < 16; i += 4)  // 16 columns
      stmatrix(results + tile_offset(64, row, i * 4 + lane / 16 * 8), pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
  });
}
// 32 columns of the sums themselves.
template <typename T, typename Tile>
__device__ __forceinline__ T* stage(const float (&sums)[16], Shared<T, Tile>& shared, int warpgroup, int& slab) {
  return stage(shared, warpgroup, slab, [&](uint32_t results) {
    const int row = fragment_row(threadIdx.x % 128), column = fragment_column(threadIdx.x % 128);
#pragma unroll
    for (int i = 0; i < 16; i += 4) {  // 8 columns; a float is as wide as two elements of a tile
      store_shared(results + tile_offset(64, row, (2 * i + column) * 2), sums[i], sums[i + 1]);
      store_shared(results + tile_offset(64, row + 8, (2 * i + column) * 2), sums[i + 2], sums[i + 3]);
    }
  });
}
template <typename Put>
__device__ __forceinline__ void send(Put put) {
  if (threadIdx.x % 128 > 0) return;
  put();
  tma_commit();
}

// The sums from `first` on, as `stage` wants them: packed in pairs, or as they are.
template <typename T>
__device__ __forceinline__ void pack_columns(const float (&d)[COUNT], int first, uint32_t (&pairs)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(d[first + 2 * i], d[first + 2 * i + 1]);
}
template <typename T>
__device__ __forceinline__ void pack_columns(const float (&d)[COUNT], int first, float (&sums)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i] = d[first + i];
}

// ---------------------------------------------------------------------------------------------------------------- host

// A block for every multiprocessor, in pairs.
template <typename Storage, typename Work>
cudaError_t launch_pairs(void (*kernel)(Work), const Work& work, cudaStream_t stream) {
  int blocks = 0;
  if (const cudaError_t error = multiprocessors(blocks)) return error;
  return launch(kernel, {dim3(blocks / PAIR * PAIR), dim3(THREADS), sizeof(Storage), stream}, work);
}

template <typename T>
constexpr MapElement map_element() {
  if (std::is_same_v<T, float>) return MAP_FLOAT32;
  return std::is_same_v<T, __half> ? MAP_FLOAT16 : MAP_BFLOAT16;
}

// Of a matrix of rows, of which a copy takes `box` rows and 128 bytes of columns.
template <typename T>
CUtensorMap rows_map(const char* name, const Matrix& x, int64_t rows, int64_t columns, int box) {
  return tensor_map(name, x.data, map_element<T>(), {{columns, 64, 2}, {rows, box, x.stride * 2}});
}

// Of the experts' weights [experts, rows, columns], likewise.
template <typename T>
CUtensorMap weights_map(const char* name, const Weights& w, int64_t experts, int64_t rows, int64_t columns, int box) {
  constexpr int64_t bytes = sizeof(T);
  return tensor_map(name, w.data, map_element<T>(),
                    {{columns, 128 / bytes, bytes}, {rows, box, w.row_stride * bytes}, {experts, 1, w.expert_stride * bytes}});
}

}  // namespace
}  // namespace flashmoe
