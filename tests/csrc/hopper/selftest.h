// What the self-test's C functions share. Each runs one kernel on the default stream to its end and returns 0, or not 0 and
// hopper_error() says why. tests/csrc/test_hopper.py calls them by ctypes, with addresses of PyTorch tensors.
#pragma once

#include <exception>
#include <string>

#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace flashmoe::hopper {

inline std::string last_error;

template <typename Function>
int run(Function launch) {
  try {
    cudaError_t error = launch();
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    last_error = cudaGetErrorString(error);
    return error;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace flashmoe::hopper
