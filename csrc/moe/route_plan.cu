// Route plan: sorts the slots by expert, stably, so that the rows of an expert lie side by side.
//
// Blocks take chunks of neighbouring slots. Where a chunk's first row of an expert is depends on all chunks' counts, hence
// two launches: one counts, one places; a few thousand slots are one chunk and one launch. Integers only, and the place of a
// slot does not depend on how the slots are cut: nothing to repeat differently. Latency bounds both launches, not memory:
// what can be under way together is.
#include <algorithm>

#include "moe/rows.cuh"

namespace flashmoe {
namespace {

constexpr int ITEMS = 4;                      // slots per thread and round
constexpr int MOST_THREADS = 1024;            // in a block
constexpr int CHUNK = MOST_THREADS * ITEMS;   // chunks are multiples of it
constexpr int ALONE = 2 * CHUNK;              // so many slots are not worth a second block
constexpr int MOST_CHUNKS = 128;              // each block reads the counts of all: more blocks, more to read
constexpr int DEFAULT_SHARED_MEMORY = 49152;  // what a kernel gets without asking

// Slots per chunk.
int chunk_of(int64_t slots) {
  const int64_t least = slots <= ALONE ? slots : (slots + MOST_CHUNKS - 1) / MOST_CHUNKS;
  return int((least + CHUNK - 1) / CHUNK * CHUNK);
}

template <typename Id>
__device__ int expert_of(Id id, int experts) {
  return id >= 0 && id < experts ? int(id) : -1;
}

// Adds how many of the slots begin ... end each expert has to `count` [E] in shared memory.
template <typename Id>
__device__ void count_slots(const RoutePlanParams& p, int64_t begin, int64_t end, int* count) {
  const Id* ids = static_cast<const Id*>(p.ids);
#pragma unroll 4
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    const int expert = expert_of(ids[slot], p.experts);
    if (expert >= 0) atomicAdd(&count[expert], 1);
  }
}

// counts[chunk, e]: one block per chunk.
template <typename Id>
__global__ void __launch_bounds__(MOST_THREADS) count_kernel(RoutePlanParams p, int chunk) {
  extern __shared__ int shared[];
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) shared[e] = 0;
  __syncthreads();
  const int64_t begin = int64_t(blockIdx.x) * chunk;
  count_slots<Id>(p, begin, min(begin + chunk, int64_t(p.slots)), shared);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) p.counts[int(blockIdx.x) * p.experts + e] = shared[e];
}

// Adds each expert's counts in all chunks to `all`, in those before this block's to `before`. The threads split the chunks
// where there are fewer experts than threads, and have 16 loads under way.
__device__ void sum_counts(const RoutePlanParams& p, int* before, int* all) {
  const int parts = max(1, int(blockDim.x) / p.experts), chunks = gridDim.x;
  for (int i = threadIdx.x; i < p.experts * parts; i += blockDim.x) {
    const int part = i / p.experts, expert = i - part * p.experts;
    int sum = 0, sum_before = 0;
    for (int first = part; first < chunks; first += 16 * parts) {
      int count[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int chunk = first + j * parts;
        count[j] = chunk < chunks ? p.counts[chunk * p.experts + expert] : 0;
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        sum += count[j];
        if (first + j * parts < int(blockIdx.x)) sum_before += count[j];
      }
    }
    atomicAdd(&before[expert], sum_before);
    atomicAdd(&all[expert], sum);
  }
}

// Makes value[i] the sum of those before it, value[count] and the result the sum of all. By the whole block, with barriers:
// one before, for the values to be there, is the caller's; what comes after may read them.
__device__ int exclusive_scan(int* value, int count) {
  __shared__ int warp_sum[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int each = (count + blockDim.x - 1) / blockDim.x;
  const int begin = min(int(threadIdx.x) * each, count), end = min(begin + each, count);
  int own = 0;
  for (int i = begin; i < end; ++i) own += value[i];
  int through = own;  // this lane
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(ALL, through, distance);
    if (lane >= distance) through += other;
  }
  if (lane == 31) warp_sum[warp] = through;
  __syncthreads();
  const int of_warp = lane < warps ? warp_sum[lane] : 0;
  const int total = __reduce_add_sync(ALL, of_warp);
  int next = __reduce_add_sync(ALL, lane < warp ? of_warp : 0) + through - own;
  for (int i = begin; i < end; ++i) {
    const int here = value[i];
    value[i] = next;
    next += here;
  }
  if (threadIdx.x == 0) value[count] = total;
  __syncthreads();
  return total;
}

// In shared memory: ints, then uint16 ranks [warps, width].
struct Layout {
  int tile;     // slots per round
  int experts;  // E
  __host__ __device__ int width() const { return (experts + 1) / 2 * 2; }  // whole words
  int bytes() const { return (tile + 2 * experts + 1) * 4 + tile / (32 * ITEMS) * width() * 2; }
};

// Places one chunk, a tile at a time. A warp has 32 * ITEMS neighbouring slots of a tile. The tile is sorted in shared memory
// before it is written: neighbours in a row are then written by neighbouring lanes.
template <typename Id>
__global__ void __launch_bounds__(MOST_THREADS) place_kernel(RoutePlanParams p, int chunk, Layout layout) {
  extern __shared__ int shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int experts = p.experts, tile = layout.tile, width = layout.width();
  int* sorted = shared;         // [tile]: expert, slot within the tile (16 bits each)
  int* row = sorted + tile;     // [E]: the next row of each expert
  int* start = row + experts;   // [E + 1]: where an expert's slots begin in `sorted`
  uint16_t* rank = reinterpret_cast<uint16_t*>(start + experts + 1);  // [warps, width]: first of a warp's slots
  uint16_t* own_rank = rank + warp * width;
  const int64_t begin = int64_t(blockIdx.x) * chunk, end = min(begin + chunk, int64_t(p.slots));
  const int own = warp * 32 * ITEMS + lane;  // first of this thread's slots within a tile, 32 apart

  int expert[ITEMS];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int64_t slot = first + own + i * 32;
      expert[i] = slot < end ? expert_of(static_cast<const Id*>(p.ids)[slot], experts) : -1;
    }
  };
  load(begin);  // needed only after the counts, whose loads it overlaps

  // Where the experts begin, of all slots and of this chunk's. `start` holds the counts of all chunks until then.
  for (int e = threadIdx.x; e < experts; e += blockDim.x) row[e] = start[e] = 0;
  __syncthreads();
  if (gridDim.x == 1)
    count_slots<Id>(p, begin, end, start);
  else
    sum_counts(p, row, start);
  __syncthreads();
  const int used = exclusive_scan(start, experts);
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    if (blockIdx.x == 0) p.offsets[e] = start[e];
    if (e < experts) row[e] += start[e];
  }
  for (int64_t nobodys = used + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; nobodys < p.slots;
       nobodys += int64_t(gridDim.x) * blockDim.x)
    p.row_slot[nobodys] = -1;

  for (int64_t first = begin; first < end; first += tile) {
    // Ranks of the slots among those of their warp, in order; own_rank counts what the warp has seen of each expert.
    for (int i = threadIdx.x; i < warps * width / 2; i += blockDim.x) reinterpret_cast<uint32_t*>(rank)[i] = 0;
    __syncthreads();
    int own_place[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const unsigned same = __match_any_sync(ALL, expert[i]);
      const int before = __popc(same & ((1u << lane) - 1));
      const int seen = expert[i] >= 0 ? own_rank[expert[i]] : 0;
      __syncwarp();
      if (expert[i] >= 0 && before == 0) own_rank[expert[i]] = uint16_t(seen + __popc(same));
      __syncwarp();
      own_place[i] = seen + before;
    }
    __syncthreads();

    // Over the warps, eight loads under way.
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
      int sum = 0;
      for (int w = 0; w < warps; w += 8) {
        int count[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) count[j] = w + j < warps ? rank[(w + j) * width + e] : 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (w + j < warps) rank[(w + j) * width + e] = uint16_t(sum);
          sum += count[j];
        }
      }
      start[e] = sum;
    }
    __syncthreads();
    const int placed = exclusive_scan(start, experts);

#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int slot = own + i * 32;
      int found = -1;
      if (expert[i] >= 0) {
        const int place = own_place[i] + own_rank[expert[i]];
        sorted[start[expert[i]] + place] = expert[i] << 16 | slot;
        found = row[expert[i]] + place;
      }
      if (first + slot < end) p.slot_row[first + slot] = found;
    }
    load(first + tile);
    __syncthreads();

    for (int i = threadIdx.x; i < placed; i += blockDim.x) {
      const int e = sorted[i] >> 16;
      p.row_slot[row[e] + i - start[e]] = int(first) + (sorted[i] & 0xffff);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) row[e] += start[e + 1] - start[e];
  }
}

template <typename Id>
cudaError_t launch(const RoutePlanParams& p, cudaStream_t stream) {
  const int chunk = chunk_of(p.slots), chunks = int(route_plan_chunks(p.slots));
  if (chunks > 1) count_kernel<Id><<<chunks, MOST_THREADS, p.experts * sizeof(int), stream>>>(p, chunk);
  // As many warps as there is room for their ranks.
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
  Layout layout{CHUNK, p.experts};
  const int reserved = 256;  // exclusive_scan's, and some
  while (layout.tile > 32 * ITEMS && layout.bytes() + reserved > most) layout.tile /= 2;
  if (layout.bytes() + reserved > DEFAULT_SHARED_MEMORY)
    if (const cudaError_t error = cudaFuncSetAttribute(place_kernel<Id>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       layout.bytes()))
      return error;
  place_kernel<Id><<<chunks, layout.tile / ITEMS, layout.bytes(), stream>>>(p, chunk, layout);
  return cudaGetLastError();
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------- launch

int64_t route_plan_chunks(int64_t slots) {
  return slots == 0 ? 1 : (slots + chunk_of(slots) - 1) / chunk_of(slots);
}

cudaError_t route_plan(const RoutePlanParams& p, cudaStream_t stream) {
  return p.wide_ids ? launch<int64_t>(p, stream) : launch<int32_t>(p, stream);
}

}  // namespace flashmoe
