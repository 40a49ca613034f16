// What the matrix products of experts share: tiles of 128 rows by 256 columns, a ring of stages, sums in the registers of
// two warpgroups of 64 rows each. One thread fills the stages by TMA; where the rows of one operand are those of tokens,
// which lie anywhere, a warpgroup gathers them by copies of 16 bytes.
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
#include "hopper/launch.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "moe/experts.h"

namespace flashmoe {
namespace {

using namespace hopper;

// --------------------------------------------------------------------------------------------------------------- sizes

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256;
constexpr int DEPTH = 64;  // of a stage: what is contracted at a time
constexpr int STAGES = 4;  // 192 KB
constexpr int THREADS = 384;
// Whoever gathers needs more registers than one thread that loads.
template <bool GATHERED>
constexpr int PRODUCER_REGISTERS = GATHERED ? 56 : 40;
template <bool GATHERED>
constexpr int CONSUMER_REGISTERS = GATHERED ? 224 : 232;
constexpr int COUNT = TILE_COLUMNS / 2;  // accumulators of a thread

constexpr int TILES = 2;  // that somebody is at work on: the producer, and consumers
constexpr int SLABS = 2;  // for results on their way to memory, 64 by 64, of each warpgroup

template <typename T, typename Tile>
struct Shared {
  alignas(1024) T a[STAGES][TILE_ROWS * DEPTH];
  alignas(1024) T b[STAGES][TILE_COLUMNS * DEPTH];
  alignas(1024) T results[TILE_ROWS / 64][SLABS][64 * 64];
  Tile tiles[TILES];  // `steps` of them stages; -1 after the last tile
  Ring<STAGES> ring;
  Ring<TILES> tile_ring;
};

enum BarrierId { WARPGROUP = 1, CONSUMERS = 3 };  // named barriers: one for each warpgroup, one for both

constexpr uint32_t A_BYTES = TILE_ROWS * DEPTH * 2, B_BYTES = TILE_COLUMNS * DEPTH * 2;  // of a stage

// By all threads. Those that gather arrive at every stage each, and their four warps want to know the tiles too.
template <bool GATHERED, typename T, typename Tile>
__device__ __forceinline__ void prepare(Shared<T, Tile>& shared) {
  if (threadIdx.x == 0) {
    shared.ring.init(GATHERED ? 1 + 128 : 1, 8);
    shared.tile_ring.init(1, GATHERED ? 8 + 4 : 8);
    fence_barrier_init();
  }
  __syncthreads();
}

// The rows of an expert. Whatever the offsets are, they lie within the tensors.
struct Rows {
  int first, count;
};
__device__ __forceinline__ Rows rows_of(const int32_t* offsets, int expert, int rows) {
  const int first = max(0, min(rows, offsets[expert])), end = max(0, min(rows, offsets[expert + 1]));
  return {first, max(0, end - first)};
}

// --------------------------------------------------------------------------------------------------------------- tiles

// Where the index-th of `high` times `columns` tiles lies: 16 rows of tiles at a time, column by column, so that those under
// way are a block of about as many rows as columns.
struct Place {
  int row, column;
};
__device__ __forceinline__ Place place_of(int index, int high, int columns) {
  constexpr int TOGETHER = 16;
  const int first = index / (TOGETHER * columns) * TOGETHER, together = min(TOGETHER, high - first);
  index -= first * columns;
  return {first + index % together, index / together};
}

// The thread that finds this block's tiles, one by one, and tells the others. `find(index, tile)` is false when there is no
// tile any more.
template <typename T, typename Tile, typename Find>
struct Publisher {
  Shared<T, Tile>& shared;
  int32_t* const claimed;
  Find find;
  Step<TILES> step;
  int taken = int(blockIdx.x) - int(gridDim.x);  // by all blocks before, beyond each one's first

  // The next tile. The claim takes its time: it is under way while the last stages of the tile before wait for room. Not
  // earlier: whoever claims early may be the last to begin. Not by atomicAdd: where other lanes are about, the compiler adds
  // for the whole warp and shares out what comes back, so that the thread would wait for it here.
  __device__ __forceinline__ void claim() { taken = int(atomicInc(reinterpret_cast<unsigned*>(claimed), INT32_MAX)); }

  __device__ __forceinline__ Tile publish() {
    Tile tile;
    if (!find(int(gridDim.x) + taken, tile)) tile.steps = -1;
    shared.tile_ring.acquire(step);
    shared.tiles[step.stage] = tile;
    shared.tile_ring.full[step.stage].arrive();
    step.next();
    return tile;
  }
};

// The producer's thread: every tile of this block published, and loaded.
template <typename T, typename Tile, typename Find, typename Load>
__device__ __forceinline__ void each_tile_published(Shared<T, Tile>& shared, int32_t* claimed, Find find, Load load) {
  Publisher<T, Tile, Find> publisher{shared, claimed, find};
  Step<STAGES> stage;
  for (;;) {
    const Tile tile = publisher.publish();
    if (tile.steps < 0) return;
    const int claim = max(0, tile.steps - STAGES);
    if (tile.steps == 0) publisher.claim();
    for (int k = 0; k < tile.steps; ++k, stage.next()) {
      if (k == claim) publisher.claim();
      shared.ring.acquire(stage);
      shared.ring.full[stage.stage].arrive_expecting(A_BYTES + B_BYTES);
      load(tile, k, stage.stage, shared.ring.full[stage.stage]);
    }
  }
}

// By all lanes of a warp that wants to know the tiles: the next one.
template <typename T, typename Tile>
__device__ __forceinline__ Tile take(Shared<T, Tile>& shared, Step<TILES> step) {
  shared.tile_ring.wait(step);
  Tile tile = shared.tiles[step.stage];
  // From one lane, so that the compiler knows it to be the same in all.
  tile.steps = __shfl_sync(0xffffffff, tile.steps, 0);
  __syncwarp();
  if (threadIdx.x % 32 == 0) shared.tile_ring.release(step);
  return tile;
}

// The consumers' threads: the same tiles.
template <typename T, typename Tile, typename Visit>
__device__ __forceinline__ void each_tile(Shared<T, Tile>& shared, Visit visit) {
  Step<TILES> step;
  for (;; step.next()) {
    const Tile tile = take(shared, step);
    if (tile.steps < 0) break;
    visit(tile);
  }
  tma_wait_read<0>();  // the block's memory may go
}

// ------------------------------------------------------------------------------------------------------------- gathers

// The slots that rows compute. Whatever row_slot holds, it names one of `count` or none.
struct Slots {
  const int32_t* of_row;  // row_slot; null: of each row its own
  uint32_t count;

  __device__ __forceinline__ bool is_one(int slot) const { return uint32_t(slot) < count; }

  // -1 for none.
  __device__ __forceinline__ int operator()(int row) const {
    if (!of_row) return row;
    const int slot = of_row[row];
    return is_one(slot) ? slot : -1;
  }
};

// Tokens [T, columns], of which rows are gathered: of slot s that of token s / each.
struct Tokens {
  const void* data;
  uint32_t stride;  // bytes
  uint32_t each;
  int columns;
};

// How 128 threads gather the ROWS rows of a stage: eight neighbours copy 128 bytes of a row, 16 each, so that thread t has
// parts of the rows t / 8 + 16 i. A warp's rows are as many as its lanes or fewer: each lane finds the token of one, and all
// take them from there.
template <typename T, int ROWS>
struct Gather {
  const Tokens& tokens;
  const Slots& slots;

  // What row_slot says of this lane's row, among those from `first` on, of which `left` are the expert's. Nothing looks at
  // it here, so that nobody waits for it before it is wanted.
  __device__ __forceinline__ int fetch(int first, int left) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 4 + lane / 4 * 16 + lane % 4;
    return row < min(left, ROWS) ? slots.of_row[first + row] : -1;
  }

  // The tokens of this thread's rows, from what all lanes fetched; -1 for none.
  struct Rows {
    int token[ROWS / 16];
  };
  __device__ __forceinline__ Rows rows(int slot) const {
    const int own = slots.is_one(slot) ? int(uint32_t(slot) / tokens.each) : -1, group = threadIdx.x % 32 / 8;
    Rows rows;
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) rows.token[i] = __shfl_sync(0xffffffff, own, i * 4 + group);
    return rows;
  }

  // Columns from `column` on into a tile, as many slabs as it has. Zeros where there is no token, and beyond the columns:
  // nothing is read there.
  template <int SLABS>
  __device__ __forceinline__ void copy(T* tile, const Rows& rows, int column) const {
    const int own = column + threadIdx.x % 8 * 8;
    const char* first = static_cast<const char*>(tokens.data) + int64_t(own) * 2;
    asm("" : "+l"(first));  // to be one number: what follows is one instruction a row then, not three
    const uint32_t to = shared_address(tile) + tile_offset(ROWS, threadIdx.x / 8, threadIdx.x % 8 * 8);
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
      const char* const from = first + uint64_t(uint32_t(max(rows.token[i], 0))) * tokens.stride;
#pragma unroll
      for (int slab = 0; slab < SLABS; ++slab)
        copy_async(to + tile_offset(ROWS, i * 16, slab * 64), from + slab * 128,
                   rows.token[i] >= 0 && own + slab * 64 < tokens.columns);
    }
  }
};

// The producer's warpgroup where rows are gathered: one of its threads publishes the tiles and loads the other operand's
// `bytes` of each stage, all copy rows. `begin(tile)` comes before a tile's stages, `copy(tile, k, stage)` in each.
//
// Tiles are found before the last stage of the one before, so that their rows' tokens are on the way while that waits for
// room; where tiles are so short that the claim has just begun, after it.
template <typename T, typename Tile, typename Find, typename Load, typename Begin, typename Copy>
__device__ __forceinline__ void each_tile_gathered(Shared<T, Tile>& shared, int32_t* claimed, uint32_t bytes, Find find,
                                                   Load load, Begin begin, Copy copy) {
  const bool speaks = threadIdx.x < 32 && elected();
  Publisher<T, Tile, Find> publisher{shared, claimed, find};
  if (speaks) publisher.publish();
  __syncwarp();
  Step<TILES> step;
  Step<STAGES> stage;
  for (;; step.next()) {
    const Tile tile = take(shared, step);
    if (tile.steps < 0) return;
    begin(tile);
    const int claim = max(0, tile.steps - STAGES);
    for (int k = 0; k < tile.steps; ++k, stage.next()) {
      Barrier& full = shared.ring.full[stage.stage];
      if (speaks) {
        if (k == claim) publisher.claim();
        if (k == claim + STAGES - 1) publisher.publish();
      }
      __syncwarp();
      shared.ring.acquire(stage);
      if (speaks) {
        full.arrive_expecting(bytes);
        load(tile, k, stage.stage, full);
      }
      copy(tile, k, stage.stage);
      full.arrive_after_copies();
    }
    if (speaks && tile.steps < STAGES) {
      if (tile.steps == 0) publisher.claim();
      publisher.publish();
    }
    __syncwarp();
  }
}

// ---------------------------------------------------------------------------------------------------------------- sums

// The products of a tile, stage by stage. A warpgroup without rows lets the stages pass.
template <Major A_MAJOR, Major B_MAJOR, typename T, typename Tile, typename Visit>
__device__ __forceinline__ void multiply(float (&d)[COUNT], Shared<T, Tile>& shared, Step<STAGES>& step, int steps, uint64_t a,
                                         uint64_t b, bool active, Visit visit) {
  constexpr int A_NEXT = A_MAJOR == K_MAJOR ? 32 : 2048, B_NEXT = B_MAJOR == K_MAJOR ? 32 : 2048;  // bytes, 16 of K
  const bool speaks = threadIdx.x % 32 == 0;  // for its warp
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
    if (k > 0 && speaks) shared.ring.release(previous);
    previous = step;
    step.next();
  }
  wgmma_wait<0>();
  pin(d);
  if (steps > 0 && speaks) shared.ring.release(previous);
}

// 64 columns of a warpgroup's results, packed, into one of its slabs; and from there to memory by TMA: `put` by one thread.
// While a slab leaves, the next one is written, or the next tile computed. Each staging is followed by one sending.
template <typename T, typename Tile>
__device__ __forceinline__ T* stage(const uint32_t (&pairs)[16], Shared<T, Tile>& shared, int warpgroup, int& slab) {
  T* const results = shared.results[warpgroup][slab];
  slab = (slab + 1) % SLABS;
  if (threadIdx.x % 128 == 0) tma_wait_read<SLABS - 1>();
  barrier_sync(WARPGROUP + warpgroup, 128);
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < 16; i += 4)  // 16 columns
    stmatrix(shared_address(results) + tile_offset(64, row, i * 4 + lane / 16 * 8), pairs[i], pairs[i + 1], pairs[i + 2],
             pairs[i + 3]);
  fence_proxy_async();
  barrier_sync(WARPGROUP + warpgroup, 128);
  return results;
}
template <typename Put>
__device__ __forceinline__ void send(Put put) {
  if (threadIdx.x % 128 > 0) return;
  put();
  tma_commit();
}

// The sums from `first` on, packed as `stage` wants them.
template <typename T>
__device__ __forceinline__ void pack_columns(const float (&d)[COUNT], int first, uint32_t (&pairs)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(d[first + 2 * i], d[first + 2 * i + 1]);
}

// ---------------------------------------------------------------------------------------------------------------- host

template <typename T>
constexpr MapElement map_element() {
  return std::is_same_v<T, __half> ? MAP_FLOAT16 : MAP_BFLOAT16;
}

Slots slots_of(const Experts& e) {
  return {e.row_slot, uint32_t(std::min(e.tokens * e.slots, int64_t(1) << 31))};
}

Tokens tokens_of(const Experts& e, const Matrix& x, int columns) {
  return {x.data, uint32_t(x.stride * 2), uint32_t(e.slots), columns};
}

// Of a matrix of rows, of which a copy takes `box` rows and 64 columns.
template <typename T>
CUtensorMap rows_map(const char* name, const Matrix& x, int64_t rows, int64_t columns, int box) {
  return tensor_map(name, x.data, map_element<T>(), {{columns, 64, 2}, {rows, box, x.stride * 2}});
}

// Of the experts' weights [experts, rows, columns], likewise.
template <typename T>
CUtensorMap weights_map(const char* name, const Weights& w, int64_t experts, int64_t rows, int64_t columns, int box) {
  return tensor_map(name, w.data, map_element<T>(),
                    {{columns, 64, 2}, {rows, box, w.row_stride * 2}, {experts, 1, w.expert_stride * 2}});
}

}  // namespace
}  // namespace flashmoe
