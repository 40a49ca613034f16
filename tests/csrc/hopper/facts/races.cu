// Does compute-sanitizer's racecheck see what the tensor cores and the copy engine do to shared memory? Each way for data
// to pass is run rightly and with its barrier left out:
//
//   for way in 0 1 2 3 4 5 6; do compute-sanitizer --tool racecheck build/flashmoe_hopper_races $way; done
//
// flashmoe_train/bench/hopper.py does that and keeps the answers.
#include <cstdio>
#include <cstdlib>

#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"

using namespace flashmoe::hopper;

enum Way {
  stores_barrier_loads,      // the control: ordinary threads alone
  stores_loads,              // ... and racecheck has to see this
  stores_barrier_wgmma,
  stores_wgmma,
  tma_wait_loads,
  tma_loads,
  stores_tma_store,
  WAYS
};
constexpr const char* NAMES[] = {
    "stores, barrier, loads", "stores, NO barrier, loads",  "stores, fence, barrier, wgmma", "stores, NO barrier, wgmma",
    "TMA, wait, loads",       "TMA, NO wait, loads",        "stores, NO barrier, TMA store",
};

struct alignas(1024) Storage {
  __nv_bfloat16 tile[64 * 64];
  Barrier barrier;
};

template <Way WAY>
__global__ void __launch_bounds__(128) race_kernel(const __grid_constant__ CUtensorMap map, float* out) {
  Storage& s = shared_storage<Storage>();
  if (threadIdx.x == 0) {
    s.barrier.init(1);
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (WAY == tma_wait_loads || WAY == tma_loads) {
    if (threadIdx.x == 0) {
      s.barrier.arrive_expecting(sizeof s.tile);
      tma_load(s.tile, &map, s.barrier, Keep::normal, 0, 0);
    }
    if constexpr (WAY == tma_wait_loads) s.barrier.wait(0);
  } else {
    for (int i = threadIdx.x; i < 64 * 64; i += 128) s.tile[i] = __float2bfloat16(i % 7);
    fence_proxy_async();
    if constexpr (WAY == stores_barrier_loads || WAY == stores_barrier_wgmma) __syncthreads();
  }
  if constexpr (WAY == stores_barrier_wgmma || WAY == stores_wgmma) {
    float d[32];
    const uint64_t tile = k_major(shared_address(s.tile));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<__nv_bfloat16, K_MAJOR, K_MAJOR>(d, advance(tile, k * 32), advance(tile, k * 32), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];
  } else if constexpr (WAY == stores_tma_store) {
    if (threadIdx.x == 0) {
      tma_store(&map, s.tile, 0, 0);
      tma_commit();
      tma_wait<0>();
    }
  } else {
    for (int i = threadIdx.x; i < 64 * 64; i += 128) out[i] = float(s.tile[64 * 64 - 1 - i]);
  }
  if constexpr (WAY == tma_loads) s.barrier.wait(0);  // a block must not end before its copies
}

template <Way WAY>
cudaError_t run(const CUtensorMap& map, float* out) {
  return launch(race_kernel<WAY>, {dim3(1), dim3(128), sizeof(Storage)}, map, out);
}

int main(int count, char** arguments) {
  const int way = count > 1 ? std::atoi(arguments[1]) : WAYS;
  if (way < 0 || way >= WAYS) return std::printf("which way, 0 ... %d?\n", WAYS - 1), 2;
  void *x, *out;
  if (cudaMalloc(&x, 64 * 64 * 2) || cudaMalloc(&out, 64 * 64 * 4) || cudaMemset(x, 0, 64 * 64 * 2)) return 1;
  const CUtensorMap map = tensor_map("x", x, MAP_BFLOAT16, {{64, 64, 2}, {64, 64, 128}});
  constexpr cudaError_t (*RUN[])(const CUtensorMap&, float*) = {
      run<stores_barrier_loads>, run<stores_loads>, run<stores_barrier_wgmma>, run<stores_wgmma>,
      run<tma_wait_loads>,       run<tma_loads>,    run<stores_tma_store>,
  };
  cudaError_t error = RUN[way](map, static_cast<float*>(out));
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  std::printf("%s: %s\n", NAMES[way], cudaGetErrorString(error));
  return error;
}
