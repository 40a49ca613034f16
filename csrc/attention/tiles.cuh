// The tiles of an attention kernel: of which rows and columns of the scores each is, and in what order blocks come to them.
//
// A head's scores have a row for every query and a column for every key. Forward takes tiles of rows and walks over columns.
// Backward takes the scores transposed: its rows are keys, its columns queries, and left and right of the window change
// places. Tiles are taken one by one by whoever is free, the longest first where they differ, so that blocks end at the same
// time. Of packed documents nobody knows on the host how many tiles there are: a kernel of one block lists them first.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include "attention/attention.h"

namespace flashmoe {
namespace {

constexpr int64_t CACHED = 32 << 20;  // bytes that the tiles under way may share: of 50 MB of L2

// A tile in its document; a batch entry that is not packed is one.
struct alignas(8) ListedTile {
  int row;  // the first
  int first_row, rows, first_column, columns, document;
};

struct TileList {
  int next;   // that nobody has claimed
  int count;  // of one head's tiles in `tiles`
  ListedTile tiles[];
};

// What a kernel is told of its tiles.
struct Schedule {
  const int32_t *row_bounds, *column_bounds;
  TileList* list;
  int rows, columns, documents;
  int strips, heads, group;  // strips: batch * heads; group: heads that share k and v
  int left, right;
  int tiles_per_strip, strips_together;  // of packed documents tiles_per_strip is an upper bound
  bool dynamic;
  bool ordered;  // a strip's tiles are claimed, by whoever takes them, in the order of their rows
};

struct Tile : ListedTile {
  int head, kv_head, batch;
  int begin, end;  // the steps that any of its rows sees, never none; end 0: there is no tile any more
};

struct Band {
  int begin, end;
};

// The columns that a row sees, if any.
__device__ __forceinline__ Band band_of(const Schedule& s, const ListedTile& tile, int row) {
  const int position = row + tile.columns - tile.rows;
  return {s.left < 0 ? 0 : max(0, position - s.left),
          s.right < 0 ? tile.columns : max(0, min(tile.columns, position + s.right + 1))};
}

// Steps that the rows of a tile see. One where they see none: everything in it is masked.
__device__ __forceinline__ void set_steps(const Schedule& s, Tile& tile, int tile_rows, int step_columns) {
  const int last = min(tile.row + tile_rows, tile.rows) - 1;
  tile.end = max(1, (band_of(s, tile, last).end + step_columns - 1) / step_columns);
  tile.begin = min(band_of(s, tile, tile.row).begin / step_columns, tile.end - 1);
}

// Strips go together, s.strips_together of them, and of those the longest tiles first, or, ORDERED, those of the first rows.
template <bool ORDERED = false>
__device__ __forceinline__ Tile tile_at(const Schedule& s, int index, int tile_rows, int step_columns) {
  Tile tile{};
  const int per_strip = s.row_bounds ? s.list->count : s.tiles_per_strip;
  if (index >= s.strips * per_strip) return tile;
  const int first = index / (s.strips_together * per_strip) * s.strips_together;
  const int together = min(s.strips_together, s.strips - first);
  index -= first * per_strip;
  // The last rows see most, unless the window has a left side alone.
  const int place = ORDERED || (s.left >= 0 && s.right < 0) ? index / together : per_strip - 1 - index / together;
  if (s.row_bounds)
    static_cast<ListedTile&>(tile) = s.list->tiles[index / together];
  else
    static_cast<ListedTile&>(tile) = {place * tile_rows, 0, s.rows, 0, s.columns, 0};
  tile.head = (first + index % together) % s.heads;
  tile.kv_head = tile.head / s.group;
  tile.batch = (first + index % together) / s.heads;
  set_steps(s, tile, tile_rows, step_columns);
  return tile;
}

// In the order of rows the list has a place for every tile that there might be.
template <bool ORDERED = false>
__device__ __forceinline__ int next_tile(const Schedule& s, int index, int blocks) {
  if (!ORDERED) return blocks + (s.dynamic ? atomicAdd(&s.list->next, 1) : index);
  const auto is_hole = [&](int i) {
    const int of_strips = i / (s.strips_together * s.tiles_per_strip) * s.strips_together;
    const int together = min(s.strips_together, s.strips - of_strips);
    return s.row_bounds && of_strips < s.strips &&
           s.list->tiles[(i - of_strips * s.tiles_per_strip) / together].rows == 0;
  };
  do index = atomicAdd(&s.list->next, 1);
  while (is_hole(index));
  return index;
}

// Where order matters nobody holds a tile before it runs.
template <bool ORDERED>
__device__ __forceinline__ int first_tile(const Schedule& s) {
  return ORDERED ? next_tile<ORDERED>(s, 0, 0) : int(blockIdx.x);
}

// A document among those that the bounds make, and its place in a list of `tile` rows or columns at a time in which no two
// documents meet. Number 0 are the rows before the first, documents + 1 those after the last: they see nothing. Whatever the
// bounds are, documents lie within the tensors.
__device__ inline ListedTile document_at(const Schedule& s, int i) {
  ListedTile found{};
  const auto bound = [&](const int32_t* bounds, int j, int length) {
    return j < 0 ? 0 : j > s.documents ? length : max(0, min(length, bounds[j]));
  };
  if (i > s.documents + 1) return found;
  found.document = i;
  found.first_row = bound(s.row_bounds, i - 1, s.rows);
  found.rows = max(0, bound(s.row_bounds, i, s.rows) - found.first_row);
  if (i == 0 || i > s.documents) return found;
  found.first_column = bound(s.column_bounds, i - 1, s.columns);
  found.columns = max(0, bound(s.column_bounds, i, s.columns) - found.first_column);
  return found;
}
__device__ __forceinline__ int place_of_document(int first, int document, int tile) { return first / tile + document; }

// ------------------------------------------------------------------------------------------------ the list of documents

constexpr int LIST_THREADS = 1024, LENGTHS = 1024;  // LENGTHS: numbers of steps that are told apart

// One head's tiles of all documents, the longest first.
__global__ void __launch_bounds__(LIST_THREADS) list_kernel(const __grid_constant__ Schedule s, int tile_rows,
                                                            int step_columns) {
  __shared__ int places[LENGTHS];  // by length: how many, then where the next goes
  __shared__ int warp_sums[LIST_THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(LIST_THREADS == LENGTHS);
  places[threadIdx.x] = 0;
  __syncthreads();

  // A warp has 32 documents at a time, and its lanes go through the tiles of each.
  const auto each_tile = [&](auto visit) {
    for (int base = warp * 32; base < s.documents + 2; base += LIST_THREADS) {
      const ListedTile mine = document_at(s, base + lane);
      for (int i = 0; i < 32; ++i) {
        Tile tile{};
        tile.document = __shfl_sync(0xffffffff, mine.document, i);
        tile.first_row = __shfl_sync(0xffffffff, mine.first_row, i);
        tile.rows = __shfl_sync(0xffffffff, mine.rows, i);
        tile.first_column = __shfl_sync(0xffffffff, mine.first_column, i);
        tile.columns = __shfl_sync(0xffffffff, mine.columns, i);
        for (tile.row = lane * tile_rows; tile.row < tile.rows; tile.row += 32 * tile_rows) {
          set_steps(s, tile, tile_rows, step_columns);
          visit(tile, LENGTHS - min(tile.end - tile.begin, LENGTHS));
        }
      }
    }
  };

  if (s.ordered) {
    for (int i = threadIdx.x; i < s.tiles_per_strip; i += LIST_THREADS) s.list->tiles[i].rows = 0;
    if (threadIdx.x == 0) s.list->next = 0, s.list->count = s.tiles_per_strip;
    __syncthreads();
    each_tile([&](const Tile& tile, int) {
      s.list->tiles[place_of_document(tile.first_row, tile.document, tile_rows) + tile.row / tile_rows] = tile;
    });
    return;
  }

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
  if (threadIdx.x == LENGTHS - 1) s.list->next = 0, s.list->count = min(sum, s.tiles_per_strip);
  __syncthreads();

  each_tile([&](const Tile& tile, int length) {
    const int place = atomicAdd(&places[length], 1);
    if (place < s.tiles_per_strip) s.list->tiles[place] = tile;  // bounds that overlap could be too many
  });
}

// ---------------------------------------------------------------------------------------------------------------- host

// What both directions ask of a problem, beside the head dims that they are compiled for.
inline bool valid(const AttentionProblem& p) {
  return p.keys >= 1 && p.keys <= ATTENTION_LONGEST && p.queries <= ATTENTION_LONGEST && p.kv_heads >= 1 &&
         p.heads % p.kv_heads == 0 && p.scale > 0;
}

// Of one head, with a document's last tile for each and for the rows before and after them.
inline int64_t tiles_of_strip(const AttentionProblem& p, int rows, int tile_rows) {
  return p.query_bounds ? rows / tile_rows + p.documents + 2 : (rows + tile_rows - 1) / tile_rows;
}

inline int64_t list_bytes(const AttentionProblem& p, int rows, int tile_rows) {
  return sizeof(TileList) + (p.query_bounds ? tiles_of_strip(p, rows, tile_rows) * sizeof(ListedTile) : 0);
}

// Of queries as rows, or transposed. `shared_bytes`: of what the tiles of a strip all read or add to.
inline Schedule schedule_of(const AttentionProblem& p, void* list, bool transposed, int heads, int tile_rows,
                            int64_t shared_bytes, bool ordered = false) {
  Schedule s{};
  s.list = static_cast<TileList*>(list);
  s.row_bounds = p.query_bounds, s.column_bounds = p.key_bounds, s.rows = p.queries, s.columns = p.keys;
  s.left = std::min(p.left, ATTENTION_LONGEST), s.right = std::min(p.right, ATTENTION_LONGEST);
  if (transposed) {
    std::swap(s.row_bounds, s.column_bounds), std::swap(s.rows, s.columns), std::swap(s.left, s.right);
  }
  s.documents = p.documents, s.ordered = ordered;
  s.heads = heads, s.group = heads / p.kv_heads, s.strips = p.batch * heads;
  s.tiles_per_strip = int(tiles_of_strip(p, s.rows, tile_rows));
  // Tiles of one length have no better order than that of memory, and need nobody to hand them out.
  s.dynamic = ordered || p.query_bounds || p.left >= 0 || p.right >= 0;
  s.strips_together = s.dynamic ? int(std::min<int64_t>(std::max<int64_t>(CACHED / shared_bytes, 1) * s.group, s.strips)) : 1;
  return s;
}

inline cudaError_t plan_tiles(const Schedule& s, int tile_rows, int step_columns, cudaStream_t stream) {
  if (!s.row_bounds) return s.dynamic ? cudaMemsetAsync(&s.list->next, 0, sizeof s.list->next, stream) : cudaSuccess;
  list_kernel<<<1, LIST_THREADS, 0, stream>>>(s, tile_rows, step_columns);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flashmoe
