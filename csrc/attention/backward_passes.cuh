// What surrounds attention's backward kernel: what it needs of every query, and what becomes of its sums.
#pragma once

#include <cuda_runtime.h>

#include "attention/backward_tile.cuh"
#include "hopper/launch.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

// What prepare is given. Rows of the schedule are queries.
struct PrepareWork : Schedule {
  const void *out, *dout;
  AttentionStrides out_strides, dout_strides;
  const float* lse;
  Statistics* statistics;  // [batch, heads, blocks]
  uint4* zeros;            // sums and turns, of every head
  int64_t zero_count;
  int* next;  // tile; or null
  int batch, blocks;
};

constexpr int PREPARE_THREADS = 256;
template <typename S>
constexpr int PREPARE_LANES = S::DIM_V <= 64 ? 8 : S::DIM_V <= 128 ? 16 : 32;  // threads that have a row, 16 bytes each

// The last document for which `begins_before` holds: as it does for all before it.
template <typename Begins>
__device__ __forceinline__ ListedTile last_document(const Schedule& s, Begins begins_before) {
  int low = 0, high = s.documents + 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const bool before = begins_before(document_at(s, middle));
    (before ? low : high) = before ? middle : middle - 1;
  }
  return document_at(s, low);
}

// Statistics, and zeros.
template <typename S>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const __grid_constant__ PrepareWork w) {
  using T = typename S::T;
  constexpr int LANES = PREPARE_LANES<S>;
  launch_next();
  const int64_t thread = int64_t(blockIdx.x) * PREPARE_THREADS + threadIdx.x, index = thread / LANES;
  const int lane = threadIdx.x % LANES, head = int(index % w.heads), row = int(index / w.heads % w.rows);
  const int64_t batch = index / w.heads / w.rows;
  if (thread == 0 && w.next) *w.next = 0;
  float sum = 0;
  if (batch < w.batch && lane < S::DIM_V / 8) {
    const auto eight = [&](const void* x, const AttentionStrides& strides) {
      return *reinterpret_cast<const uint4*>(static_cast<const T*>(x) + batch * strides.batch + row * strides.row +
                                             head * strides.head + lane * 8);
    };
    const uint4 a = eight(w.out, w.out_strides), b = eight(w.dout, w.dout_strides);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum += float(reinterpret_cast<const T*>(&a)[i]) * float(reinterpret_cast<const T*>(&b)[i]);
  }
#pragma unroll
  for (int i = LANES / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
  for (int64_t i = thread; i < w.zero_count; i += int64_t(gridDim.x) * PREPARE_THREADS) w.zeros[i] = uint4{};
  if (batch >= w.batch) return;

  ListedTile document{0, 0, w.rows, 0, w.columns, 0};
  if (w.row_bounds) document = last_document(w, [&](const ListedTile& of) { return of.first_row <= row; });
  const int query = row - document.first_row;
  Statistics& statistics =
      w.statistics[(batch * w.heads + head) * w.blocks + query / S::QUERIES +
                   place_of_document(document.first_row, document.document, S::QUERIES)];
  if (lane == 0) {
    statistics.lse[query % S::QUERIES] = w.lse[(batch * w.heads + head) * w.rows + row] * 1.44269504f;
    statistics.delta[query % S::QUERIES] = sum;
  }
  if (query == document.rows - 1)  // Beyond the end scores are hidden, but these are read.
    for (int i = query % S::QUERIES + 1 + lane; i < S::QUERIES; i += LANES) statistics.lse[i] = statistics.delta[i] = 0;
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
  const int place = gridDim.x - 1 - blockIdx.x;  // from the end: what was added to last may still be in the cache
  const int block = place % w.blocks, strip = place / w.blocks, head = strip % w.heads, batch = strip / w.heads;
  int first = block * S::QUERIES, end = w.rows;  // rows
  if (w.row_bounds) {
    const ListedTile document = last_document(
        w, [&](const ListedTile& of) { return place_of_document(of.first_row, of.document, S::QUERIES) <= block; });
    first = document.first_row + (block - place_of_document(document.first_row, document.document, S::QUERIES)) * S::QUERIES;
    end = document.first_row + document.rows;
  }
  const float4* const sums =
      reinterpret_cast<const float4*>(w.sums) + place * int64_t(S::QUERIES * S::DIM / 4);
  T* const dq = static_cast<T*>(w.dq) + (int64_t(batch) * w.rows * w.heads + head) * S::DIM;
  constexpr int CHUNKS = S::DIM / 8;
  for (int i = threadIdx.x; i < S::QUERIES / 2 * CHUNKS; i += CONVERT_THREADS) {
    const int column = i % CHUNKS * 8, upper = i / CHUNKS / 8 * 16 + i / CHUNKS % 8;  // rows: upper and eight below
    constexpr int OF_PART = S::SUM_COLUMNS;
    const float4* const four = sums + column / OF_PART * (OF_PART * S::QUERIES / 4) + upper / 16 * OF_PART * 4 +
                               column % OF_PART * 4 + upper % 8 * 4;
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

}  // namespace
}  // namespace flashmoe
