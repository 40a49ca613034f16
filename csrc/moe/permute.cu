// Permute: copies each token into the rows of its experts.
//
// Goes by token, so that a token is read once and written K times; going by row would read it K times, and from device
// memory, because tokens that are neighbours in a row's expert are far apart.
#include <algorithm>

#include "moe/rows.cuh"

namespace flashmoe {
namespace {

constexpr int UNITS = 4;

// Of row i and slot i. A row that two slots name would have two writers, one that names a slot of another row would have
// none. The maps are small beside the rows, and no token waits for this.
template <typename Params>
__device__ void check_inverse(const Params& p, int64_t i) {
  const int64_t slots = p.tokens * p.slots;
  if (i < p.row_count) {
    const int slot = p.row_slot[i];
    assert(slot < slots && "row_slot names a slot that slot_row does not have");
    assert((slot < 0 || p.slot_row[slot] == i) && "slot_row must be the inverse of row_slot");
  }
  if (i < slots) {
    const int row = p.slot_row[i];
    assert(row < p.row_count && "slot_row names a row that row_slot does not have");
    assert((row < 0 || p.row_slot[row] == i) && "slot_row must be the inverse of row_slot");
  }
}

// One warp copies UNITS units per lane of one token (grid.y: the parts of a row); the blocks behind those of the tokens
// check the maps and zero the rows that belong to nobody. Unit is as many bytes as addresses allow.
template <typename Unit>
__global__ void __launch_bounds__(256) permute_kernel(PermuteParams p, unsigned token_blocks, int64_t width,
                                                      int64_t x_stride) {
  const int64_t part = int64_t(blockIdx.y) * UNITS * 32, begin = part + threadIdx.x;
  Unit* rows = static_cast<Unit*>(p.rows);

  if (blockIdx.x >= token_blocks) {
    const int64_t first = (int64_t(blockIdx.x - token_blocks) * blockDim.y + threadIdx.y) * 32;
    const int64_t own = first + threadIdx.x;
    if (blockIdx.y == 0) check_inverse(p, own);
    const unsigned nobodys = __ballot_sync(0xffffffff, own < p.row_count && p.row_slot[own] < 0);
    zero_rows(rows, width, first, nobodys, part, min(width, part + UNITS * 32));
    return;
  }

  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.tokens) return;
  const Unit* x = static_cast<const Unit*>(p.x) + token * x_stride;
  Unit unit[UNITS];
#pragma unroll
  for (int i = 0; i < UNITS; ++i)
    if (begin + i * 32 < width) unit[i] = x[begin + i * 32];
  for (int k = 0; k < p.slots; ++k) {
    const int row = p.slot_row[token * p.slots + k];
    assert(row < p.row_count && "slot_row names a row that row_slot does not have");
    if (row < 0) continue;
#pragma unroll
    for (int i = 0; i < UNITS; ++i)
      if (begin + i * 32 < width) rows[row * width + begin + i * 32] = unit[i];
  }
}

__global__ void __launch_bounds__(256) prepare_gather_kernel(PrepareGatherParams p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  check_inverse(p, i);
  if (i < p.counter_count) p.counters[i] = 0;
}

template <typename Unit>
cudaError_t launch(const PermuteParams& p, cudaStream_t stream) {
  const int64_t width = p.dim * p.element_size / int64_t(sizeof(Unit));
  const int64_t x_stride = p.x_stride * p.element_size / int64_t(sizeof(Unit));
  const int64_t entries = std::max(p.row_count, p.tokens * p.slots);  // of the longer map
  const unsigned token_blocks = blocks(p.tokens), map_blocks = blocks((entries + 31) / 32);
  const dim3 grid(token_blocks + map_blocks, unsigned((width + UNITS * 32 - 1) / (UNITS * 32)));
  permute_kernel<Unit><<<grid, WARPS, 0, stream>>>(p, token_blocks, width, x_stride);
  return cudaGetLastError();
}

}  // namespace

cudaError_t moe_prepare_gather(const PrepareGatherParams& p, cudaStream_t stream) {
  const int64_t entries = std::max({p.row_count, p.tokens * p.slots, p.counter_count});
  if (entries > 0) prepare_gather_kernel<<<unsigned((entries + 255) / 256), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t moe_permute(const PermuteParams& p, cudaStream_t stream) {
  if (std::max(p.row_count, p.tokens) == 0 || p.dim == 0) return cudaSuccess;
  if (aligned_to_16(p.x, p.x_stride * p.element_size) && aligned_to_16(p.rows, p.dim * p.element_size))
    return launch<uint4>(p, stream);
  switch (p.element_size) {
    case 2: return launch<uint16_t>(p, stream);
    case 4: return launch<uint32_t>(p, stream);
    case 8: return launch<uint64_t>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashmoe
