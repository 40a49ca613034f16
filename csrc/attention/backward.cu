// Attention backward: the gradients of q, k and v from that of out.
//
//   prepare   delta = rowsum(dout * out) of every query; zeros in the sums of dq
//   backward  p = exp(scale * k qT - lse), ds = p * (v doutT - delta); dv = p dout, dk = ds q, dq += dsT k
//   convert   the sums of dq, in float32, to dq
//
// Everything is transposed: a tile is 128 keys, a step 64 queries of a head, so that p and ds are in registers what dv and dk
// need of them. In a block two consumer warpgroups have 64 keys each, with their sums of dk and dv; of the warps of the first
// warpgroup, one thread loads k, v and a ring of stages of q and dout, and another warp what is known of each query. Only
// ds goes through shared memory: dq needs that of both warpgroups. Tiles of different keys add to the sums of the same
// queries.
//
// Every mask is a band, and a tile visits the queries that any of its keys is seen by, from the last one back. A tile is of one
// head of keys: its steps go through all heads of queries that share it.
// docs/kernels/attention_backward.md says what was tried and measured.
#include <algorithm>
#include <type_traits>

#include <cuda.h>

#include "attention/attention.h"
#include "attention/loads.cuh"
#include "attention/softmax.cuh"
#include "attention/tiles.cuh"
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/reduce.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

using namespace hopper;

// --------------------------------------------------------------------------------------------------------------- sizes

template <typename Element, int D, int V>
struct Sizes {
  using T = Element;
  static constexpr int DIM = D, DIM_V = V;
  static constexpr int WIDTH = (D + 63) / 64 * 64, WIDTH_V = (V + 63) / 64 * 64;  // columns in memory: slabs of 64
  static constexpr int KEYS = 128;                                                // of a tile
  static constexpr int QUERIES = 64;                                              // of a step
  static constexpr int STAGES = 2;                                                // of q, and of dout
  static constexpr int KEY_STAGES = 2;                                            // the next tile's k and v have room
  // dq of a step is computed by the warpgroups in turn where its sums fit into the registers of one, and else half by each.
  static constexpr bool ALTERNATE = WIDTH == 64;
  static constexpr int OWN = ALTERNATE ? WIDTH : WIDTH / 2;  // columns
  static constexpr int THREADS = 384;
  static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
};

constexpr int TILES = 3;  // that somebody is at work on: the producer, and consumers between two

enum BarrierId { WARPGROUP = 1, CONSUMERS = 3 };  // named barriers: one for each consumer, one for both

template <typename S>
struct Shared {
  using T = typename S::T;
  alignas(1024) T k[S::KEY_STAGES][S::KEYS * S::WIDTH];
  alignas(1024) T v[S::KEY_STAGES][S::KEYS * S::WIDTH_V];
  alignas(1024) T q[S::STAGES][S::QUERIES * S::WIDTH];
  alignas(1024) T dout[S::STAGES][S::QUERIES * S::WIDTH_V];
  alignas(1024) T ds[2][S::KEYS * S::QUERIES];
  float lse[S::STAGES][S::QUERIES];    // times log2(e); comes with q
  float delta[S::STAGES][S::QUERIES];  // comes with dout
  Tile tiles[TILES];
  Ring<S::KEY_STAGES> key_ring;
  Ring<S::STAGES> q_ring, dout_ring;
  Ring<TILES> tile_ring;
  Ring<1> turn_ring;
};

// What the kernels are given. Rows of the schedule are keys, columns queries; its heads are those of keys, or, where these
// make too few tiles, `group` parts of the query heads of each.
struct Work : Schedule {
  CUtensorMap q, k, v, dout;  // columns, heads, rows, batch
  const float *lse, *delta;   // [batch, query heads, queries]
  float* sums;                // of dq: [batch, query heads, blocks] of 64 queries in the order of wgmma's accumulators
  int* turns;                 // [batch, query heads, blocks]: how many tiles have added to a block
  void *dk, *dv;              // contiguous
  float *dk_parts, *dv_parts;  // group times dk and dv where tiles have a part of the heads each; or null
  int query_heads, heads_together;  // heads_together: that share a tile
  int blocks;
  float scale, exponent_scale;  // exponent_scale: times log2(e)
};

// Whether anybody sees a key of the tile. If not, there is nothing to add to dq.
template <typename S>
__device__ __forceinline__ bool is_seen(const Work& w, const Tile& tile) {
  return band_of(w, tile, tile.row).begin < band_of(w, tile, min(tile.row + S::KEYS, tile.rows) - 1).end;
}

// Of a document's step: where its sums lie. Documents begin anywhere, blocks of one do not meet those of the next.
template <typename S>
__device__ __forceinline__ int64_t block_of(const Work& w, const Tile& tile, int head, int step) {
  return (int64_t(tile.batch) * w.query_heads + head) * w.blocks +
         place_of_document(tile.first_column, tile.document, S::QUERIES) + step;
}

// ------------------------------------------------------------------------------------------------------------ producer

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
    Barrier& keys = shared.key_ring.full[key_step.stage];
    keys.arrive_expecting(S::KEYS * (S::WIDTH + S::WIDTH_V) * sizeof(typename S::T));
    load_rows(shared.k[key_step.stage], &w.k, keys, S::KEYS, S::WIDTH, tile->kv_head, tile->first_row + tile->row,
              tile->batch, Keep::briefly);
    load_rows(shared.v[key_step.stage], &w.v, keys, S::KEYS, S::WIDTH_V, tile->kv_head, tile->first_row + tile->row,
              tile->batch, Keep::briefly);
    key_step.next();
    // Known before it is needed: the claim and the divisions behind a tile's place take their time. But where others wait for
    // tiles in their order nobody holds one that it does not compute.
    if (!ORDERED) index = next_tile(w, index);
    for (int n = 0; n < w.heads_together; ++n) {
      const int head = tile->head * w.heads_together + n;
      for (int i = tile->end - 1; i >= tile->begin; --i, step.next()) {
        const int row = tile->first_column + i * S::QUERIES;
        shared.q_ring.acquire(step);
        Barrier& q = shared.q_ring.full[step.stage];
        q.arrive_expecting(S::QUERIES * S::WIDTH * sizeof(typename S::T));
        load_rows(shared.q[step.stage], &w.q, q, S::QUERIES, S::WIDTH, head, row, tile->batch, Keep::longest);
        shared.dout_ring.acquire(step);
        Barrier& dout = shared.dout_ring.full[step.stage];
        dout.arrive_expecting(S::QUERIES * S::WIDTH_V * sizeof(typename S::T));
        load_rows(shared.dout[step.stage], &w.dout, dout, S::QUERIES, S::WIDTH_V, head, row, tile->batch, Keep::longest);
      }
    }
    if (ORDERED) index = next_tile<ORDERED>(w, index);
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
    if (threadIdx.x % 32 == 0) shared.tile_ring.release(step);
  }
}

// One warp: lse and delta of every step's queries. They begin anywhere, and the copy engine wants multiples of 16 bytes.
template <typename S>
__device__ void produce_statistics(const Work& w, Shared<S>& shared) {
  constexpr int EACH = S::QUERIES / 32;
  const int lane = threadIdx.x % 32;
  Step<S::STAGES> step;
  wait_for_previous();
  each_tile<S>(shared, [&](const Tile& tile) {
    for (int n = 0; n < w.heads_together; ++n) {
      const int64_t row = (int64_t(tile.batch) * w.query_heads + tile.head * w.heads_together + n) * w.columns;
      for (int i = tile.end - 1; i >= tile.begin; --i, step.next()) {
        float lse[EACH], delta[EACH];
#pragma unroll
        for (int j = 0; j < EACH; ++j) {  // beyond the end there are zeros in q and dout: p is to be 0 there too
          const int query = tile.first_column + i * S::QUERIES + j * 32 + lane;
          lse[j] = query < w.columns ? w.lse[row + query] : INFINITY;
          delta[j] = query < w.columns ? w.delta[row + query] : 0;
        }
        shared.q_ring.acquire(step);
#pragma unroll
        for (int j = 0; j < EACH; ++j) shared.lse[step.stage][j * 32 + lane] = lse[j];
        shared.q_ring.full[step.stage].arrive();
        shared.dout_ring.acquire(step);
#pragma unroll
        for (int j = 0; j < EACH; ++j) shared.delta[step.stage][j * 32 + lane] = delta[j];
        shared.dout_ring.full[step.stage].arrive();
      }
    }
  });
}

// One warp, where the order of sums matters: tiles add to a block of dq one after the other, in the order of their keys.
template <typename S>
__device__ void keep_turns(const Work& w, Shared<S>& shared) {
  Step<1> step;
  wait_for_previous();
  each_tile<S>(shared, [&](const Tile& tile) {
    if (threadIdx.x % 32 > 0 || !is_seen<S>(w, tile)) return;
    for (int n = 0; n < w.heads_together; ++n)
      for (int i = tile.end - 1; i >= tile.begin; --i, step.next()) {
        // Before this tile come those that have a key which the step's first query sees, or a later one.
        const int first_key = w.right < 0 ? 0 : max(0, i * S::QUERIES - (tile.columns - tile.rows) - w.right);
        const int before = tile.row / S::KEYS - first_key / S::KEYS;
        int* const turn = w.turns + block_of<S>(w, tile, tile.head * w.heads_together + n, i);
        while (*static_cast<volatile int*>(turn) < before) {}
        __threadfence();
        shared.turn_ring.full[0].arrive();
        shared.turn_ring.empty[0].wait(step.phase);  // all warps have added
        __threadfence();
        atomicAdd(turn, 1);
      }
  });
}

// ----------------------------------------------------------------------------------------------------------- consumers

// d = a bT over DIM columns; a: the warpgroup's 64 keys, b: the step's queries.
template <typename S, int DIM>
__device__ __forceinline__ void multiply_scores(float (&d)[S::QUERIES / 2], uint64_t a, uint64_t b) {
#pragma unroll
  for (int i = 0; i < DIM; i += 16)
    wgmma<typename S::T, K_MAJOR, K_MAJOR>(d, advance(a, i / 64 * S::KEYS * 128 + i % 64 * 2),
                                           advance(b, i / 64 * S::QUERIES * 128 + i % 64 * 2), i > 0);
}

// d += a b over the step's queries.
template <typename S, int COUNT>
__device__ __forceinline__ void multiply_queries(float (&d)[COUNT], const uint32_t (&a)[S::QUERIES / 4], uint64_t b,
                                                 bool accumulate) {
#pragma unroll
  for (int i = 0; i < S::QUERIES; i += 16)
    wgmma<typename S::T, MN_MAJOR>(d, a + i / 4, advance(b, i * 128), accumulate || i > 0);
}

// dq = dsT k over the tile's keys, in a warpgroup's own columns.
template <typename S>
__device__ __forceinline__ void multiply_keys(float (&dq)[S::OWN / 2], uint64_t ds, uint64_t k) {
#pragma unroll
  for (int i = 0; i < S::KEYS; i += 16)
    wgmma<typename S::T, MN_MAJOR, MN_MAJOR>(dq, advance(ds, i * 128), advance(k, i * 128), i > 0);
}

// A warpgroup's 64 rows of dk or dv, straight to memory: to `to`, or as a part of a sum.
template <typename T, int DIM>
__device__ __forceinline__ void store_rows(const float (&d)[DIM / 2], void* to, float* parts, const Work& w,
                                           const Tile& tile, int row, int thread, float scale) {
  const int kv_heads = w.heads / w.group, part = tile.head % w.group;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = row + fragment_row(thread) + 8 * r;
    const int64_t place = (int64_t(tile.batch) * w.rows + tile.first_row + key) * kv_heads + tile.kv_head;
    if (parts) {
      float* const out = parts + (place * w.group + part) * DIM + fragment_column(thread);
      if (key < tile.rows)
#pragma unroll
        for (int j = 0; j < DIM / 2; j += 4)
          *reinterpret_cast<float2*>(out + j * 2) = {d[j + 2 * r] * scale, d[j + 2 * r + 1] * scale};
      continue;
    }
    T* const out = static_cast<T*>(to) + place * DIM + thread % 4 * 8;
#pragma unroll
    for (int j = 0; j < DIM / 2; j += 16) {  // 32 columns
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = pack<T>(d[j + 4 * i + 2 * r] * scale, d[j + 4 * i + 2 * r + 1] * scale);
      const uint4 eight = quad_transpose(pairs);
      if (key < tile.rows) *reinterpret_cast<uint4*>(out + j * 2) = eight;
    }
  }
}

template <typename S>
__device__ void consume(const Work& w, Shared<S>& shared, int warpgroup) {
  using T = typename S::T;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool speaks = lane == 0;  // for its warp
  constexpr int K_STAGE = sizeof shared.k[0], V_STAGE = sizeof shared.v[0], Q_STAGE = sizeof shared.q[0],
                DOUT_STAGE = sizeof shared.dout[0], DS_STAGE = sizeof shared.ds[0];
  const uint32_t k_address = shared_address(shared.k), v_address = shared_address(shared.v),
                 q_address = shared_address(shared.q), dout_address = shared_address(shared.dout);
  const uint64_t k = k_major(k_address + warpgroup * 64 * 128), v = k_major(v_address + warpgroup * 64 * 128);
  const uint64_t q = k_major(q_address), dout = k_major(dout_address);
  const uint64_t q_rows = mn_major(q_address, S::QUERIES * 128), dout_rows = mn_major(dout_address, S::QUERIES * 128);
  const uint64_t ds = mn_major(shared_address(shared.ds), S::KEYS * 128);
  // Of dq, from here on.
  const int own = S::ALTERNATE ? 0 : warpgroup * S::OWN;
  const uint64_t k_rows = mn_major(k_address + own * S::KEYS * 2, S::KEYS * 128);
  float* const own_sums = w.sums + own * S::QUERIES + thread * 4;

  Step<TILES> tile_step;
  Step<S::KEY_STAGES> key_step;
  Step<S::STAGES> step;
  Step<1> turn;
  int buffer = 0;  // of ds
  float dk[S::DIM / 2], dv[S::DIM_V / 2];

  for (;; tile_step.next()) {
    shared.tile_ring.wait(tile_step);
    const Tile& tile = shared.tiles[tile_step.stage];
    const int begin = __shfl_sync(0xffffffff, tile.begin, 0), end = __shfl_sync(0xffffffff, tile.end, 0);
    if (end == 0) break;
    const int first = tile.row + warpgroup * 64;  // of this warpgroup's keys
    // Zeros where a query does not see a key.
    const auto hide = [&](auto& x, int i) {
      const int row = first + fragment_row(thread);
      const Band nothing{0, 0};
      const Band seen[2] = {row < tile.rows ? band_of(w, tile, row) : nothing,
                            row + 8 < tile.rows ? band_of(w, tile, row + 8) : nothing};
      mask(x, seen, i * S::QUERIES + fragment_column(thread), 0);
    };
    // Steps of which all keys of this warpgroup are seen by every query.
    const int first_whole = (band_of(w, tile, first + 63).begin + S::QUERIES - 1) / S::QUERIES;
    const int end_whole = first + 64 > tile.rows ? 0 : band_of(w, tile, first).end / S::QUERIES;
    const auto is_whole = [&](int i) { return i >= first_whole && i < end_whole; };
    const bool adds = is_seen<S>(w, tile);

    shared.key_ring.wait(key_step);
    if (w.row_bounds && tile.row + S::KEYS > tile.rows) {
      clear_rows(shared.k[key_step.stage], S::KEYS, S::WIDTH, tile.rows - tile.row, thread);
      fence_proxy_async();
      barrier_sync(WARPGROUP + warpgroup, 128);
    }

    const auto one = [&](int head, int i, bool accumulate, auto masked) {
      float s[S::QUERIES / 2], dp[S::QUERIES / 2];
      uint32_t p_pairs[S::QUERIES / 4], ds_pairs[S::QUERIES / 4];
      const bool cut = w.row_bounds && tile.columns < (i + 1) * S::QUERIES;

      // Scores, and the gradient of the probabilities.
      shared.q_ring.wait(step);
      wgmma_fence();
      multiply_scores<S, S::DIM>(s, advance(k, key_step.stage * K_STAGE), advance(q, step.stage * Q_STAGE));
      wgmma_commit();
      shared.dout_ring.wait(step);
      wgmma_fence();
      multiply_scores<S, S::DIM_V>(dp, advance(v, key_step.stage * V_STAGE), advance(dout, step.stage * DOUT_STAGE));
      wgmma_commit();

      // Probabilities. Two neighbours of a row of accumulators are two queries.
      const float* const lse = shared.lse[step.stage] + fragment_column(thread);
      const float* const delta = shared.delta[step.stage] + fragment_column(thread);
      wgmma_wait<1>();
      pin(s);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 8; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[4 * j + e] = exp2_fast(s[4 * j + e] * w.exponent_scale - (e % 2 ? pair.y : pair.x));
      }
      if constexpr (decltype(masked)::value) hide(s, i);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 4; ++j) p_pairs[j] = pack<T>(s[2 * j], s[2 * j + 1]);

      // Their gradient becomes that of the scores, but for the scale.
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 8; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[4 * j + e] = s[4 * j + e] * (dp[4 * j + e] - (e % 2 ? pair.y : pair.x));
      }
      if constexpr (decltype(masked)::value) {
        hide(dp, i);
        if (cut) {
          const int left = tile.columns - i * S::QUERIES;
          clear_rows(shared.q[step.stage], S::QUERIES, S::WIDTH, left, thread);
          clear_rows(shared.dout[step.stage], S::QUERIES, S::WIDTH_V, left, thread);
          fence_proxy_async();
          barrier_sync(WARPGROUP + warpgroup, 128);
        }
      }
#pragma unroll
      for (int j = 0; j < S::QUERIES / 4; ++j) ds_pairs[j] = pack<T>(dp[2 * j], dp[2 * j + 1]);
      const int ds_row = warpgroup * 64 + thread / 32 * 16 + lane % 16;
#pragma unroll
      for (int j = 0; j < S::QUERIES / 4; j += 4)  // 16 queries
        stmatrix(shared_address(shared.ds[buffer]) + tile_offset(S::KEYS, ds_row, j * 4 + lane / 16 * 8), ds_pairs[j],
                 ds_pairs[j + 1], ds_pairs[j + 2], ds_pairs[j + 3]);

      wgmma_fence();
      multiply_queries<S>(dv, p_pairs, advance(dout_rows, step.stage * DOUT_STAGE), accumulate);
      wgmma_commit();
      // ds of both warpgroups is there, and both have read that of the step before.
      fence_proxy_async();
      barrier_sync(CONSUMERS, 256);
      const auto finish_values = [&] {
        pin(dv);
        pin(p_pairs);
        __syncwarp();  // all lanes have read delta, and lse below
        if (speaks) shared.dout_ring.release(step);
      };
      const auto issue_keys = [&] {
        wgmma_fence();
        multiply_queries<S>(dk, ds_pairs, advance(q_rows, step.stage * Q_STAGE), accumulate);
        wgmma_commit();
      };
      if (!S::ALTERNATE || buffer == warpgroup) {
        float dq[S::OWN / 2];
        wgmma_fence();
        multiply_keys<S>(dq, advance(ds, buffer * DS_STAGE), advance(k_rows, key_step.stage * K_STAGE));
        wgmma_commit();
        wgmma_wait<1>();
        finish_values();
        issue_keys();
        wgmma_wait<1>();
        pin(dq);
        if (adds) {
          if (w.ordered) shared.turn_ring.wait(turn);
          float* const sums = own_sums + block_of<S>(w, tile, head, i) * S::WIDTH * S::QUERIES;
#pragma unroll
          for (int j = 0; j < S::OWN / 2; j += 4)
            add_to_global(sums + j * 128, dq[j], dq[j + 1], dq[j + 2], dq[j + 3]);
          if (w.ordered) {
            __syncwarp();
            if (speaks) shared.turn_ring.release(turn);
          }
        }
      } else {
        wgmma_wait<0>();
        finish_values();
        issue_keys();
      }
      if (adds) turn.next();
      wgmma_wait<0>();
      pin(dk);
      pin(ds_pairs);
      __syncwarp();
      if (speaks) shared.q_ring.release(step);
      step.next();
      buffer ^= 1;
    };

    for (int n = 0; n < w.heads_together; ++n) {
      const int head = tile.head * w.heads_together + n;
      // Loops of their own: a question in one of them costs time.
      for (int i = end - 1; i >= begin;) {
        for (; i >= begin && !is_whole(i); --i) one(head, i, n > 0 || i < end - 1, std::true_type());
        for (; i >= begin && i >= first_whole; --i) one(head, i, n > 0 || i < end - 1, std::false_type());
      }
    }
    if (speaks) shared.key_ring.release(key_step);
    key_step.next();
    store_rows<T, S::DIM>(dk, w.dk, w.dk_parts, w, tile, first, thread, w.scale);
    store_rows<T, S::DIM_V>(dv, w.dv, w.dv_parts, w, tile, first, thread, 1);
    __syncwarp();
    if (speaks) shared.tile_ring.release(tile_step);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) backward_kernel(const __grid_constant__ Work w) {
  auto& shared = shared_storage<Shared<S>>();
  if (threadIdx.x == 0) {
    shared.key_ring.init(1, 8);
    shared.q_ring.init(1 + 32, 8);  // the copies, and the statistics' warp
    shared.dout_ring.init(1 + 32, 8);
    shared.tile_ring.init(1, w.ordered ? 10 : 9);
    shared.turn_ring.init(1, S::ALTERNATE ? 4 : 8);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<S::PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) {
      if (elected()) w.ordered ? produce<S, true>(w, shared) : produce<S, false>(w, shared);
    } else if (threadIdx.x < 64) {
      produce_statistics<S>(w, shared);
    } else if (threadIdx.x < 96 && w.ordered) {
      keep_turns<S>(w, shared);
    }
  } else {
    more_registers<S::CONSUMER_REGISTERS>();
    // From one lane, so that the compiler knows it to be the same in all: descriptors stay in uniform registers.
    consume<S>(w, shared, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
}

// -------------------------------------------------------------------------------------------------- what surrounds them

// What prepare is given, beside what the backward kernel reads of it.
struct PrepareWork {
  const void *out, *dout;
  AttentionStrides out_strides, dout_strides;
  const float* lse;
  float *lse_scaled, *delta;  // [batch, heads, queries]
  uint4* zeros;               // sums and turns, of every head
  int64_t zero_count;
  int* next;  // tile; or null
  int batch, queries, heads;
};

constexpr int PREPARE_THREADS = 256;

// lse times log2(e), delta, and zeros. LANES threads have a row, 16 bytes each.
template <typename T, int V, int LANES>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const __grid_constant__ PrepareWork w) {
  launch_next();
  const int64_t thread = int64_t(blockIdx.x) * PREPARE_THREADS + threadIdx.x, row = thread / LANES;
  if (thread == 0 && w.next) *w.next = 0;
  float sum = 0;
  const int head = int(row % w.heads), query = int(row / w.heads % w.queries);
  const int64_t batch = row / w.heads / w.queries;
  if (batch < w.batch && threadIdx.x % LANES < V / 8) {
    const auto eight = [&](const void* x, const AttentionStrides& strides) {
      return *reinterpret_cast<const uint4*>(static_cast<const T*>(x) + batch * strides.batch + query * strides.row +
                                             head * strides.head + threadIdx.x % LANES * 8);
    };
    const uint4 a = eight(w.out, w.out_strides), b = eight(w.dout, w.dout_strides);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum += float(reinterpret_cast<const T*>(&a)[i]) * float(reinterpret_cast<const T*>(&b)[i]);
  }
#pragma unroll
  for (int i = LANES / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
  if (batch < w.batch && threadIdx.x % LANES == 0) {
    const int64_t place = (batch * w.heads + head) * w.queries + query;
    w.delta[place] = sum;
    w.lse_scaled[place] = w.lse[place] * 1.44269504f;
  }
  for (int64_t i = thread; i < w.zero_count; i += int64_t(gridDim.x) * PREPARE_THREADS) w.zeros[i] = uint4{};
}

// What convert is given: of the schedule, the documents, whose rows are queries.
struct ConvertWork : Schedule {
  const float* sums;
  void* dq;  // contiguous
  int blocks;
  float scale;
};

constexpr int CONVERT_THREADS = 256;

// A block of sums, from the order of accumulators to rows. Queries in no document are in blocks of their own, all zeros.
template <typename S>
__global__ void __launch_bounds__(CONVERT_THREADS) convert_kernel(const __grid_constant__ ConvertWork w) {
  using T = typename S::T;
  wait_for_previous();
  const int block = blockIdx.x % w.blocks, strip = blockIdx.x / w.blocks, head = strip % w.heads, batch = strip / w.heads;
  int first = block * S::QUERIES, end = w.rows;  // rows
  if (w.row_bounds) {
    int low = 0, high = w.documents + 1;  // the last document that begins at this block or before
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      const bool before = place_of_document(document_at(w, middle).first_row, middle, S::QUERIES) <= block;
      (before ? low : high) = before ? middle : middle - 1;
    }
    const ListedTile document = document_at(w, low);
    first = document.first_row + (block - place_of_document(document.first_row, low, S::QUERIES)) * S::QUERIES;
    end = document.first_row + document.rows;
  }
  const float4* const sums =
      reinterpret_cast<const float4*>(w.sums) + blockIdx.x * int64_t(S::QUERIES * S::WIDTH / 4);
  T* const dq = static_cast<T*>(w.dq) + (int64_t(batch) * w.rows * w.heads + head) * S::DIM;
  constexpr int CHUNKS = S::DIM / 8;
  for (int i = threadIdx.x; i < S::QUERIES / 2 * CHUNKS; i += CONVERT_THREADS) {
    const int column = i % CHUNKS * 8, upper = i / CHUNKS / 8 * 16 + i / CHUNKS % 8;  // rows: upper and eight below
    const float4* const four = sums + column / 8 * 128 + upper / 16 * 32 + upper % 8 * 4;
    uint4 eight[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 x = four[j];
      (&eight[0].x)[j] = pack<T>(x.x * w.scale, x.y * w.scale);
      (&eight[1].x)[j] = pack<T>(x.z * w.scale, x.w * w.scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + upper + 8 * r;
      if (row < end) *reinterpret_cast<uint4*>(dq + int64_t(row) * w.heads * S::DIM + column) = eight[r];
    }
  }
}

// Sums of the parts of dk or dv, of rows of 8 columns, in their order.
template <typename T>
__global__ void __launch_bounds__(256) add_parts_kernel(const float4* parts, uint4* sums, int64_t count, int dim, int group) {
  wait_for_previous();
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < count; i += int64_t(gridDim.x) * 256) {
    const float4* part = parts + (i / (dim / 8) * group * (dim / 8) + i % (dim / 8)) * 2;
    float4 a{}, b{};
    for (int j = 0; j < group; ++j, part += dim / 4) {
      const float4 x = part[0], y = part[1];
      a = {a.x + x.x, a.y + x.y, a.z + x.z, a.w + x.w}, b = {b.x + y.x, b.y + y.y, b.z + y.z, b.w + y.w};
    }
    sums[i] = {pack<T>(a.x, a.y), pack<T>(a.z, a.w), pack<T>(b.x, b.y), pack<T>(b.z, b.w)};
  }
}

// -------------------------------------------------------------------------------------------------------------- launch

constexpr int TILE_KEYS = 128, STEP_QUERIES = 64;
constexpr int TILES_A_BLOCK = 8;  // at least, so that blocks end at about the same time

// Parts of the query heads of each head of keys, with tiles of their own: as few as keep all multiprocessors busy to the end.
int parts_of(const AttentionBackwardParams& p, int blocks) {
  const int heads = p.heads / p.kv_heads;
  const int64_t tiles = p.batch * p.kv_heads * tiles_of_strip(p, p.keys, TILE_KEYS);
  for (int parts = 1; parts < heads; ++parts)
    if (heads % parts == 0 && tiles * parts >= TILES_A_BLOCK * blocks) return parts;
  return heads;
}

// Where what lies in the workspace, in bytes.
struct Workspace {
  int64_t lse, delta, sums, turns, dk_parts, dv_parts, end;
  int blocks, parts;

  Workspace(const AttentionBackwardParams& p, int most_blocks) {
    const auto after = [](int64_t begin, int64_t bytes) { return begin + (bytes + 255) / 256 * 256; };
    const int64_t rows = int64_t(p.batch) * p.heads, width = (p.dim + 63) / 64 * 64;
    blocks = int(tiles_of_strip(p, p.queries, STEP_QUERIES));
    lse = after(0, list_bytes(p, p.keys, TILE_KEYS));
    delta = after(lse, rows * p.queries * 4);
    sums = after(delta, rows * p.queries * 4);
    turns = sums + rows * blocks * STEP_QUERIES * width * 4;
    dk_parts = after(turns, p.deterministic ? rows * blocks * 4 : 0);
    parts = parts_of(p, most_blocks);
    const int64_t key_rows = parts > 1 ? int64_t(p.batch) * p.keys * p.kv_heads * parts : 0;
    dv_parts = after(dk_parts, key_rows * p.dim * 4);
    end = after(dv_parts, key_rows * p.dim_v * 4);
  }
};

template <typename S>
cudaError_t launch_backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  using T = typename S::T;
  static_assert(S::KEYS == TILE_KEYS && S::QUERIES == STEP_QUERIES);
  const MapElement element = p.type == AttentionType::float16 ? MAP_FLOAT16 : MAP_BFLOAT16;
  int most_blocks = 0;
  if (const cudaError_t error = multiprocessors(most_blocks)) return error;
  const Workspace workspace(p, most_blocks);
  char* const base = static_cast<char*>(p.workspace);
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };

  const int64_t query_bytes = (S::DIM + S::DIM_V) * element.bytes + S::WIDTH * 4;
  const int parts = workspace.parts, together = p.heads / p.kv_heads / parts;
  Work w{schedule_of(p, p.workspace, true, p.kv_heads * parts, S::KEYS, p.queries * query_bytes * together, p.deterministic)};
  // Blocks that wait for each other's sums wait less if there are few of a strip.
  if (w.ordered) w.strips_together = std::min(w.strips, std::max(w.strips_together, most_blocks / 8));
  w.q = map_of("q", p.q, element, p.q_strides, p.batch, p.queries, p.heads, p.dim, S::QUERIES);
  w.k = map_of("k", p.k, element, p.k_strides, p.batch, p.keys, p.kv_heads, p.dim, S::KEYS);
  w.v = map_of("v", p.v, element, p.v_strides, p.batch, p.keys, p.kv_heads, p.dim_v, S::KEYS);
  w.dout = map_of("dout", p.dout, element, p.dout_strides, p.batch, p.queries, p.heads, p.dim_v, S::QUERIES);
  w.lse = floats(workspace.lse), w.delta = floats(workspace.delta), w.sums = floats(workspace.sums);
  w.turns = p.deterministic ? reinterpret_cast<int*>(base + workspace.turns) : nullptr;
  w.dk = p.dk, w.dv = p.dv;
  if (parts > 1) w.dk_parts = floats(workspace.dk_parts), w.dv_parts = floats(workspace.dv_parts);
  w.query_heads = p.heads, w.heads_together = together, w.blocks = workspace.blocks;
  w.scale = p.scale, w.exponent_scale = p.scale * 1.44269504f;
  if (w.row_bounds)
    if (const cudaError_t error = plan_tiles(w, S::KEYS, S::QUERIES, stream)) return error;

  const PrepareWork prepare{p.out, p.dout, p.out_strides, p.dout_strides, p.lse, floats(workspace.lse),
                            floats(workspace.delta), reinterpret_cast<uint4*>(base + workspace.sums),
                            (workspace.dk_parts - workspace.sums) / 16, w.row_bounds ? nullptr : &w.list->next,
                            p.batch, p.queries, p.heads};
  constexpr int LANES = S::DIM_V <= 64 ? 8 : S::DIM_V <= 128 ? 16 : 32;
  const int64_t threads = int64_t(p.batch) * p.queries * p.heads * LANES;
  if (const cudaError_t error =
          launch(prepare_kernel<T, S::DIM_V, LANES>,
                 {dim3((threads + PREPARE_THREADS - 1) / PREPARE_THREADS), dim3(PREPARE_THREADS), 0, stream}, prepare))
    return error;

  const int blocks = int(std::min<int64_t>(int64_t(w.strips) * w.tiles_per_strip, most_blocks));
  if (const cudaError_t error =
          launch(backward_kernel<S>, {dim3(blocks), dim3(S::THREADS), sizeof(Shared<S>), stream, true}, w))
    return error;

  const ConvertWork convert{schedule_of(p, p.workspace, false, p.heads, S::QUERIES, 1), w.sums, p.dq, w.blocks, p.scale};
  if (const cudaError_t error = launch(
          convert_kernel<S>, {dim3(w.blocks * p.heads * p.batch), dim3(CONVERT_THREADS), 0, stream, true}, convert))
    return error;
  if (parts == 1) return cudaSuccess;
  const auto add_parts = [&](const float* of, void* to, int dim) {
    const int64_t count = int64_t(p.batch) * p.keys * p.kv_heads * dim / 8;
    return launch(add_parts_kernel<T>, {dim3(std::min<int64_t>((count + 255) / 256, 16 * most_blocks)), dim3(256), 0, stream},
                  reinterpret_cast<const float4*>(of), static_cast<uint4*>(to), count, dim, parts);
  };
  if (const cudaError_t error = add_parts(w.dk_parts, p.dk, p.dim)) return error;
  return add_parts(w.dv_parts, p.dv, p.dim_v);
}

// A study of one head dim compiles nothing else, for bf16 alone.
#ifndef BACKWARD_DIM
#define BACKWARD_DIM 0
#endif
constexpr bool compiled(int dim) { return BACKWARD_DIM == 0 || BACKWARD_DIM == dim; }

template <typename T>
cudaError_t backward_of(const AttentionBackwardParams& p, cudaStream_t stream) {
  const auto is = [&](int dim, int dim_v) { return p.dim == dim && p.dim_v == dim_v; };
  if constexpr (compiled(64)) if (is(64, 64)) return launch_backward<Sizes<T, 64, 64>>(p, stream);
  if constexpr (compiled(96)) if (is(96, 96)) return launch_backward<Sizes<T, 96, 96>>(p, stream);
  if constexpr (compiled(128)) if (is(128, 128)) return launch_backward<Sizes<T, 128, 128>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& p) {
  int most_blocks = 0;
  multiprocessors(most_blocks);  // an error is the launch's to report
  return Workspace(p, most_blocks).end;
}

cudaError_t attention_backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  if (!valid(p) || p.queries < 1) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.heads == 0) return cudaSuccess;
  if constexpr (BACKWARD_DIM == 0)
    if (p.type == AttentionType::float16) return backward_of<__half>(p, stream);
  return backward_of<__nv_bfloat16>(p, stream);
}

}  // namespace flashmoe
