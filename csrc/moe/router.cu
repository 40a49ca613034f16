// Router: from the logits of each token to its experts and their weights, with the sums that balancing losses need; and the
// gradient of that.
//
// The usual router (up to 512 experts, up to 32 chosen) is one warp per token with everything in registers, each lane having
// V neighbouring experts: of equal scores the lowest lane's is the lowest id. It is bound by instructions, most of them for
// the K rounds of the choice. All other cases, and float64, take a warp per token too but go through memory, slowly.
//
// A NaN is the largest score, as in torch.sort; no score, whatever it is, gives an id twice or out of range. Statistics are
// summed in a fixed order: per warp, per block, over the blocks. Results repeat bitwise.
#include <algorithm>
#include <climits>
#include <cmath>

#include "moe/rows.cuh"

namespace flashmoe {
namespace {

constexpr double EPSILON = 1e-20;     // of the renormalisation
constexpr int LANE_EXPERTS = 16;      // at most, in registers
constexpr int BLOCKS = 512;           // about a wave; each writes statistics that have to be summed
constexpr int SMALL_BLOCKS = 2048;    // the same of single warps

// ----------------------------------------------------------------------------------------------------- numbers as keys
// Integers in the order of the numbers, and back. NaNs are the largest.

template <typename Sum>
using KeyOf = std::conditional_t<std::is_same_v<Sum, double>, long long, int>;

template <typename Key>
constexpr Key TAKEN = sizeof(Key) == 8 ? Key(LLONG_MIN) : Key(INT_MIN);  // below every number

__device__ int key_of(float x) {
  const int bits = __float_as_int(x);
  return x != x ? INT_MAX : bits ^ (bits >> 31 & INT_MAX);
}
__device__ long long key_of(double x) {
  const long long bits = __double_as_longlong(x);
  return x != x ? LLONG_MAX : bits ^ (bits >> 63 & LLONG_MAX);
}
__device__ float number(int key) { return __int_as_float(key ^ (key >> 31 & INT_MAX)); }
__device__ double number(long long key) { return __longlong_as_double(key ^ (key >> 63 & LLONG_MAX)); }

// ------------------------------------------------------------------------------------------------------ over the lanes

// Of `lanes` neighbours, a power of two.
__device__ float sum_of(int lanes, float x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
  return x;
}
__device__ float max_of(int lanes, float x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(ALL, x, distance));
  return x;
}
__device__ float warp_max(float x) { return number(__reduce_max_sync(ALL, key_of(x))); }
__device__ double warp_max(double x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmax(x, __shfl_xor_sync(ALL, x, distance));
  return x;
}

// ------------------------------------------------------------------------------------------------------------- scores

template <typename Sum>
struct Score {
  bool sigmoid;
  Sum most, factor;  // of the softmax: the largest logit, 1 / sum
  __device__ Sum operator()(Sum logit) const {
    return sigmoid ? Sum(1) / (Sum(1) + std::exp(-logit)) : std::exp(logit - most) * factor;
  }
};

// Over logit(0) ... logit(count - 1), every lane taking each 32nd.
template <typename Sum, typename Logit>
__device__ Score<Sum> softmax(int count, Logit logit) {
  Sum most = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < count; i += 32) most = max(most, logit(i));
  most = warp_max(most);
  for (int i = threadIdx.x; i < count; i += 32) sum += std::exp(logit(i) - most);
  return {false, most, Sum(1) / warp_sum(sum)};
}

// The part of the tokens that a block has: it never crosses from one sequence into the next.
struct Part {
  int64_t begin, end;
  __device__ explicit Part(const RouterParams& p) {
    const int64_t length = p.tokens / p.sequences, each = (length + p.parts - 1) / p.parts;
    const int64_t sequence = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    begin = sequence * length + min(part * each, length);
    end = sequence * length + min((part + 1) * each, length);
  }
};

// --------------------------------------------------------------------------------------------------------- in registers

// Elements that a lane moves by one instruction.
template <typename T, int V>
constexpr int WIDTH = V * int(sizeof(T)) < 16 ? V : 16 / int(sizeof(T));

// The lane's logits of a token, -inf behind the last expert. `vector`: addresses allow WIDTH elements at a time.
template <typename T, int V>
__device__ void load(float (&x)[V], const T* logits, int experts, bool vector) {
  constexpr int N = WIDTH<T, V>;
  const int first = threadIdx.x * V;
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = -INFINITY;
  if (vector) {
    if (first < experts) {
#pragma unroll
      for (int i = 0; i < V; i += N) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(logits + first + i);
#pragma unroll
        for (int j = 0; j < N; ++j) x[i + j] = static_cast<float>(pack.element[j]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (first + i < experts) x[i] = static_cast<float>(logits[first + i]);
  }
}

// Makes scores of the lane's logits.
template <int V>
__device__ Score<float> score_all(float (&x)[V], bool sigmoid) {
  Score<float> score{sigmoid, 0, 0};
  if (sigmoid) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = score(x[i]);
    return score;
  }
  float most = x[0], sum = 0;
#pragma unroll
  for (int i = 1; i < V; ++i) most = max(most, x[i]);
  score.most = warp_max(most);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = std::exp(x[i] - score.most);
    sum += x[i];
  }
  score.factor = 1 / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] *= score.factor;
  return score;
}

// Closes the experts of all but the limited_groups groups whose two best keys have the largest sum. A group is `span`
// whole lanes, a power of two.
template <int V>
__device__ void close_groups(const RouterParams& p, int (&key)[V]) {
  const int span = p.experts / p.groups / V, own = threadIdx.x / span;
  int best = TAKEN<int>, second = TAKEN<int>;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    second = max(second, min(best, key[i]));
    best = max(best, key[i]);
  }
  for (int distance = 1; distance < span; distance *= 2) {
    const int other = __shfl_xor_sync(ALL, best, distance), others_second = __shfl_xor_sync(ALL, second, distance);
    second = max(min(best, other), max(second, others_second));
    best = max(best, other);
  }
  const int value = key_of(number(best) + number(second));
  int better = 0;  // groups
  for (int group = 0; group < p.groups; ++group) {
    const int other = __shfl_sync(ALL, value, group * span);
    better += other > value || (other == value && group < own);
  }
  if (better >= p.limited_groups && own < p.groups)
#pragma unroll
    for (int i = 0; i < V; ++i) key[i] = key_of(-INFINITY);
}

// A lane's keys as sorted lists of four: the best of the lane is at the head of a list, and what a round takes is taken by
// shifting its list.
template <int V>
struct Lists {
  static constexpr int LENGTH = V < 4 ? V : 4, COUNT = V / LENGTH;
  int key[V];
  uint32_t order[COUNT];  // bytes: where in `key` the entries of a list were

  template <int I>
  __device__ void swap_if_less(int list) {  // strictly: of equal keys the lower expert stays in front
    constexpr uint32_t SWAP = I == 0 ? 0x3201 : I == 1 ? 0x3120 : 0x2310;
    int &a = key[list * LENGTH + I], &b = key[list * LENGTH + I + 1];
    if (a < b) order[list] = __byte_perm(order[list], 0, SWAP);
    const int less = min(a, b);
    a = max(a, b), b = less;
  }

  __device__ void sort() {
#pragma unroll
    for (int list = 0; list < COUNT; ++list) {
      order[list] = 0x03020100 + uint32_t(list * LENGTH) * 0x01010101;
      if constexpr (LENGTH > 1) swap_if_less<0>(list);
      if constexpr (LENGTH > 2) {
        swap_if_less<1>(list);
        swap_if_less<2>(list);
        swap_if_less<0>(list);
        swap_if_less<1>(list);
        swap_if_less<0>(list);
      }
    }
  }

  // Takes the best of all lanes, of equals the lowest; its expert.
  __device__ int take() {
    int best = key[0];
#pragma unroll
    for (int list = 1; list < COUNT; ++list) best = max(best, key[list * LENGTH]);
    const int most = __reduce_max_sync(ALL, best);
    const int owner = __ffs(__ballot_sync(ALL, best == most)) - 1;
    uint32_t place = order[0] & 0xff;
    bool open = int(threadIdx.x) == owner;
#pragma unroll
    for (int list = 0; list < COUNT; ++list) {
      int* entry = key + list * LENGTH;
      if (!open || (COUNT > 1 && entry[0] != most)) continue;
      open = false;
      if (list > 0) place = order[list] & 0xff;
      order[list] >>= 8;
#pragma unroll
      for (int i = 1; i < LENGTH; ++i) entry[i - 1] = entry[i];
      entry[LENGTH - 1] = TAKEN<int>;
    }
    return __shfl_sync(ALL, int(threadIdx.x * V + place), owner);
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(256, V <= 4 ? 4 : V == 8 ? 3 : 2) router_kernel(RouterParams p, bool vector) {
  __shared__ float block_sums[8][32 * V];
  __shared__ int block_counts[32 * V];
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
  const Part part(p);
  for (int e = thread; e < 32 * V; e += 256) block_counts[e] = 0;
  __syncthreads();

  float bias[V], sums[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const bool biased = p.bias && lane * V + i < p.experts;
    bias[i] = biased ? static_cast<const float*>(p.bias)[lane * V + i] : 0;
  }
  // The weights are computed of several tokens at a time, as many as the lanes have slots for: slot k of token j of such a
  // batch is lane j * span + k.
  int span = 1;
  while (span < p.slots) span *= 2;
  const int own_slot = lane % span, own_token = lane / span;
  for (int64_t first = part.begin + warp; first < part.end; first += 8 * (32 / span)) {
    int id = 0;
    Score<float> own_score{};
    for (int j = 0; j < 32 / span && first + 8 * j < part.end; ++j) {
      float scores[V];
      const T* logits = static_cast<const T*>(p.logits) + (first + 8 * j) * p.logits_stride;
      load<T, V>(scores, logits, p.experts, vector);
      const Score<float> score = score_all<V>(scores, p.function == ScoreFunction::sigmoid);
      if (own_token == j) own_score = score;
      Lists<V> lists;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[i] += scores[i];
        lists.key[i] = lane * V + i < p.experts ? key_of(scores[i] + bias[i]) : TAKEN<int>;
      }
      if (p.groups > 1) close_groups<V>(p, lists.key);
      lists.sort();
      for (int k = 0; k < p.slots; ++k) {
        const int taken = lists.take();
        if (lane == j * span + k) id = taken;
      }
    }

    // From the logits, which are in the cache: the scores are other lanes'.
    const int64_t token = first + 8 * own_token;
    const bool own = own_slot < p.slots && token < part.end;
    float logit = -INFINITY;
    if (own) logit = static_cast<float>(static_cast<const T*>(p.logits)[token * p.logits_stride + id]);
    if (p.function == ScoreFunction::topk_softmax) {
      const float most = max_of(span, logit);
      own_score = {false, most, 1 / sum_of(span, std::exp(logit - most))};
    }
    float weight = own ? own_score(logit) : 0;
    if (p.renormalize) weight /= sum_of(span, weight) + float(EPSILON);
    if (own) {
      static_cast<float*>(p.weights)[token * p.slots + own_slot] = weight * float(p.scale);
      p.ids[token * p.slots + own_slot] = id;
      atomicAdd(&block_counts[id], 1);
    }
  }

  // Statistics of the block.
#pragma unroll
  for (int i = 0; i < V; ++i) block_sums[warp][lane * V + i] = sums[i];
  __syncthreads();
  for (int e = thread; e < p.experts; e += 256) {
    float sum = 0;
    for (int w = 0; w < 8; ++w) sum += block_sums[w][e];
    static_cast<float*>(p.part_sums)[int64_t(blockIdx.x) * p.experts + e] = sum;
    p.part_counts[int64_t(blockIdx.x) * p.experts + e] = block_counts[e];
  }
}

// One warp per token.
template <typename T, int V>
__global__ void __launch_bounds__(256, V <= 4 ? 4 : V == 8 ? 3 : 2)
    router_backward_kernel(RouterBackwardParams p, bool vector) {
  const int lane = threadIdx.x;
  const int64_t token = int64_t(blockIdx.x) * 8 + threadIdx.y;
  if (token >= p.tokens) return;
  const T* logits = static_cast<const T*>(p.logits) + token * p.logits_stride;
  const bool sigmoid = p.function == ScoreFunction::sigmoid, topk = p.function == ScoreFunction::topk_softmax;

  // What is loaded is under way together.
  const bool own = lane < p.slots;
  const int id = own ? p.ids[token * p.slots + lane] : 0;
  assert(id >= 0 && id < p.experts && "ids must be experts");
  float gradient = own ? static_cast<const float*>(p.dweights)[token * p.slots + lane] * float(p.scale) : 0;
  const float logit = own ? static_cast<float>(logits[id]) : -INFINITY;
  float scores[V], d[V] = {};
  load<T, V>(scores, logits, p.experts, vector);
  if (p.dscore_sums) {
    const int64_t sequence = token / (p.tokens / p.sequences);
    const float* sums = static_cast<const float*>(p.dscore_sums) + sequence * p.experts;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (lane * V + i < p.experts) d[i] = sums[lane * V + i];
  }

  // Through scale and renormalisation to the weights, lane k having slot k.
  const Score<float> score = score_all<V>(scores, sigmoid);
  const auto chosen = topk ? softmax<float>(p.slots, [&](int) { return logit; }) : score;
  const float weight = own ? chosen(logit) : 0;
  if (p.renormalize) {
    const float total = warp_sum(weight) + float(EPSILON), product = warp_sum(gradient * weight);
    gradient = (gradient - product / total) / total;
  }
  if (topk) gradient = weight * (gradient - warp_sum(gradient * weight));

  // From the slots to the lanes that have their experts: to their scores, or to their logits.
  const auto spread = [&] {
    for (int k = 0; k < p.slots; ++k) {
      const int place = __shfl_sync(ALL, id, k) - lane * V;
      const float of_slot = __shfl_sync(ALL, gradient, k);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (place == i) d[i] += of_slot;
    }
  };
  if (!topk) spread();
  float product = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) product += d[i] * scores[i];
  if (!sigmoid) product = warp_sum(product);
#pragma unroll
  for (int i = 0; i < V; ++i) d[i] = sigmoid ? d[i] * scores[i] * (1 - scores[i]) : scores[i] * (d[i] - product);
  if (topk) spread();

  constexpr int N = WIDTH<T, V>;
  T* dlogits = static_cast<T*>(p.dlogits) + token * p.experts + lane * V;
  if (vector) {
    if (lane * V < p.experts) {
#pragma unroll
      for (int i = 0; i < V; i += N) {
        Pack<T, N> pack;
#pragma unroll
        for (int j = 0; j < N; ++j) pack.element[j] = static_cast<T>(d[i + j]);
        *reinterpret_cast<Pack<T, N>*>(dlogits + i) = pack;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (lane * V + i < p.experts) dlogits[i] = static_cast<T>(d[i]);
  }
}

// ------------------------------------------------------------------------------------------------------ through memory
// One warp per block; lane l has experts l, l + 32, ... Shared memory has a key per expert (and one per group), or what the
// weights add to the gradient of each score.

// The largest of key[0] ... key[count - 1] and, of equals, the lowest index, for all lanes.
template <typename Key>
__device__ int best_of(const Key* key, int count) {
  Key best = TAKEN<Key>;
  int place = INT_MAX;
  for (int i = threadIdx.x; i < count; i += 32)
    if (key[i] > best) best = key[i], place = i;
  for (int distance = 16; distance > 0; distance /= 2) {
    const Key other = __shfl_xor_sync(ALL, best, distance);
    const int others_place = __shfl_xor_sync(ALL, place, distance);
    if (other > best || (other == best && others_place < place)) best = other, place = others_place;
  }
  return place;
}

// As close_groups above, for groups of any size.
template <typename Sum, typename Key = KeyOf<Sum>>
__device__ void close_groups_in_memory(const RouterParams& p, Key* key, Key* group_key) {
  const int size = p.experts / p.groups;
  __syncwarp();
  for (int group = threadIdx.x; group < p.groups; group += 32) {
    Key best = TAKEN<Key>, second = TAKEN<Key>;
    for (int e = group * size; e < (group + 1) * size; ++e) {
      second = max(second, min(best, key[e]));
      best = max(best, key[e]);
    }
    group_key[group] = key_of(number(best) + number(second));
  }
  __syncwarp();
  for (int i = 0; i < p.limited_groups; ++i) {
    const int group = best_of(group_key, p.groups);
    __syncwarp();
    if (threadIdx.x == 0) group_key[group] = TAKEN<Key>;
    __syncwarp();
  }
  for (int e = threadIdx.x; e < p.experts; e += 32)
    if (group_key[e / size] != TAKEN<Key>) key[e] = key_of(-Sum(INFINITY));
}

template <typename T>
__global__ void __launch_bounds__(32) router_in_memory_kernel(RouterParams p) {
  using Sum = Accumulator<T>;
  using Key = KeyOf<Sum>;
  extern __shared__ long long shared[];
  Key* key = reinterpret_cast<Key*>(shared);  // [E]
  Key* group_key = key + p.experts;           // [groups]
  const int lane = threadIdx.x;
  const Part part(p);
  const Sum* bias = static_cast<const Sum*>(p.bias);
  Sum* sums = static_cast<Sum*>(p.part_sums) + int64_t(blockIdx.x) * p.experts;
  int* counts = p.part_counts + int64_t(blockIdx.x) * p.experts;
  for (int e = lane; e < p.experts; e += 32) sums[e] = 0, counts[e] = 0;

  for (int64_t token = part.begin; token < part.end; ++token) {
    const T* logits = static_cast<const T*>(p.logits) + token * p.logits_stride;
    const auto logit = [&](int e) { return static_cast<Sum>(logits[e]); };
    const Score<Sum> score =
        p.function == ScoreFunction::sigmoid ? Score<Sum>{true, 0, 0} : softmax<Sum>(p.experts, logit);
    for (int e = lane; e < p.experts; e += 32) {
      const Sum value = score(logit(e));
      sums[e] += value;
      key[e] = key_of(bias ? value + bias[e] : value);
    }
    if (p.groups > 1) close_groups_in_memory<Sum>(p, key, group_key);

    // Every lane reads and takes keys of its own experts alone.
    int* ids = p.ids + token * p.slots;
    for (int k = 0; k < p.slots; ++k) {
      const int id = best_of(key, p.experts);
      if (id % 32 != lane) continue;
      key[id] = TAKEN<Key>;
      counts[id] += 1;
      ids[k] = id;
    }
    __syncwarp();

    const auto of_slot = [&](int k) { return logit(ids[k]); };
    const auto chosen = p.function == ScoreFunction::topk_softmax ? softmax<Sum>(p.slots, of_slot) : score;
    Sum total = 0;
    for (int k = lane; k < p.slots; k += 32) total += chosen(of_slot(k));
    total = p.renormalize ? warp_sum(total) + Sum(EPSILON) : Sum(1);
    Sum* weights = static_cast<Sum*>(p.weights) + token * p.slots;
    for (int k = lane; k < p.slots; k += 32) weights[k] = chosen(of_slot(k)) / total * Sum(p.scale);
    __syncwarp();
  }
}

template <typename T>
__global__ void __launch_bounds__(32) router_backward_in_memory_kernel(RouterBackwardParams p) {
  using Sum = Accumulator<T>;
  extern __shared__ long long shared[];
  Sum* added = reinterpret_cast<Sum*>(shared);  // [E]: by the weights, to the gradient of scores or logits
  const int lane = threadIdx.x;
  const bool sigmoid = p.function == ScoreFunction::sigmoid, topk = p.function == ScoreFunction::topk_softmax;
  const int64_t token = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + token * p.logits_stride;
  const int* ids = p.ids + token * p.slots;
  const Sum* dweights = static_cast<const Sum*>(p.dweights) + token * p.slots;
  const auto logit = [&](int e) { return static_cast<Sum>(logits[e]); };
  const auto of_slot = [&](int k) {
    assert(ids[k] >= 0 && ids[k] < p.experts && "ids must be experts");
    return logit(ids[k]);
  };
  const Score<Sum> score = sigmoid ? Score<Sum>{true, 0, 0} : softmax<Sum>(p.experts, logit);
  const auto chosen = topk ? softmax<Sum>(p.slots, of_slot) : score;

  // Through scale and renormalisation: gradient(k) = dweights[k] * factor - subtracted.
  Sum factor = p.scale, subtracted = 0, total = 0, product = 0;
  for (int k = lane; k < p.slots; k += 32) {
    total += chosen(of_slot(k));
    product += chosen(of_slot(k)) * dweights[k] * factor;
  }
  total = warp_sum(total) + Sum(EPSILON), product = warp_sum(product);
  if (p.renormalize) {
    subtracted = product / total / total;
    factor /= total;
  }
  const auto gradient = [&](int k) { return dweights[k] * factor - subtracted; };
  Sum mean = 0;  // of top-k softmax
  if (topk) {
    for (int k = lane; k < p.slots; k += 32) mean += chosen(of_slot(k)) * gradient(k);
    mean = warp_sum(mean);
  }
  for (int e = lane; e < p.experts; e += 32) added[e] = 0;
  for (int k = 0; k < p.slots; ++k)  // in order, each by the lane that has the expert
    if (ids[k] % 32 == lane) added[ids[k]] += topk ? chosen(of_slot(k)) * (gradient(k) - mean) : gradient(k);

  const Sum* sums = static_cast<const Sum*>(p.dscore_sums);
  if (sums) sums += token / (p.tokens / p.sequences) * p.experts;
  const auto dscore = [&](int e) { return (sums ? sums[e] : Sum(0)) + (topk ? Sum(0) : added[e]); };
  product = 0;
  if (!sigmoid) {
    for (int e = lane; e < p.experts; e += 32) product += dscore(e) * score(logit(e));
    product = warp_sum(product);
  }
  for (int e = lane; e < p.experts; e += 32) {
    const Sum value = score(logit(e));
    Sum d = sigmoid ? dscore(e) * value * (1 - value) : value * (dscore(e) - product);
    if (topk) d += added[e];
    static_cast<T*>(p.dlogits)[token * p.experts + e] = static_cast<T>(d);
  }
}

// ---------------------------------------------------------------------------------------------------------- statistics

// Sums the parts of a sequence (grid.x) for 32 experts (grid.y): each warp some parts, then a tree over the warps.
template <typename Sum>
__global__ void __launch_bounds__(1024) sum_parts_kernel(RouterParams p) {
  __shared__ Sum sums[32][32];
  __shared__ int counts[32][32];
  const int lane = threadIdx.x, warp = threadIdx.y, expert = blockIdx.y * 32 + lane;
  Sum sum = 0;
  int count = 0;
  if (expert < p.experts) {
#pragma unroll 8
    for (int part = warp; part < p.parts; part += 32) {
      const int64_t entry = (int64_t(blockIdx.x) * p.parts + part) * p.experts + expert;
      sum += static_cast<const Sum*>(p.part_sums)[entry];
      count += p.part_counts[entry];
    }
  }
  sums[warp][lane] = sum, counts[warp][lane] = count;
  for (int half = 16; half > 0; half /= 2) {
    __syncthreads();
    if (warp < half) {
      sums[warp][lane] += sums[warp + half][lane];
      counts[warp][lane] += counts[warp + half][lane];
    }
  }
  if (warp == 0 && expert < p.experts) {
    static_cast<Sum*>(p.score_sums)[int64_t(blockIdx.x) * p.experts + expert] = sums[0][lane];
    p.counts[int64_t(blockIdx.x) * p.experts + expert] = counts[0][lane];
  }
}

// -------------------------------------------------------------------------------------------------------------- launch

template <typename T, int V>
bool loads_vectors(const void* logits, int64_t stride, int experts) {
  constexpr int BYTES = WIDTH<T, V> * int(sizeof(T));
  return experts % V == 0 && stride * int64_t(sizeof(T)) % BYTES == 0 && reinterpret_cast<uintptr_t>(logits) % BYTES == 0;
}

// Calls function(constant V) for the fewest experts per lane.
template <typename Function>
void for_lane_experts(int experts, Function function) {
  if (experts <= 32)
    function(std::integral_constant<int, 1>());
  else if (experts <= 64)
    function(std::integral_constant<int, 2>());
  else if (experts <= 128)
    function(std::integral_constant<int, 4>());
  else if (experts <= 256)
    function(std::integral_constant<int, 8>());
  else
    function(std::integral_constant<int, LANE_EXPERTS>());
}

bool in_registers(DType dtype, int experts, int slots) {
  return dtype != DType::float64 && experts <= 32 * LANE_EXPERTS && slots <= 32;
}

bool groups_are_lanes(const RouterParams& p) {
  if (p.groups == 1) return true;
  const int size = p.experts / p.groups;
  bool fits = false;
  for_lane_experts(p.experts, [&](auto v) {
    const int span = size / v.value;
    fits = size % v.value == 0 && (span & (span - 1)) == 0;
  });
  return fits;
}

// Shared memory beyond 48 KiB has to be asked for.
template <typename Kernel>
cudaError_t allow(Kernel* kernel, size_t bytes) {
  if (bytes <= 49152) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

}  // namespace

int64_t router_parts(int64_t tokens, int64_t sequences, int64_t experts) {
  const int64_t blocks = experts <= 32 * LANE_EXPERTS ? BLOCKS : SMALL_BLOCKS;
  const int64_t most = (tokens / sequences + 7) / 8;  // no warp without a token
  return std::max<int64_t>(1, std::min(blocks / sequences, most));
}

cudaError_t router_topk(const RouterParams& p, cudaStream_t stream) {
  const unsigned grid = unsigned(p.sequences * p.parts);
  const cudaError_t error = for_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      if (in_registers(p.dtype, p.experts, p.slots) && groups_are_lanes(p)) {
        for_lane_experts(p.experts, [&](auto v) {
          constexpr int V = decltype(v)::value;
          const bool vector = loads_vectors<T, V>(p.logits, p.logits_stride, p.experts);
          router_kernel<T, V><<<grid, WARPS, 0, stream>>>(p, vector);
        });
        return cudaGetLastError();
      }
    }
    const size_t bytes = (size_t(p.experts) + p.groups) * sizeof(KeyOf<Accumulator<T>>);
    if (const cudaError_t refused = allow(router_in_memory_kernel<T>, bytes)) return refused;
    router_in_memory_kernel<T><<<grid, 32, bytes, stream>>>(p);
    return cudaGetLastError();
  });
  if (error != cudaSuccess || p.parts == 1) return error;
  const dim3 sums(unsigned(p.sequences), unsigned((p.experts + 31) / 32));
  if (p.dtype == DType::float64)
    sum_parts_kernel<double><<<sums, dim3(32, 32), 0, stream>>>(p);
  else
    sum_parts_kernel<float><<<sums, dim3(32, 32), 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t router_topk_backward(const RouterBackwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return for_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      if (in_registers(p.dtype, p.experts, p.slots)) {
        for_lane_experts(p.experts, [&](auto v) {
          constexpr int V = decltype(v)::value;
          const bool vector = loads_vectors<T, V>(p.logits, p.logits_stride, p.experts) &&
                              loads_vectors<T, V>(p.dlogits, p.experts, p.experts);
          router_backward_kernel<T, V><<<blocks(p.tokens), WARPS, 0, stream>>>(p, vector);
        });
        return cudaGetLastError();
      }
    }
    const size_t bytes = p.experts * sizeof(Accumulator<T>);
    if (const cudaError_t refused = allow(router_backward_in_memory_kernel<T>, bytes)) return refused;
    router_backward_in_memory_kernel<T><<<unsigned(p.tokens), 32, bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace flashmoe
