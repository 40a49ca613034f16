// What the hardware can do where the kernels' designs depend on it: vector adds to memory, 2^x off the special-function
// units, gathering rows into tiles. Prints table, case, column and number, with tabs between; flashmoe_train/bench/hopper.py
// makes of that what docs/hopper.md shows.
//
//   cmake --build build --target flashmoe_hopper_throughput && build/flashmoe_hopper_throughput
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/reduce.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tma.cuh"

namespace flashmoe::hopper {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error)), std::exit(1);
}

void report(const char* table, const std::string& label, const char* column, double value) {
  std::printf("%s\t%s\t%s\t%.4g\n", table, label.c_str(), column, value);
}

template <typename T>
T* allocate(size_t count) {
  void* result;
  check(cudaMalloc(&result, count * sizeof(T)));
  check(cudaMemset(result, 0, count * sizeof(T)));
  return static_cast<T*>(result);
}

// Median of 15 runs after two, in ms.
template <typename Run>
float time(Run run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 17; ++i) {
    check(cudaEventRecord(begin));
    check(run());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int multiprocessors() {
  int result;
  check(cudaDeviceGetAttribute(&result, cudaDevAttrMultiProcessorCount, 0));
  return result;
}

// ------------------------------------------------------------------------------------------------------ adds to memory

enum class Add { vector, scalar, store };

// As attention's backward adds to the gradient of the queries: a block goes over tiles of 64 x 128 float32 in turn, from a
// place of its own; 512 neighbouring bytes a warp.
template <Add ADD>
__global__ void __launch_bounds__(256) add_kernel(float* sums, int tiles, int steps) {
  for (int step = 0; step < steps; ++step) {
    float* tile = sums + (int64_t(blockIdx.x) * tiles / gridDim.x + step) % tiles * (64 * 128);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = float(i);
      if constexpr (ADD == Add::scalar) {
        float* p = tile + i * 1024 + threadIdx.x / 32 * 128 + threadIdx.x % 32;  // 32 lanes, 128 bytes, four times
        for (int j = 0; j < 4; ++j) atomicAdd(p + j * 32, x);
      } else {
        float* p = tile + i * 1024 + threadIdx.x * 4;
        if constexpr (ADD == Add::vector) add_to_global(p, x, x, x, x);
        if constexpr (ADD == Add::store) *reinterpret_cast<float4*>(p) = float4{x, x, x, x};
      }
    }
  }
}

void measure_adds() {
  // float32 terms in GB/s, by one block of 256 threads per multiprocessor or two
  for (int megabytes : {8, 32, 1024})
    for (int blocks : {multiprocessors(), 2 * multiprocessors()}) {
      const int tiles = megabytes * 32, steps = 512;
      float* sums = allocate<float>(size_t(tiles) * 64 * 128);
      const Launch how{dim3(blocks), dim3(256)};
      const double gigabytes = double(blocks) * steps * 64 * 128 * 4 / 1e9;
      const auto rate = [&](auto kernel) {
        return gigabytes / time([&] { return launch(kernel, how, sums, tiles, steps); }) * 1e3;
      };
      const std::string label = std::to_string(megabytes) + " MB, " + std::to_string(blocks) + " blocks";
      report("adds", label, "red.v4", rate(add_kernel<Add::vector>));
      report("adds", label, "red", rate(add_kernel<Add::scalar>));
      report("adds", label, "store.v4", rate(add_kernel<Add::store>));
      check(cudaFree(sums));
    }
}

// ------------------------------------------------------------------------------------------------------------------ 2^x

// 2^x without the special-function units, x > -127: the integer part goes to the exponent, a polynomial of degree 3 does
// the rest, to 9e-4 (bf16 rounds to 4e-3).
__device__ __forceinline__ float exp2_polynomial(float x) {
  x = fmaxf(x, -127.f);
  const float shifted = x + 12582912.f;  // 1.5 * 2^23: the low bits are x, rounded
  const float f = x - (shifted - 12582912.f);
  const float p = fmaf(fmaf(fmaf(0.0559220f, f, 0.2402265f), f, 0.6931472f), f, 1.f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

constexpr int THREADS = 1024;

// POLYNOMIAL of every 8 numbers take the polynomial. Each power is preceded by a multiply-add, as in softmax.
template <int POLYNOMIAL>
__global__ void __launch_bounds__(THREADS, 1) exp2_kernel(float* out, int64_t* clocks, int rounds) {
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = -float(threadIdx.x + i) / 1024;
  __syncthreads();
  const int64_t begin = clock64();
#pragma unroll 2
  for (int round = 0; round < rounds; ++round)
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float y = fmaf(x[i], 0.5f, -1.f);
      x[i] = i * POLYNOMIAL % 8 < POLYNOMIAL ? exp2_polynomial(y) : exp2_fast(y);
    }
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += x[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int POLYNOMIAL>
void measure_exp2(float* out, int64_t* clocks) {
  const int rounds = 2000;
  check(launch(exp2_kernel<POLYNOMIAL>, {dim3(multiprocessors()), dim3(THREADS)}, out, clocks, rounds));
  int64_t taken;
  check(cudaMemcpy(&taken, clocks, sizeof taken, cudaMemcpyDeviceToHost));
  report("exp2", std::to_string(POLYNOMIAL) + "/8 by a polynomial", "per multiprocessor and clock",
         double(THREADS) * 16 * rounds / taken);
}

void measure_exp2() {
  float* out = allocate<float>(multiprocessors() * THREADS);
  int64_t* clocks = allocate<int64_t>(multiprocessors());
  measure_exp2<0>(out, clocks);
  measure_exp2<1>(out, clocks);
  measure_exp2<2>(out, clocks);
  measure_exp2<3>(out, clocks);
  measure_exp2<4>(out, clocks);
  measure_exp2<5>(out, clocks);
  measure_exp2<6>(out, clocks);
  measure_exp2<8>(out, clocks);
}

// -------------------------------------------------------------------------------------------------------------- gathers

// How 128 rows of 64 columns, one stage of a matrix product, come into a swizzled tile.
enum class Gather {
  box,          // neighbouring rows, by one TMA load: the bound
  one_thread,   // one TMA load a row, all by one thread
  one_warp,     // one TMA load a row, four by each lane
  copy_async,   // 16 bytes a thread and instruction, 128 threads
};
constexpr int STAGES = 6, ROWS = 128;

struct alignas(1024) GatherStorage {
  __nv_bfloat16 tile[STAGES][ROWS * 64];
  Ring<STAGES> ring;
  int index[ROWS];
};

// A block's tile of 128 rows, 64 columns at a time; the consumer only lets go of the stages.
template <Gather GATHER>
__global__ void __launch_bounds__(256, 1) gather_kernel(const __grid_constant__ CUtensorMap box,
                                                        const __grid_constant__ CUtensorMap row,
                                                        const __nv_bfloat16* x, int width, const int* index, int tiles) {
  GatherStorage& s = shared_storage<GatherStorage>();
  if (threadIdx.x == 0) {
    s.ring.init(GATHER == Gather::copy_async ? 128 : 1, 1);
    fence_barrier_init();
  }
  __syncthreads();
  const int thread = threadIdx.x;
  Step<STAGES> step;
  if (thread < 128) {
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      barrier_sync(1, 128);  // nobody reads the previous tile's any more
      s.index[thread] = index[tile * ROWS + thread];
      barrier_sync(1, 128);
      if constexpr (GATHER == Gather::copy_async) {
        const __nv_bfloat16* source[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) source[i] = x + int64_t(s.index[thread / 8 + i * 16]) * width + thread % 8 * 8;
        const uint32_t offset = tile_offset(ROWS, thread / 8, thread % 8 * 8);
        for (int column = 0; column < width; column += 64, step.next()) {
          s.ring.acquire(step);
          const uint32_t to = shared_address(s.tile[step.stage]) + offset;
#pragma unroll
          for (int i = 0; i < 8; ++i) copy_async(to + i * 16 * 128, source[i] + column, true);
          s.ring.full[step.stage].arrive_after_copies();
        }
      } else if (thread < (GATHER == Gather::one_warp ? 32 : 1)) {
        for (int column = 0; column < width; column += 64, step.next()) {
          Barrier& full = s.ring.full[step.stage];
          s.ring.acquire(step);
          if (thread == 0) full.arrive_expecting(ROWS * 128);
          if constexpr (GATHER == Gather::box) {
            tma_load(s.tile[step.stage], &box, full, Keep::normal, column, tile * ROWS);
          } else {
            constexpr int STRIDE = GATHER == Gather::one_warp ? 32 : 1;
            __syncwarp(STRIDE == 32 ? 0xffffffff : 1);  // the bytes are expected before any can come
#pragma unroll 4
            for (int i = thread; i < ROWS; i += STRIDE)
              tma_load(s.tile[step.stage] + i * 64, &row, full, Keep::normal, column, s.index[i]);
          }
        }
      }
    }
  } else if (thread == 128) {
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
      for (int column = 0; column < width; column += 64, step.next()) {
        s.ring.wait(step);
        s.ring.release(step);
      }
  }
}

// Whole rows, by one bulk copy each, as a dispatch would move them; no swizzle. As many rows a stage as it has room for.
__global__ void __launch_bounds__(64, 1) bulk_rows_kernel(const __nv_bfloat16* x, int width, const int* index, int tiles) {
  GatherStorage& s = shared_storage<GatherStorage>();
  if (threadIdx.x == 0) {
    s.ring.init(1, 1);
    fence_barrier_init();
  }
  const int rows = ROWS * 64 / width, lane = threadIdx.x % 32;
  __syncthreads();
  Step<STAGES> step;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    for (int row = 0; row < ROWS; row += 32) {
      const int own = index[tile * ROWS + row + lane];
      for (int i = 0; i < 32; i += rows, step.next())
        if (threadIdx.x == 32) {
          s.ring.wait(step);
          s.ring.release(step);
        } else if (threadIdx.x < 32) {
          Barrier& full = s.ring.full[step.stage];
          if (lane == 0) {
            s.ring.acquire(step);
            full.arrive_expecting(rows * width * 2);
          }
          for (int j = 0; j < rows; ++j) {
            const int from = __shfl_sync(0xffffffff, own, i + j);
            if (lane == 0) bulk_load(s.tile[step.stage] + j * width, x + int64_t(from) * width, width * 2, full);
          }
        }
    }
}

void measure_gathers() {
  // GB/s into tiles of 128 x 64, six stages, one block a multiprocessor; nothing else goes on
  for (int bytes : {4096, 8192, 14336})
    for (bool shuffled : {false, true}) {
      const int width = bytes / 2, rows = (1 << 29) / bytes / 128 * 128, tiles = rows / ROWS;  // 512 MB
      __nv_bfloat16* x = allocate<__nv_bfloat16>(size_t(rows) * width);
      std::vector<int> order(rows);
      std::iota(order.begin(), order.end(), 0);
      if (shuffled) std::shuffle(order.begin(), order.end(), std::mt19937(0));
      int* index = allocate<int>(rows);
      check(cudaMemcpy(index, order.data(), rows * sizeof(int), cudaMemcpyHostToDevice));
      const CUtensorMap box = tensor_map("x", x, MAP_BFLOAT16, {{width, 64, 2}, {rows, ROWS, bytes}});
      const CUtensorMap row = tensor_map("x", x, MAP_BFLOAT16, {{width, 64, 2}, {rows, 1, bytes}});
      const auto rate = [&](float ms) { return double(rows) * bytes / ms / 1e6; };
      const Launch how{dim3(multiprocessors()), dim3(256), sizeof(GatherStorage)};
      const Launch bulk{dim3(multiprocessors()), dim3(64), sizeof(GatherStorage)};
      const auto gather = [&](auto kernel) {
        return rate(time([&] { return launch(kernel, how, box, row, x, width, index, tiles); }));
      };
      const std::string label = std::to_string(bytes) + " bytes a row, " + (shuffled ? "shuffled" : "in order");
      report("gather", label, "TMA box (neighbours)", gather(gather_kernel<Gather::box>));
      report("gather", label, "cp.async", gather(gather_kernel<Gather::copy_async>));
      report("gather", label, "TMA by row, 32 lanes", gather(gather_kernel<Gather::one_warp>));
      report("gather", label, "TMA by row, one lane", gather(gather_kernel<Gather::one_thread>));
      report("gather", label, "bulk copies of whole rows",
             rate(time([&] { return launch(bulk_rows_kernel, bulk, x, width, index, tiles); })));
      check(cudaFree(x));
      check(cudaFree(index));
    }
}

}  // namespace
}  // namespace flashmoe::hopper

int main() {
  using namespace flashmoe::hopper;
  measure_adds();
  measure_exp2();
  measure_gathers();
}
