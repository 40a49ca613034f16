// Gradients of the experts' weights: what is summed over are an expert's rows, however many there are.
//
//   dw2 = dyT a        dw1 = dgateT x    dw3 = dupT x
//
// Both operands lie in memory by rows, and are contracted over them. Rows of the next expert in the last stage are zeroed in
// both: 0 times NaN would be NaN. An expert without rows gets zeros. Results are rounded to the operands' type or stay float32,
// and are stored, or added to what is there: by the copy engine, once for every element.
#include "moe/grouped.cuh"

namespace flashmoe {
namespace {

// What a kernel is given: out[part][e] = a[rows of e, part]T b[rows of e], or +=; parts of `height` columns.
struct Work {
  Copies copies;
  CUtensorMap a, b, out[2];
  const int32_t* offsets;
  int32_t* claimed;
  int experts, rows, height, width;
  int parts, high, columns;  // tiles that cover a part's height, and the width
  bool add;
};

struct Tile {
  int expert, part, row, column;  // row and column of the result
  int first, rows, steps;         // of the expert
};

// Two tiles of a pair have the same columns: neighbours of the left rows' columns, whatever part they are of.
__device__ __forceinline__ bool find(const Work& w, uint32_t rank, int index, Tile& tile) {
  const int high = w.parts * w.high, pairs_high = (high + PAIR - 1) / PAIR, of_expert = pairs_high * w.columns;
  if (index >= w.experts * of_expert) return false;
  tile.expert = index / of_expert;
  const Place place = place_of(index - tile.expert * of_expert, pairs_high, w.columns);
  const int row = place.row * PAIR + int(rank);
  tile.part = min(row / w.high, w.parts - 1);
  tile.row = (row - tile.part * w.high) * TILE_ROWS;  // of a pair's second tile, maybe beyond the last part
  tile.column = place.column * TILE_COLUMNS;
  const Rows rows = rows_of(w.offsets, tile.expert, w.rows);
  tile.first = rows.first, tile.rows = rows.count;
  tile.steps = (tile.rows + DEPTH - 1) / DEPTH;
  return true;
}

// One thread. The pair shares the right rows: each block loads half of their columns, into both.
template <typename T>
__device__ void produce(const Work& w, Shared<T, Tile>& shared) {
  const uint32_t rank = rank_in_pair();
  Arrived arrived{w.copies, total_rows(w.offsets, w.experts, w.rows)};
  const auto load = [&](const Tile& tile, int k, int stage, Barrier& full) {
    arrived.await(tile.first + k * DEPTH, tile.first + (k + 1) * DEPTH);
    if (k % ASKING == ASKING / 2) arrived.more();
    const int row = tile.first + k * DEPTH, shared_column = int(rank) * (TILE_COLUMNS / 2);
#pragma unroll
    for (int i = 0; i < TILE_ROWS; i += 64)
      tma_load(shared.a[stage] + i * DEPTH, &w.a, full, Keep::normal, tile.part * w.height + tile.row + i, row);
#pragma unroll
    for (int i = 0; i < TILE_COLUMNS / 2; i += 64)
      tma_load_both(shared.b[stage] + (shared_column + i) * DEPTH, &w.b, full, Keep::normal, tile.column + shared_column + i,
                    row);
  };
  const auto find_tile = [&](int index, Tile& tile) { return find(w, rank, index, tile); };
  each_tile_published(shared, rank, w.claimed, find_tile, load);
}

// Zeros in the rows of a stage from `begin` on, by both warpgroups.
template <typename T>
__device__ __forceinline__ void clear_rows(Shared<T, Tile>& shared, int stage, int begin) {
  const auto clear = [&](T* tile, int columns) {
    for (int column = 0; column < columns; column += 64)
      for (int i = begin * 8 + threadIdx.x - 128; i < DEPTH * 8; i += 256)
        reinterpret_cast<uint4*>(tile + column * DEPTH)[i] = uint4{};
  };
  clear(shared.a[stage], TILE_ROWS);
  clear(shared.b[stage], TILE_COLUMNS);
  fence_proxy_async();
  barrier_sync(CONSUMERS, 256);
}

template <typename T, typename Out>
__device__ void consume(const Work& w, Shared<T, Tile>& shared, int warpgroup) {
  const uint64_t a = mn_major(shared_address(shared.a) + warpgroup * DEPTH * 128, DEPTH * 128);
  const uint64_t b = mn_major(shared_address(shared.b), DEPTH * 128);
  Step<STAGES> step;
  float d[COUNT];
  int slab = 0;
  each_tile(shared, [&](const Tile& tile) {
    const int row = tile.row + warpgroup * 64;
    multiply<MN_MAJOR, MN_MAJOR>(d, shared, step, tile.steps, a, b, row < w.height, [&](int k, int stage) {
      if (tile.rows - k * DEPTH < DEPTH) clear_rows(shared, stage, tile.rows - k * DEPTH);
    });
    if (row >= w.height) return;
    if (tile.steps == 0 && w.add) return;
    constexpr int SLAB_COUNT = 16 * 4 / sizeof(Out);  // accumulators that fill a slab: 64 columns, or 32 of float32
#pragma unroll
    for (int i = 0; i < COUNT; i += SLAB_COUNT) {
      std::conditional_t<std::is_same_v<Out, float>, float, uint32_t> values[16];
      pack_columns<Out>(d, i, values);
      if (tile.steps == 0)
        for (auto& value : values) value = 0;
      const int column = tile.column + 2 * i;
      if (column >= w.width) break;
      const T* const results = stage(values, shared, warpgroup, slab);
      send([&] {
        if (w.add) tma_add(&w.out[tile.part], results, column, row, tile.expert);
        else tma_store(&w.out[tile.part], results, column, row, tile.expert);
      });
    }
  });
}

template <typename T, typename Out>
__global__ void __cluster_dims__(PAIR) __launch_bounds__(THREADS, 1) weight_gradient_kernel(const __grid_constant__ Work w) {
  auto& shared = shared_storage<Shared<T, Tile>>();
  prepare(shared);
  if (threadIdx.x < 128) {
    fewer_registers<COPYING_REGISTERS>();
    if (threadIdx.x < 32) {
      if (elected()) produce<T>(w, shared);
    } else if (w.copies.claimed) {
      copy_rows(w.copies, total_rows(w.offsets, w.experts, w.rows));
    }
  } else {
    more_registers<BESIDE_COPYING_REGISTERS>();
    consume<T, Out>(w, shared, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
  cluster_sync();  // the other block may still write here
}

// -------------------------------------------------------------------------------------------------------------- launch

template <typename T, typename Out>
cudaError_t run(const Experts& e, int32_t* claimed, const Copies& copies, const Matrix& a, const Matrix& b, int height, int width,
                std::initializer_list<Weights> out, bool add, cudaStream_t stream) {
  Work w{};
  w.copies = copies;
  w.a = rows_map<T>("the left rows", a, e.rows, int64_t(out.size()) * height, DEPTH);
  w.b = rows_map<T>("the right rows", b, e.rows, width, DEPTH);
  w.claimed = claimed, w.offsets = e.offsets, w.experts = e.count, w.rows = int(e.rows);
  int i = 0;
  for (const Weights& part : out) w.out[i++] = weights_map<Out>("the gradient", part, e.count, height, width, 64);
  w.add = add;
  w.height = height, w.width = width, w.parts = int(out.size());
  w.high = (height + TILE_ROWS - 1) / TILE_ROWS, w.columns = (width + TILE_COLUMNS - 1) / TILE_COLUMNS;
  return launch_pairs<Shared<T, Tile>>(weight_gradient_kernel<T, Out>, w, stream);
}

auto run_of(const Experts& e, const GradientSums& to) {
  if (e.half) return to.wide ? run<__half, float> : run<__half, __half>;
  return to.wide ? run<__nv_bfloat16, float> : run<__nv_bfloat16, __nv_bfloat16>;
}

}  // namespace

cudaError_t moe_weight_gradient_down(const MoEWeightGradientDownParams& p, cudaStream_t stream) {
  return run_of(p.experts, p.to)(p.experts, p.claimed, copies_of(p.gather, p.dy, p.columns), p.dy, p.a, p.columns,
                                 p.experts.hidden, {p.dw2}, p.to.add, stream);
}

cudaError_t moe_weight_gradient_up(const MoEWeightGradientUpParams& p, cudaStream_t stream) {
  return run_of(p.experts, p.to)(p.experts, p.claimed, copies_of(p.gather, p.x, p.columns), p.dh, p.x, p.experts.hidden,
                                 p.columns, {p.dw1, p.dw3}, p.to.add, stream);
}

}  // namespace flashmoe
