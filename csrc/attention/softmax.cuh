// The running softmax of attention's forward kernel, and the masks of all, on the accumulators of wgmma.
#pragma once

#include <cstdint>

#include "attention/tiles.cuh"
#include "hopper/reduce.cuh"
#include "hopper/wgmma.cuh"

namespace flashmoe {
namespace {

// The softmax of the two queries of which this thread holds a quarter of the scores, step by step.
//
// Probabilities are relative to a score that need not be the largest: floating-point numbers lose nothing when all of them
// are some powers of two larger. So a step takes the reference as it is, and only if its probabilities came out too large it
// looks for the largest score, scales all sums, and computes them again.
struct Softmax {
  static constexpr float LIMIT = 1 << 15;  // of a step's probabilities, for fp16's sake

  float scale;              // times log2(e): powers of two are what the hardware has
  float limit[2];           // 0 as long as no key has been seen; NaN for a query that is not there
  float shift[2] = {0, 0};  // the reference: a score times scale
  float sum[2] = {0, 0};    // of this thread's quarter

  // Raises the references to the largest scores. Sums until now, of values too, are to be scaled by `rescale`.
  template <int COUNT>
  __device__ __forceinline__ void raise(const float (&s)[COUNT], float (&rescale)[2]) {
    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = limit[r] == 0 ? -INFINITY : shift[r];
      const float raised = fmaxf(before, hopper::quad_max(high[r]) * scale);
      shift[r] = raised == -INFINITY ? 0 : raised;  // not NaN where all is hidden
      rescale[r] = hopper::exp2_fast(before - shift[r]);
      sum[r] *= rescale[r];
      if (raised > -INFINITY && limit[r] == 0) limit[r] = LIMIT;
    }
  }

  // Turns scores into probabilities, but for the division by `sum`, and adds those up.
  template <typename T, int COUNT>
  __device__ __forceinline__ void exponentials(const float (&s)[2 * COUNT], uint32_t (&p)[COUNT], float (&total)[2]) {
    total[0] = total[1] = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float a = hopper::exp2_fast(s[2 * i] * scale - shift[i % 2]);
      const float b = hopper::exp2_fast(s[2 * i + 1] * scale - shift[i % 2]);
      total[i % 2] += a, total[i % 2] += b;
      p[i] = hopper::pack<T>(a, b);
    }
  }

  // Whether the references have to be raised before such probabilities are used. The same in all threads of a warp. Nothing
  // is compared with NaN: rows of the next document change no bit of this one's.
  __device__ __forceinline__ bool too_low(const float (&total)[2]) {
    return __any_sync(0xffffffff, total[0] >= limit[0] || total[1] >= limit[1]);
  }
};

// -infinity, or what is given, for the columns, from `column` on, that a row does not see.
template <int COUNT>
__device__ __forceinline__ void mask(float (&s)[COUNT], const Band (&seen)[2], int column, float hidden = -INFINITY) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (i / 4 * 8 + i % 2 >= seen[i / 2 % 2].end - column) s[i] = hidden;
  if (max(seen[0].begin, seen[1].begin) <= column) return;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (i / 4 * 8 + i % 2 < seen[i / 2 % 2].begin - column) s[i] = hidden;
}

}  // namespace
}  // namespace flashmoe
