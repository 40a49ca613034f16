// The warpgroups of attention's backward kernel that compute.
#pragma once

#include <type_traits>

#include "attention/backward_tile.cuh"
#include "attention/loads.cuh"
#include "attention/softmax.cuh"
#include "hopper/reduce.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

// ------------------------------------------------------------------------------------------------------------ products

// d = a bT over DIM columns; a: the warpgroup's 64 keys, b: the step's queries.
template <typename S, int DIM>
__device__ __forceinline__ void multiply_scores(float (&d)[S::QUERIES / 2], uint64_t a, uint64_t b) {
#pragma unroll
  for (int i = 0; i < DIM; i += 16)
    wgmma<typename S::T, K_MAJOR, K_MAJOR>(d, advance(a, i / 64 * S::KEYS * 128 + i % 64 * 2),
                                           advance(b, i / 64 * S::QUERIES * 128 + i % 64 * 2), i > 0);
}

// d += a b over the step's queries; a in registers.
template <typename S, int COUNT>
__device__ __forceinline__ void multiply_queries(float (&d)[COUNT], const uint32_t (&a)[S::QUERIES / 4], uint64_t b,
                                                 bool accumulate) {
#pragma unroll
  for (int i = 0; i < S::QUERIES; i += 16)
    wgmma<typename S::T, MN_MAJOR>(d, a + i / 4, advance(b, i * 128), accumulate || i > 0);
}

// The same with a, 64 keys, in shared memory.
template <typename S, int COUNT>
__device__ __forceinline__ void multiply_queries(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
#pragma unroll
  for (int i = 0; i < S::QUERIES; i += 16)
    wgmma<typename S::T, K_MAJOR, MN_MAJOR>(d, advance(a, i * 2), advance(b, i * 128), accumulate || i > 0);
}

// dq = dsT k over the tile's keys.
template <typename S>
__device__ __forceinline__ void multiply_keys(float (&dq)[S::SUM_COLUMNS / 2], uint64_t ds, uint64_t k) {
#pragma unroll
  for (int i = 0; i < S::KEYS; i += 16)
    wgmma<typename S::T, MN_MAJOR, MN_MAJOR>(dq, advance(ds, i * 128), advance(k, i * 128), i > 0);
}

// ---------------------------------------------------------------------------------------------- what is done with scores

// visit(tile, begin, end) for the tiles of this block. The steps come from one lane, so that the compiler knows them to be the
// same in all.
template <typename S, typename Visit>
__device__ __forceinline__ void compute_tiles(Shared<S>& shared, Visit visit) {
  for (Step<TILES> step;; step.next()) {
    shared.tile_ring.wait(step);
    const Tile& tile = shared.tiles[step.stage];
    const int begin = __shfl_sync(0xffffffff, tile.begin, 0), end = __shfl_sync(0xffffffff, tile.end, 0);
    if (end == 0) return;
    visit(tile, begin, end);
    __syncwarp();
    if (threadIdx.x % 32 < SPEAKERS) shared.tile_ring.release(step);
  }
}

// Scores of 64 keys, and the gradient of their probabilities.
template <typename S>
struct Scores {
  Shared<S>& shared;
  const uint64_t k, v, q, dout;

  __device__ __forceinline__ Scores(Shared<S>& shared, int first_key)
      : shared(shared),
        k(k_major(shared_address(shared.k) + first_key * 128)),
        v(k_major(shared_address(shared.v) + first_key * 128)),
        q(k_major(shared_address(shared.q))),
        dout(k_major(shared_address(shared.dout))) {}

  // Two batches of products.
  __device__ __forceinline__ void issue(float (&s)[S::QUERIES / 2], float (&dp)[S::QUERIES / 2],
                                        Step<S::KEY_STAGES> key_step, Step<S::STAGES> step) const {
    shared.q_ring.wait(step);
    wgmma_fence();
    multiply_scores<S, S::DIM>(s, advance(k, key_step.stage * sizeof shared.k[0]),
                               advance(q, step.stage * sizeof shared.q[0]));
    wgmma_commit();
    shared.dout_ring.wait(step);
    wgmma_fence();
    multiply_scores<S, S::DIM_V>(dp, advance(v, value_step<S>(key_step).stage * sizeof shared.v[0]),
                                 advance(dout, step.stage * sizeof shared.dout[0]));
    wgmma_commit();
  }
};

// Of a warpgroup's 64 keys: which queries see them.
template <typename S>
struct Keys {
  const Work& work;
  const Tile& tile;
  int first, thread;           // first: in the document
  int first_whole, end_whole;  // steps of which every query sees all of them

  __device__ __forceinline__ Keys(const Work& w, const Tile& tile, int first, int thread)
      : work(w), tile(tile), first(first), thread(thread) {
    first_whole = (band_of(w, tile, first + 63).begin + S::QUERIES - 1) / S::QUERIES;
    end_whole = first + 64 > tile.rows ? 0 : band_of(w, tile, first).end / S::QUERIES;
  }

  // Zeros where a query of step i does not see a key.
  __device__ __forceinline__ void hide(float (&x)[S::QUERIES / 2], int i) const {
    const int row = first + fragment_row(thread);
    const Band nothing{0, 0};
    const Band seen[2] = {row < tile.rows ? band_of(work, tile, row) : nothing,
                          row + 8 < tile.rows ? band_of(work, tile, row + 8) : nothing};
    mask(x, seen, i * S::QUERIES + fragment_column(thread), 0);
  }

  // visit(head, i, whether it is not the first step, whether it has to hide) for every step of every head, from the last one
  // back. Loops of their own: a question in one of them costs time.
  template <typename Visit>
  __device__ __forceinline__ void each_step(int begin, int end, Visit visit) const {
    for (int n = 0; n < work.heads_together; ++n) {
      const int head = tile.head * work.heads_together + n;
      for (int i = end - 1; i >= begin;) {
        for (; i >= begin && !(i >= first_whole && i < end_whole); --i)
          visit(head, i, n > 0 || i < end - 1, std::true_type());
        for (; i >= begin && i >= first_whole; --i) visit(head, i, n > 0 || i < end - 1, std::false_type());
      }
    }
  }
};

// Scores become probabilities. Two neighbours of a row of accumulators are two queries; lse: from the thread's first on.
template <typename S>
__device__ __forceinline__ void powers(float (&s)[S::QUERIES / 2], const float* lse, float scale) {
#pragma unroll
  for (int j = 0; j < S::QUERIES / 8; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * j + e] = exp2_fast(s[4 * j + e] * scale - (e % 2 ? pair.y : pair.x));
  }
}

// Four gradients of probabilities p become those of scores, but for the scale.
__device__ __forceinline__ void gradients(float* dp, const float* p, const float* delta) {
  const float2 pair = *reinterpret_cast<const float2*>(delta);
#pragma unroll
  for (int e = 0; e < 4; ++e) dp[e] = p[e] * (dp[e] - (e % 2 ? pair.y : pair.x));
}

// Zeros in the rows of a tile from `begin` on, before this warpgroup multiplies with it.
template <int ROWS, int COLUMNS, typename T>
__device__ __forceinline__ void clear(T* tile, int begin, int thread, int barrier) {
  clear_rows(tile, ROWS, COLUMNS, begin, thread);
  fence_proxy_async();
  barrier_sync(BarrierId(barrier), 128);
}

// ------------------------------------------------------------------------------------------------------------- results

// Packed accumulators, 64 keys of the step's queries, to a tile; `place`: of the thread's first 16 bytes.
template <typename S>
__device__ __forceinline__ void store_pairs(const uint32_t (&pairs)[S::QUERIES / 4], uint32_t place) {
#pragma unroll
  for (int j = 0; j < S::QUERIES / 4; j += 4)  // 16 queries, two chunks of the swizzle on
    stmatrix(place ^ j * 8, pairs[j], pairs[j + 1], pairs[j + 2], pairs[j + 3]);
}

// dq of a warpgroup to a buffer, from which a warp adds it to memory.
template <int COUNT>
__device__ __forceinline__ void store_sums(const float (&dq)[COUNT], Ring<1>& ring, Step<1> step, const float* buffer,
                                           int thread) {
  const uint32_t place = shared_address(buffer) + thread / 32 * COUNT * 128 + thread % 32 * 16;
  ring.acquire(step);
#pragma unroll
  for (int j = 0; j < COUNT; j += 4) store_shared(place + j * 128, dq[j], dq[j + 1], dq[j + 2], dq[j + 3]);
  fence_proxy_async();
  __syncwarp();
  if (thread % 32 < SPEAKERS) ring.full[0].arrive();
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

// ------------------------------------------------------------------------------------------------- head dims up to 128

// Each warpgroup computes dk and dv of its 64 keys. Only ds is shared: dq needs that of all keys.
template <typename S>
__device__ void consume(const Work& w, Shared<S>& shared, int warpgroup) {
  using T = typename S::T;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool speaks = lane < SPEAKERS;  // for its warp
  constexpr int K_STAGE = sizeof shared.k[0], Q_STAGE = sizeof shared.q[0], DOUT_STAGE = sizeof shared.dout[0],
                DS_STAGE = sizeof shared.ds[0];
  static_assert(S::PAIR_STAGES == S::STAGES);
  const Scores<S> scores(shared, warpgroup * 64);
  const uint64_t q_rows = mn_major(shared_address(shared.q), S::QUERIES * 128),
                 dout_rows = mn_major(shared_address(shared.dout), S::QUERIES * 128);
  const uint64_t ds = mn_major(shared_address(shared.ds), S::KEYS * 128);
  const uint32_t ds_place = shared_address(shared.ds) +
                            tile_offset(S::KEYS, warpgroup * 64 + thread / 32 * 16 + lane % 16, lane / 16 * 8);
  // Of dq, from here on.
  const int buffer = S::IN_TURN ? 0 : warpgroup;
  const uint64_t k_rows = mn_major(shared_address(shared.k) + buffer * S::SUM_COLUMNS * S::KEYS * 2, S::KEYS * 128);

  Step<S::KEY_STAGES> key_step;
  Step<S::STAGES> step;
  Step<1> dq_step;
  int turn = 0;  // whose it is to compute dq
  float dk[S::DIM / 2], dv[S::DIM_V / 2];

  compute_tiles<S>(shared, [&](const Tile& tile, int begin, int end) {
    const Keys<S> keys(w, tile, tile.row + warpgroup * 64, thread);
    const bool adds = is_seen<S>(w, tile);

    shared.key_ring.wait(key_step);
    shared.value_ring.wait(value_step<S>(key_step));
    if (w.row_bounds && tile.row + S::KEYS > tile.rows)
      clear<S::KEYS, S::WIDTH>(shared.k[key_step.stage], tile.rows - tile.row, thread, WARPGROUP + warpgroup);

    keys.each_step(begin, end, [&](int head, int i, bool accumulate, auto masked) {
      float s[S::QUERIES / 2], dp[S::QUERIES / 2];
      uint32_t p_pairs[S::QUERIES / 4], ds_pairs[S::QUERIES / 4];

      scores.issue(s, dp, key_step, step);

      // p and ds.
      wgmma_wait<1>();
      pin(s);
      powers<S>(s, shared.statistics[step.stage].lse + fragment_column(thread), w.exponent_scale);
      if constexpr (decltype(masked)::value) keys.hide(s, i);
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 8; ++j) {
        gradients(dp + 4 * j, s + 4 * j, shared.statistics[step.stage].delta + fragment_column(thread) + 8 * j);
        p_pairs[2 * j] = pack<T>(s[4 * j], s[4 * j + 1]), p_pairs[2 * j + 1] = pack<T>(s[4 * j + 2], s[4 * j + 3]);
        if constexpr (!decltype(masked)::value)  // at once, while registers are short
          ds_pairs[2 * j] = pack<T>(dp[4 * j], dp[4 * j + 1]), ds_pairs[2 * j + 1] = pack<T>(dp[4 * j + 2], dp[4 * j + 3]);
      }
      if constexpr (decltype(masked)::value) {
        keys.hide(dp, i);
        if (w.row_bounds && tile.columns < (i + 1) * S::QUERIES) {
          const int left = tile.columns - i * S::QUERIES;
          clear_rows(shared.q[step.stage], S::QUERIES, S::WIDTH, left, thread);
          clear<S::QUERIES, S::WIDTH_V>(shared.dout[step.stage], left, thread, WARPGROUP + warpgroup);
        }
#pragma unroll
        for (int j = 0; j < S::QUERIES / 4; ++j) ds_pairs[j] = pack<T>(dp[2 * j], dp[2 * j + 1]);
      }
      store_pairs<S>(ds_pairs, ds_place + step.stage * DS_STAGE);

      wgmma_fence();
      multiply_queries<S>(dv, p_pairs, advance(dout_rows, step.stage * DOUT_STAGE), accumulate);
      wgmma_commit();
      // ds of all warpgroups is there, and all have read that of the step before.
      fence_proxy_async();
      barrier_sync(CONSUMERS, 128 * S::WARPGROUPS);
      const auto finish_values = [&] {
        pin(dv);
        pin(p_pairs);
        if (speaks) shared.dout_ring.release(step);
      };
      const auto issue_keys = [&] {
        wgmma_fence();
        multiply_queries<S>(dk, ds_pairs, advance(q_rows, step.stage * Q_STAGE), accumulate);
        wgmma_commit();
      };
      if (!S::IN_TURN || turn == warpgroup) {
        float dq[S::SUM_COLUMNS / 2];
        wgmma_fence();
        multiply_keys<S>(dq, advance(ds, step.stage * DS_STAGE), advance(k_rows, key_step.stage * K_STAGE));
        wgmma_commit();
        wgmma_wait<1>();
        finish_values();
        issue_keys();
        wgmma_wait<1>();
        pin(dq);
        if (adds) store_sums(dq, shared.dq_ring[buffer], dq_step, shared.dq[buffer], thread);
      } else {
        wgmma_wait<0>();
        finish_values();
        issue_keys();
      }
      if (adds) dq_step.next();
      turn = turn + 1 == S::WARPGROUPS ? 0 : turn + 1;
      wgmma_wait<0>();
      pin(dk);
      pin(ds_pairs);
      __syncwarp();  // all lanes have read the statistics
      if (speaks) shared.q_ring.release(step);
      step.next();
    });
    if (speaks) shared.key_ring.release(key_step), shared.value_ring.release(value_step<S>(key_step));
    key_step.next();
    store_rows<T, S::DIM>(dk, w.dk, w.dk_parts, w, tile, keys.first, thread, w.scale);
    store_rows<T, S::DIM_V>(dv, w.dv, w.dv_parts, w, tile, keys.first, thread, 1);
  });
}

// ------------------------------------------------------------------------------------------------- wider heads, 64 keys

// One warpgroup computes p and ds, and dk.
template <typename S>
__device__ void consume_scores(const Work& w, Shared<S>& shared, int warpgroup) {
  using T = typename S::T;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool speaks = lane < SPEAKERS;  // for its warp
  constexpr int Q_STAGE = sizeof shared.q[0], PAIR_STAGE = sizeof shared.ds[0];
  const Scores<S> scores(shared, 0);
  const uint64_t q_rows = mn_major(shared_address(shared.q), S::QUERIES * 128);
  const uint32_t place = tile_offset(S::KEYS, thread / 32 * 16 + lane % 16, lane / 16 * 8);

  Step<S::KEY_STAGES> key_step;
  Step<S::STAGES> step;
  Step<S::PAIR_STAGES> pair_step;
  float dk[S::DIM / 2];

  compute_tiles<S>(shared, [&](const Tile& tile, int begin, int end) {
    const Keys<S> keys(w, tile, tile.row, thread);

    shared.key_ring.wait(key_step);
    shared.value_ring.wait(value_step<S>(key_step));
    keys.each_step(begin, end, [&](int, int i, bool accumulate, auto masked) {
      float s[S::QUERIES / 2], dp[S::QUERIES / 2];
      uint32_t pairs[S::QUERIES / 4];
      const auto hand_over = [&](Ring<S::PAIR_STAGES>& ring, const auto& to) {
        ring.acquire(pair_step);
        store_pairs<S>(pairs, shared_address(to) + place + pair_step.stage * PAIR_STAGE);
        fence_proxy_async();
        __syncwarp();
        if (speaks) ring.full[pair_step.stage].arrive();
      };

      scores.issue(s, dp, key_step, step);

      // p.
      wgmma_wait<1>();
      pin(s);
      powers<S>(s, shared.statistics[step.stage].lse + fragment_column(thread), w.exponent_scale);
      if constexpr (decltype(masked)::value) keys.hide(s, i);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 4; ++j) pairs[j] = pack<T>(s[2 * j], s[2 * j + 1]);
      hand_over(shared.p_ring, shared.p);

      // ds.
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 8; ++j)
        gradients(dp + 4 * j, s + 4 * j, shared.statistics[step.stage].delta + fragment_column(thread) + 8 * j);
      if constexpr (decltype(masked)::value) keys.hide(dp, i);
      if (speaks) shared.dout_ring.release(step);
#pragma unroll
      for (int j = 0; j < S::QUERIES / 4; ++j) pairs[j] = pack<T>(dp[2 * j], dp[2 * j + 1]);
      hand_over(shared.ds_ring, shared.ds);

      if (decltype(masked)::value && w.row_bounds && tile.columns < (i + 1) * S::QUERIES)
        clear<S::QUERIES, S::WIDTH>(shared.q[step.stage], tile.columns - i * S::QUERIES, thread, WARPGROUP + warpgroup);
      wgmma_fence();
      multiply_queries<S>(dk, pairs, advance(q_rows, step.stage * Q_STAGE), accumulate);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dk);
      pin(pairs);
      if (speaks) shared.q_ring.release(step);
      step.next(), pair_step.next();
    });
    if (speaks) shared.key_ring.release(key_step), shared.value_ring.release(value_step<S>(key_step));
    key_step.next();
    store_rows<T, S::DIM>(dk, w.dk, w.dk_parts, w, tile, keys.first, thread, w.scale);
  });
}

// Another one computes dv and dq of them.
template <typename S>
__device__ void consume_pairs(const Work& w, Shared<S>& shared, int warpgroup) {
  using T = typename S::T;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool speaks = lane < SPEAKERS;  // for its warp
  constexpr int K_STAGE = sizeof shared.k[0], DOUT_STAGE = sizeof shared.dout[0], PAIR_STAGE = sizeof shared.ds[0];
  const uint64_t p = k_major(shared_address(shared.p)), ds = mn_major(shared_address(shared.ds), S::KEYS * 128);
  const uint64_t k_rows = mn_major(shared_address(shared.k), S::KEYS * 128),
                 dout_rows = mn_major(shared_address(shared.dout), S::QUERIES * 128);

  Step<S::KEY_STAGES> key_step;
  Step<S::STAGES> step;
  Step<S::PAIR_STAGES> pair_step;
  Step<1> dq_step;
  Step<S::STAGES> turn;
  float dv[S::DIM_V / 2];

  compute_tiles<S>(shared, [&](const Tile& tile, int begin, int end) {
    const bool adds = is_seen<S>(w, tile);

    shared.key_ring.wait(key_step);
    if (w.row_bounds && tile.row + S::KEYS > tile.rows)
      clear<S::KEYS, S::WIDTH>(shared.k[key_step.stage], tile.rows - tile.row, thread, WARPGROUP + warpgroup);

    for (int n = 0; n < w.heads_together; ++n)
      for (int i = end - 1; i >= begin; --i) {
        shared.dout_ring.wait(step);
        if (w.row_bounds && tile.columns < (i + 1) * S::QUERIES)
          clear<S::QUERIES, S::WIDTH_V>(shared.dout[step.stage], tile.columns - i * S::QUERIES, thread,
                                        WARPGROUP + warpgroup);
        shared.p_ring.wait(pair_step);
        wgmma_fence();
        multiply_queries<S>(dv, advance(p, pair_step.stage * PAIR_STAGE), advance(dout_rows, step.stage * DOUT_STAGE),
                            n > 0 || i < end - 1);
        wgmma_commit();
        shared.ds_ring.wait(pair_step);
#pragma unroll
        for (int part = 0; part < S::DIM; part += S::SUM_COLUMNS) {
          float dq[S::SUM_COLUMNS / 2];
          wgmma_fence();
          multiply_keys<S>(dq, advance(ds, pair_step.stage * PAIR_STAGE),
                           advance(k_rows, key_step.stage * K_STAGE + part * S::KEYS * 2));
          wgmma_commit();
          if (part == 0) {
            wgmma_wait<1>();
            pin(dv);
            if (speaks) shared.dout_ring.release(step), shared.p_ring.release(pair_step);
          }
          wgmma_wait<0>();
          pin(dq);
          if (part == S::DIM - S::SUM_COLUMNS && speaks) shared.ds_ring.release(pair_step);
          if (!adds) continue;
          if constexpr (S::STAGED) {
            store_sums(dq, shared.dq_ring[0], dq_step, shared.dq[0], thread);
            dq_step.next();
          } else {
            if (part == 0 && w.ordered) shared.turn_ring.wait(turn);
            float* const sums = w.sums + (int64_t(block_of<S>(w, tile, tile.head * w.heads_together + n, i)) * S::DIM + part) *
                                             S::QUERIES + thread / 32 * S::SUM_COLUMNS * 16 + lane * 4;
#pragma unroll
            for (int j = 0; j < S::SUM_COLUMNS / 2; j += 4)
              add_to_global(sums + j * 32, dq[j], dq[j + 1], dq[j + 2], dq[j + 3]);
          }
        }
        if (!S::STAGED && w.ordered && adds) {
          __syncwarp();
          if (speaks) shared.added[turn.stage].arrive();
          turn.next();
        }
        step.next(), pair_step.next();
      }
    if (speaks) shared.key_ring.release(key_step), shared.value_ring.release(value_step<S>(key_step));
    key_step.next();
    store_rows<T, S::DIM_V>(dv, w.dv, w.dv_parts, w, tile, tile.row, thread, 1);
  });
}

}  // namespace
}  // namespace flashmoe
