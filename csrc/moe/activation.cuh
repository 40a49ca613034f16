// SwiGLU in float32, the same in forward and backward: what is computed again there is equal bit by bit.
#pragma once

#include "hopper/reduce.cuh"

namespace flashmoe {
namespace {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1, 1 + hopper::exp2_fast(x * -1.44269504f)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

}  // namespace
}  // namespace flashmoe
