// Affinity from attention on CUDA. A block owns a tile of 32 x 32 pairs and its mirror image, so that what a
// pair and its mirrored pair share is read or formed once. Maps are read and their gradients written in
// vectors of 16 bytes, each entry once; what is transposed, through shared memory, are the sums over the maps
// or the gradient that all maps share. Only a window's tiles are visited, and in them only vectors with a
// pair in the window are read. Where rows or tensors don't begin at a multiple of 16 bytes, the same kernels
// take one value at a time. Sums towards the gradients of weight and bias and towards the loss are formed by
// block, then in a second launch over the blocks, always in the same order; no atomics.
#include <cstring>
#include <type_traits>

#include "affinity/affinity.h"
#include "common/cuda.cuh"

namespace afa {
namespace {

constexpr int kTile = static_cast<int>(kAffinityTile);
constexpr int kGroup = static_cast<int>(kAffinityGroup);
constexpr int kSumThreads = 256;
constexpr int kLabels = 16;  // that a thread writes at once

// Below it a node's number is held in 32 bits.
#ifdef AFA_CUDA_ON_HOST
constexpr int64_t kNarrow = 60;
#else
constexpr int64_t kNarrow = int64_t{1} << 31;
#endif

dim3 block_grid(int64_t blocks) {
  return dim3(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
}

// ---- vectors ----------------------------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T at[V];
};

// Integers of a vector's size, which the compiler moves in one access whatever the type they hold.
template <int kBytes>
struct Raw;
template <>
struct Raw<1> {
  using type = uint8_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

template <int V, typename T>
__device__ inline Vec<T, V> load(const T* from) {
  using Bits = typename Raw<sizeof(T) * V>::type;
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  Vec<T, V> v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

template <int V, typename T>
__device__ inline Vec<T, V> load_if(bool in, const T* from) {
  Vec<T, V> v = {};
  if (in) v = load<V>(from);
  return v;
}

template <typename T, int V>
__device__ inline void store(T* to, const Vec<T, V>& v) {
  using Bits = typename Raw<sizeof(T) * V>::type;
  Bits bits;
  memcpy(&bits, &v, sizeof(v));
  *reinterpret_cast<Bits*>(to) = bits;
}

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // values in 16 bytes

bool aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// ---- tiles ------------------------------------------------------------------------------------------------

// Threads of a block whose maps come in vectors of V, and how many of a tile's vectors each owns: the n-th in
// row own_row(n), all from the same column on.
template <int V>
constexpr int kTileThreads = kTile * kTile / V < 256 ? kTile * kTile / V : 256;
template <int V>
constexpr int kOwn = kTile * kTile / V / kTileThreads<V>;

template <int V>
__device__ inline int own_row(int n) {
  return (static_cast<int>(threadIdx.x) + n * kTileThreads<V>) / (kTile / V);
}
template <int V>
__device__ inline int own_column() {
  return static_cast<int>(threadIdx.x) % (kTile / V) * V;
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

struct TilePair {
  int64_t b;
  int row, column;  // first nodes, row <= column
};

__device__ inline TilePair tile_pair(const PairLayout& p, int64_t index) {
  const int64_t pairs = tile_pairs_of(p), b = index / pairs;
  const int tiles = static_cast<int>(tiles_of(p)), wide = tiles | 1;
  const int rest = static_cast<int>(index - b * pairs), line = rest / wide, at = rest - line * wide;
  // Line l holds what row l has from the diagonal on, and then what the l-th row from the end has.
  const int upper = tiles - line, row = at < upper ? line : tiles - (tiles & 1 ? 0 : 1) - line;
  const int column = row + (at < upper ? at : at - upper);
  return {b, row * kTile, column * kTile};
}

// The same among those that may meet the window; column may lie outside.
__device__ inline TilePair near_tile_pair(const PairLayout& p, int64_t index) {
  if (p.radius < 0) return tile_pair(p, index);
  const int64_t pairs = near_tile_pairs_of(p), b = index / pairs;
  const int wide = static_cast<int>(tile_reach_of(p)) + 1, rest = static_cast<int>(index - b * pairs);
  const int row = rest / wide;
  return {b, row * kTile, (row + rest - row * wide) * kTile};
}

// False only where no pair of the tiles lies in the window, or none at all.
__device__ inline bool meets_window(const PairLayout& p, const TilePair& t) {
  const int last = static_cast<int>(nodes_of(p)) - 1, width = static_cast<int>(p.width);
  if (t.column > last) return false;
  const int row_end = t.row + kTile - 1 < last ? t.row + kTile - 1 : last;
  return p.radius < 0 || t.column / width - row_end / width <= static_cast<int>(p.radius);
}

// The coordinates of the tiles' nodes: first the rows', then the columns'.
struct Places {
  int y[2 * kTile], x[2 * kTile];
};

__device__ inline void find_places(const PairLayout& p, const TilePair& t, Places& places) {
  const int width = static_cast<int>(p.width);
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < 2 * kTile; n += static_cast<int>(blockDim.x)) {
    const int node = n < kTile ? t.row + n : t.column + n - kTile;
    places.y[n] = node / width;
    places.x[n] = node - node / width * width;
  }
  __syncthreads();
}

// Where the pair of the tile's node `row` and the mirrored tile's node `column` lies in its image's pairs,
// or, swapped, the pair of the latter and the former; -1 outside.
template <bool kSwapped>
__device__ inline int64_t pair_at(const PairLayout& p, const TilePair& t, const Places& places, int row,
                                  int column) {
  const int nodes = static_cast<int>(nodes_of(p)), radius = static_cast<int>(p.radius);
  if (t.row + row >= nodes || t.column + column >= nodes) return -1;
  const int i = kSwapped ? t.column + column : t.row + row, j = kSwapped ? t.row + row : t.column + column;
  if (radius < 0) return static_cast<int64_t>(i) * nodes + j;
  const int dy = places.y[kTile + column] - places.y[row], dx = places.x[kTile + column] - places.x[row];
  if (dy < -radius || dy > radius || dx < -radius || dx > radius) return -1;
  if (!p.windowed) return static_cast<int64_t>(i) * nodes + j;
  const int side = 2 * radius + 1, offset = dy * side + dx;
  return static_cast<int64_t>(i) * (side * side) + (side * side) / 2 + (kSwapped ? -offset : offset);
}

// ---- forward ----------------------------------------------------------------------------------------------

template <typename Sum>
__device__ inline Sum sigmoid(Sum x) {
  return 1 / (1 + exp(-x));
}

// Blocks of 256 threads, or twice as many of 128, that an SM shall hold at least: what a window or single
// values need more of registers costs warps.
constexpr int forward_blocks(int threads, int at_once, bool pairs, bool wide) {
  return (!wide || (pairs && at_once > 2) ? 3 : (pairs || at_once > 2 ? 4 : 5)) * (256 / threads);
}

// kAtOnce maps are read before the first of them is needed. kPairs: any layout of pairs; else rows of N
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
      // Past the edge the last row or vector is read again: what comes of it is not stored.
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

// ---- backward ---------------------------------------------------------------------------------------------

// The loss's gradient to sum_k weight_k S_k at the tile's pairs: (dA_ij + dA_ji) A_ij (1 - A_ij), 0 outside.
// Symmetric, so that the mirrored tile's is its transpose. Of all threads of a block of kTileThreads<V>.
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

// Every pair of tiles, since the maps' gradients are written outside of a window too.
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

// The sums of N values over the block's threads, each in the thread of its number; in a fixed order.
template <int kThreadsOfBlock, int N, typename S>
__device__ inline S block_sums(S (&shared)[N][kThreadsOfBlock], const S (&value)[N]) {
  static_assert(kThreadsOfBlock % 32 == 0 && N * 32 <= kThreadsOfBlock, "a warp takes a value");
  const int thread = static_cast<int>(threadIdx.x);
  S sum = 0;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) shared[n][thread] = value[n];
  __syncthreads();
  // 32 sums of each, then 4, then one. A sum goes where its first term stood, which no other thread reads.
  if (thread < N * 32) {
    S* from = shared[thread / 32] + thread % 32;
    for (int n = 0; n < kThreadsOfBlock / 32; ++n) sum += from[32 * n];
    *from = sum;
  }
  __syncthreads();
  if (thread < N * 4) {
    S* from = shared[thread / 4] + thread % 4;
    sum = 0;
    for (int n = 0; n < 8; ++n) sum += from[4 * n];
    *from = sum;
  }
  __syncthreads();
  if (thread < N) {
    sum = 0;
    for (int n = 0; n < 4; ++n) sum += shared[thread][n];
  }
  return sum;
}

// As forward_blocks.
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
        // Dense, every entry counts, even without a gradient. Outside a window it may hold anything.
        reads[n] = !kPairs && t.row + row < nodes && t.column + column < nodes;
        reads_mirror[n] = !kPairs && t.column + row < nodes && t.row + column < nodes;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          gradient[n][e] = tile[row][column + e];
          mirrored[n][e] = t.row == t.column ? Sum{0} : tile[column + e][row];
          bias_sum += gradient[n][e] / 2 + mirrored[n][e] / 2;  // each pair is met in both of its entries
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
          const int k = k0 + m0 + m < maps ? k0 + m0 + m : maps - 1;  // the last again: not stored
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

// ---- labels -----------------------------------------------------------------------------------------------

// 0 <= i < end, in one comparison.
template <typename Index>
__device__ inline bool within(Index i, Index end) {
  return static_cast<std::make_unsigned_t<Index>>(i) < static_cast<std::make_unsigned_t<Index>>(end);
}

// A thread writes L labels that follow one another in memory: those of one node's pairs, and of the next
// one's where its own end. Only the first one's pair is found by division. All tokens are read without a
// branch, the image's first in place of none, so that the reads don't wait for each other. Index holds a
// node's number; with L > 1 a node has at least L pairs.
template <typename Index, bool kWindowed, int L>
__global__ void __launch_bounds__(kThreads) labels_kernel(const __grid_constant__ AffinityLabelParams p) {
  const PairLayout& pairs = p.pairs;
  const Index height = static_cast<Index>(pairs.height), width = static_cast<Index>(pairs.width);
  const Index radius = static_cast<Index>(pairs.radius), side = 2 * radius + 1;
  const Index rows = kWindowed ? side : height, columns = kWindowed ? side : width;  // of a node's pairs
  const int64_t nodes = nodes_of(pairs), size = pairs_of_node(pairs), count = pairs.batch * nodes * size;
  for (int64_t item = first_item() * L; item < count; item += item_stride() * L) {
    const int64_t line = item / size, b = line / nodes;
    const Index node = static_cast<Index>(line - b * nodes), entry = static_cast<Index>(item - line * size);
    const int64_t* tokens = p.tokens + b * nodes;
    Index y = node / width, x = node - y * width;
    Index row = entry / columns, column = entry - row * columns;
    const Index next_x = x + 1 < width ? x + 1 : 0, below = next_x > 0 ? y : y + 1;
    const Index next_y = below < height ? below : 0;
    const bool last = line + 1 == pairs.batch * nodes, new_image = next_x == 0 && next_y == 0;
    const int64_t* next_tokens = new_image && !last ? tokens + nodes : tokens;
    int64_t own = tokens[node];
    const int64_t next_own = next_tokens[next_y * width + next_x];
    int64_t to[L], from[L];
    bool in[L];
#pragma unroll
    for (int n = 0; n < L; ++n) {
      const Index to_y = kWindowed ? y + row - radius : row, to_x = kWindowed ? x + column - radius : column;
      in[n] = kWindowed ? within(to_y, height) && within(to_x, width)
                        : within(to_y - y + radius, side) && within(to_x - x + radius, side);
      to[n] = tokens[in[n] ? to_y * width + to_x : 0];
      from[n] = own;
      ++column;
      const bool end_of_row = column == columns;
      column = end_of_row ? 0 : column;
      row += end_of_row ? 1 : 0;
      const bool end = row == rows;
      row = end ? 0 : row;
      y = end ? next_y : y;
      x = end ? next_x : x;
      own = end ? next_own : own;
      tokens = end ? next_tokens : tokens;
    }
    Vec<uint8_t, L> labels;
#pragma unroll
    for (int n = 0; n < L; ++n) {
      const bool counts = in[n] && from[n] != p.ignore && to[n] != p.ignore;
      labels.at[n] = counts ? (to[n] == from[n] ? 1 : 0) : 255;
    }
    if (item + L <= count) {
      store(p.labels + item, labels);
    } else {
#pragma unroll
      for (int n = 0; n < L; ++n) {
        if (item + n < count) p.labels[item + n] = labels.at[n];
      }
    }
  }
}

// ---- loss -------------------------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads) loss_kernel(const __grid_constant__ AffinityLossParams p) {
  using Sum = typename SumOf<T>::type;
  constexpr int kVectors = static_cast<int>(kLossBlock) / V / kSumThreads;  // of a thread
  __shared__ double shared[4][kSumThreads];
  const T* affinity = static_cast<const T*>(p.affinity);
  for (int64_t block = blockIdx.x; block * kLossBlock < p.count; block += gridDim.x) {
    const int64_t first = block * kLossBlock;
    Sum same = 0, different = 0;
    int same_count = 0, different_count = 0;
    auto add = [&](Sum a, uint8_t label) {
      // Products, not choices: a NaN counts whatever its label, as in the definition.
      const int is_same = label == 1 ? 1 : 0, is_different = label == 0 ? 1 : 0;
      same += (1 - a) * static_cast<Sum>(is_same);
      different += a * static_cast<Sum>(is_different);
      same_count += is_same;
      different_count += is_different;
    };
    if (first + kLossBlock <= p.count) {
      const int64_t own = first + static_cast<int64_t>(threadIdx.x) * V;
#pragma unroll 4
      for (int n = 0; n < kVectors; ++n) {
        const Vec<uint8_t, V> label = load<V>(p.labels + own + n * (kSumThreads * V));
        const Vec<T, V> value = load<V>(affinity + own + n * (kSumThreads * V));
#pragma unroll
        for (int e = 0; e < V; ++e) add(to_sum<Sum>(value.at[e]), label.at[e]);
      }
    } else {
      for (int64_t n = first + threadIdx.x; n < p.count; n += kSumThreads) {
        add(to_sum<Sum>(affinity[n]), p.labels[n]);
      }
    }
    const double own[4] = {static_cast<double>(same), static_cast<double>(different),
                           static_cast<double>(same_count), static_cast<double>(different_count)};
    const double sum = block_sums<kSumThreads>(shared, own);
    if (threadIdx.x < 4) p.partial[4 * block + threadIdx.x] = sum;
  }
}

template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_losses_kernel(const double* partial, int64_t blocks, Sum* out) {
  __shared__ double shared[4][kSumThreads], total[4];
  double own[4] = {};
  for (int64_t block = threadIdx.x; block < blocks; block += kSumThreads) {
    for (int n = 0; n < 4; ++n) own[n] += partial[4 * block + n];
  }
  const double sum = block_sums<kSumThreads>(shared, own);
  if (threadIdx.x < 4) total[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    const double same = 0.5 / (total[2] + 1), different = 0.5 / (total[3] + 1);
    out[0] = static_cast<Sum>(same * total[0] + different * total[1]);
    out[1] = static_cast<Sum>(same);
    out[2] = static_cast<Sum>(different);
  }
}

template <typename Sum, int V>
__global__ void __launch_bounds__(kThreads)
    loss_backward_kernel(const __grid_constant__ AffinityLossParams p) {
  const Sum grad = *static_cast<const Sum*>(p.grad);
  const Sum* sums = static_cast<const Sum*>(p.sums);
  const Sum same = -grad * sums[1], different = grad * sums[2];
  Sum* out = static_cast<Sum*>(p.grad_affinity);
  auto gradient = [&](uint8_t label) { return label == 1 ? same : (label == 0 ? different : Sum{0}); };
  for (int64_t n = first_item() * V; n < p.count; n += item_stride() * V) {
    if (n + V <= p.count) {
      const Vec<uint8_t, V> label = load<V>(p.labels + n);
      Vec<Sum, V> value;
#pragma unroll
      for (int e = 0; e < V; ++e) value.at[e] = gradient(label.at[e]);
      store(out + n, value);
    } else {
      for (int64_t e = n; e < p.count; ++e) out[e] = gradient(p.labels[e]);
    }
  }
}

// ---- launches ---------------------------------------------------------------------------------------------

// Calls f with a vector as long as the maps' rows and addresses allow (one value or 16 bytes), and with
// whether the pairs may have any layout: those of single values always may.
template <typename T, typename F>
void with_tiles(const AffinityParams& p, const F& f) {
  constexpr int V = kWide<T>;
  const bool any_layout = p.pairs.radius >= 0;
  bool wide = nodes_of(p.pairs) % V == 0 && aligned(p.attention) && aligned(p.grad_attention);
  if (!any_layout) wide = wide && aligned(p.affinity) && aligned(p.grad);
  if (!wide) {
    f(Vec<T, 1>{}, Flag<true>{});
  } else if (any_layout) {
    f(Vec<T, V>{}, Flag<true>{});
  } else {
    f(Vec<T, V>{}, Flag<false>{});
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
      switch (static_cast<AffinityVariant>(p.variant)) { AFA_AFFINITY_VARIANTS(AFA_CASE) }
#undef AFA_CASE
    });
  });
  return launch_error();
}

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

const char* launch_affinity_labels(const AffinityLabelParams& p, void* stream) {
  const int64_t size = pairs_of_node(p.pairs), labels = p.pairs.batch * nodes_of(p.pairs) * size;
  auto launch = [&](auto index, auto windowed) {
    using Index = decltype(index);
    constexpr bool kWindowed = decltype(windowed)::value;
    if (size >= kLabels && aligned(p.labels)) {
      AFA_LAUNCH((labels_kernel<Index, kWindowed, kLabels>), grid_for(ceil_div(labels, kLabels), 1), kThreads,
                 stream, p);
    } else {
      AFA_LAUNCH((labels_kernel<Index, kWindowed, 1>), grid_for(labels, 1), kThreads, stream, p);
    }
  };
  auto with_layout = [&](auto index) {
    p.pairs.windowed ? launch(index, Flag<true>{}) : launch(index, Flag<false>{});
  };
  nodes_of(p.pairs) < kNarrow ? with_layout(int32_t{}) : with_layout(int64_t{});
  return launch_error();
}

const char* launch_affinity_loss(const AffinityLossParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.count, kLossBlock);
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    using Sum = typename SumOf<T>::type;
    constexpr int V = kWide<T>;
    if (blocks > 0) {
      if (aligned(p.affinity) && aligned(p.labels, V)) {
        AFA_LAUNCH((loss_kernel<T, V>), block_grid(blocks), kSumThreads, stream, p);
      } else {
        AFA_LAUNCH((loss_kernel<T, 1>), block_grid(blocks), kSumThreads, stream, p);
      }
    }
    AFA_LAUNCH((add_losses_kernel<Sum>), 1, kSumThreads, stream, p.partial, blocks,
               static_cast<Sum*>(p.sums));
  });
  return launch_error();
}

const char* launch_affinity_loss_backward(const AffinityLossParams& p, void* stream) {
  auto launch = [&](auto type) {
    using Sum = decltype(type);
    constexpr int V = kWide<Sum>;
    if (aligned(p.grad_affinity) && aligned(p.labels, V)) {
      AFA_LAUNCH((loss_backward_kernel<Sum, V>), grid_for(ceil_div(p.count, V), 1), kThreads, stream, p);
    } else {
      AFA_LAUNCH((loss_backward_kernel<Sum, 1>), grid_for(p.count, 1), kThreads, stream, p);
    }
  };
  p.kind == Kind::f64 ? launch(double{}) : launch(float{});
  return launch_error();
}

}  // namespace afa
