// What the roles of attention's backward kernel share: sizes for each head dim, shared memory, what the kernel is given.
#pragma once

#include <cuda.h>

#include "attention/tiles.cuh"
#include "hopper/barrier.cuh"
#include "hopper/shared_memory.cuh"

namespace flashmoe {
namespace {

using namespace hopper;

constexpr int STEP_QUERIES = 64;
constexpr int tile_keys(int dim) { return dim <= 64 ? 192 : dim <= 128 ? 128 : 64; }

template <typename Element, int D, int V>
struct Sizes {
  using T = Element;
  static constexpr int DIM = D, DIM_V = V;
  static constexpr int WIDTH = (D + 63) / 64 * 64, WIDTH_V = (V + 63) / 64 * 64;  // columns in shared memory: slabs of 64
  static constexpr int KEYS = tile_keys(D), QUERIES = STEP_QUERIES;               // of a tile, of a step
  // Sums of dk and dv of 64 keys are more than a warpgroup's registers hold: one has dk, another dv.
  static constexpr bool WIDE = D > 128;
  static constexpr int WARPGROUPS = WIDE ? 2 : KEYS / 64;  // consumers
  // How much of dq is computed at once. Where one warpgroup holds all columns of a step, they take turns; with head dim 128
  // each computes half of every step. To memory it goes through a buffer, SUM_BUFFERS of them at a time, or, where shared
  // memory has no room for one, straight from registers.
  static constexpr bool IN_TURN = D <= 96, STAGED = D <= 192;
  static constexpr int SUM_COLUMNS = D == 128 || D == 256 ? D / 2 : D, SUM_BUFFERS = D == 128 ? 2 : 1;
  // Stages of the rings, as shared memory allows: of k, v, of q and dout each, of ds and p.
  static constexpr int KEY_STAGES = D <= 192 ? 2 : 1, VALUE_STAGES = D <= 64 ? 2 : 1, STAGES = 2, PAIR_STAGES = 2;
  static constexpr int THREADS = 128 * (1 + WARPGROUPS);
  // Together what the launch gives all: 512 times 128, or 384 times 168.
  static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 24, CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : 240;
};

constexpr int TILES = 3;  // that somebody is at work on: the producer, and consumers between two

enum BarrierId { WARPGROUP = 1, CONSUMERS = 4 };  // named barriers: one for each consumer, one for all of them

// What is known of each query of a step.
struct Statistics {
  float lse[STEP_QUERIES], delta[STEP_QUERIES];  // lse times log2(e)
};

template <typename S>
struct Shared {
  using T = typename S::T;
  alignas(1024) T k[S::KEY_STAGES][S::KEYS * S::WIDTH];
  alignas(1024) T v[S::VALUE_STAGES][S::KEYS * S::WIDTH_V];
  alignas(1024) T q[S::STAGES][S::QUERIES * S::WIDTH];
  alignas(1024) T dout[S::STAGES][S::QUERIES * S::WIDTH_V];
  alignas(1024) T ds[S::PAIR_STAGES][S::KEYS * S::QUERIES];
  alignas(1024) T p[S::WIDE ? S::PAIR_STAGES : 1][S::WIDE ? S::KEYS * S::QUERIES : 8];
  alignas(128) float dq[S::SUM_BUFFERS][S::STAGED ? S::QUERIES * S::SUM_COLUMNS : 4];  // in the order of accumulators
  alignas(16) Statistics statistics[S::STAGES];                                        // come with q
  Tile tiles[TILES];
  Ring<S::KEY_STAGES> key_ring;
  Ring<S::VALUE_STAGES> value_ring;
  Ring<S::STAGES> q_ring, dout_ring;
  Ring<S::PAIR_STAGES> p_ring, ds_ring;  // from one warpgroup to the other
  Ring<1> dq_ring[S::SUM_BUFFERS];
  Ring<S::STAGES> turn_ring;  // without a buffer, in a fixed order: whose turn it is; `added`: that it can be passed on
  Barrier added[S::STAGES];
  Ring<TILES> tile_ring;
};

// What the kernels are given. Rows of the schedule are keys, columns queries; its heads are those of keys, or, where these
// make too few tiles, `group` parts of the query heads of each.
struct Work : Schedule {
  CUtensorMap q, k, v, dout;  // columns, heads, rows, batch
  const Statistics* statistics;  // [batch, query heads, blocks] of 64 queries
  float* sums;                   // of dq of each block, in parts of so many columns as are computed at once, in the order of
                                 // wgmma's accumulators
  int* turns;                    // how often a tile, or half of one, has been added to a block
  void *dk, *dv;              // contiguous
  float *dk_parts, *dv_parts;  // group times dk and dv where tiles have a part of the heads each; or null
  int query_heads, heads_together;  // heads_together: that share a tile
  int blocks;
  float scale, exponent_scale;  // exponent_scale: times log2(e)
};

// k and v go on together, a stage with every tile.
template <typename S>
__device__ __forceinline__ Step<S::VALUE_STAGES> value_step(Step<S::KEY_STAGES> key_step) {
  if constexpr (S::VALUE_STAGES == S::KEY_STAGES) return key_step;
  static_assert(S::VALUE_STAGES == S::KEY_STAGES || (S::VALUE_STAGES == 1 && S::KEY_STAGES == 2));
  return {0, uint32_t(key_step.stage)};
}

// Whether anybody sees a key of the tile. If not, there is nothing to add to dq.
template <typename S>
__device__ __forceinline__ bool is_seen(const Work& w, const Tile& tile) {
  return band_of(w, tile, tile.row).begin < band_of(w, tile, min(tile.row + S::KEYS, tile.rows) - 1).end;
}

// Of a document's step: where its statistics and sums lie. Documents begin anywhere, blocks of one do not meet those of the
// next.
template <typename S>
__device__ __forceinline__ int block_of(const Work& w, const Tile& tile, int head, int step) {
  return (tile.batch * w.query_heads + head) * w.blocks + place_of_document(tile.first_column, tile.document, S::QUERIES) +
         step;
}

}  // namespace
}  // namespace flashmoe
