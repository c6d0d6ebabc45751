// affinity_from_attention: A = sigmoid(sum_k weight_k (S_k + S_k^T) + bias).
//
// Threads: a block owns a tile of 32 x 32 pairs and its mirror image; a thread owns 16 bytes of a row of
// either tile, in every map. Reads: attention [B, K, N, N], each entry once; with a window, only vectors with
// a pair in the window. Writes: affinity, both tiles. Slower: transposing every map. Only the sum over the
// maps is transposed, once, through shared memory.
#include "affinity/affinity.cuh"

namespace afa {
namespace {

template <typename Sum>
__device__ inline Sum sigmoid(Sum x) {
  return 1 / (1 + exp(-x));
}

// Minimum number of resident blocks per SM, for 256 threads (twice as many for 128): a window or single
// values need more registers, which costs warps.
constexpr int forward_blocks(int threads, int at_once, bool pairs, bool wide) {
  return (!wide || (pairs && at_once > 2) ? 3 : (pairs || at_once > 2 ? 4 : 5)) * (256 / threads);
}

// kAtOnce maps are read before the first of them is needed. kPairs: any layout of pairs; otherwise rows of N
// without a window.
template <typename T, int V, int kAtOnce, bool kPairs>
__global__ void __launch_bounds__(kTileThreads<V>,
                                  min_blocks<T>(forward_blocks(kTileThreads<V>, kAtOnce, kPairs, V > 1)))
    affinity_kernel(const __grid_constant__ AffinityParams p) {
  using Sum = typename SumOf<T>::type;
  constexpr int kCount = kOwn<V>;
  __shared__ Sum tile[kTile][kTile + 1];
  __shared__ Places places;
  const PairLayout& pairs = p.pairs;
  const int nodes = static_cast<int>(nodes_of(pairs)), maps = static_cast<int>(p.maps);
  const int64_t plane = static_cast<int64_t>(nodes) * nodes;
  const int64_t count = pairs.batch * (kPairs ? near_tile_pairs_of(pairs) : tile_pairs_of(pairs));
  const Sum* weight = static_cast<const Sum*>(p.weight);
  const Sum bias = *static_cast<const Sum*>(p.bias);
  const int column = own_column<V>();
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const TilePair t = kPairs ? near_tile_pair(pairs, index) : tile_pair(pairs, index);
    if (kPairs) {
      if (!meets_window(pairs, t)) continue;
      if (pairs.radius >= 0) find_places(pairs, t, places);
    }
    const T* source = static_cast<const T*>(p.attention) + t.b * maps * plane;
    const T *here[kCount], *mirror[kCount];
    bool reads[kCount], reads_mirror[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int row = own_row<V>(n);
      // Past the edge the last row or vector is read again; its result is not stored.
      auto from = [&](int first_row, int first_column) {
        const int i = first_row + row, j = first_column + column;
        return source + static_cast<int64_t>(i < nodes ? i : nodes - 1) * nodes + (j < nodes ? j : nodes - V);
      };
      here[n] = from(t.row, t.column);
      mirror[n] = from(t.column, t.row);
      reads[n] = reads_mirror[n] = !kPairs;
      if (kPairs) {
        for (int e = 0; e < V; ++e) {
          reads[n] = reads[n] || pair_at<false>(pairs, t, places, row, column + e) >= 0;
          reads_mirror[n] = reads_mirror[n] || pair_at<false>(pairs, t, places, column + e, row) >= 0;
        }
      }
    }
    Sum sum[kCount][V] = {}, mirrored[kCount][V] = {};
    auto add = [&](int k, auto maps_at_once) {
      constexpr int kMaps = sizeof(maps_at_once.at);
      Vec<T, V> value[kMaps][kCount], mirror_value[kMaps][kCount];
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
          value[m][n] = load_if<V>(reads[n], here[n] + m * plane);
          mirror_value[m][n] = load_if<V>(reads_mirror[n], mirror[n] + m * plane);
        }
      }
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        const Sum w = weight[k + m];
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
#pragma unroll
          for (int e = 0; e < V; ++e) {
            sum[n][e] += w * to_sum<Sum>(value[m][n].at[e]);
            mirrored[n][e] += w * to_sum<Sum>(mirror_value[m][n].at[e]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        here[n] += kMaps * plane;
        mirror[n] += kMaps * plane;
      }
    };
    int k = 0;
#pragma unroll 1
    for (; k + kAtOnce <= maps; k += kAtOnce) add(k, Vec<char, kAtOnce>{});
#pragma unroll 1
    for (; k < maps; ++k) add(k, Vec<char, 1>{});

    __syncthreads();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int e = 0; e < V; ++e) tile[own_row<V>(n)][column + e] = mirrored[n][e];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sum[n][e] = sigmoid(sum[n][e] + tile[column + e][own_row<V>(n)] + bias);
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int e = 0; e < V; ++e) tile[own_row<V>(n)][column + e] = sum[n][e];
    }
    __syncthreads();
    T* affinity = static_cast<T*>(p.affinity) + t.b * nodes * pairs_of_node(pairs);
    if constexpr (kPairs) {
      for (int n = static_cast<int>(threadIdx.x); n < kTile * kTile; n += kTileThreads<V>) {
        const int row = n / kTile, lane = n % kTile;
        const int64_t at = pair_at<false>(pairs, t, places, row, lane);
        if (at >= 0) affinity[at] = from_sum<T>(tile[row][lane]);
        const int64_t mirror_at = pair_at<true>(pairs, t, places, lane, row);
        if (mirror_at >= 0 && t.row != t.column) affinity[mirror_at] = from_sum<T>(tile[lane][row]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int row = own_row<V>(n);
        Vec<T, V> out, mirror_out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          out.at[e] = from_sum<T>(sum[n][e]);
          mirror_out.at[e] = from_sum<T>(tile[column + e][row]);
        }
        const int i = t.row + row, j = t.column + column, mirror_i = t.column + row,
                  mirror_j = t.row + column;
        if (i < nodes && j < nodes) store(affinity + static_cast<int64_t>(i) * nodes + j, out);
        if (t.row != t.column && mirror_i < nodes && mirror_j < nodes) {
          store(affinity + static_cast<int64_t>(mirror_i) * nodes + mirror_j, mirror_out);
        }
      }
    }
  }
}

}  // namespace

const char* launch_affinity(const AffinityParams& p, void* stream) {
  const dim3 grid = block_grid(p.pairs.batch * near_tile_pairs_of(p.pairs));
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    with_tiles<T>(p, [&](auto vector, auto any_layout) {
      constexpr int V = sizeof(vector) / sizeof(T);
      constexpr bool kPairs = decltype(any_layout)::value;
#define AFA_CASE(name, kMaps)                                                                            \
  case AffinityVariant::name:                                                                            \
    AFA_LAUNCH((affinity_kernel<T, V, (V == 1 ? 1 : kMaps), kPairs>), grid, kTileThreads<V>, stream, p); \
    break;
      switch (p.variant) { AFA_AFFINITY_VARIANTS(AFA_CASE) }
#undef AFA_CASE
    });
  });
  return launch_error();
}

}  // namespace afa
