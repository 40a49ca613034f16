// The tiles of an attention kernel: of which queries and keys each is, and in what order blocks come to them.
//
// Tiles are taken one by one by whoever is free, the longest first where they differ, so that blocks end at the same time.
// Of packed documents nobody knows on the host how many tiles there are: a kernel of one block lists them first.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include "attention/attention.h"

namespace flashmoe {
namespace {

constexpr int64_t CACHED = 32 << 20;  // bytes of k and v that the tiles under way may share: of 50 MB of L2

// A tile in its document; a batch entry that is not packed is one.
struct ListedTile {
  int query;  // the first
  int first_query, queries;  // the document's
  int first_key, keys;
};

struct TileList {
  int next;   // that nobody has claimed
  int count;  // of one head's tiles in `tiles`
  ListedTile tiles[];
};

// What a kernel is given.
struct Work {
  CUtensorMap q, k, v;  // columns, heads, rows, batch
  void* out;
  float* lse;
  const int32_t *query_bounds, *key_bounds;
  TileList* list;
  AttentionStrides out_strides;
  int rows, queries, keys, heads, group;  // rows: batch * heads; group: heads that share k and v
  int left, right;
  int tiles_per_row, rows_together;  // of packed documents tiles_per_row is an upper bound
  float scale;                       // times log2(e)
  bool dynamic;
};

struct Tile : ListedTile {
  int head, kv_head, batch;
  int begin, end;  // the steps that any of its queries sees, never none; end 0: there is no tile any more
};

struct Band {
  int begin, end;
};

// The keys that a query sees, if any.
__device__ __forceinline__ Band band_of(const Work& w, const ListedTile& tile, int query) {
  const int position = query + tile.keys - tile.queries;
  return {w.left < 0 ? 0 : max(0, position - w.left),
          w.right < 0 ? tile.keys : max(0, min(tile.keys, position + w.right + 1))};
}

// Steps that the queries of a tile see. One where they see none: everything in it is masked.
__device__ __forceinline__ void set_steps(const Work& w, Tile& tile, int tile_queries, int step_keys) {
  const int last = min(tile.query + tile_queries, tile.queries) - 1;
  tile.end = max(1, (band_of(w, tile, last).end + step_keys - 1) / step_keys);
  tile.begin = min(band_of(w, tile, tile.query).begin / step_keys, tile.end - 1);
}

// Rows of heads go together, w.rows_together of them, and of those the longest tiles first.
__device__ inline Tile tile_at(const Work& w, int index, int tile_queries, int step_keys) {
  Tile tile{};
  const int per_row = w.query_bounds ? w.list->count : w.tiles_per_row;
  if (index >= w.rows * per_row) return tile;
  const int first = index / (w.rows_together * per_row) * w.rows_together;
  const int together = min(w.rows_together, w.rows - first);
  index -= first * per_row;
  if (w.query_bounds)
    static_cast<ListedTile&>(tile) = w.list->tiles[index / together];
  else
    static_cast<ListedTile&>(tile) = {(per_row - 1 - index / together) * tile_queries, 0, w.queries, 0, w.keys};
  tile.head = (first + index % together) % w.heads;
  tile.kv_head = tile.head / w.group;
  tile.batch = (first + index % together) / w.heads;
  set_steps(w, tile, tile_queries, step_keys);
  return tile;
}

__device__ __forceinline__ int next_tile(const Work& w, int index) {
  return int(gridDim.x) + (w.dynamic ? atomicAdd(&w.list->next, 1) : index);
}

// ------------------------------------------------------------------------------------------------ the list of documents

constexpr int LIST_THREADS = 1024, LENGTHS = 1024;  // LENGTHS: numbers of steps that are told apart

// One head's tiles of all documents, the longest first. The rows before the first document and after the last are two more,
// which see no key.
__global__ void __launch_bounds__(LIST_THREADS) list_kernel(const __grid_constant__ Work w, int documents,
                                                            int tile_queries, int step_keys) {
  __shared__ int places[LENGTHS];  // by length: how many, then where the next goes
  __shared__ int warp_sums[LIST_THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(LIST_THREADS == LENGTHS);
  places[threadIdx.x] = 0;
  __syncthreads();

  // Whatever the bounds are, documents lie within the tensors.
  const auto document = [&](int i) {
    ListedTile found{};
    const auto bound = [&](const int32_t* bounds, int j, int length) {
      return j < 0 ? 0 : j > documents ? length : max(0, min(length, bounds[j]));
    };
    if (i > documents + 1) return found;
    found.first_query = bound(w.query_bounds, i - 1, w.queries);
    found.queries = max(0, bound(w.query_bounds, i, w.queries) - found.first_query);
    if (i == 0 || i > documents) return found;
    found.first_key = bound(w.key_bounds, i - 1, w.keys);
    found.keys = max(0, bound(w.key_bounds, i, w.keys) - found.first_key);
    return found;
  };
  // A warp has 32 documents at a time, and its lanes go through the tiles of each.
  const auto each_tile = [&](auto visit) {
    for (int base = warp * 32; base < documents + 2; base += LIST_THREADS) {
      const ListedTile mine = document(base + lane);
      for (int i = 0; i < 32; ++i) {
        Tile tile{};
        tile.first_query = __shfl_sync(0xffffffff, mine.first_query, i);
        tile.queries = __shfl_sync(0xffffffff, mine.queries, i);
        tile.first_key = __shfl_sync(0xffffffff, mine.first_key, i);
        tile.keys = __shfl_sync(0xffffffff, mine.keys, i);
        for (tile.query = lane * tile_queries; tile.query < tile.queries; tile.query += 32 * tile_queries) {
          set_steps(w, tile, tile_queries, step_keys);
          visit(tile, LENGTHS - min(tile.end - tile.begin, LENGTHS));
        }
      }
    }
  };

  each_tile([&](const Tile&, int length) { atomicAdd(&places[length], 1); });
  __syncthreads();

  // Sums of all that come before.
  const int count = places[threadIdx.x];
  int sum = count;
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(0xffffffff, sum, i);
    if (lane >= i) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += warp_sums[i];
  places[threadIdx.x] = sum - count;
  if (threadIdx.x == LENGTHS - 1) w.list->next = 0, w.list->count = min(sum, w.tiles_per_row);
  __syncthreads();

  each_tile([&](const Tile& tile, int length) {
    const int place = atomicAdd(&places[length], 1);
    if (place < w.tiles_per_row) w.list->tiles[place] = tile;  // bounds that overlap could be too many
  });
}

// ---------------------------------------------------------------------------------------------------------------- host

// Of one head, with a document's last tile for each and for the rows before and after them.
inline int64_t tiles_of_row(const AttentionForwardParams& p, int tile_queries) {
  return p.query_bounds ? p.queries / tile_queries + p.documents + 2 : (p.queries + tile_queries - 1) / tile_queries;
}

inline int64_t workspace_bytes(const AttentionForwardParams& p, int tile_queries) {
  return sizeof(TileList) + (p.query_bounds ? tiles_of_row(p, tile_queries) * sizeof(ListedTile) : 0);
}

// All but the tensor maps and scales. `key_bytes`: of a row of k and v.
inline Work work_of(const AttentionForwardParams& p, int tile_queries, int64_t key_bytes) {
  Work w{};
  w.out = p.out, w.lse = p.lse, w.out_strides = p.out_strides;
  w.query_bounds = p.query_bounds, w.key_bounds = p.key_bounds;
  w.list = static_cast<TileList*>(p.workspace);
  w.rows = p.batch * p.heads, w.queries = p.queries, w.keys = p.keys;
  w.heads = p.heads, w.group = p.heads / p.kv_heads;
  w.left = std::min(p.left, ATTENTION_LONGEST), w.right = std::min(p.right, ATTENTION_LONGEST);
  w.tiles_per_row = int(tiles_of_row(p, tile_queries));
  // Tiles of one length have no better order than that of memory, and need nobody to hand them out.
  w.dynamic = p.query_bounds || p.left >= 0 || p.right >= 0;
  const int64_t cached_rows = std::max<int64_t>(CACHED / (p.keys * key_bytes), 1) * w.group;
  w.rows_together = w.dynamic ? int(std::min<int64_t>(cached_rows, w.rows)) : 1;
  return w;
}

inline cudaError_t plan_tiles(const Work& w, int documents, int tile_queries, int step_keys, cudaStream_t stream) {
  if (!w.query_bounds) return w.dynamic ? cudaMemsetAsync(&w.list->next, 0, sizeof w.list->next, stream) : cudaSuccess;
  list_kernel<<<1, LIST_THREADS, 0, stream>>>(w, documents, tile_queries, step_keys);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flashmoe
