// The experts' products: each row times the weights of its expert.
//
//   moe_up            [gate, up] = x [w1, w3]T, and their activation    the epilogue is SwiGLU
//   moe_down          y = a w2T
//   moe_down_backward da = dy w2, then the gradient of SwiGLU
//   moe_up_backward   dx = dgate w1 + dup w3                            one sum over both
//
// One thread loads stages, two warpgroups multiply; a block takes tiles until there are none. The expert is a coordinate of
// the weights' tensor map. Results go to memory by TMA, 64 rows at a time; where some of those are the next expert's, from
// registers, row by row.
#include "moe/activation.cuh"
#include "moe/grouped.cuh"
#include "moe/rows.cuh"

namespace flashmoe {
namespace {

// --------------------------------------------------------------------------------------------------------------- tiles

// What a kernel is given.
struct Work {
  CUtensorMap a;       // rows, of whose columns there may be two parts
  CUtensorMap b0, b1;  // weights: of the two parts, or of the two halves of a tile's columns
  CUtensorMap out_map, activation_map;
  const int32_t* offsets;
  int32_t* claimed;
  RowWeights weights;
  void *out, *activation;
  int64_t out_stride, activation_stride;
  int experts, rows, width;  // width: columns of the result; of gate alone
  int columns;               // tiles that cover them
  int steps, first_steps;    // stages of a tile; of a's first part
  int second_column;         // where a's second part begins
};

struct Tile {
  int expert, row, left, column;  // left: the expert's rows from `row` on
  int steps;
};

// The tiles in the order in which blocks take them: expert by expert.
struct Walk {
  const Work& w;
  int expert = 0, before = 0;  // tiles of all experts before

  __device__ __forceinline__ bool find(int index, Tile& tile) {
    for (; expert < w.experts; ++expert) {
      const Rows rows = rows_of(w.offsets, expert, w.rows);
      const int high = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
      if (index < before + high * w.columns) {
        const Place place = place_of(index - before, high, w.columns);
        const int row = place.row * TILE_ROWS;
        tile = {expert, rows.first + row, rows.count - row, place.column, w.steps};
        return true;
      }
      before += high * w.columns;
    }
    return false;
  }
};

// ------------------------------------------------------------------------------------------------------------ producer

// One thread. GLU: the tile's columns are 128 of gate and the same 128 of up.
template <typename T, Major B_MAJOR, bool GLU>
__device__ void produce(const Work& w, Shared<T, Tile>& shared) {
  Walk walk{w};
  const auto load = [&](const Tile& tile, int k, int stage, Barrier& full) {
    const bool first = k < w.first_steps;
    const int depth = first ? k * DEPTH : (k - w.first_steps) * DEPTH;
    tma_load(shared.a[stage], &w.a, full, Keep::normal, (first ? 0 : w.second_column) + depth, tile.row);
    T* const b = shared.b[stage];
    if constexpr (B_MAJOR == K_MAJOR) {
      const int column = tile.column * (GLU ? TILE_COLUMNS / 2 : TILE_COLUMNS);
      tma_load(b, &w.b0, full, Keep::normal, depth, column, tile.expert);
      tma_load(b + TILE_COLUMNS / 2 * DEPTH, &w.b1, full, Keep::normal, depth, GLU ? column : column + TILE_COLUMNS / 2,
               tile.expert);
    } else {
#pragma unroll
      for (int i = 0; i < TILE_COLUMNS; i += 64)
        tma_load(b + i * DEPTH, first ? &w.b0 : &w.b1, full, Keep::normal, tile.column * TILE_COLUMNS + i, depth,
                 tile.expert);
    }
  };
  each_tile_published(shared, w.claimed, [&](int index, Tile& tile) { return walk.find(index, tile); }, load);
}

// ----------------------------------------------------------------------------------------------------------- consumers

// A warpgroup's 64 rows, all of them the expert's.
template <typename T>
__device__ __forceinline__ void send_rows(const Work& w, const float (&d)[COUNT], const Tile& tile, Shared<T, Tile>& shared,
                                          int warpgroup, int& slab) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 32) {  // 64 columns
    uint32_t pairs[16];
    pack_columns<T>(d, i, pairs);
    const int column = tile.column * TILE_COLUMNS + 2 * i;
    if (column < w.width)
      send(pairs, shared, warpgroup, slab,
           [&](const T* results) { tma_store(&w.out_map, results, column, tile.row + warpgroup * 64); });
  }
}

// The two rows of this thread, of which `left` says how many there are.
template <typename T>
__device__ __forceinline__ void store_rows(const Work& w, const float (&d)[COUNT], const Tile& tile, int row, int left) {
  const int column = tile.column * TILE_COLUMNS + threadIdx.x % 4 * 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* const out = static_cast<T*>(w.out) + (tile.row + row + 8 * r) * w.out_stride + column;
#pragma unroll
    for (int j = 0; j < COUNT; j += 16) {  // 32 columns
      const uint4 eight = eight_of<T>(d + j, r);
      if (8 * r < left && column + 2 * j < w.width) *reinterpret_cast<uint4*>(out + 2 * j) = eight;
    }
  }
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

// Of packed neighbours of gate and up.
template <typename T>
__device__ __forceinline__ uint32_t activation_of(uint32_t gate, uint32_t up, float weight) {
  const float2 g = unpack<T>(gate), u = unpack<T>(up);
  return pack<T>(swiglu(g.x, u.x) * weight, swiglu(g.y, u.y) * weight);
}

// gate and up of a column are sums of one thread.
template <typename T>
__device__ __forceinline__ void send_glu(const Work& w, const float (&d)[COUNT], const Tile& tile, Shared<T, Tile>& shared,
                                         int warpgroup, int& slab) {
  const int row = tile.row + warpgroup * 64, own = row + fragment_row(threadIdx.x % 128);
  const float weight[2] = {weight_of(w.weights, own), weight_of(w.weights, own + 8)};
#pragma unroll
  for (int i = 0; i < COUNT / 2; i += 32) {  // 64 columns
    uint32_t gate[16], up[16], activation[16];
    pack_columns<T>(d, i, gate);
    pack_columns<T>(d, COUNT / 2 + i, up);
#pragma unroll
    for (int j = 0; j < 16; ++j) activation[j] = activation_of<T>(gate[j], up[j], weight[j % 2]);
    const int column = tile.column * (TILE_COLUMNS / 2) + 2 * i;
    if (column >= w.width) break;
    send(gate, shared, warpgroup, slab, [&](const T* results) { tma_store(&w.out_map, results, column, 0, row); });
    send(up, shared, warpgroup, slab, [&](const T* results) { tma_store(&w.out_map, results, column, 1, row); });
    send(activation, shared, warpgroup, slab, [&](const T* results) { tma_store(&w.activation_map, results, column, row); });
  }
}

template <typename T>
__device__ __forceinline__ void store_glu(const Work& w, const float (&d)[COUNT], const Tile& tile, int row, int left) {
  const int column = tile.column * (TILE_COLUMNS / 2) + threadIdx.x % 4 * 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool there = 8 * r < left;
    const int64_t at = tile.row + row + 8 * r;
    const float weight = there ? weight_of(w.weights, int(at)) : 0;
    T* const h = static_cast<T*>(w.out) + at * w.out_stride + column;
    T* const activation = static_cast<T*>(w.activation) + at * w.activation_stride + column;
#pragma unroll
    for (int j = 0; j < COUNT / 2; j += 16) {  // 32 columns
      uint32_t gate[4], up[4], a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = j + 4 * i + 2 * r;
        gate[i] = pack<T>(d[pair], d[pair + 1]), up[i] = pack<T>(d[COUNT / 2 + pair], d[COUNT / 2 + pair + 1]);
        a[i] = activation_of<T>(gate[i], up[i], weight);
      }
      const uint4 eight_gate = quad_transpose(gate), eight_up = quad_transpose(up), eight_a = quad_transpose(a);
      if (there && column + 2 * j < w.width) {
        *reinterpret_cast<uint4*>(h + 2 * j) = eight_gate;
        *reinterpret_cast<uint4*>(h + w.width + 2 * j) = eight_up;
        *reinterpret_cast<uint4*>(activation + 2 * j) = eight_a;
      }
    }
  }
}

template <typename T, Major B_MAJOR, bool GLU>
__device__ void consume(const Work& w, Shared<T, Tile>& shared, int warpgroup) {
  const int row = warpgroup * 64 + fragment_row(threadIdx.x % 128);
  const uint64_t a = k_major(shared_address(shared.a) + warpgroup * 64 * 128);
  const uint64_t b = B_MAJOR == K_MAJOR ? k_major(shared_address(shared.b)) : mn_major(shared_address(shared.b), DEPTH * 128);
  Step<STAGES> step;
  float d[COUNT];
  int slab = 0;
  each_tile(shared, [&](const Tile& tile) {
    const int left = __shfl_sync(0xffffffff, tile.left, 0) - warpgroup * 64;
    const bool active = left > 0;
    multiply<K_MAJOR, B_MAJOR>(d, shared, step, tile.steps, a, b, active, [](int, int) {});
    if (!active) return;
    if constexpr (GLU) {
      if (left >= 64)
        send_glu<T>(w, d, tile, shared, warpgroup, slab);
      else
        store_glu<T>(w, d, tile, row, tile.left - row);
    } else {
      if (left >= 64)
        send_rows<T>(w, d, tile, shared, warpgroup, slab);
      else
        store_rows<T>(w, d, tile, row, tile.left - row);
    }
  });
}

template <typename T, Major B_MAJOR, bool GLU>
__global__ void __launch_bounds__(THREADS, 1) products_kernel(const __grid_constant__ Work w) {
  auto& shared = shared_storage<Shared<T, Tile>>();
  prepare(shared);
  if (threadIdx.x < 128) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && elected()) produce<T, B_MAJOR, GLU>(w, shared);
  } else {
    more_registers<CONSUMER_REGISTERS>();
    // From one lane, so that the compiler knows it to be the same in all: descriptors stay in uniform registers.
    consume<T, B_MAJOR, GLU>(w, shared, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
}

// ------------------------------------------------------------------------------------------------- SwiGLU's gradient

// One warp a row, of which `a` holds da unweighted: a becomes the weighted activation.
template <typename T>
__global__ void __launch_bounds__(256) glu_backward_kernel(MoEDownBackwardParams p) {
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
    const auto at = [&](T* x) -> Pack<T, 8>& { return *reinterpret_cast<Pack<T, 8>*>(x + column); };
    const Pack<T, 8> gate = *reinterpret_cast<const Pack<T, 8>*>(h + column);
    const Pack<T, 8> up = *reinterpret_cast<const Pack<T, 8>*>(h + n + column);
    const Pack<T, 8> da = at(a);
    Pack<T, 8> activation, dgate, dup;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = float(gate.element[i]), u = float(up.element[i]), gradient = float(da.element[i]);
      const float s = sigmoid(g), full = swiglu(g, u), weighted = gradient * weight;
      product += gradient * full;
      activation.element[i] = T(full * weight);
      dgate.element[i] = T(weighted * u * s * (1 + g * (1 - s)));
      dup.element[i] = T(weighted * g * s);
    }
    at(a) = activation;
    at(dh) = dgate;
    at(dh + n) = dup;
  }
  for (int offset = 16; offset > 0; offset /= 2) product += __shfl_xor_sync(0xffffffff, product, offset);
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

template <typename T, Major B_MAJOR, bool GLU = false>
cudaError_t run(const Experts& e, int32_t* claimed, Work w, cudaStream_t stream) {
  w.claimed = claimed, w.offsets = e.offsets, w.experts = e.count, w.rows = int(e.rows);
  w.columns = (w.width + (GLU ? TILE_COLUMNS / 2 : TILE_COLUMNS) - 1) / (GLU ? TILE_COLUMNS / 2 : TILE_COLUMNS);
  int blocks = 0;
  if (const cudaError_t error = multiprocessors(blocks)) return error;
  return launch(products_kernel<T, B_MAJOR, GLU>, {dim3(blocks), dim3(THREADS), sizeof(Shared<T, Tile>), stream}, w);
}

constexpr int stages(int columns) { return (columns + DEPTH - 1) / DEPTH; }

template <typename T>
cudaError_t up(const MoEUpParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("x", p.x, e.rows, e.dim, TILE_ROWS);
  w.b0 = weights_map<T>("w1", p.w1, e.count, e.hidden, e.dim, TILE_COLUMNS / 2);
  w.b1 = weights_map<T>("w3", p.w3, e.count, e.hidden, e.dim, TILE_COLUMNS / 2);
  w.weights = p.weights;
  // gate and up are dimensions of their own, so that a copy ends with gate.
  w.out_map = tensor_map("h", p.h.data, map_element<T>(),
                         {{e.hidden, 64, 2}, {2, 1, int64_t(e.hidden) * 2}, {e.rows, 64, p.h.stride * 2}});
  w.activation_map = rows_map<T>("a", p.a, e.rows, e.hidden, 64);
  w.out = p.h.data, w.out_stride = p.h.stride, w.activation = p.a.data, w.activation_stride = p.a.stride;
  w.width = e.hidden, w.steps = w.first_steps = stages(e.dim);
  return run<T, K_MAJOR, true>(e, p.claimed, w, stream);
}

template <typename T>
cudaError_t down(const MoEDownParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("a", p.a, e.rows, e.hidden, TILE_ROWS);
  w.b0 = w.b1 = weights_map<T>("w2", p.w2, e.count, e.dim, e.hidden, TILE_COLUMNS / 2);
  w.out_map = rows_map<T>("y", p.y, e.rows, e.dim, 64);
  w.out = p.y.data, w.out_stride = p.y.stride;
  w.width = e.dim, w.steps = w.first_steps = stages(e.hidden);
  return run<T, K_MAJOR>(e, p.claimed, w, stream);
}

template <typename T>
cudaError_t down_backward(const MoEDownBackwardParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("dy", p.dy, e.rows, e.dim, TILE_ROWS);
  w.b0 = w.b1 = weights_map<T>("w2", p.w2, e.count, e.dim, e.hidden, DEPTH);
  w.out_map = rows_map<T>("a", p.a, e.rows, e.hidden, 64);
  w.out = p.a.data, w.out_stride = p.a.stride;
  w.width = e.hidden, w.steps = w.first_steps = stages(e.dim);
  if (const cudaError_t error = run<T, MN_MAJOR>(e, p.claimed, w, stream)) return error;
  glu_backward_kernel<T><<<blocks(e.rows), WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t up_backward(const MoEUpBackwardParams& p, cudaStream_t stream) {
  const Experts& e = p.experts;
  Work w{};
  w.a = rows_map<T>("dh", p.dh, e.rows, 2 * e.hidden, TILE_ROWS);
  w.b0 = weights_map<T>("w1", p.w1, e.count, e.hidden, e.dim, DEPTH);
  w.b1 = weights_map<T>("w3", p.w3, e.count, e.hidden, e.dim, DEPTH);
  w.out_map = rows_map<T>("dx", p.dx, e.rows, e.dim, 64);
  w.out = p.dx.data, w.out_stride = p.dx.stride;
  w.width = e.dim, w.first_steps = stages(e.hidden), w.steps = 2 * w.first_steps, w.second_column = e.hidden;
  return run<T, MN_MAJOR>(e, p.claimed, w, stream);
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

cudaError_t moe_up_backward(const MoEUpBackwardParams& p, cudaStream_t stream) {
  return p.experts.half ? up_backward<__half>(p, stream) : up_backward<__nv_bfloat16>(p, stream);
}

cudaError_t moe_zero_nobodys(const ZeroNobodysParams& p, cudaStream_t stream) {
  zero_nobodys_kernel<<<132, WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flashmoe
