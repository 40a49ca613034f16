// How a kernel is launched, and how its threads share its registers.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe::hopper {

// Registers move from the producer's warpgroup to the consumers'. By whole warpgroups, each role in one branch of a
// single if; R in 24 ... 256 by 8, their sum within what the launch gave. Without __launch_bounds__(threads, 1) ptxas
// ignores it (C7508).
template <int R>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}

// True in one lane of a warp, the same at every call; all 32 lanes call it.
__device__ __forceinline__ bool elected() {
  uint32_t result;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(result));
  return result;
}

// Programmatic dependent launch. launch_next() by all blocks of a kernel, or their end, lets the next one begin if it was
// launched to overlap; that one calls wait_for_previous() before it touches global memory, to read or to write. The wait is
// for the end of the previous kernel and all it wrote, however early launch_next() was.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Of the current device: blocks of a kernel that leaves no room for a second one.
inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool overlap = false;  // may start before the previous kernel has ended: for kernels that call wait_for_previous
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes)))
    return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = how.overlap;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid, config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes, config.stream = how.stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

}  // namespace flashmoe::hopper
