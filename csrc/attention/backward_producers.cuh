// The warps of attention's backward kernel that bring data and take it away.
#pragma once

#include "attention/backward_tile.cuh"
#include "attention/loads.cuh"
#include "hopper/launch.cuh"

namespace flashmoe {
namespace {

// gridDim.x, read when it is wanted: kept from tile to tile it costs a register that the loading thread does not have.
__device__ __forceinline__ int blocks_of_grid() {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

// One thread: tiles, and everything that the copy engine brings.
template <typename S, bool ORDERED>
__device__ void produce(const Work& w, Shared<S>& shared) {
  Step<TILES> tile_step;
  Step<S::KEY_STAGES> key_step;
  Step<S::STAGES> step;
  wait_for_previous();
  const auto publish = [&](int index) {
    const Tile tile = tile_at<ORDERED>(w, index, S::KEYS, S::QUERIES);
    shared.tile_ring.acquire(tile_step);
    Tile* const published = shared.tiles + tile_step.stage;
    *published = tile;
    shared.tile_ring.full[tile_step.stage].arrive();
    tile_step.next();
    return published;
  };
  int index = first_tile<ORDERED>(w);
  for (const Tile* tile = publish(index); tile->end > 0;) {
    shared.key_ring.acquire(key_step);
    Barrier& k = shared.key_ring.full[key_step.stage];
    k.arrive_expecting(sizeof shared.k[0]);
    load_rows(shared.k[key_step.stage], &w.k, k, S::KEYS, S::WIDTH, tile->kv_head, tile->first_row + tile->row, tile->batch,
              Keep::briefly);
    const int stage = value_step<S>(key_step).stage;
    shared.value_ring.acquire(value_step<S>(key_step));
    Barrier& v = shared.value_ring.full[stage];
    v.arrive_expecting(sizeof shared.v[0]);
    load_rows(shared.v[stage], &w.v, v, S::KEYS, S::WIDTH_V, tile->kv_head, tile->first_row + tile->row, tile->batch,
              Keep::briefly);
    key_step.next();
    // Known before it is needed: the claim and the divisions behind a tile's place take their time. But where others wait for
    // tiles in their order nobody holds one that it does not compute.
    if (!ORDERED) index = next_tile(w, index, blocks_of_grid());
    for (int n = 0; n < w.heads_together; ++n) {
      const int head = tile->head * w.heads_together + n;
      for (int i = tile->end - 1; i >= tile->begin; --i, step.next()) {
        const int row = tile->first_column + i * S::QUERIES;
        shared.q_ring.acquire(step);
        Barrier& q = shared.q_ring.full[step.stage];
        q.arrive_expecting(sizeof shared.q[0] + sizeof(Statistics));
        bulk_load(&shared.statistics[step.stage], w.statistics + block_of<S>(w, *tile, head, i), sizeof(Statistics), q);
        load_rows(shared.q[step.stage], &w.q, q, S::QUERIES, S::WIDTH, head, row, tile->batch, Keep::longest);
        shared.dout_ring.acquire(step);
        Barrier& dout = shared.dout_ring.full[step.stage];
        dout.arrive_expecting(sizeof shared.dout[0]);
        load_rows(shared.dout[step.stage], &w.dout, dout, S::QUERIES, S::WIDTH_V, head, row, tile->batch, Keep::longest);
      }
    }
    if (ORDERED) index = next_tile<ORDERED>(w, index, 0);
    tile = publish(index);
  }
}

// The tiles of this block, for a warp that goes along with the consumers.
template <typename S, typename Visit>
__device__ __forceinline__ void each_tile(Shared<S>& shared, Visit visit) {
  for (Step<TILES> step;; step.next()) {
    shared.tile_ring.wait(step);
    const Tile& tile = shared.tiles[step.stage];
    if (tile.end == 0) return;
    visit(tile);
    __syncwarp();
    if (threadIdx.x % 32 < SPEAKERS) shared.tile_ring.release(step);
  }
}

// ------------------------------------------------------------------------------------------------ dq, on its way to memory

// Where the order of additions matters, tiles take turns at a block of queries in the order of their keys: before this tile
// come those that have a key which the step's first query sees, or a later one.
template <typename S>
__device__ __forceinline__ void await_turn(const Work& w, const Tile& tile, int step, int block) {
  const int first_key = w.right < 0 ? 0 : max(0, step * S::QUERIES - (tile.columns - tile.rows) - w.right);
  const int before = (tile.row / S::KEYS - first_key / S::KEYS) * S::SUM_BUFFERS;
  while (static_cast<volatile int*>(w.turns)[block] < before) {}
  __threadfence();
}

__device__ __forceinline__ void pass_turn(const Work& w, int block) {
  __threadfence();
  atomicAdd(w.turns + block, 1);
}

// visit(tile, step, block) with one lane, for every step that adds something.
template <typename S, typename Visit, typename Finish>
__device__ __forceinline__ void each_addition(const Work& w, Shared<S>& shared, Visit visit, Finish finish) {
  wait_for_previous();
  each_tile<S>(shared, [&](const Tile& tile) {
    if (threadIdx.x % 32 > 0 || !is_seen<S>(w, tile)) return;
    for (int n = 0; n < w.heads_together; ++n)
      for (int i = tile.end - 1; i >= tile.begin; --i)
        visit(tile, i, block_of<S>(w, tile, tile.head * w.heads_together + n, i));
    finish();
  });
}

// One warp for each buffer: what consumers wrote there is added to the sums. A turn is passed on behind the next step's
// addition, when the step's own has surely arrived.
template <typename S>
__device__ void add_sums(const Work& w, Shared<S>& shared, int buffer) {
  Ring<1>& ring = shared.dq_ring[buffer];
  Step<1> step;
  int to_pass = -1;
  const auto pass = [&] {
    if (to_pass >= 0) pass_turn(w, to_pass);
    to_pass = -1;
  };
  each_addition<S>(
      w, shared,
      [&](const Tile& tile, int i, int block) {
        if (w.ordered) await_turn<S>(w, tile, i, block);
        ring.wait(step);
        bulk_add(w.sums + (int64_t(block) * S::DIM + buffer * S::SUM_COLUMNS) * S::QUERIES, shared.dq[buffer],
                 sizeof shared.dq[buffer]);
        tma_commit();
        if (w.ordered) {
          tma_wait<1>();
          pass();
          to_pass = block;
        }
        tma_wait_read<0>();
        ring.release(step);
        step.next();
      },
      [&] {
        tma_wait<0>();
        pass();
      });
}

// Without a buffer consumers add. In a fixed order one warp waits for those before, and says so,
template <typename S>
__device__ void await_turns(const Work& w, Shared<S>& shared) {
  Step<S::STAGES> step;
  each_addition<S>(
      w, shared,
      [&](const Tile& tile, int i, int block) {
        shared.turn_ring.acquire(step);
        await_turn<S>(w, tile, i, block);
        shared.turn_ring.full[step.stage].arrive();
        step.next();
      },
      [] {});
}

// and another tells those behind.
template <typename S>
__device__ void pass_turns(const Work& w, Shared<S>& shared) {
  Step<S::STAGES> step;
  each_addition<S>(
      w, shared,
      [&](const Tile&, int, int block) {
        shared.added[step.stage].wait(step.phase);
        pass_turn(w, block);
        shared.turn_ring.release(step);
        step.next();
      },
      [] {});
}

}  // namespace
}  // namespace flashmoe
