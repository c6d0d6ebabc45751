// Gradients of affinity_from_attention with respect to attention, weight and bias.
//
// Threads: a block owns tiles of 32 x 32 pairs and their mirror images; a thread owns 16 bytes of a row of
// either tile. A block of backward_attention_kernel processes one pair of tiles and all maps, a block of
// backward_weight_kernel four pairs of tiles and up to 16 maps, whose sums stay in registers.
// add_partials_kernel has one block per map.
// Reads: gradient and affinity of the tiles, once for all maps; for the weight also the attention, each entry
// once; with a window, only vectors with a pair in it.
// Writes: grad_attention [B, K, N, N], zeros outside the window; partial [parts, K + 1], then grad_weight [K
// + 1]. Slower: transposing every map's gradient; only the gradient that all maps share is transposed,
// through shared memory. Sums are accumulated per block, then over the blocks in a second launch, always in
// the same order: no atomics.
#include "affinity/affinity.cuh"

namespace afa {
namespace {

constexpr int kGroup = static_cast<int>(kAffinityGroup);

// The loss's gradient with respect to sum_k weight_k S_k at the tile's pairs: (dA_ij + dA_ji) A_ij (1 -
// A_ij), 0 outside. It is symmetric, so that of the mirrored tile is its transpose. Called by all
// kTileThreads<V> threads of a block.
template <typename T, int V, bool kPairs, typename Sum>
__device__ void gradient_tile(const AffinityParams& p, const TilePair& t, Places& places,
                              Sum (&tile)[kTile][kTile + 1]) {
  constexpr int kWidth = kPairs ? 1 : V;  // of the pairs' vectors
  constexpr int kCount = kTile * kTile / kWidth / kTileThreads<V>;
  const int nodes = static_cast<int>(nodes_of(p.pairs));
  const int64_t first = t.b * nodes * pairs_of_node(p.pairs);
  const T* grad = static_cast<const T*>(p.grad) + first;
  const T* affinity = static_cast<const T*>(p.affinity) + first;
  const int column = static_cast<int>(threadIdx.x) % (kTile / kWidth) * kWidth;
  auto row_of = [&](int n) {
    return (static_cast<int>(threadIdx.x) + n * kTileThreads<V>) / (kTile / kWidth);
  };
  auto place = [&](int first_row, int first_column, int row) -> int64_t {
    const int i = first_row + row, j = first_column + column;
    return i < nodes && j < nodes ? static_cast<int64_t>(i) * nodes + j : -1;
  };
  if (kPairs && p.pairs.radius >= 0) find_places(p.pairs, t, places);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const int row = row_of(n);
    const int64_t at = kPairs ? pair_at<true>(p.pairs, t, places, column, row) : place(t.column, t.row, row);
    const Vec<T, kWidth> value = load_if<kWidth>(at >= 0, grad + at);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) tile[row][column + e] = to_sum<Sum>(value.at[e]);
  }
  __syncthreads();
  Sum gradient[kCount][kWidth];
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const int row = row_of(n);
    const int64_t at = kPairs ? pair_at<false>(p.pairs, t, places, row, column) : place(t.row, t.column, row);
    const Vec<T, kWidth> value = load_if<kWidth>(at >= 0, grad + at);
    const Vec<T, kWidth> a = load_if<kWidth>(at >= 0, affinity + at);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const Sum x = to_sum<Sum>(a.at[e]);
      gradient[n][e] = (tile[column + e][row] + to_sum<Sum>(value.at[e])) * x * (1 - x);
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) tile[row_of(n)][column + e] = gradient[n][e];
  }
  __syncthreads();
}

// Visits all pairs of tiles, because the maps' gradients are also written outside a window.
template <typename T, int V, bool kPairs>
__global__ void __launch_bounds__(kTileThreads<V>, min_blocks<T>((V > 1 ? 4 : 2) * (256 / kTileThreads<V>)))
    backward_attention_kernel(const __grid_constant__ AffinityParams p) {
  using Sum = typename SumOf<T>::type;
  constexpr int kCount = kOwn<V>;
  __shared__ Sum tile[kTile][kTile + 1];
  __shared__ Places places;
  const PairLayout& pairs = p.pairs;
  const int nodes = static_cast<int>(nodes_of(pairs)), maps = static_cast<int>(p.maps);
  const int64_t plane = static_cast<int64_t>(nodes) * nodes, count = pairs.batch * tile_pairs_of(pairs);
  const Sum* weight = static_cast<const Sum*>(p.weight);
  const int column = own_column<V>();
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const TilePair t = tile_pair(pairs, index);
    const bool meets = !kPairs || meets_window(pairs, t);
    if (meets) gradient_tile<T, V, kPairs>(p, t, places, tile);
    Sum gradient[kCount][V], mirrored[kCount][V];
    T *here[kCount], *mirror[kCount];
    bool writes[kCount], writes_mirror[kCount];
    T* out = static_cast<T*>(p.grad_attention) + t.b * maps * plane;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int row = own_row<V>(n);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        gradient[n][e] = meets ? tile[row][column + e] : Sum{0};
        mirrored[n][e] = meets ? tile[column + e][row] : Sum{0};
      }
      here[n] = out + static_cast<int64_t>(t.row + row) * nodes + t.column + column;
      mirror[n] = out + static_cast<int64_t>(t.column + row) * nodes + t.row + column;
      writes[n] = t.row + row < nodes && t.column + column < nodes;
      writes_mirror[n] = t.row != t.column && t.column + row < nodes && t.row + column < nodes;
    }
#pragma unroll 4
    for (int k = 0; k < maps; ++k) {
      const Sum w = weight[k];
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        Vec<T, V> value, mirror_value;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          value.at[e] = from_sum<T>(w * gradient[n][e]);
          mirror_value.at[e] = from_sum<T>(w * mirrored[n][e]);
        }
        if (writes[n]) store(here[n], value);
        if (writes_mirror[n]) store(mirror[n], mirror_value);
        here[n] += plane;
        mirror[n] += plane;
      }
    }
  }
}

// Minimum number of resident blocks per SM, for 256 threads (twice as many for 128): a window or single
// values need more registers, which costs warps.
constexpr int weight_blocks(int threads, bool pairs, bool wide) {
  if (pairs && wide) return threads < 256 ? 3 : 2;
  return (wide ? 3 : 1) * (256 / threads);
}

template <bool kZeroWins, typename Sum>
__device__ inline Sum product(Sum gradient, Sum value) {
  return gradient * (kZeroWins && gradient == 0 ? Sum{0} : value);
}

// A block adds up kTilesOfPart pairs of tiles for up to kGroup maps, whose sums stay in registers, and writes
// one part. It reads kAtOnce maps before the first of them is needed.
template <typename T, int V, bool kPairs>
__global__ void __launch_bounds__(kTileThreads<V>,
                                  min_blocks<T>(weight_blocks(kTileThreads<V>, kPairs, V > 1)))
    backward_weight_kernel(const __grid_constant__ AffinityParams p) {
  using Sum = typename SumOf<T>::type;
  constexpr int kCount = kOwn<V>, kAtOnce = V > 1 ? 2 : 1, kTogether = 4;
  __shared__ Sum tile[kTile][kTile + 1];
  __shared__ Places places;
  __shared__ Sum shared[kTogether][kTileThreads<V>];
  const PairLayout& pairs = p.pairs;
  const int nodes = static_cast<int>(nodes_of(pairs)), maps = static_cast<int>(p.maps);
  const int64_t plane = static_cast<int64_t>(nodes) * nodes;
  const int64_t tile_pairs = pairs.batch * near_tile_pairs_of(pairs), groups = (maps + kGroup - 1) / kGroup;
  const int64_t items = weight_parts_of(pairs) * groups;
  const int column = own_column<V>(), thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t part = item / groups;
    const int k0 = static_cast<int>(item - part * groups) * kGroup;
    Sum sum[kGroup] = {}, bias_sum = 0;
    const int64_t end = (part + 1) * kTilesOfPart < tile_pairs ? (part + 1) * kTilesOfPart : tile_pairs;
    for (int64_t index = part * kTilesOfPart; index < end; ++index) {
      const TilePair t = kPairs ? near_tile_pair(pairs, index) : tile_pair(pairs, index);
      if (kPairs && !meets_window(pairs, t)) continue;
      gradient_tile<T, V, kPairs>(p, t, places, tile);
      const T* source = static_cast<const T*>(p.attention) + t.b * maps * plane;
      Sum gradient[kCount][V], mirrored[kCount][V];
      const T *here[kCount], *mirror[kCount];
      bool reads[kCount], reads_mirror[kCount];
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int row = own_row<V>(n);
        // In the dense layout all entries are used, even without a gradient. Entries outside a window are
        // undefined.
        reads[n] = !kPairs && t.row + row < nodes && t.column + column < nodes;
        reads_mirror[n] = !kPairs && t.column + row < nodes && t.row + column < nodes;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          gradient[n][e] = tile[row][column + e];
          mirrored[n][e] = t.row == t.column ? Sum{0} : tile[column + e][row];
          bias_sum += gradient[n][e] / 2 + mirrored[n][e] / 2;  // each pair occurs in both of its entries
          reads[n] = reads[n] || (kPairs && gradient[n][e] != 0);
          reads_mirror[n] = reads_mirror[n] || (kPairs && mirrored[n][e] != 0);
        }
        here[n] = source + static_cast<int64_t>(t.row + row) * nodes + t.column + column;
        mirror[n] = source + static_cast<int64_t>(t.column + row) * nodes + t.row + column;
      }
#pragma unroll
      for (int m0 = 0; m0 < kGroup; m0 += kAtOnce) {
        if (k0 + m0 >= maps) break;
        Vec<T, V> value[kAtOnce][kCount], mirror_value[kAtOnce][kCount];
#pragma unroll
        for (int m = 0; m < kAtOnce; ++m) {
          const int k = k0 + m0 + m < maps ? k0 + m0 + m : maps - 1;  // past the end: the last, not stored
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            value[m][n] = load_if<V>(reads[n], here[n] + k * plane);
            mirror_value[m][n] = load_if<V>(reads_mirror[n], mirror[n] + k * plane);
          }
        }
#pragma unroll
        for (int m = 0; m < kAtOnce; ++m) {
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
#pragma unroll
            for (int e = 0; e < V; ++e) {
              sum[m0 + m] += product<kPairs>(gradient[n][e], to_sum<Sum>(value[m][n].at[e]));
              sum[m0 + m] += product<kPairs>(mirrored[n][e], to_sum<Sum>(mirror_value[m][n].at[e]));
            }
          }
        }
      }
    }
    Sum* partial = static_cast<Sum*>(p.partial) + part * (maps + 1);
#pragma unroll
    for (int m0 = 0; m0 < kGroup; m0 += kTogether) {
      if (k0 + m0 >= maps) break;
      const Sum own[kTogether] = {sum[m0], sum[m0 + 1], sum[m0 + 2], sum[m0 + 3]};
      const Sum total = block_sums<kTileThreads<V>>(shared, own);
      if (thread < kTogether && k0 + m0 + thread < maps) partial[k0 + m0 + thread] = total;
    }
    if (k0 == 0) {
      const Sum own[kTogether] = {bias_sum, 0, 0, 0};
      const Sum total = block_sums<kTileThreads<V>>(shared, own);
      if (thread == 0) partial[maps] = total;
    }
  }
}

template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_partials_kernel(const Sum* partial, int64_t parts, int64_t size, Sum* out) {
  __shared__ double shared[1][kSumThreads];
  for (int64_t k = blockIdx.x; k < size; k += gridDim.x) {
    double own[1] = {0};
    for (int64_t part = threadIdx.x; part < parts; part += kSumThreads) {
      own[0] += static_cast<double>(partial[part * size + k]);
    }
    const double sum = block_sums<kSumThreads>(shared, own);
    if (threadIdx.x == 0) out[k] = static_cast<Sum>(sum);
  }
}

}  // namespace

const char* launch_affinity_backward_attention(const AffinityParams& p, void* stream) {
  const int64_t blocks = p.pairs.batch * tile_pairs_of(p.pairs);
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    with_tiles<T>(p, [&](auto vector, auto any_layout) {
      constexpr int V = sizeof(vector) / sizeof(T);
      AFA_LAUNCH((backward_attention_kernel<T, V, decltype(any_layout)::value>), block_grid(blocks),
                 kTileThreads<V>, stream, p);
    });
  });
  return launch_error();
}

const char* launch_affinity_backward_weight(const AffinityParams& p, void* stream) {
  const int64_t parts = weight_parts_of(p.pairs);
  const dim3 grid = block_grid(parts * ceil_div(p.maps, kGroup));
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    using Sum = typename SumOf<T>::type;
    with_tiles<T>(p, [&](auto vector, auto any_layout) {
      constexpr int V = sizeof(vector) / sizeof(T);
      constexpr bool kPairs = decltype(any_layout)::value;
      AFA_LAUNCH((backward_weight_kernel<T, V, kPairs>), grid, kTileThreads<V>, stream, p);
    });
    AFA_LAUNCH((add_partials_kernel<Sum>), block_grid(p.maps + 1), kSumThreads, stream,
               static_cast<const Sum*>(p.partial), parts, p.maps + 1, static_cast<Sum*>(p.grad_weight));
  });
  return launch_error();
}

}  // namespace afa
