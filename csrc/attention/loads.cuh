// How rows of a head come to shared memory: the tensors' maps, copies of boxes of rows, and zeros where these are others'.
#pragma once

#include <cuda.h>

#include "attention/attention.h"
#include "hopper/barrier.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"

namespace flashmoe {
namespace {

// `rows` of `columns`, slab by slab, to a barrier that expects them. What lies beyond the tensor is zeros.
template <typename T>
__device__ __forceinline__ void load_rows(T* tile, const CUtensorMap* map, hopper::Barrier& barrier, int rows, int columns,
                                          int head, int row, int batch, hopper::Keep keep) {
#pragma unroll 1
  for (int column = 0; column < columns; column += 64)
    hopper::tma_load(tile + column * rows, map, barrier, keep, column, head, row, batch);
}

// Zeros in the rows of a tile from `begin` on, where there is the next document: 0 * NaN would be NaN. By a warpgroup for
// itself, since the others write nothing else; fence_proxy_async() and a barrier of its own follow.
template <typename T>
__device__ __forceinline__ void clear_rows(T* tile, int rows, int columns, int begin, int thread) {
  for (int column = 0; column < columns; column += 64)
    for (int i = begin * 8 + thread; i < rows * 8; i += 128) reinterpret_cast<uint4*>(tile + column * rows)[i] = uint4{};
}

// Of a tensor [batch, rows, heads, dim], of which a copy takes `box` rows and 64 columns of a head.
inline CUtensorMap map_of(const char* name, const void* base, hopper::MapElement element, AttentionStrides strides, int batch,
                          int rows, int heads, int dim, int box) {
  return hopper::tensor_map(name, base, element,
                            {{dim, 64, element.bytes},
                             {heads, 1, strides.head * element.bytes},
                             {rows, box, strides.row * element.bytes},
                             {batch, 1, strides.batch * element.bytes}});
}

}  // namespace
}  // namespace flashmoe
