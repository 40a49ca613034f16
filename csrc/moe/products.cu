// The experts' products: each row times the weights of its expert.
//
//   moe_up             [gate, up] = x [w1, w3]T     then SwiGLU of them
//   moe_down           y = a w2T
//   moe_down_backward  da = dy w2                   SwiGLU's gradient has a kernel of its own
//   moe_up_backward    dx = dgate w1 + dup w3       one sum over both
//
// One thread loads stages, two warpgroups multiply; a block takes tiles until there are none. The expert is a coordinate of
// the weights' tensor map. Results go to memory by TMA, 64 rows at a time; where some of those are the next expert's, by
// ordinary stores.
#include "moe/activation.cuh"
#include "moe/grouped.cuh"
#include "moe/rows.cuh"

namespace flashmoe {
namespace {

// --------------------------------------------------------------------------------------------------------------- tiles

enum class Product { up, down, down_backward, up_backward };

template <Product P>
constexpr Major WEIGHTS_MAJOR = P == Product::up || P == Product::down ? K_MAJOR : MN_MAJOR;

// Columns of the result in a tile: of gate, and as many of up.
template <Product P>
constexpr int WIDTH = P == Product::up ? TILE_COLUMNS / 2 : TILE_COLUMNS;

// [rows, parts of `width` columns]. In the map parts are a dimension of their own, so that copies end where a part does.
struct Output {
  CUtensorMap map;  // columns, parts, rows: 64 x 1 x 64
  void* data;
  int64_t stride;
  int width;
};

// Products whose rows may be copies of tokens.
template <Product P>
constexpr bool GATHERS = P == Product::up || P == Product::down_backward;

// What a kernel is given.
struct Work {
  Copies copies;
  CUtensorMap a;       // rows, of whose columns there may be two parts
  CUtensorMap b0, b1;  // weights: of the two parts, or of the two halves of a tile's columns
  Output out, activation;
  const int32_t* offsets;
  int32_t* claimed;
  RowWeights weights;
  int experts, rows;
  int columns;             // tiles that cover a part of the result
  int steps, first_steps;  // stages of a tile; of a's first part
  int second_column;       // where a's second part begins
};

struct Tile {
  int expert, row, left, column;  // left: the expert's rows from `row` on
  int steps;
  bool stacked;  // the pair's other tile has the same columns and other rows, else the same rows and other columns
};

// The pairs of tiles in the order in which blocks take them: expert by expert. Two tiles of rows share weights; where one is
// left over, two tiles of columns share rows.
struct Walk {
  const Work& w;
  uint32_t rank;
  int expert = 0, before = 0;  // pairs of all experts before

  __device__ __forceinline__ bool find(int index, Tile& tile) {
    for (; expert < w.experts; ++expert) {
      const Rows rows = rows_of(w.offsets, expert, w.rows);
      const int high = (rows.count + TILE_ROWS - 1) / TILE_ROWS, stacked = high / PAIR * w.columns;
      const int pairs = stacked + high % PAIR * ((w.columns + PAIR - 1) / PAIR), own = index - before;
      if (own < pairs) {
        tile.stacked = own < stacked;
        Place place{high - 1, (own - stacked) * PAIR + int(rank)};
        if (tile.stacked) {
          place = place_of(own, high / PAIR, w.columns);
          place.row = place.row * PAIR + int(rank);
        }
        const int row = place.row * TILE_ROWS;
        tile.expert = expert, tile.row = rows.first + row, tile.column = place.column, tile.steps = w.steps;
        tile.left = place.column < w.columns ? rows.count - row : 0;
        return true;
      }
      before += pairs;
    }
    return false;
  }
};

// ------------------------------------------------------------------------------------------------------------ producer

// One thread. What the pair shares, each block loads half of, into both.
template <typename T, Product P>
__device__ void produce(const Work& w, Shared<T, Tile>& shared) {
  constexpr int HALF = TILE_COLUMNS / 2;
  const uint32_t rank = rank_in_pair();
  Walk walk{w, rank};
  Arrived arrived{w.copies, GATHERS<P> ? total_rows(w.offsets, w.experts, w.rows) : 0};
  const auto load = [&](const Tile& tile, int k, int stage, Barrier& full) {
    if (GATHERS<P> && k == 0) arrived.await(tile.row, tile.row + TILE_ROWS);
    if (GATHERS<P> && k % ASKING == ASKING / 2) arrived.more();
    const bool first = k < w.first_steps;
    const int depth = first ? k * DEPTH : (k - w.first_steps) * DEPTH, a_depth = (first ? 0 : w.second_column) + depth;
    T *const a = shared.a[stage], *const b = shared.b[stage];
    const auto load_a = [&](int i) { tma_load(a + i * DEPTH, &w.a, full, Keep::normal, a_depth, tile.row + i); };
    const auto load_b = [&](int half, auto copy) {
      if constexpr (WEIGHTS_MAJOR<P> == K_MAJOR) {  // two halves: gate and up, or neighbours
        const int column = tile.column * WIDTH<P> + (P == Product::up ? 0 : half * HALF);
        copy(b + half * HALF * DEPTH, half == 0 ? &w.b0 : &w.b1, depth, column);
      } else {
        const int column = half * HALF;
#pragma unroll
        for (int i = 0; i < HALF; i += 64)
          copy(b + (column + i) * DEPTH, first ? &w.b0 : &w.b1, tile.column * TILE_COLUMNS + column + i, depth);
      }
    };
    if (tile.stacked) {
      load_a(0), load_a(TILE_ROWS / 2);
      load_b(int(rank), [&](T* to, const CUtensorMap* map, int x, int y) {
        tma_load_both(to, map, full, Keep::normal, x, y, tile.expert);
      });
    } else {
      const int i = int(rank) * (TILE_ROWS / 2);
      tma_load_both(a + i * DEPTH, &w.a, full, Keep::normal, a_depth, tile.row + i);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_b(half, [&](T* to, const CUtensorMap* map, int x, int y) {
          tma_load(to, map, full, Keep::normal, x, y, tile.expert);
        });
    }
  };
  each_tile_published(shared, rank, w.claimed, [&](int index, Tile& tile) { return walk.find(index, tile); }, load);
}

// ----------------------------------------------------------------------------------------------------------- consumers

// 64 columns of a warpgroup's results, packed, to memory; of its rows `left` are the expert's.
template <typename T>
__device__ __forceinline__ void emit(const Output& to, const uint32_t (&pairs)[16], Shared<T, Tile>& shared, int warpgroup,
                                     int& slab, int column, int part, int row, int left) {
  if (column >= to.width) return;
  const T* const results = stage(pairs, shared, warpgroup, slab);
  send([&] {
    if (left >= 64) tma_store(&to.map, results, column, part, row);
  });
  if (left >= 64) return;
  const int chunk = threadIdx.x % 8 * 8;  // 16 bytes
  for (int i = threadIdx.x % 128 / 8; i < left && column + chunk < to.width; i += 16)
    *reinterpret_cast<uint4*>(static_cast<T*>(to.data) + (row + i) * to.stride + part * to.width + column + chunk) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(results) + tile_offset(64, i, chunk));
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(reinterpret_cast<__half2&>(pair));
  else return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair));
}

__device__ __forceinline__ float weight_of(const RowWeights& w, int row) {
  if (!w.weights) return 1;
  const int slot = w.row_slot ? w.row_slot[row] : row;
  return slot < 0 ? 0 : w.weights[slot];
}

// gate and up of a column are sums of one thread.
template <typename T>
__device__ __forceinline__ void finish_glu(const Work& w, const float (&d)[COUNT], const Tile& tile, Shared<T, Tile>& shared,
                                           int warpgroup, int& slab, int row, int left) {
  const int own = fragment_row(threadIdx.x % 128);
  const float weight[2] = {own < left ? weight_of(w.weights, row + own) : 0,
                           own + 8 < left ? weight_of(w.weights, row + own + 8) : 0};
#pragma unroll
  for (int i = 0; i < COUNT / 2; i += 32) {  // 64 columns
    uint32_t gate[16], up[16], activation[16];
    pack_columns<T>(d, i, gate);
    pack_columns<T>(d, COUNT / 2 + i, up);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 g = unpack<T>(gate[j]), u = unpack<T>(up[j]);
      activation[j] = pack<T>(swiglu(g.x, u.x) * weight[j % 2], swiglu(g.y, u.y) * weight[j % 2]);
    }
    const int column = tile.column * (TILE_COLUMNS / 2) + 2 * i;
    emit(w.out, gate, shared, warpgroup, slab, column, 0, row, left);
    emit(w.out, up, shared, warpgroup, slab, column, 1, row, left);
    emit(w.activation, activation, shared, warpgroup, slab, column, 0, row, left);
  }
}

template <typename T, Product P>
__device__ void consume(const Work& w, Shared<T, Tile>& shared, int warpgroup) {
  constexpr Major B_MAJOR = WEIGHTS_MAJOR<P>;
  const uint64_t a = k_major(shared_address(shared.a) + warpgroup * 64 * 128);
  const uint64_t b = B_MAJOR == K_MAJOR ? k_major(shared_address(shared.b)) : mn_major(shared_address(shared.b), DEPTH * 128);
  Step<STAGES> step;
  float d[COUNT];
  int slab = 0;
  each_tile(shared, [&](const Tile& tile) {
    const int row = tile.row + warpgroup * 64, left = __shfl_sync(0xffffffff, tile.left, 0) - warpgroup * 64;
    multiply<K_MAJOR, B_MAJOR>(d, shared, step, tile.steps, a, b, left > 0, [](int, int) {});
    if (left <= 0) return;
    if constexpr (P == Product::up) {
      finish_glu<T>(w, d, tile, shared, warpgroup, slab, row, left);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i += 32) {  // 64 columns
        uint32_t pairs[16];
        pack_columns<T>(d, i, pairs);
        emit(w.out, pairs, shared, warpgroup, slab, tile.column * TILE_COLUMNS + 2 * i, 0, row, left);
      }
    }
  });
}

template <typename T, Product P>
__global__ void __cluster_dims__(PAIR) __launch_bounds__(THREADS, 1) products_kernel(const __grid_constant__ Work w) {
  auto& shared = shared_storage<Shared<T, Tile>>();
  prepare(shared);
  if (threadIdx.x < 128) {
    fewer_registers<GATHERS<P> ? COPYING_REGISTERS : PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) {
      if (elected()) produce<T, P>(w, shared);
    } else if (GATHERS<P> && w.copies.claimed) {
      copy_rows(w.copies, total_rows(w.offsets, w.experts, w.rows));
    }
  } else {
    more_registers<GATHERS<P> ? BESIDE_COPYING_REGISTERS : CONSUMER_REGISTERS>();
    // From one lane, so that the compiler knows it to be the same in all: descriptors stay in uniform registers.
    consume<T, P>(w, shared, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
  cluster_sync();  // the other block may still write here
}

// -------------------------------------------------------------------------------------------------- what surrounds them

// SwiGLU's gradient, one warp a row: `a` holds da of the unweighted activation and becomes the weighted activation.
template <typename T>
__global__ void __launch_bounds__(256) glu_backward_kernel(MoEActivationBackwardParams p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.experts.rows || row >= p.experts.offsets[p.experts.count]) return;
  const int slot = p.weights.row_slot ? p.weights.row_slot[row] : int(row);
  const float weight = weight_of(p.weights, int(row));
  const int n = p.experts.hidden;
  const T* const h = static_cast<const T*>(p.h.data) + row * p.h.stride;
  T* const dh = static_cast<T*>(p.dh.data) + row * p.dh.stride;
  T* const a = static_cast<T*>(p.a.data) + row * p.a.stride;
  float product = 0;
  for (int column = threadIdx.x * 8; column < n; column += 256) {
    using Eight = Pack<T, 8>;
    const auto load = [&](const T* x) { return *reinterpret_cast<const Eight*>(x + column); };
    const auto store = [&](T* x, const Eight& eight) { *reinterpret_cast<Eight*>(x + column) = eight; };
    const Eight gate = load(h), up = load(h + n), da = load(a);
    Eight activation, dgate, dup;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = float(gate.element[i]), u = float(up.element[i]), gradient = float(da.element[i]);
      const float s = sigmoid(g), full = swiglu(g, u), weighted = gradient * weight;
      product += gradient * full;
      activation.element[i] = T(full * weight);
      dgate.element[i] = T(weighted * u * s * (1 + g * (1 - s)));
      dup.element[i] = T(weighted * g * s);
    }
    store(a, activation);
    store(dh, dgate);
    store(dh + n, dup);
  }
  product = warp_sum(product);
  if (threadIdx.x == 0 && p.dweights && slot >= 0) p.dweights[slot] = product;
}

// One warp a row.
__global__ void __launch_bounds__(256) zero_nobodys_kernel(ZeroNobodysParams p) {
  const int64_t width = p.row_bytes / 16;
  uint4* const x = static_cast<uint4*>(p.x);
  for (int64_t row = max(0, *p.end) + int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t(gridDim.x) * blockDim.y)
    for (int64_t i = threadIdx.x; i < width; i += 32) x[row * width + i] = uint4{};
}

// -------------------------------------------------------------------------------------------------------------- launch

template <typename T>
Output output_of(const char* name, const Matrix& x, int64_t rows, int width, int parts = 1) {
  const CUtensorMap map =
      tensor_map(name, x.data, map_element<T>(), {{width, 64, 2}, {parts, 1, int64_t(width) * 2}, {rows, 64, x.stride * 2}});
  return {map, x.data, x.stride, width};
}

template <typename T, Product P>
cudaError_t run(const Experts& e, int32_t* claimed, Work w, cudaStream_t stream) {
  w.claimed = claimed, w.offsets = e.offsets, w.experts = e.count, w.rows = int(e.rows);
  w.columns = (w.out.width + WIDTH<P> - 1) / WIDTH<P>;
  return launch_pairs<Shared<T, Tile>>(products_kernel<T, P>, w, stream);
}

constexpr int stages(int columns) { return (columns + DEPTH - 1) / DEPTH; }

template <typename T>
cudaError_t up(const MoEUpParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("x", p.x, e.rows, e.dim, TILE_ROWS / 2);
  w.b0 = weights_map<T>("w1", p.w1, e.count, e.hidden, e.dim, TILE_COLUMNS / 2);
  w.b1 = weights_map<T>("w3", p.w3, e.count, e.hidden, e.dim, TILE_COLUMNS / 2);
  w.copies = copies_of(p.gather, p.x, e.dim);
  w.weights = p.weights;
  w.out = output_of<T>("h", p.h, e.rows, e.hidden, 2), w.activation = output_of<T>("a", p.a, e.rows, e.hidden);
  w.steps = w.first_steps = stages(e.dim);
  return run<T, Product::up>(e, p.claimed, w, stream);
}

template <typename T>
cudaError_t down(const MoEDownParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("a", p.a, e.rows, e.hidden, TILE_ROWS / 2);
  w.b0 = w.b1 = weights_map<T>("w2", p.w2, e.count, e.dim, e.hidden, TILE_COLUMNS / 2);
  w.out = output_of<T>("y", p.y, e.rows, e.dim);
  w.steps = w.first_steps = stages(e.hidden);
  return run<T, Product::down>(e, p.claimed, w, stream);
}

template <typename T>
cudaError_t down_backward(const MoEDownBackwardParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.copies = copies_of(p.gather, p.dy, e.dim);
  w.a = rows_map<T>("dy", p.dy, e.rows, e.dim, TILE_ROWS / 2);
  w.b0 = w.b1 = weights_map<T>("w2", p.w2, e.count, e.dim, e.hidden, DEPTH);
  w.out = output_of<T>("da", p.da, e.rows, e.hidden);
  w.steps = w.first_steps = stages(e.dim);
  return run<T, Product::down_backward>(e, p.claimed, w, stream);
}

template <typename T>
cudaError_t up_backward(const MoEUpBackwardParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("dh", p.dh, e.rows, 2 * e.hidden, TILE_ROWS / 2);
  w.b0 = weights_map<T>("w1", p.w1, e.count, e.hidden, e.dim, DEPTH);
  w.b1 = weights_map<T>("w3", p.w3, e.count, e.hidden, e.dim, DEPTH);
  w.out = output_of<T>("dx", p.dx, e.rows, e.dim);
  w.first_steps = stages(e.hidden), w.steps = 2 * w.first_steps, w.second_column = e.hidden;
  return run<T, Product::up_backward>(e, p.claimed, w, stream);
}

}  // namespace

cudaError_t moe_up(const MoEUpParams& p, cudaStream_t stream) {
  return p.experts.half ? up<__half>(p, stream) : up<__nv_bfloat16>(p, stream);
}

cudaError_t moe_down(const MoEDownParams& p, cudaStream_t stream) {
  return p.experts.half ? down<__half>(p, stream) : down<__nv_bfloat16>(p, stream);
}

cudaError_t moe_down_backward(const MoEDownBackwardParams& p, cudaStream_t stream) {
  return p.experts.half ? down_backward<__half>(p, stream) : down_backward<__nv_bfloat16>(p, stream);
}

cudaError_t moe_activation_backward(const MoEActivationBackwardParams& p, cudaStream_t stream) {
  const auto kernel = p.experts.half ? glu_backward_kernel<__half> : glu_backward_kernel<__nv_bfloat16>;
  kernel<<<blocks(p.experts.rows), WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t moe_up_backward(const MoEUpBackwardParams& p, cudaStream_t stream) {
  return p.experts.half ? up_backward<__half>(p, stream) : up_backward<__nv_bfloat16>(p, stream);
}

cudaError_t moe_zero_nobodys(const ZeroNobodysParams& p, cudaStream_t stream) {
  zero_nobodys_kernel<<<132, WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flashmoe
