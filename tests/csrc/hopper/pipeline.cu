// Who waits for whom: rings of stages, registers that move between roles, named barriers, turns.
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/tma.cuh"
#include "selftest.h"

namespace flashmoe::hopper {
namespace {

__device__ void nap(uint32_t seed) { __nanosleep((seed * 2654435761u >> 20) % 512); }

// ---------------------------------------------------------------------------------------------------------------- ring

constexpr int STAGES = 3, WORDS = 256;
constexpr int SUMS = 192;  // more than a thread has at launch: ptxas would spill if the registers did not move

struct alignas(1024) RingStorage {
  uint32_t words[STAGES][WORDS];
  Ring<STAGES> ring;
};

// Each consuming thread folds its word of every item into SUMS numbers, in order: a lost, doubled or early item shows.
__global__ void __launch_bounds__(384, 1) ring_kernel(const uint32_t* items, int count, uint32_t* out) {
  RingStorage& s = shared_storage<RingStorage>();
  if (threadIdx.x == 0) {
    s.ring.init(1, 8);
    fence_barrier_init();
  }
  __syncthreads();
  Step<STAGES> step;
  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x < 32 && elected())
      for (int i = 0; i < count; ++i, step.next()) {
        nap(i + blockIdx.x);
        s.ring.acquire(step);
        s.ring.full[step.stage].arrive_expecting(WORDS * 4);
        bulk_load(s.words[step.stage], items + int64_t(i) * WORDS, WORDS * 4, s.ring.full[step.stage]);
      }
  } else {
    more_registers<240>();
    const int thread = threadIdx.x - 128;
    uint32_t sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sum[i] = i;
    for (int i = 0; i < count; ++i, step.next()) {
      s.ring.wait(step);
      nap(i * 8 + thread / 32);
      const uint32_t word = s.words[step.stage][thread];
      __syncwarp();  // all lanes have read
      if (thread % 32 == 0) s.ring.release(step);
#pragma unroll
      for (int j = 0; j < SUMS; ++j) sum[j] = sum[j] * 31 + word;
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i) out[(blockIdx.x * SUMS + i) * WORDS + thread] = sum[i];
  }
}

// ------------------------------------------------------------------------------------------------------ named barriers

enum class NamedBarrier : int { full = 1, empty = 2, turn = 3 };  // turn: and the ids after it, one a warpgroup

// Warpgroup 1 hands items over to warpgroup 0 through one buffer: out[i] = item i backwards.
__global__ void __launch_bounds__(256) hand_over_kernel(int count, int* out) {
  int* buffer = &shared_storage<int>();
  const int thread = threadIdx.x % 128;
  for (int i = 0; i < count; ++i) {
    nap(i * 8 + threadIdx.x / 32);
    if (threadIdx.x >= 128) {
      if (i > 0) barrier_sync(NamedBarrier::empty, 256);
      buffer[thread] = i * 128 + thread;
      barrier_arrive(NamedBarrier::full, 256);
    } else {
      barrier_sync(NamedBarrier::full, 256);
      out[i * 128 + thread] = buffer[127 - thread];
      if (i + 1 < count) barrier_arrive(NamedBarrier::empty, 256);
    }
  }
}

// Whose turn it was, `rounds` times for each warpgroup. Nothing but the turns protects the counter.
template <int WARPGROUPS>
__global__ void __launch_bounds__(128 * WARPGROUPS) turns_kernel(int rounds, int* out) {
  volatile int& count = shared_storage<int>();
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  using Turn = Turns<int(NamedBarrier::turn), WARPGROUPS>;
  const int warpgroup = threadIdx.x / 128;
  Turn::start(warpgroup);
  for (int i = 0; i < rounds; ++i) {
    nap(i * 8 + warpgroup);
    Turn::wait(warpgroup);
    if (threadIdx.x % 128 == 0) {
      const int turn = count;
      out[turn] = warpgroup;
      nap(turn);
      count = turn + 1;
    }
    Turn::pass(warpgroup);
  }
}

}  // namespace
}  // namespace flashmoe::hopper

using namespace flashmoe::hopper;

EXPORT int hopper_ring(const uint32_t* items, int count, int blocks, uint32_t* out) {
  return run([&] {
    return launch(ring_kernel, {dim3(blocks), dim3(384), sizeof(RingStorage)}, items, count, out);
  });
}
EXPORT int hopper_hand_over(int count, int* out) {
  return run([&] { return launch(hand_over_kernel, {dim3(1), dim3(256), 512}, count, out); });
}
EXPORT int hopper_turns(int warpgroups, int rounds, int* out) {
  return run([&] {
    return launch(warpgroups == 2 ? turns_kernel<2> : turns_kernel<3>, {dim3(1), dim3(128 * warpgroups), 4}, rounds, out);
  });
}
