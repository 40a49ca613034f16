// Combine: every token gathers and sums the rows that its experts computed; and the gradient of that.
//
// Both are bound by memory: R * d elements are read once (and written once by the gradient). One writer per output and a
// fixed order of sums, so results repeat bitwise. docs/kernels/combine.md says why the kernels are built as they are.
#include <algorithm>

#include "moe/rows.cuh"

namespace flashmoe {
namespace {

// ------------------------------------------------------------------------------------------------------------- forward

// Packs per lane of a warp's part of a row. Fewer slots are fewer loads in flight, so the part is longer.
template <int GROUP>
constexpr int PACKS = GROUP <= 2 ? 16 : 8;

// One warp sums PACKS<GROUP> packs per lane of one token (grid.y: the parts of a row), GROUP slots at a time: the loads of
// all slots of a group are under way before the first sum waits for one. Where a group holds all of a token's slots, which
// is the rule, their rows and weights are fetched once for all columns.
template <typename T, int N, int GROUP>
__global__ void __launch_bounds__(256, 3) combine_kernel(CombineParams p) {
  using Sum = Accumulator<T>;
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.tokens) return;

  const Pack<T, N>* rows = static_cast<const Pack<T, N>*>(p.rows);
  const uint32_t stride = p.rows_stride / N, width = p.dim / N;  // in packs
  int row[GROUP];
  Sum weight[GROUP];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const int64_t slot = token * p.slots + first + i;
      row[i] = first + i < p.slots ? p.slot_row[slot] : -1;
      assert(row[i] < p.row_count && "slot_row names a row that rows does not have");
      // What the weight of a slot without a row holds may be NaN: it is not read.
      weight[i] = row[i] < 0 ? Sum(0) : p.weights ? static_cast<const Sum*>(p.weights)[slot] : Sum(1);
    }
  };
  const auto add = [&](Sum (&sum)[N], uint32_t column) {
    Pack<T, N> pack[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      pack[i] = Pack<T, N>{};
      if (row[i] >= 0) pack[i] = rows[uint64_t(uint32_t(row[i])) * stride + column];
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += weight[i] * static_cast<Sum>(pack[i].element[j]);
  };

  fetch(0);
  Pack<T, N>* out = static_cast<Pack<T, N>*>(p.out) + token * width;
  uint32_t column = blockIdx.y * PACKS<GROUP> * 32 + threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < PACKS<GROUP> && column < width; ++i, column += 32) {
    Sum sum[N] = {};
    add(sum, column);
    if (p.slots > GROUP) {
      for (int first = GROUP; first < p.slots; first += GROUP) {
        fetch(first);
        add(sum, column);
      }
      fetch(0);
    }
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.element[j] = static_cast<T>(sum[j]);
    out[column] = result;
  }
}

template <typename T, int N, int GROUP>
void launch_combine(const CombineParams& p, cudaStream_t stream) {
  constexpr int PART = PACKS<GROUP> * 32 * N;
  const dim3 grid(blocks(p.tokens), unsigned((p.dim + PART - 1) / PART));
  combine_kernel<T, N, GROUP><<<grid, WARPS, 0, stream>>>(p);
}

// ------------------------------------------------------------------------------------------------------------ backward

// One warp per slot: scales the token's gradient into the slot's row and sums its product with the row. The slots of a
// token are neighbours, so its gradient comes from device memory once.
template <typename T, int N>
__global__ void __launch_bounds__(256) combine_backward_kernel(CombineBackwardParams p) {
  using Sum = Accumulator<T>;
  const int64_t slot = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int lane = threadIdx.x;
  if (slot >= p.tokens * p.slots) return;
  const int row = p.slot_row[slot];
  assert(row < p.row_count && "slot_row names a row that rows does not have");
  Sum* dweight = static_cast<Sum*>(p.dweights) + slot;
  if (row < 0) {
    if (lane == 0) *dweight = Sum(0);
    return;
  }

  const T* dout = static_cast<const T*>(p.dout) + slot / p.slots * p.dout_stride;
  const T* y = static_cast<const T*>(p.rows) + row * p.rows_stride;
  T* dy = static_cast<T*>(p.drows) + row * p.dim;
  const Sum weight = static_cast<const Sum*>(p.weights)[slot];
  if (lane == 0) p.row_slot[row] = static_cast<int>(slot);  // not last: slot would live in registers until then
  Sum product = 0;
#pragma unroll 4
  for (int64_t column = lane * N; column < p.dim; column += 32 * N) {
    const Pack<T, N> gradient = *reinterpret_cast<const Pack<T, N>*>(dout + column);
    const Pack<T, N> output = *reinterpret_cast<const Pack<T, N>*>(y + column);
    Pack<T, N> scaled;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Sum g = static_cast<Sum>(gradient.element[j]);
      product += g * static_cast<Sum>(output.element[j]);
      scaled.element[j] = static_cast<T>(weight * g);
    }
    *reinterpret_cast<Pack<T, N>*>(dy + column) = scaled;
  }

  product = warp_sum(product);
  if (lane == 0) *dweight = product;
}

// After all slots have written: one warp zeros those of 32 rows that no slot wrote, and asserts of 32 slots that nobody
// else wrote into their rows. An atomic in the kernel above would say so too, but its warps would wait for the answer.
template <typename T>
__global__ void __launch_bounds__(256) finish_backward_kernel(CombineBackwardParams p) {
  const int64_t first = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * 32, own = first + threadIdx.x;
  if (own < p.tokens * p.slots) {
    const int row = p.slot_row[own];
    assert((row < 0 || p.row_slot[row] == own) && "slot_row must not name a row twice");
  }
  const unsigned nobodys = __ballot_sync(0xffffffff, own < p.row_count && p.row_slot[own] < 0);
  zero_rows(static_cast<T*>(p.drows), p.dim, first, nobodys, 0, p.dim);
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------- launch

cudaError_t moe_combine(const CombineParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.dim == 0) return cudaSuccess;
  return for_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / sizeof(T);
    if (!aligned_to_16(p.rows, p.rows_stride * sizeof(T)) || !aligned_to_16(p.out, p.dim * sizeof(T)))
      launch_combine<T, 1, 4>(p, stream);
    else if (p.slots <= 1)
      launch_combine<T, N, 1>(p, stream);
    else if (p.slots <= 2)
      launch_combine<T, N, 2>(p, stream);
    else if (p.slots <= 4)
      launch_combine<T, N, 4>(p, stream);
    else if (p.slots <= 6)
      launch_combine<T, N, 6>(p, stream);
    else
      launch_combine<T, N, 8>(p, stream);
    return cudaGetLastError();
  });
}

cudaError_t moe_combine_backward(const CombineBackwardParams& p, cudaStream_t stream) {
  if (p.row_count > 0)
    if (const cudaError_t error = cudaMemsetAsync(p.row_slot, -1, p.row_count * sizeof(int32_t), stream)) return error;
  return for_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / sizeof(T);
    const int64_t slots = p.tokens * p.slots;
    const bool aligned = aligned_to_16(p.rows, p.rows_stride * sizeof(T)) &&
                         aligned_to_16(p.dout, p.dout_stride * sizeof(T)) && aligned_to_16(p.drows, p.dim * sizeof(T));
    if (slots > 0 && aligned) combine_backward_kernel<T, N><<<blocks(slots), WARPS, 0, stream>>>(p);
    if (slots > 0 && !aligned) combine_backward_kernel<T, 1><<<blocks(slots), WARPS, 0, stream>>>(p);
    const int64_t entries = std::max(p.row_count, slots);
    if (entries > 0) finish_backward_kernel<T><<<blocks((entries + 31) / 32), WARPS, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace flashmoe
