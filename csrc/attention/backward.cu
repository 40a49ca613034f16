// Attention backward: the gradients of q, k and v from that of out.
//
//   prepare   delta = rowsum(dout * out) of every query, beside its lse; zeros in the sums of dq
//   backward  p = exp(scale * k qT - lse), ds = p * (v doutT - delta); dv = p dout, dk = ds q, dq += dsT k
//   convert   the sums of dq, in float32, to dq
//
// Everything is transposed: a tile is 64 to 192 keys, a step 64 queries of a head, so that p and ds are in registers what dv
// and dk need of them. Tiles of different keys add to the sums of the same queries. Who does what in a block:
//
//   backward_producers.cuh   the first warpgroup: one thread loads tiles, k, v and a ring of stages of q and dout; one or two
//                            warps add dq to memory
//   backward_consumers.cuh   the others. Up to head dim 128 each has 64 keys of the tile, and only ds goes through shared
//                            memory: dq needs that of all keys. Wider heads need so many registers that tiles have 64 keys,
//                            of which one warpgroup computes p, ds and dk, and another dv and dq
//
// Every mask is a band, and a tile visits the queries that any of its keys is seen by, from the last one back. A tile is of
// one head of keys: its steps go through all heads of queries that share it.
// docs/kernels/attention_backward.md says what was tried and measured.
#include <algorithm>

#include "attention/backward_consumers.cuh"
#include "attention/backward_passes.cuh"
#include "attention/backward_producers.cuh"

namespace flashmoe {
namespace {

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) backward_kernel(const __grid_constant__ Work w) {
  auto& shared = shared_storage<Shared<S>>();
  if (threadIdx.x == 0) {
    constexpr int WARPGROUP_SPEAKS = 4 * SPEAKERS, ALL_SPEAK = S::WARPGROUPS * WARPGROUP_SPEAKS;
    shared.key_ring.init(1, ALL_SPEAK);
    shared.value_ring.init(1, ALL_SPEAK);
    shared.q_ring.init(1, S::WIDE ? WARPGROUP_SPEAKS : ALL_SPEAK);
    shared.dout_ring.init(1, ALL_SPEAK);
    shared.p_ring.init(WARPGROUP_SPEAKS, WARPGROUP_SPEAKS);
    shared.ds_ring.init(WARPGROUP_SPEAKS, WARPGROUP_SPEAKS);
    for (Ring<1>& ring : shared.dq_ring) ring.init(WARPGROUP_SPEAKS, 1);
    shared.turn_ring.init(1, 1);
    for (Barrier& added : shared.added) added.init(WARPGROUP_SPEAKS);
    shared.tile_ring.init(1, ALL_SPEAK + (S::STAGED ? S::SUM_BUFFERS : w.ordered ? 2 : 0) * SPEAKERS);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<S::PRODUCER_REGISTERS>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      if (elected()) w.ordered ? produce<S, true>(w, shared) : produce<S, false>(w, shared);
    } else if constexpr (S::STAGED) {
      if (warp <= S::SUM_BUFFERS) add_sums<S>(w, shared, warp - 1);
    } else if (w.ordered && warp <= 2) {
      warp == 1 ? await_turns<S>(w, shared) : pass_turns<S>(w, shared);
    }
  } else {
    more_registers<S::CONSUMER_REGISTERS>();
    // From one lane, so that the compiler knows it to be the same in all: descriptors stay in uniform registers.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1;
    if constexpr (S::WIDE)
      warpgroup == 0 ? consume_pairs<S>(w, shared, 0) : consume_scores<S>(w, shared, 1);
    else
      consume<S>(w, shared, warpgroup);
  }
}

// -------------------------------------------------------------------------------------------------------------- launch

constexpr int TILES_A_BLOCK = 8;  // at least, so that blocks end at about the same time

// Parts of the query heads of each head of keys, with tiles of their own: as few as keep all multiprocessors busy to the end.
int parts_of(const AttentionBackwardParams& p, int blocks) {
  const int heads = p.heads / p.kv_heads;
  const int64_t tiles = p.batch * p.kv_heads * tiles_of_strip(p, p.keys, tile_keys(p.dim));
  for (int parts = 1; parts < heads; ++parts)
    if (heads % parts == 0 && tiles * parts >= TILES_A_BLOCK * blocks) return parts;
  return heads;
}

// Where what lies in the workspace, in bytes.
struct Workspace {
  int64_t statistics, sums, turns, dk_parts, dv_parts, end;
  int blocks, parts;

  Workspace(const AttentionBackwardParams& p, int most_blocks) {
    const auto after = [](int64_t begin, int64_t bytes) { return begin + (bytes + 255) / 256 * 256; };
    blocks = int(tiles_of_strip(p, p.queries, STEP_QUERIES));
    const int64_t all_blocks = int64_t(p.batch) * p.heads * blocks;
    statistics = after(0, list_bytes(p, p.keys, tile_keys(p.dim)));
    sums = after(statistics, all_blocks * sizeof(Statistics));
    turns = after(sums, all_blocks * STEP_QUERIES * p.dim * 4);
    dk_parts = after(turns, p.deterministic ? all_blocks * 4 : 0);
    parts = parts_of(p, most_blocks);
    const int64_t key_rows = parts > 1 ? int64_t(p.batch) * p.keys * p.kv_heads * parts : 0;
    dv_parts = after(dk_parts, key_rows * p.dim * 4);
    end = after(dv_parts, key_rows * p.dim_v * 4);
  }
};

template <typename S>
cudaError_t launch_backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  using T = typename S::T;
  static_assert(sizeof(Shared<S>) <= 227 << 10);
  const MapElement element = p.type == AttentionType::float16 ? MAP_FLOAT16 : MAP_BFLOAT16;
  int most_blocks = 0;
  if (const cudaError_t error = multiprocessors(most_blocks)) return error;
  const Workspace workspace(p, most_blocks);
  char* const base = static_cast<char*>(p.workspace);
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };

  const int64_t query_bytes = (S::DIM + S::DIM_V) * element.bytes + S::DIM * 4;
  const int parts = workspace.parts, together = p.heads / p.kv_heads / parts;
  Work w{schedule_of(p, p.workspace, true, p.kv_heads * parts, S::KEYS, p.queries * query_bytes * together, p.deterministic)};
  w.dynamic = true;  // a strip's last tile, with rows beyond its end to hide, takes longer
  // Blocks that wait for each other's sums wait less if there are few of a strip.
  if (w.ordered) w.strips_together = std::min(w.strips, std::max(w.strips_together, most_blocks / 8));
  w.q = map_of("q", p.q, element, p.q_strides, p.batch, p.queries, p.heads, p.dim, S::QUERIES);
  w.k = map_of("k", p.k, element, p.k_strides, p.batch, p.keys, p.kv_heads, p.dim, S::KEYS);
  w.v = map_of("v", p.v, element, p.v_strides, p.batch, p.keys, p.kv_heads, p.dim_v, S::KEYS);
  w.dout = map_of("dout", p.dout, element, p.dout_strides, p.batch, p.queries, p.heads, p.dim_v, S::QUERIES);
  auto* const statistics = reinterpret_cast<Statistics*>(base + workspace.statistics);
  w.statistics = statistics, w.sums = floats(workspace.sums);
  w.turns = p.deterministic ? reinterpret_cast<int*>(base + workspace.turns) : nullptr;
  w.dk = p.dk, w.dv = p.dv;
  if (parts > 1) w.dk_parts = floats(workspace.dk_parts), w.dv_parts = floats(workspace.dv_parts);
  w.query_heads = p.heads, w.heads_together = together, w.blocks = workspace.blocks;
  w.scale = p.scale, w.exponent_scale = p.scale * 1.44269504f;
  if (w.row_bounds)
    if (const cudaError_t error = plan_tiles(w, S::KEYS, S::QUERIES, stream)) return error;

  const Schedule queries = schedule_of(p, p.workspace, false, p.heads, S::QUERIES, 1);
  const PrepareWork prepare{queries, p.out, p.dout, p.out_strides, p.dout_strides, p.lse, statistics,
                            reinterpret_cast<uint4*>(base + workspace.sums), (workspace.dk_parts - workspace.sums) / 16,
                            w.row_bounds ? nullptr : &w.list->next, p.batch, w.blocks};
  const int64_t threads = int64_t(p.batch) * p.queries * p.heads * PREPARE_LANES<S>;
  if (const cudaError_t error =
          launch(prepare_kernel<S>,
                 {dim3((threads + PREPARE_THREADS - 1) / PREPARE_THREADS), dim3(PREPARE_THREADS), 0, stream}, prepare))
    return error;

  const int blocks = int(std::min<int64_t>(int64_t(w.strips) * w.tiles_per_strip, most_blocks));
  if (const cudaError_t error =
          launch(backward_kernel<S>, {dim3(blocks), dim3(S::THREADS), sizeof(Shared<S>), stream, true}, w))
    return error;

  const ConvertWork convert{queries, w.sums, p.dq, w.blocks, p.scale};
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
  if constexpr (compiled(192)) if (is(192, 128)) return launch_backward<Sizes<T, 192, 128>>(p, stream);
  if constexpr (compiled(256)) if (is(256, 256)) return launch_backward<Sizes<T, 256, 256>>(p, stream);
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
