// Common code of the affinity kernels: the loop over pairs of tiles, and sums over a block's threads.
//
// The N x N pairs of nodes are divided into tiles of 32 x 32. A block owns a tile and its mirror image, so
// values common to the pairs (i, j) and (j, i) are read or computed once. Maps are read and their gradients
// written in vectors of 16 bytes, each entry once. If rows or tensors are not aligned to 16 bytes, the same
// kernels process one value at a time. Only tiles that may overlap a window are visited.
#pragma once

#include "affinity/affinity.h"
#include "common/cuda.cuh"
#include "common/vectors.cuh"

namespace afa {
namespace {

constexpr int kTile = static_cast<int>(kAffinityTile);
constexpr int kSumThreads = 256;

// Threads of a block that reads maps in vectors of V, and the number of a tile's vectors that each thread
// owns: the n-th one is in row own_row(n), all start at the same column.
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

struct TilePair {
  int64_t b;
  int row, column;  // first nodes, row <= column
};

__device__ inline TilePair tile_pair(const PairLayout& p, int64_t index) {
  const int64_t pairs = tile_pairs_of(p), b = index / pairs;
  const int tiles = static_cast<int>(tiles_of(p)), wide = tiles | 1;
  const int rest = static_cast<int>(index - b * pairs), line = rest / wide, at = rest - line * wide;
  // Line l has the tiles of row l from the diagonal on, followed by those of the l-th row from the end.
  const int upper = tiles - line, row = at < upper ? line : tiles - (tiles & 1 ? 0 : 1) - line;
  const int column = row + (at < upper ? at : at - upper);
  return {b, row * kTile, column * kTile};
}

// The same for the tiles that may overlap the window; column may be outside.
__device__ inline TilePair near_tile_pair(const PairLayout& p, int64_t index) {
  if (p.radius < 0) return tile_pair(p, index);
  const int64_t pairs = near_tile_pairs_of(p), b = index / pairs;
  const int wide = static_cast<int>(tile_reach_of(p)) + 1, rest = static_cast<int>(index - b * pairs);
  const int row = rest / wide;
  return {b, row * kTile, (row + rest - row * wide) * kTile};
}

// False only if no pair of the tiles is in the window or in the image.
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

// Index in the image's pairs of the pair (tile's node `row`, mirrored tile's node `column`) or, swapped, of
// the reversed pair; -1 outside.
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

// Sums of N values over the block's threads in a fixed order; thread n gets the n-th sum.
template <int kThreadsOfBlock, int N, typename S>
__device__ inline S block_sums(S (&shared)[N][kThreadsOfBlock], const S (&value)[N]) {
  static_assert(kThreadsOfBlock % 32 == 0 && N * 32 <= kThreadsOfBlock, "one warp per value");
  const int thread = static_cast<int>(threadIdx.x);
  S sum = 0;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) shared[n][thread] = value[n];
  __syncthreads();
  // 32 sums per value, then 4, then one. A sum overwrites its first term, which no other thread reads.
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

// Calls f with the longest vector that the maps' rows and addresses allow (one value or 16 bytes), and with
// a flag: true if the pairs can have any layout, which is always the case for single values.
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
}  // namespace afa
