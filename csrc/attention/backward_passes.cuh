// What surrounds attention's backward kernel: what it needs of every query, and what becomes of its sums.
#pragma once

#include <cuda_runtime.h>

#include "attention/backward_tile.cuh"
#include "hopper/launch.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

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
      reinterpret_cast<const float4*>(w.sums) + blockIdx.x * int64_t(S::QUERIES * S::DIM / 4);
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
