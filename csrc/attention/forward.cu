// Attention forward: out = softmax(scale * q kT) v and the logarithm of every query's sum.
//
// A tile is 64, 128 or 192 queries of a head, a step so many keys. In a block one thread of the first warpgroup, the producer,
// loads q and a ring of stages of k and v; each consumer warpgroup has 64 of the queries, whose scores, probabilities and
// sums never leave its registers. It issues the scores of a step and the sums of the step before it together, then does the
// softmax of the former while the other warpgroups' products run.
//
// Every mask is a band, and a tile visits the keys that any of its queries sees, from the last one back: first the steps
// that the band's right edge or the last key cuts, then those of which every query sees all, then those at its left edge.
// docs/kernels/attention.md says what was tried and measured.
#include <algorithm>
#include <type_traits>

#include <cuda.h>

#include "attention/attention.h"
#include "attention/loads.cuh"
#include "attention/softmax.cuh"
#include "attention/tiles.cuh"
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

using namespace hopper;

// --------------------------------------------------------------------------------------------------------------- sizes

template <typename Element, int D, int V, int TILE, int STEP>
struct Sizes {
  using T = Element;
  static constexpr int DIM = D, DIM_V = V;
  static constexpr int WIDTH = (D + 63) / 64 * 64, WIDTH_V = (V + 63) / 64 * 64;  // columns in memory: slabs of 64
  static constexpr int QUERIES = TILE;                                            // of a tile
  static constexpr int KEYS = STEP;                                               // of a step
  static constexpr int STAGES = 2;                                                // of k, and of v
  static constexpr bool AHEAD = WIDTH <= 128;  // q of the next tile has room, and its first scores run as this one ends
  static constexpr int Q_STAGES = AHEAD ? 2 : 1;
  static constexpr int CONSUMERS = QUERIES / 64;  // warpgroups
  static constexpr int THREADS = 128 + 128 * CONSUMERS;
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
};

constexpr int SMALLEST_TILE = 64;  // in queries: the workspace has room for so many tiles
constexpr int TILES = 3;           // that somebody is at work on: the producer, and consumers between two

// What the kernel is given.
struct Work : Schedule {
  CUtensorMap q, k, v;  // columns, heads, rows, batch
  void* out;
  float* lse;
  AttentionStrides out_strides;
  float scale;  // times log2(e)
};

enum BarrierId { WARPGROUP = 1, TURN = 4 };  // named barriers: one for each consumer

template <typename S>
struct Shared {
  alignas(1024) typename S::T q[S::Q_STAGES][S::QUERIES * S::WIDTH];
  alignas(1024) typename S::T k[S::STAGES][S::KEYS * S::WIDTH];
  alignas(1024) typename S::T v[S::STAGES][S::KEYS * S::WIDTH_V];
  Tile tiles[TILES];
  Ring<S::Q_STAGES> q_ring;
  Ring<S::STAGES> k_ring, v_ring;
  Ring<TILES> tile_ring;
};

// ------------------------------------------------------------------------------------------------------------ producer

template <typename T>
__device__ void load_tile(T* tile, const CUtensorMap* map, Barrier& barrier, int rows, int columns, int head, int row,
                          int batch, Keep keep) {
  barrier.arrive_expecting(rows * columns * sizeof(T));
  load_rows(tile, map, barrier, rows, columns, head, row, batch, keep);
}

// One thread.
template <typename S>
__device__ void produce(const Work& w, Shared<S>& shared) {
  Step<S::Q_STAGES> q_step;
  Step<TILES> tile_step;
  Step<S::STAGES> k_step, v_step;
  const auto publish = [&](int index) {
    const Tile tile = tile_at(w, index, S::QUERIES, S::KEYS);
    shared.tile_ring.acquire(tile_step);
    Tile* const published = shared.tiles + tile_step.stage;
    *published = tile;
    shared.tile_ring.full[tile_step.stage].arrive();
    tile_step.next();
    return published;
  };
  const auto load_k = [&](const Tile& tile, int i) {
    shared.k_ring.acquire(k_step);
    load_tile(shared.k[k_step.stage], &w.k, shared.k_ring.full[k_step.stage], S::KEYS, S::WIDTH, tile.kv_head,
              tile.first_column + i * S::KEYS, tile.batch, Keep::longest);
    k_step.next();
  };
  const auto load_v = [&](const Tile& tile, int i) {
    shared.v_ring.acquire(v_step);
    load_tile(shared.v[v_step.stage], &w.v, shared.v_ring.full[v_step.stage], S::KEYS, S::WIDTH_V,
              tile.kv_head, tile.first_column + i * S::KEYS, tile.batch, Keep::longest);
    v_step.next();
  };
  const auto begin = [&](const Tile& tile) {
    shared.q_ring.acquire(q_step);
    load_tile(shared.q[q_step.stage], &w.q, shared.q_ring.full[q_step.stage], S::QUERIES, S::WIDTH, tile.head,
              tile.first_row + tile.row, tile.batch, Keep::briefly);
    q_step.next();
    load_k(tile, tile.end - 1);
  };

  int index = blockIdx.x;
  // Tiles stay in shared memory: this thread has few registers.
  const Tile* tile = publish(index);
  if (tile->end > 0) begin(*tile);
  while (tile->end > 0) {
    // Known before it is needed: the claim and the divisions behind a tile's place take their time.
    index = next_tile(w, index, gridDim.x);
    const Tile* const next = publish(index);
    // In the order of their use.
    for (int i = tile->end - 1; i > tile->begin; --i) {
      load_k(*tile, i - 1);
      load_v(*tile, i);
    }
    if (S::AHEAD && next->end > 0) begin(*next);
    load_v(*tile, tile->begin);
    if (!S::AHEAD && next->end > 0) begin(*next);
    tile = next;
  }
}

// ----------------------------------------------------------------------------------------------------------- consumers

// s = q kT. `q` is the descriptor of the warpgroup's rows.
template <typename S>
__device__ __forceinline__ void multiply_scores(float (&s)[S::KEYS / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int i = 0; i < S::DIM; i += 16)
    wgmma<typename S::T, K_MAJOR, K_MAJOR>(s, advance(q, i / 64 * S::QUERIES * 128 + i % 64 * 2),
                                           advance(k, i / 64 * S::KEYS * 128 + i % 64 * 2), i > 0);
}

// o += p v; of the first step, o = p v.
template <typename S>
__device__ __forceinline__ void multiply_values(float (&o)[S::DIM_V / 2], const uint32_t (&p)[S::KEYS / 4], uint64_t v,
                                                bool accumulate) {
#pragma unroll
  for (int i = 0; i < S::KEYS; i += 16)
    wgmma<typename S::T, MN_MAJOR>(o, p + i / 4, advance(v, i * 128), accumulate || i > 0);
}

template <typename S>
__device__ void consume(const Work& w, Shared<S>& shared, int warpgroup) {
  using T = typename S::T;
  using ConsumerTurns = Turns<TURN, S::CONSUMERS>;
  const int thread = threadIdx.x % 128;
  const bool speaks = thread == 0;  // for its warpgroup, right after its products have been waited for
  const uint64_t q = k_major(shared_address(shared.q) + warpgroup * 64 * 128);
  const uint64_t k = k_major(shared_address(shared.k)), v = mn_major(shared_address(shared.v), S::KEYS * 128);
  constexpr int Q_STAGE = sizeof shared.q[0], K_STAGE = sizeof shared.k[0], V_STAGE = sizeof shared.v[0];

  float s[S::KEYS / 2], o[S::DIM_V / 2], rescale[2];
  uint32_t p[S::KEYS / 4];
  Step<S::Q_STAGES> q_step;
  Step<TILES> tile_step;
  Step<S::STAGES> k_step, v_step;
  ConsumerTurns::start(warpgroup);

  // Whether the last step of a tile is one that other warpgroups see and this one does not.
  static_assert(S::QUERIES - 64 <= S::KEYS, "there might be two such steps");
  const auto last_unseen = [&](const Tile& tile) {
    const int last = min(tile.row + warpgroup * 64 + 64, tile.rows) - 1;
    return tile.end - tile.begin > 1 && band_of(w, tile, last).end <= (tile.end - 1) * S::KEYS;
  };
  const auto release_k = [&] {
    if (speaks) shared.k_ring.release(k_step);
    k_step.next();
  };
  const auto release_v = [&] {
    if (speaks) shared.v_ring.release(v_step);
    v_step.next();
  };
  // A stage that is not read: all warps have seen it before it goes back.
  const auto skip_k = [&] {
    shared.k_ring.wait(k_step);
    barrier_sync(WARPGROUP + warpgroup, 128);
    release_k();
  };
  const auto skip_v = [&] {
    ConsumerTurns::wait(warpgroup);
    ConsumerTurns::pass(warpgroup);
    shared.v_ring.wait(v_step);
    barrier_sync(WARPGROUP + warpgroup, 128);
    release_v();
  };
  // Of the first step that this warpgroup sees; false if there is no tile any more. Then too products run, of what there is:
  // so the compiler knows which registers are in use.
  const auto first_scores = [&] {
    shared.tile_ring.wait(tile_step);
    const Tile& tile = shared.tiles[tile_step.stage];
    const bool more = __shfl_sync(0xffffffff, tile.end, 0) > 0;
    if (more) {
      shared.q_ring.wait(q_step);
      if (last_unseen(tile)) skip_k();
      shared.k_ring.wait(k_step);
    }
    wgmma_fence();
    multiply_scores<S>(s, advance(q, q_step.stage * Q_STAGE), advance(k, k_step.stage * K_STAGE));
    wgmma_commit();
    return more;
  };

  for (bool more = first_scores(); more;) {
    const Tile& tile = shared.tiles[tile_step.stage];
    const bool unseen = last_unseen(tile);
    const int begin = tile.begin, end = tile.end - unseen;
    const int row = tile.row + warpgroup * 64 + fragment_row(thread);
    const Band seen[2] = {band_of(w, tile, row), band_of(w, tile, row + 8)};
    // Steps that all queries of this warpgroup see all of.
    const int first_whole = (band_of(w, tile, tile.row + warpgroup * 64 + 63).begin + S::KEYS - 1) / S::KEYS;
    const int end_whole = band_of(w, tile, tile.row + warpgroup * 64).end / S::KEYS;
    const auto is_whole = [&](int i) { return i >= first_whole && i < end_whole; };
    Softmax softmax{w.scale, {row < tile.rows ? 0 : NAN, row + 8 < tile.rows ? 0 : NAN}};

    if (unseen) skip_v();
    if (w.row_bounds && tile.columns < end * S::KEYS) {
      shared.v_ring.wait(v_step);
      clear_rows(shared.v[v_step.stage], S::KEYS, S::WIDTH_V, tile.columns - (end - 1) * S::KEYS, thread);
      fence_proxy_async();
      barrier_sync(WARPGROUP + warpgroup, 128);
    }
    wgmma_wait<0>();
    pin(s);
    release_k();
    if (!is_whole(end - 1)) mask(s, seen, (end - 1) * S::KEYS + fragment_column(thread));
    softmax.raise(s, rescale);
    softmax.exponentials<T>(s, p, softmax.sum);

    // Scores of step i beside the values of step i + 1.
    const auto both = [&](int i, auto masked) {
      shared.k_ring.wait(k_step);
      ConsumerTurns::wait(warpgroup);
      wgmma_fence();
      multiply_scores<S>(s, advance(q, q_step.stage * Q_STAGE), advance(k, k_step.stage * K_STAGE));
      wgmma_commit();
      shared.v_ring.wait(v_step);
      wgmma_fence();
      multiply_values<S>(o, p, advance(v, v_step.stage * V_STAGE), i < end - 2);
      wgmma_commit();

      wgmma_wait<1>();
      pin(s);
      ConsumerTurns::pass(warpgroup);
      release_k();
      if constexpr (decltype(masked)::value) mask(s, seen, i * S::KEYS + fragment_column(thread));

      // Not later: the others' products hide the exponentials better than the warpgroup's own.
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release_v();
      float total[2];
      softmax.exponentials<T>(s, p, total);
      if (softmax.too_low(total)) {
        softmax.raise(s, rescale);
        softmax.exponentials<T>(s, p, total);
#pragma unroll
        for (int j = 0; j < S::DIM_V / 2; ++j) o[j] *= rescale[j / 2 % 2];
      }
      softmax.sum[0] += total[0], softmax.sum[1] += total[1];
    };
    // Loops of their own: a question in one of them would cost 2 to 3 %.
    for (int i = end - 2; i >= begin;) {
      for (; i >= begin && tile.row + warpgroup * 64 >= tile.rows; --i) skip_k(), skip_v();  // no queries here
      for (; i >= begin && !is_whole(i); --i) both(i, std::true_type());
      for (; i >= begin && i >= first_whole; --i) both(i, std::false_type());
    }

    // The last values; the next tile's first scores are computed while these leave.
    if (speaks) shared.q_ring.release(q_step);
    q_step.next();
    shared.v_ring.wait(v_step);
    wgmma_fence();
    multiply_values<S>(o, p, advance(v, v_step.stage * V_STAGE), end - begin > 1);
    wgmma_commit();
    const Step<TILES> done = tile_step;
    tile_step.next();
    if (S::AHEAD) more = first_scores();
    wgmma_wait<S::AHEAD>();
    pin(o);
    pin(p);
    release_v();

    // Sums over the keys of all four threads; out and lse straight to memory, of the rows that are there.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax.sum[r]), inverse = sum > 0 ? 1 / sum : 0;
      const int query = tile.row + warpgroup * 64 + fragment_row(thread) + 8 * r;
      if (query < tile.rows && thread % 4 == 0)
        w.lse[(int64_t(tile.batch) * w.heads + tile.head) * w.rows + tile.first_row + query] =
            softmax.shift[r] * 0.69314718f + __logf(sum);
      T* out = static_cast<T*>(w.out) + tile.batch * w.out_strides.batch + tile.head * w.out_strides.head +
               (tile.first_row + query) * w.out_strides.row + thread % 4 * 8;
#pragma unroll
      for (int j = 0; j < S::DIM_V / 2; j += 16) {  // 32 columns
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pack<T>(o[j + 4 * i + 2 * r] * inverse, o[j + 4 * i + 2 * r + 1] * inverse);
        const uint4 eight = quad_transpose(pairs);
        if (query < tile.rows) *reinterpret_cast<uint4*>(out + j * 2) = eight;
      }
    }
    __syncwarp();
    if (thread % 32 == 0) shared.tile_ring.release(done);
    if (!S::AHEAD) more = first_scores();
  }
  wgmma_wait<0>();
  pin(s);
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) forward_kernel(const __grid_constant__ Work w) {
  auto& shared = shared_storage<Shared<S>>();
  if (threadIdx.x == 0) {
    shared.q_ring.init(1, S::CONSUMERS);
    shared.k_ring.init(1, S::CONSUMERS);
    shared.v_ring.init(1, S::CONSUMERS);
    shared.tile_ring.init(1, 4 * S::CONSUMERS);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {  // a single consumer has all the registers that it can use as it is
    if (S::CONSUMERS > 1) fewer_registers<S::PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && elected()) produce<S>(w, shared);
  } else {
    if (S::CONSUMERS > 1) more_registers<S::CONSUMER_REGISTERS>();
    // From one lane, so that the compiler knows it to be the same in all: descriptors stay in uniform registers.
    consume<S>(w, shared, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
}

// -------------------------------------------------------------------------------------------------------------- launch

template <typename S>
cudaError_t launch_forward(const AttentionForwardParams& p, int most_blocks, cudaStream_t stream) {
  const MapElement element = p.type == AttentionType::float16 ? MAP_FLOAT16 : MAP_BFLOAT16;
  const int64_t key_bytes = (S::DIM + S::DIM_V) * element.bytes;
  Work w{schedule_of(p, p.workspace, false, p.heads, S::QUERIES, p.keys * key_bytes)};
  w.out = p.out, w.lse = p.lse, w.out_strides = p.out_strides;
  w.q = map_of("q", p.q, element, p.q_strides, p.batch, p.queries, p.heads, p.dim, S::QUERIES);
  w.k = map_of("k", p.k, element, p.k_strides, p.batch, p.keys, p.kv_heads, p.dim, S::KEYS);
  w.v = map_of("v", p.v, element, p.v_strides, p.batch, p.keys, p.kv_heads, p.dim_v, S::KEYS);
  w.scale = p.scale * 1.44269504f;

  if (const cudaError_t error = plan_tiles(w, S::QUERIES, S::KEYS, stream)) return error;
  const int64_t tiles = int64_t(w.strips) * w.tiles_per_strip;
  const int blocks = int(std::min<int64_t>(tiles, most_blocks));
  return launch(forward_kernel<S>, {dim3(blocks), dim3(S::THREADS), sizeof(Shared<S>), stream}, w);
}

// Tiles of 64 queries where that gives no multiprocessor more than one: too few larger ones would leave most of them idle.
template <typename T, int D, int V, int TILE, int STEP>
cudaError_t forward(const AttentionForwardParams& p, cudaStream_t stream) {
  int most_blocks = 0;
  if (const cudaError_t error = multiprocessors(most_blocks)) return error;
  if (int64_t(p.batch) * p.heads * tiles_of_strip(p, p.queries, SMALLEST_TILE) <= most_blocks)
    return launch_forward<Sizes<T, D, V, SMALLEST_TILE, STEP>>(p, most_blocks, stream);
  return launch_forward<Sizes<T, D, V, TILE, STEP>>(p, most_blocks, stream);
}

// A study of one head dim compiles nothing else, for bf16 alone.
#ifndef FORWARD_DIM
#define FORWARD_DIM 0
#endif
constexpr bool compiled(int dim) { return FORWARD_DIM == 0 || FORWARD_DIM == dim; }

template <typename T>
cudaError_t forward_of(const AttentionForwardParams& p, cudaStream_t stream) {
  const auto is = [&](int dim, int dim_v) { return p.dim == dim && p.dim_v == dim_v; };
  if constexpr (compiled(64)) if (is(64, 64)) return forward<T, 64, 64, 192, 128>(p, stream);
  if constexpr (compiled(96)) if (is(96, 96)) return forward<T, 96, 96, 128, 128>(p, stream);
  if constexpr (compiled(128)) if (is(128, 128)) return forward<T, 128, 128, 128, 128>(p, stream);
  if constexpr (compiled(192)) if (is(192, 128)) return forward<T, 192, 128, 128, 128>(p, stream);
  if constexpr (compiled(256)) if (is(256, 256)) return forward<T, 256, 256, 128, 64>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t attention_forward_workspace(const AttentionForwardParams& p) { return list_bytes(p, p.queries, SMALLEST_TILE); }

cudaError_t attention_forward(const AttentionForwardParams& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.queries == 0 || p.heads == 0) return cudaSuccess;
  if constexpr (FORWARD_DIM == 0)
    if (p.type == AttentionType::float16) return forward_of<__half>(p, stream);
  return forward_of<__nv_bfloat16>(p, stream);
}

}  // namespace flashmoe
