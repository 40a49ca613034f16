// The exchange of tokens over peer memory as the host sees it: what each kernel does, its parameters, its launch. No PyTorch.
//
//   W ranks    T tokens here    M places for tokens of each rank    K experts of a token    d model dim
//
// Every rank has the same memory, which the others reach over NVLink: what is called shared below lies there, at the same
// distance from its begin on every rank. An exchange uses one of several channels. Of a channel a rank has rows, written by
// the others, and signals [3, W]: how often each rank's data has arrived here, how often each rank has read what this one
// sent, and how many tokens came. Both only grow: `epoch`, kept on the device, says how often the channel has been used, so
// that a replayed CUDA graph goes on where it was. Writers wait until what they sent before has been read; readers until it
// has arrived.
//
// A wait that lasts too long writes who was missing into host memory and goes on, with whatever data is there; so do all
// later ones, at once. The host reads the report when it comes by: nobody hangs, and no kernel traps.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flashmoe {

constexpr int MOST_RANKS = 8;

enum Signal { ARRIVED, READ, COUNT, SIGNALS };

// Words of the state of an exchange, in device memory: two of each channel, then one for all.
constexpr int CHANNELS = 4, EPOCH = 0, DONE = 1, FAILED = 2 * CHANNELS, STATE_WORDS = 16;

// Words of the report, in host memory; RECORDED is written last.
enum Report { RECORDED, MISSING, LAYER, AWAITED, CHANNEL, REPORT_WORDS = 8 };

struct Link {
  const int64_t* distance;  // [W]: from this rank's memory to each rank's, in bytes
  int32_t* signals;         // shared: [channels, 3, W]
  int32_t* state;           // [STATE_WORDS]
  int32_t* report;          // [REPORT_WORDS], host memory
  int64_t patience;         // ns
  int world, rank, channel, layer;
};

// position[t, w]: the number of token t among those that go to rank w, -1 if it does not; counts[w]: how many do.
struct ExchangePlanParams {
  const int32_t* ids;  // [T, K]
  int32_t* position;   // [T, W]
  int32_t* counts;     // [W]
  int64_t tokens;
  int slots, experts, world;
};
cudaError_t exchange_plan(const ExchangePlanParams& params, cudaStream_t stream);

// Row position[t, w] of this rank's part of rank w's `rows` becomes x[t], for all t and w. Says before that the channels in
// `read`, a mask, have been read.
struct DispatchParams {
  Link link;
  const void* x;            // [T, d]
  const int32_t* position;  // [T, W]
  const int32_t* counts;    // [W]
  const int32_t* ids;       // [T, K], or null: no routing goes along
  const float* weights;     // [T, K]
  void* rows;               // shared: [W, M, d]
  int32_t* routing;         // shared: [W, M, 2 K]: ids, weights
  int64_t tokens, places, x_stride_bytes, row_bytes;  // T, M; multiples of 16
  int slots, blocks, read;
};
cudaError_t exchange_dispatch(const DispatchParams& params, cudaStream_t stream);

// Returns when everything has arrived, in the order of the stream.
cudaError_t exchange_wait(const Link& link, cudaStream_t stream);

// What has arrived, copied to memory of this rank's own: counts, and of each place ids among the experts here and weights.
struct ReceiveParams {
  Link link;
  const int32_t* routing;  // shared: [W, M, 2 K], or null
  int32_t* counts;         // [W]
  int32_t* ids;            // [W M, K]: -1 of others' experts and where no token is
  float* weights;          // [W M, K]: 0 there
  int64_t places;
  int slots, here;  // experts of a rank
};
cudaError_t exchange_receive(const ReceiveParams& params, cudaStream_t stream);

// The way back. Rows go to the rank that their token is from, into its `sums`; values of slots into its `slot_values`.
// `read` as above.
struct ReturnParams {
  Link link;
  const void* rows;        // [W M, d]
  const int32_t* arrived;  // [W]: how many of each source there are
  const float* values;     // [W M, K], or null
  void* sums;              // shared: [W, M, d]
  float* slot_values;      // shared: [W, M, K]
  int64_t places, rows_stride_bytes, row_bytes;
  int slots, blocks, read;
};
cudaError_t exchange_return(const ReturnParams& params, cudaStream_t stream);

// After a wait: out[t] = the sum over ranks, in order and in float32, of what has come back of token t; of this rank's own
// experts from `rows`. dslots[t, k] = the value of slot k of the rank that has its expert, 0 of skipped ones.
struct SumParams {
  Link link;
  const void* rows;         // as in ReturnParams, with values, sums and slot_values
  const float* values;
  const void* sums;
  const float* slot_values;
  const int32_t* position;  // [T, W]
  const int32_t* ids;       // [T, K], if there are values
  void* out;                // [T, d], contiguous
  float* dslots;            // [T, K]
  int64_t tokens, places, rows_stride_bytes, row_bytes;
  int slots, here;
  bool half;  // float16, else bfloat16
};
cudaError_t exchange_sum(const SumParams& params, cudaStream_t stream);

}  // namespace flashmoe
