// Host: describes a tensor to the copy engine. What it cannot take is named in the exception, before the driver sees it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

namespace flashmoe::hopper {

// One dimension of a tensor and how much of it a copy takes. Sizes in elements.
struct MapDimension {
  int64_t size;
  int64_t box;
  int64_t stride;  // bytes; the innermost one's is that of an element
};

struct MapElement {
  CUtensorMapDataType type;
  int64_t bytes;
};
constexpr MapElement MAP_BFLOAT16{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2}, MAP_FLOAT16{CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2},
    MAP_FLOAT32{CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};

// cuTensorMapEncodeTiled, found at run time: nothing links to the driver, so the library loads where there is none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled (12.0 or later is needed): " +
                               std::string(cudaGetErrorString(error)));
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return function;
}

// The driver wants a context, which a thread has once the runtime has worked in it: that of autograd may come here first.
inline cudaError_t thread_has_context() {
  static thread_local const cudaError_t error = [] {
    int device = 0;
    const cudaError_t found = cudaGetDevice(&device);
    return found ? found : cudaSetDevice(device);
  }();
  return error;
}

// Of 2 to 4 dimensions, the innermost first, in the layout of shared_memory.cuh: 128-byte swizzle, zeros outside.
inline CUtensorMap tensor_map(const char* name, const void* base, MapElement element,
                              std::initializer_list<MapDimension> dimensions) {
  const auto require = [&](bool condition, const std::string& rule, int64_t found) {
    if (!condition)
      throw std::runtime_error("tensor map of " + std::string(name) + ": " + rule + ", found " + std::to_string(found));
  };
  const int rank = int(dimensions.size());
  require(rank >= 2 && rank <= 4, "there must be 2 to 4 dimensions", rank);
  require(base != nullptr, "there must be a base address", 0);
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the base address must be a multiple of 16 bytes",
          reinterpret_cast<uintptr_t>(base) % 16);

  cuuint64_t sizes[4], strides[4];
  cuuint32_t box[4], steps[4] = {1, 1, 1, 1};
  int i = 0;
  for (const MapDimension& d : dimensions) {
    const std::string at = "dimension " + std::to_string(i);
    require(d.size >= 1, at + " must not be empty: return before the launch", d.size);
    require(d.size <= int64_t(1) << 32, at + " must have at most 2^32 elements", d.size);
    require(d.box >= 1 && d.box <= 256, at + "'s box must have 1 to 256 elements", d.box);
    if (i == 0) {
      require(d.stride == element.bytes, at + "'s stride must be an element of " + std::to_string(element.bytes) + " bytes",
              d.stride);
      require(d.box * element.bytes == 128, at + "'s box must be 128 bytes wide like a slab", d.box * element.bytes);
    } else if (d.size > 1) {
      require(d.stride > 0, at + "'s stride must be positive: copy an expanded view", d.stride);
      require(d.stride % 16 == 0, at + "'s stride must be a multiple of 16 bytes", d.stride);
      require(d.stride < int64_t(1) << 40, at + "'s stride must be below 2^40 bytes", d.stride);
    }
    sizes[i] = d.size, box[i] = cuuint32_t(d.box);
    strides[i] = d.size > 1 ? d.stride : 16;  // of a single element it says nothing, and may be anything
    ++i;
  }

  require(thread_has_context() == cudaSuccess, "the thread must have a CUDA context", thread_has_context());
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, element.type, rank, const_cast<void*>(base), sizes, strides + 1, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled must succeed", result);
  return map;
}

}  // namespace flashmoe::hopper
