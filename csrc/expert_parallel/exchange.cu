// Dispatch and combine over peer memory; exchange.h says what each kernel does, docs/kernels/expert_parallel.md why so.
//
// Few blocks push: NVLink is full with a quarter of the multiprocessors, the others are for whatever else runs. What waits
// for other ranks is those few blocks or a single warp, never a grid that fills the GPU: a collective on another stream
// must find room, or two ranks wait for each other for good.
#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "expert_parallel/signals.cuh"

namespace flashmoe {
namespace {

constexpr unsigned ALL = 0xffffffff;  // lanes
constexpr int PLAN_THREADS = 1024, PLAN_TOKENS = 8;  // of each thread and round
constexpr int PUSH_THREADS = 1024;
constexpr int VECTOR = 16;  // bytes

// Input that nobody writes meanwhile, and is read once.
__device__ __forceinline__ int4 load_once(const void* p) {
  int4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// What other ranks have written before this kernel began: not by the path for constants.
__device__ __forceinline__ int4 load_shared(const void* p) {
  int4 v;
  asm volatile("ld.global.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store(void* p, int4 v) {
  asm volatile("st.global.L1::no_allocate.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---------------------------------------------------------------------------------------------------------------- plan

// One block for each rank; a thread has neighbouring tokens, a block scan numbers those that go there.
__global__ void __launch_bounds__(PLAN_THREADS) plan_kernel(ExchangePlanParams p) {
  __shared__ int warp_sum[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, w = blockIdx.x;
  const unsigned here = p.experts / p.world, first = w * here;
  int base = 0;
  for (int64_t round = 0; round < p.tokens; round += PLAN_THREADS * PLAN_TOKENS) {
    const int64_t begin = round + threadIdx.x * PLAN_TOKENS;
    unsigned goes = 0;
#pragma unroll
    for (int i = 0; i < PLAN_TOKENS; ++i) {
      if (begin + i >= p.tokens) break;
      const int32_t* ids = p.ids + (begin + i) * p.slots;
      bool any = false;
      for (int k = 0; k < p.slots; ++k) any |= unsigned(ids[k]) - first < here;  // negative ids are large
      goes |= unsigned(any) << i;
    }
    const int own = __popc(goes);
    int through = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(ALL, through, distance);
      if (lane >= distance) through += other;
    }
    if (lane == 31) warp_sum[warp] = through;
    __syncthreads();
    const int before = __reduce_add_sync(ALL, lane < warp ? warp_sum[lane] : 0);
    const int total = __reduce_add_sync(ALL, warp_sum[lane]);
    int next = base + before + through - own;
#pragma unroll
    for (int i = 0; i < PLAN_TOKENS; ++i)
      if (begin + i < p.tokens) p.position[(begin + i) * p.world + w] = goes >> i & 1 ? next++ : -1;
    base += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) p.counts[w] = base;
}

// ------------------------------------------------------------------------------------------------------------ dispatch

// Until everybody has read what this rank sent by the channel before. By all threads of all blocks; returns the new epoch.
// Says first that the channels in `read` have been read: whatever did was launched before, so it has ended.
__device__ int32_t begin_sending(const Link& link, int read) {
  if (blockIdx.x == 0 && threadIdx.x < link.world)
    for (int channel = 0; channel < CHANNELS; ++channel)
      if (read >> channel & 1)
        store_release(at(link, threadIdx.x, signal(link, channel, READ, link.rank)), word(link, channel, EPOCH));
  const int32_t epoch = word(link, link.channel, EPOCH) + 1;
  if (threadIdx.x < link.world) await(link, READ, threadIdx.x, epoch - 1);
  __syncthreads();
  return epoch;
}

// By the last block: everything has been written.
__device__ void announce(const Link& link, int32_t epoch, const int32_t* counts) {
  const int w = threadIdx.x;
  if (w < link.world) {
    if (counts) *at(link, w, signal(link, link.channel, COUNT, link.rank)) = counts[w];
    store_release(at(link, w, signal(link, link.channel, ARRIVED, link.rank)), epoch);
  }
  if (w == 0) word(link, link.channel, EPOCH) = epoch;
}

// A warp pushes one token after the other to all its ranks, from registers; UNITS vectors a lane are under way.
template <int W>
__global__ void __launch_bounds__(PUSH_THREADS, 1) dispatch_kernel(DispatchParams p) {
  constexpr int UNITS = W <= 4 ? 4 : 2;
  const Link& link = p.link;
  const int32_t epoch = begin_sending(link, p.read);
  const int lane = threadIdx.x % 32, vectors = int(p.row_bytes / VECTOR);
  const int64_t warps = int64_t(gridDim.x) * (PUSH_THREADS / 32);
  for (int64_t token = int64_t(threadIdx.x / 32) * gridDim.x + blockIdx.x; token < p.tokens; token += warps) {
    char* to[W];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      to[i] = nullptr;
      if (i >= link.world) continue;
      const int w = (link.rank + 1 + i) % link.world;  // in another order on every rank, or all would begin with one
      const int place = p.position[token * link.world + w];
      if (place < 0) continue;
      const int64_t row = link.rank * p.places + place;
      to[i] = at(link, w, static_cast<char*>(p.rows)) + row * p.row_bytes;
      if (!p.ids) continue;
      int32_t* routing = at(link, w, p.routing) + row * 2 * p.slots;
      for (int k = lane; k < p.slots; k += 32) {
        routing[k] = p.ids[token * p.slots + k];
        routing[p.slots + k] = __float_as_int(p.weights[token * p.slots + k]);
      }
    }
    const char* x = static_cast<const char*>(p.x) + token * p.x_stride_bytes;
    for (int first = lane; first < vectors; first += 32 * UNITS) {
      int4 unit[UNITS];
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (first + 32 * u < vectors) unit[u] = load_once(x + (first + 32 * u) * VECTOR);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (!to[w]) continue;
#pragma unroll
        for (int u = 0; u < UNITS; ++u)
          if (first + 32 * u < vectors) store(to[w] + (first + 32 * u) * VECTOR, unit[u]);
      }
    }
  }
  if (last_block(link)) announce(link, epoch, p.counts);
}

__global__ void __launch_bounds__(32) wait_kernel(Link link) {
  if (threadIdx.x < link.world) await(link, ARRIVED, threadIdx.x, word(link, link.channel, EPOCH));
}

__global__ void __launch_bounds__(256) receive_kernel(ReceiveParams p) {
  const Link& link = p.link;
  if (blockIdx.x == 0 && threadIdx.x < link.world)
    p.counts[threadIdx.x] = *signal(link, link.channel, COUNT, threadIdx.x);
  if (!p.routing) return;
  const int64_t entries = link.world * p.places * p.slots;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < entries; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t place = i / p.slots;
    const int k = int(i - place * p.slots), source = int(place / p.places);
    int32_t id = -1;
    float weight = 0;
    if (place - source * p.places < *signal(link, link.channel, COUNT, source)) {
      const int32_t* routing = p.routing + place * 2 * p.slots;
      id = routing[k] - link.rank * p.here;
      if (id < 0 || id >= p.here) id = -1;
      if (id >= 0) weight = __int_as_float(routing[p.slots + k]);  // what others' weigh is not ours, and may be NaN
    }
    p.ids[i] = id;
    p.weights[i] = weight;
  }
}

// ------------------------------------------------------------------------------------------------------------- combine

// A warp pushes one row after the other. Rows of all sources come in turns, the first of which differs from row to row, so
// that all links are busy; this rank's own rows are read where they are.
__global__ void __launch_bounds__(PUSH_THREADS, 1) return_kernel(ReturnParams p) {
  constexpr int UNITS = 4;
  __shared__ int arrived[MOST_RANKS];
  const Link& link = p.link;
  if (threadIdx.x < link.world) arrived[threadIdx.x] = threadIdx.x == link.rank ? 0 : p.arrived[threadIdx.x];
  const int32_t epoch = begin_sending(link, p.read);
  int most = 0;
  for (int w = 0; w < link.world; ++w) most = max(most, arrived[w]);

  const int lane = threadIdx.x % 32, vectors = int(p.row_bytes / VECTOR);
  const unsigned items = unsigned(most) * link.world, warps = gridDim.x * (PUSH_THREADS / 32);
  for (unsigned item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += warps) {
    const unsigned place = item / link.world, turn = item - place * link.world + (place * 2654435761u >> 24);
    const int source = int(turn % link.world);
    if (int(place) >= arrived[source]) continue;
    const int64_t from = source * p.places + place, to = link.rank * p.places + place;
    if (p.values) {
      float* values = at(link, source, p.slot_values) + to * p.slots;
      for (int k = lane; k < p.slots; k += 32) values[k] = p.values[from * p.slots + k];
    }
    const char* row = static_cast<const char*>(p.rows) + from * p.rows_stride_bytes;
    char* sums = at(link, source, static_cast<char*>(p.sums)) + to * p.row_bytes;
    for (int first = lane; first < vectors; first += 32 * UNITS) {
      int4 unit[UNITS];
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (first + 32 * u < vectors) unit[u] = load_once(row + (first + 32 * u) * VECTOR);
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (first + 32 * u < vectors) store(sums + (first + 32 * u) * VECTOR, unit[u]);
    }
  }
  if (last_block(link)) announce(link, epoch, nullptr);
}

template <typename T>
__device__ __forceinline__ void add(float (&sum)[8], int4 v) {
  const T* element = reinterpret_cast<const T*>(&v);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += static_cast<float>(element[i]);
}

// A warp sums one token after the other.
template <typename T, int W>
__global__ void __launch_bounds__(256, W <= 4 ? 4 : 2) sum_kernel(SumParams p) {
  const Link& link = p.link;
  const int lane = threadIdx.x % 32, vectors = int(p.row_bytes / VECTOR);
  const int64_t warps = int64_t(gridDim.x) * 8;
  for (int64_t token = int64_t(blockIdx.x) * 8 + threadIdx.x / 32; token < p.tokens; token += warps) {
    const char* row[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      row[w] = nullptr;
      const int place = w < link.world ? p.position[token * link.world + w] : -1;
      if (place < 0) continue;
      const int64_t from = w * p.places + place;
      row[w] = w == link.rank ? static_cast<const char*>(p.rows) + from * p.rows_stride_bytes
                              : static_cast<const char*>(p.sums) + from * p.row_bytes;
    }
    if (p.values)
      for (int k = lane; k < p.slots; k += 32) {
        const int64_t slot = token * p.slots + k;
        const int id = p.ids[slot], w = id / p.here;
        float value = 0;
        if (id >= 0 && w < link.world) {
          const int64_t from = (w * p.places + p.position[token * link.world + w]) * p.slots + k;
          value = (w == link.rank ? p.values : p.slot_values)[from];
        }
        p.dslots[slot] = value;
      }
    char* out = static_cast<char*>(p.out) + token * p.row_bytes;
    for (int vector = lane; vector < vectors; vector += 32) {
      int4 part[W];
#pragma unroll
      for (int w = 0; w < W; ++w)
        if (row[w]) part[w] = load_shared(row[w] + vector * VECTOR);
      float sum[8] = {};
#pragma unroll
      for (int w = 0; w < W; ++w)
        if (row[w]) add<T>(sum, part[w]);
      int4 result;
      T* element = reinterpret_cast<T*>(&result);
#pragma unroll
      for (int i = 0; i < 8; ++i) element[i] = static_cast<T>(sum[i]);
      store(out + vector * VECTOR, result);
    }
  }
  if (last_block(link) && threadIdx.x < link.world)
    store_release(at(link, threadIdx.x, signal(link, link.channel, READ, link.rank)), word(link, link.channel, EPOCH));
}

// As few ranks as there is code for, of which the last may be nobody.
template <typename Function>
cudaError_t for_ranks(int world, Function function) {
  if (world <= 2) return function(std::integral_constant<int, 2>());
  if (world <= 4) return function(std::integral_constant<int, 4>());
  return function(std::integral_constant<int, MOST_RANKS>());
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------- launch

cudaError_t exchange_plan(const ExchangePlanParams& p, cudaStream_t stream) {
  plan_kernel<<<p.world, PLAN_THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t exchange_dispatch(const DispatchParams& p, cudaStream_t stream) {
  return for_ranks(p.link.world, [&](auto ranks) {
    dispatch_kernel<ranks.value><<<p.blocks, PUSH_THREADS, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t exchange_wait(const Link& link, cudaStream_t stream) {
  wait_kernel<<<1, 32, 0, stream>>>(link);
  return cudaGetLastError();
}

cudaError_t exchange_receive(const ReceiveParams& p, cudaStream_t stream) {
  const int64_t entries = p.routing ? p.link.world * p.places * p.slots : 1;
  const int blocks = int(std::min<int64_t>((entries + 255) / 256, 1024));
  receive_kernel<<<blocks, 256, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t exchange_return(const ReturnParams& p, cudaStream_t stream) {
  return_kernel<<<p.blocks, PUSH_THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t exchange_sum(const SumParams& p, cudaStream_t stream) {
  const int blocks = int(std::clamp<int64_t>((p.tokens + 7) / 8, 1, 528));
  return for_ranks(p.link.world, [&](auto ranks) {
    if (p.half)
      sum_kernel<__half, ranks.value><<<blocks, 256, 0, stream>>>(p);
    else
      sum_kernel<__nv_bfloat16, ranks.value><<<blocks, 256, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace flashmoe
