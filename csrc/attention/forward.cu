// Attention forward, head dim 128: out = softmax(scale * q kT) v and the logarithm of every query's sum.
//
// A tile is 128 queries of a head, a step 128 keys. In a block one thread of the first warpgroup, the producer, loads q
// and a ring of stages of k and v; two consumer warpgroups have 64 queries each, whose scores, probabilities and sums
// never leave their registers. A consumer issues the scores of a step and the sums of the step before it together and
// does the softmax of the former while the latter run; the two take turns, so that one's products hide the other's
// softmax.
//
// Keys are walked from the last one back: what a mask touches comes first, and no step after those asks.
// docs/kernels/attention.md says what was tried and measured.
#include <algorithm>
#include <type_traits>

#include "attention/attention.h"
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/reduce.cuh"
#include "hopper/shared_memory.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

using namespace hopper;
using T = __nv_bfloat16;

// --------------------------------------------------------------------------------------------------------------- sizes

// How blocks come to their tiles: one each; every gridDim.x-th; or whoever is free takes the next.
enum Schedule { ONE_TILE, STATIC, DYNAMIC };
#ifndef FORWARD_SCHEDULE
#define FORWARD_SCHEDULE DYNAMIC
#endif

struct Sizes {
  static constexpr int DIM = 128;
  static constexpr int QUERIES = 128;             // of a tile
  static constexpr int KEYS = 128;                // of a step
  static constexpr int STAGES = 2;                // of k, and of v
  static constexpr int CONSUMERS = QUERIES / 64;  // warpgroups
  static constexpr int THREADS = 128 + 128 * CONSUMERS;
  static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
  static constexpr int64_t CACHED = 32 << 20;     // bytes of k and v that the tiles under way may share: of 50 MB of L2
};

// Named barriers: the consumers' turns; each one's own.
enum BarrierId { TURN = 1, WARPGROUP = TURN + Sizes::CONSUMERS };
using ConsumerTurns = Turns<TURN, Sizes::CONSUMERS>;

// Tiles are slabs of 64 columns.
struct Shared {
  alignas(1024) T q[Sizes::QUERIES * Sizes::DIM];
  alignas(1024) T k[Sizes::STAGES][Sizes::KEYS * Sizes::DIM];
  alignas(1024) T v[Sizes::STAGES][Sizes::KEYS * Sizes::DIM];
  alignas(1024) T out[Sizes::QUERIES * Sizes::DIM];
  Ring<1> q_ring;
  Ring<Sizes::STAGES> k_ring, v_ring;
  Ring<1> tile_ring;
  int next_tile;
};

// What the kernel is given.
struct Work {
  CUtensorMap q, k, v, out;  // columns, heads, rows, batch
  float* lse;
  int32_t* next_tile;
  int rows, queries, keys, heads, group;  // rows: batch * heads; group: heads that share k and v
  int tiles, tiles_per_row, rows_together;
  float scale;
  bool causal;
};

// --------------------------------------------------------------------------------------------------------------- tiles

struct Tile {
  int query, head, batch;  // query: its first
  int steps;

  // Rows of heads go together, w.rows_together of them, and of those the last tiles first: where they are the longest,
  // blocks end at the same time.
  __device__ Tile(const Work& w, int index) {
    const int first = index / (w.rows_together * w.tiles_per_row) * w.rows_together;
    const int together = min(w.rows_together, w.rows - first);
    index -= first * w.tiles_per_row;
    query = (w.tiles_per_row - 1 - index / together) * Sizes::QUERIES;
    head = (first + index % together) % w.heads;
    batch = (first + index % together) / w.heads;
    // A tile that sees no key has a step nevertheless, of which everything is masked.
    steps = max(1, (keys_seen(w, query + Sizes::QUERIES - 1) + Sizes::KEYS - 1) / Sizes::KEYS);
  }

  // By one query: keys 0 ... keys_seen - 1.
  static __device__ int keys_seen(const Work& w, int query) {
    return w.causal ? max(0, min(w.keys, query + 1 + w.keys - w.queries)) : w.keys;
  }
};

// ------------------------------------------------------------------------------------------------------------ producer

__device__ void load_tile(T* tile, const CUtensorMap* map, Barrier& barrier, int rows, int head, int row, int batch,
                          Keep keep) {
  barrier.arrive_expecting(rows * Sizes::DIM * sizeof(T));
  for (int column = 0; column < Sizes::DIM; column += 64)
    tma_load(tile + column * rows, map, barrier, keep, column, head, row, batch);
}

// One thread.
__device__ void produce(const Work& w, Shared& shared) {
  Step<1> q_step, tile_step;
  Step<Sizes::STAGES> k_step, v_step;
  for (int index = blockIdx.x; index < w.tiles;) {
    const Tile tile(w, index);
    // Claimed before the loads, which take longer than the answer.
    index = FORWARD_SCHEDULE == DYNAMIC ? atomicAdd(w.next_tile, 1) + int(gridDim.x) : index + int(gridDim.x);

    shared.q_ring.acquire(q_step);
    load_tile(shared.q, &w.q, shared.q_ring.full[0], Sizes::QUERIES, tile.head, tile.query, tile.batch, Keep::briefly);
    q_step.next();
    const auto load_k = [&](int i) {
      shared.k_ring.acquire(k_step);
      load_tile(shared.k[k_step.stage], &w.k, shared.k_ring.full[k_step.stage], Sizes::KEYS, tile.head / w.group,
                i * Sizes::KEYS, tile.batch, Keep::longest);
      k_step.next();
    };
    const auto load_v = [&](int i) {
      shared.v_ring.acquire(v_step);
      load_tile(shared.v[v_step.stage], &w.v, shared.v_ring.full[v_step.stage], Sizes::KEYS, tile.head / w.group,
                i * Sizes::KEYS, tile.batch, Keep::longest);
      v_step.next();
    };
    // In the order of their use.
    load_k(tile.steps - 1);
    for (int i = tile.steps - 1; i >= 0; --i) {
      if (i > 0) load_k(i - 1);
      load_v(i);
    }

    if (FORWARD_SCHEDULE == DYNAMIC) {
      shared.tile_ring.acquire(tile_step);
      shared.next_tile = index;
      shared.tile_ring.full[0].arrive();
      tile_step.next();
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- consumers

// The softmax of the two queries of which this thread holds a quarter of the scores, step by step.
struct Softmax {
  float scale;  // times log2(e): powers of two are what the hardware has
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // sum: of this thread's quarter
  float shift[2];                                          // max * scale; 0, not NaN, as long as no key has been seen

  // The maxima with those of new scores. Sums until now, of values too, are to be scaled by `rescale`.
  template <int COUNT>
  __device__ __forceinline__ void raise_maxima(const float (&s)[COUNT], float (&rescale)[2]) {
    float high[2] = {max[0], max[1]};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = quad_max(high[r]);
      const float seen = high[r] == -INFINITY ? 0.f : high[r];
      shift[r] = seen * scale;
      // The difference first: where no maximum grows this is 1 exactly. The rounding of max * scale, which is the same in
      // every step, would add up over them.
      rescale[r] = exp2_fast((max[r] - seen) * scale);
      max[r] = high[r];
      sum[r] *= rescale[r];
    }
  }

  // Turns scores into probabilities, but for the division by `sum`.
  template <int COUNT>
  __device__ __forceinline__ void exponentials(float (&s)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum[i / 2 % 2] += s[i] = exp2_fast(s[i] * scale - shift[i / 2 % 2]);
  }
};

// -infinity for the keys, from `column` on, that a query does not see.
template <int COUNT>
__device__ __forceinline__ void mask(float (&s)[COUNT], const int (&seen)[2], int column) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (i / 4 * 8 + i % 2 >= seen[i / 2 % 2] - column) s[i] = -INFINITY;
}

// s = q kT. `q` is the descriptor of the warpgroup's rows.
__device__ __forceinline__ void multiply_scores(float (&s)[Sizes::KEYS / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int i = 0; i < Sizes::DIM; i += 16)
    wgmma<T, K_MAJOR, K_MAJOR>(s, advance(q, i / 64 * Sizes::QUERIES * 128 + i % 64 * 2),
                               advance(k, i / 64 * Sizes::KEYS * 128 + i % 64 * 2), i > 0);
}

// o += p v; of the first step, o = p v.
__device__ __forceinline__ void multiply_values(float (&o)[Sizes::DIM / 2], const uint32_t (&p)[Sizes::KEYS / 4],
                                                uint64_t v, bool accumulate) {
#pragma unroll
  for (int i = 0; i < Sizes::KEYS; i += 16)
    wgmma<T, MN_MAJOR>(o, p + i / 4, advance(v, i * 128), accumulate || i > 0);
}

__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[Sizes::KEYS / 4], const float (&s)[Sizes::KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < Sizes::KEYS / 4; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

__device__ void consume(const Work& w, Shared& shared, int warpgroup) {
  const int thread = threadIdx.x % 128;
  const bool speaks = thread == 0;  // for its warpgroup, right after its products have been waited for
  const uint64_t q = k_major(shared_address(shared.q) + warpgroup * 64 * 128);
  const uint64_t k = k_major(shared_address(shared.k)), v = mn_major(shared_address(shared.v), Sizes::KEYS * 128);
  constexpr int STAGE = sizeof shared.k[0];

  float s[Sizes::KEYS / 2], o[Sizes::DIM / 2], rescale[2];
  uint32_t p[Sizes::KEYS / 4];
  Step<1> q_step, tile_step;
  Step<Sizes::STAGES> k_step, v_step;
  ConsumerTurns::start(warpgroup);

  for (int index = blockIdx.x; index < w.tiles;) {
    const Tile tile(w, index);
    const int row = tile.query + warpgroup * 64 + fragment_row(thread);
    const int seen[2] = {Tile::keys_seen(w, row), Tile::keys_seen(w, row + 8)};
    // Steps that all queries of this warpgroup see all of.
    const int unmasked = Tile::keys_seen(w, tile.query + warpgroup * 64) / Sizes::KEYS;
    Softmax softmax{w.scale * 1.44269504f};

    // The first scores.
    shared.q_ring.wait(q_step);
    shared.k_ring.wait(k_step);
    wgmma_fence();
    multiply_scores(s, q, advance(k, k_step.stage * STAGE));
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    if (speaks) shared.k_ring.release(k_step);
    k_step.next();
    if (tile.steps > unmasked) mask(s, seen, (tile.steps - 1) * Sizes::KEYS + fragment_column(thread));
    softmax.raise_maxima(s, rescale);
    softmax.exponentials(s);
    pack_probabilities(p, s);

    // Scores of step i beside the values of step i + 1.
    const auto both = [&](int i, auto masked) {
      shared.k_ring.wait(k_step);
      ConsumerTurns::wait(warpgroup);
      wgmma_fence();
      multiply_scores(s, q, advance(k, k_step.stage * STAGE));
      wgmma_commit();
      shared.v_ring.wait(v_step);
      wgmma_fence();
      multiply_values(o, p, advance(v, v_step.stage * STAGE), i < tile.steps - 2);
      wgmma_commit();
      ConsumerTurns::pass(warpgroup);

      wgmma_wait<1>();
      pin(s);
      if (speaks) shared.k_ring.release(k_step);
      k_step.next();
      if constexpr (decltype(masked)::value) mask(s, seen, i * Sizes::KEYS + fragment_column(thread));
      softmax.raise_maxima(s, rescale);

      // Not later: exponentials beside the warpgroup's own products cost 3 to 5 %; the other's products hide them. ptxas
      // puts this between the maxima of the two queries.
      wgmma_wait<0>();
      pin(o);
      pin(p);
      if (speaks) shared.v_ring.release(v_step);
      v_step.next();
      softmax.exponentials(s);
      pack_probabilities(p, s);
#pragma unroll
      for (int j = 0; j < Sizes::DIM / 2; ++j) o[j] *= rescale[j / 2 % 2];
    };
    // Two loops: a question in one of them would cost 2 to 3 %.
    int i = tile.steps - 2;
    for (; i >= unmasked; --i) both(i, std::true_type());
    for (; i >= 0; --i) both(i, std::false_type());

    // q is free for the next tile; the last values.
    if (speaks) shared.q_ring.release(q_step);
    q_step.next();
    shared.v_ring.wait(v_step);
    wgmma_fence();
    multiply_values(o, p, advance(v, v_step.stage * STAGE), tile.steps > 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
    pin(p);
    if (speaks) shared.v_ring.release(v_step);
    v_step.next();

    // Sums over the keys of all four threads; out by way of shared memory, once the last tile's has been read there.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax.sum[r]), inverse = sum > 0 ? 1 / sum : 0;
      if (thread % 4 == 0 && row + 8 * r < w.queries)
        w.lse[int64_t(tile.batch * w.heads + tile.head) * w.queries + row + 8 * r] =
            softmax.max[r] * w.scale + __logf(sum);
#pragma unroll
      for (int j = 2 * r; j < Sizes::DIM / 2; j += 4) o[j] *= inverse, o[j + 1] *= inverse;
    }
    if (speaks) tma_wait_read<0>();
    barrier_sync(WARPGROUP + warpgroup, 128);
    store_accumulators<T>(o, shared_address(shared.out), Sizes::QUERIES, warpgroup * 64);
    fence_proxy_async();
    barrier_sync(WARPGROUP + warpgroup, 128);
    if (speaks) {
      for (int column = 0; column < Sizes::DIM; column += 64)
        tma_store(&w.out, shared.out + column * Sizes::QUERIES + warpgroup * 64 * 64, column, tile.head,
                  tile.query + warpgroup * 64, tile.batch);
      tma_commit();
    }

    if (FORWARD_SCHEDULE == DYNAMIC) {
      shared.tile_ring.wait(tile_step);
      index = shared.next_tile;
      __syncwarp();
      if (thread % 32 == 0) shared.tile_ring.release(tile_step);
      tile_step.next();
    } else {
      index += gridDim.x;
    }
  }
  if (speaks) tma_wait_read<0>();  // shared memory ends with the block
}

__global__ void __launch_bounds__(Sizes::THREADS, 1) forward_kernel(const __grid_constant__ Work w) {
  Shared& shared = shared_storage<Shared>();
  if (threadIdx.x == 0) {
    shared.q_ring.init(1, Sizes::CONSUMERS);
    shared.k_ring.init(1, Sizes::CONSUMERS);
    shared.v_ring.init(1, Sizes::CONSUMERS);
    shared.tile_ring.init(1, 4 * Sizes::CONSUMERS);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<Sizes::PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && elected()) produce(w, shared);
  } else {
    more_registers<Sizes::CONSUMER_REGISTERS>();
    // From one lane, so that the compiler knows it to be the same in all: descriptors stay in uniform registers.
    consume(w, shared, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
}

// Of a tensor [batch, rows, heads, DIM], of which a copy takes `box` rows and 64 columns of a head.
CUtensorMap map_of(const char* name, const void* base, AttentionStrides strides, int batch, int rows, int heads,
                   int box) {
  constexpr int64_t E = sizeof(T);
  return tensor_map(name, base, MAP_BFLOAT16,
                    {{Sizes::DIM, 64, E},
                     {heads, 1, strides.head * E},
                     {rows, box, strides.row * E},
                     {batch, 1, strides.batch * E}});
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------- launch

cudaError_t attention_forward(const AttentionForwardParams& p, cudaStream_t stream) {
  if (p.dim != Sizes::DIM || p.keys < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || !(p.scale > 0))
    return cudaErrorInvalidValue;
  if (p.batch == 0 || p.queries == 0 || p.heads == 0) return cudaSuccess;
  Work w{};
  w.q = map_of("q", p.q, p.q_strides, p.batch, p.queries, p.heads, Sizes::QUERIES);
  w.k = map_of("k", p.k, p.k_strides, p.batch, p.keys, p.kv_heads, Sizes::KEYS);
  w.v = map_of("v", p.v, p.v_strides, p.batch, p.keys, p.kv_heads, Sizes::KEYS);
  w.out = map_of("out", p.out, p.out_strides, p.batch, p.queries, p.heads, 64);
  w.lse = p.lse, w.next_tile = p.next_tile;
  w.rows = p.batch * p.heads, w.queries = p.queries, w.keys = p.keys;
  w.heads = p.heads, w.group = p.heads / p.kv_heads;
  w.tiles_per_row = (p.queries + Sizes::QUERIES - 1) / Sizes::QUERIES;
  w.tiles = w.rows * w.tiles_per_row;
  // Tiles of one length have no better order than that of memory.
  const int64_t kv_bytes = int64_t(p.keys) * Sizes::DIM * 2 * sizeof(T);  // k and v of a group
  const int64_t cached_rows = std::max<int64_t>(Sizes::CACHED / kv_bytes, 1) * w.group;
  w.rows_together = p.causal ? int(std::min<int64_t>(cached_rows, w.rows)) : 1;
  w.scale = p.scale, w.causal = p.causal;

  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (FORWARD_SCHEDULE == DYNAMIC)
    if (const cudaError_t error = cudaMemsetAsync(p.next_tile, 0, sizeof *p.next_tile, stream)) return error;
  const int blocks = FORWARD_SCHEDULE == ONE_TILE ? w.tiles : std::min(w.tiles, multiprocessors);
  return launch(forward_kernel, {dim3(blocks), dim3(Sizes::THREADS), sizeof(Shared), stream}, w);
}

}  // namespace flashmoe
