// A pipeline that can be made to hang, built with the watchdog as -DFLASHMOE_WATCHDOG would.
#define FLASHMOE_WATCHDOG
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "selftest.h"

namespace flashmoe::hopper {
namespace {

constexpr int STAGES = 2;
using Pipeline = Ring<STAGES>;

// In block `guilty`, if there is one, the consumer forgets to release item `forgotten`.
__global__ void __launch_bounds__(64) hang_kernel(int items, int guilty, int forgotten, int* out) {
  Pipeline& ring = shared_storage<Pipeline>();
  if (threadIdx.x == 0) {
    ring.init(1, 1);
    fence_barrier_init();
  }
  __syncthreads();
  Step<STAGES> step;
  for (int i = 0; i < items; ++i, step.next()) {
    if (threadIdx.x == 0) {
      ring.acquire(step);
      ring.full[step.stage].arrive();
    }
    if (threadIdx.x == 32) {
      ring.wait(step);
      if (int(blockIdx.y) != guilty || i != forgotten) ring.release(step);
    }
  }
  if (threadIdx.x == 0) out[blockIdx.y] = shared_address(&ring.empty[0]);
}

}  // namespace
}  // namespace flashmoe::hopper

using namespace flashmoe::hopper;

// Copies the HANGS records to `records`; out: where each block's first `empty` barrier is.
EXPORT int hopper_watchdog(int items, int blocks, int guilty, int forgotten, Hang* records, int* out) {
  const Hang* found = watchdog();
  const int error = run([&] {
    return launch(hang_kernel, {dim3(1, blocks), dim3(64), sizeof(Pipeline)}, items, guilty, forgotten, out);
  });
  if (!error && found)
    for (int i = 0; i < HANGS; ++i) records[i] = found[i];
  return found ? error : -1;
}
