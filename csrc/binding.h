// The boundary to PyTorch that all ops.cpp share: checks of arguments, the current stream.
//
// Public functions in Python check first and raise ValueError or TypeError. The checks here are for whoever calls
// torch.ops.flashmoe directly: they raise RuntimeError with the same words, and nothing is read out of bounds.
#pragma once

#include <cstdint>
#include <string>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace flashmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of x's device, as PyTorch has it: kernels are ordered with everything else that runs there.
inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline std::string text(const Tensor& x) {  // its shape: [2, 3]
  std::string result = "[";
  for (int64_t i = 0; i < x.dim(); ++i) result += (i ? ", " : "") + std::to_string(x.size(i));
  return result + "]";
}

// What the library holds code for: see CMakeLists.txt.
inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                  "flashmoe_train's kernels need a GPU of compute capability 8.0 (Ampere) or later; on older ones delete "
                  "libflashmoe_cuda.so from the package: PyTorch's own operations then do this work");
  STD_CUDA_CHECK(error);
}

// Kernels for the tensor cores are compiled for sm_90a, which runs on Hopper GPUs and no other. `function` is the public
// one that has the kernel.
inline void check_hopper(const char* function, int device) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  STD_TORCH_CHECK(major == 9 && minor == 0, "the ", function,
                  " kernel takes GPUs of compute capability 9.0 (Hopper), found ", major, ".", minor, "; flashmoe_train.",
                  function, " runs PyTorch's kernels there");
}

// TMA reads contiguous rows of 2-byte elements that begin at multiples of 16 bytes, none of them twice: anything else is
// copied.
// `copies` in flashmoe_train/ops/attention/checks.py tells users by the same rule.
inline Tensor readable(const Tensor& x) {
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(x.dim() - 1) == 1;
  for (int i = 0; i < x.dim() - 1; ++i) fits &= x.size(i) <= 1 || (x.stride(i) > 0 && x.stride(i) % 8 == 0);
  if (fits) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  torch::stable::copy_(copy, x);
  return copy;
}

inline void check_device(const char* name, const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == first.get_device_index(), name, " must be on CUDA device ",
                  first.get_device_index(), " like the other tensors");
}

// A floating-point matrix on a CUDA device, with a contiguous last dimension. One argument there is enough to get here,
// so the first one may be elsewhere.
inline void check_matrix(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), name, " must be on a CUDA device like the other tensors");
  STD_TORCH_CHECK(x.dim() == 2, name, " must have 2 dimensions, found ", text(x));
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float ||
                      type == ScalarType::Double,
                  name, " must be bfloat16, float16, float32 or float64, found ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1 || x.numel() == 0, name,
                  " must have a contiguous last dimension, found stride ", x.stride(1));
  STD_TORCH_CHECK(x.size(1) <= INT32_MAX && x.stride(0) <= INT32_MAX, name,
                  " must have rows of fewer than 2^31 elements, found ", text(x), " with stride ", x.stride(0));
}

// An int32 tensor of so many dimensions on the device of `first`.
inline void check_indices(const char* name, const Tensor& x, int64_t dimensions, const Tensor& first) {
  STD_TORCH_CHECK(x.dim() == dimensions, name, " must have ", dimensions, " dimensions, found ", text(x));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, name, " must be int32, found ",
                  torch::headeronly::toString(x.scalar_type()));
  check_device(name, x, first);
}

}  // namespace flashmoe
