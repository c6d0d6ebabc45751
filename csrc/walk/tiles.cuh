// Common code of the walk's kernels: the power of an entry, a target's sources, and tiles of entries in
// shared memory. Entries outside the window are not read.
//
// In a dense affinity, or in one by node, the entries that a target gathers are a row apart. A tiled kernel
// therefore reads them along the targets: a block owns a segment of a row of targets and stages, for some
// rows of sources at a time, the entries to these targets in tiles of 4 x 4, raised to the power, 0 outside
// the window.
#pragma once

#include "common/vectors.cuh"
#include "walk/walk.h"

namespace afa {
namespace {

__device__ inline float power_of(float value, double power) {
  return powf(value, static_cast<float>(power));
}
__device__ inline double power_of(double value, double power) {
  return pow(value, power);
}

template <typename Sum>
__device__ Sum raised(const WalkParams& p, Sum value) {
  return p.whole_power > 0 ? whole_power(value, p.whole_power) : power_of(value, p.power);
}

template <typename Sum>
__device__ Sum raised_derivative(const WalkParams& p, Sum value) {
  const Sum outer = static_cast<Sum>(p.power);
  return p.whole_power > 0 ? outer * whole_power(value, p.whole_power - 1)
                           : outer * power_of(value, p.power - 1);
}

// A power known at compile time, 1 or 2; 0: the power in p.
template <int POWER>
struct Power {
  template <typename Sum>
  static __device__ Sum of(const WalkParams& p, Sum value) {
    return POWER == 1 ? value : POWER == 2 ? value * value : raised(p, value);
  }
  template <typename Sum>
  static __device__ Sum derivative(const WalkParams& p, Sum value) {
    return POWER == 1 ? Sum{1} : POWER == 2 ? 2 * value : raised_derivative(p, value);
  }
};

template <typename F>
__device__ void with_power(const WalkParams& p, const F& f) {
  if (p.whole_power == 1) {
    f(Power<1>{});
  } else if (p.whole_power == 2) {
    f(Power<2>{});
  } else {
    f(Power<0>{});
  }
}

struct Node {
  int64_t index, y, x;
};

// f(k, whether the source is in the grid, index of the source, index of the entry) for every offset.
template <typename F>
__device__ void each_source(const WalkParams& p, int64_t b, const Node& node, const F& f) {
  const int64_t nodes = p.height * p.width, size = p.stencil.size;
  const int64_t step = p.layout == Layout::dense     ? -nodes
                       : p.layout == Layout::by_node ? 1 - size
                                                     : nodes - 1;
  int64_t k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run run = p.stencil.run[r];  // from right to left
    const int64_t sy = node.y + run.dy;
    const int64_t end = sy >= 0 && sy < p.height ? p.width : 0;
    int64_t sx = node.x + run.dx, source = sy * p.width + sx;
    int64_t at = affinity_index(p, b, source, node.index, k);
    for (int j = 0; j < run.count; ++j, ++k, --sx, --source, at += step)
      f(k, sx >= 0 && sx < end, source, at);
  }
}

template <typename F>
__device__ void each_node(const WalkParams& p, const F& f) {
  const int64_t nodes = p.height * p.width;
  for (int64_t index = first_item(); index < nodes; index += item_stride()) {
    const int64_t y = index / p.width;
    f(Node{index, y, index - y * p.width});
  }
}

// ---- tiles

constexpr int kStepClasses = 8;  // of a thread in a step
constexpr int kTileThreads = 224;
// How a tiled kernel distributes its work to blocks and threads. A group: four adjacent nodes, the first x is
// a multiple of four.
struct WalkTiles {
  int rows;                // of sources, at once
  int groups;              // of targets of a block
  int reach;               // groups of sources on each side of a group of targets
  int sets;                // threads per group and row: one for eight classes, or one for each target
  int classes;             // per pass, without the last one, which is all ones; 0 for the transition
  int64_t across, passes;  // blocks per row of targets; passes over the classes
  bool wide;               // whether four entries can be read at once
  bool wide_scores;        // and four scores

  AFA_HOST_DEVICE int threads() const { return groups * sets * rows; }
  AFA_HOST_DEVICE int sources() const { return groups + 2 * reach; }  // groups of them
  // Tiles of 4 x 4 entries from one group of sources, and that group's scores. Four more values per group, so
  // that neighboring groups use different banks.
  AFA_HOST_DEVICE int tiles() const { return 2 * reach + 1; }
  AFA_HOST_DEVICE int entry_pitch() const { return 16 * tiles() + 4; }
  AFA_HOST_DEVICE int slots() const { return kStepClasses * sets; }
  AFA_HOST_DEVICE int score_pitch() const { return 4 * slots() + 4; }
  AFA_HOST_DEVICE int shared() const {
    const int staged = rows * sources() * (entry_pitch() + (classes > 0 ? score_pitch() : 0));
    const int sums = rows * (classes > 0 ? slots() : 2) * 4 * groups;
    return staged > sums ? staged : sums;
  }
};

// One block's segment of a row of targets.
struct WalkPiece {
  int64_t b;
  int y, x;         // the first target
  int targets;      // groups of them
  int first, end;   // the runs of the stencil whose sources are in the grid: [first, end)
  int left, right;  // the groups of sources that are in the grid: [left, right)
};

__device__ inline WalkPiece piece_of(const WalkParams& walk, const WalkTiles& s, int64_t b, int64_t item) {
  const int width = static_cast<int>(walk.width);
  const int y = static_cast<int>(item / s.across), x = static_cast<int>(item % s.across) * 4 * s.groups;
  const int whole = (width - x + 3) / 4;             // groups to the end of the row
  const int above = walk.stencil.run[0].dy + y + 1;  // runs go from the sources below to those above
  return {b,
          y,
          x,
          whole < s.groups ? whole : s.groups,
          above - static_cast<int>(walk.height) > 0 ? above - static_cast<int>(walk.height) : 0,
          walk.stencil.runs < above ? walk.stencil.runs : above,
          x / 4 < s.reach ? s.reach - x / 4 : 0,
          whole + s.reach < s.sources() ? whole + s.reach : s.sources()};
}

// The number of offsets before each run, into shared memory.
__device__ inline void count_offsets(const Stencil& stencil, int* first_of_run) {
  for (int r = static_cast<int>(threadIdx.x); r < stencil.runs; r += static_cast<int>(blockDim.x)) {
    int before = 0;
    for (int i = 0; i < r; ++i) before += stencil.run[i].count;
    first_of_run[r] = before;
  }
}

template <typename T>
__device__ float4 load_four(const T* at) {
  const Vec<T, 4> four = load<4>(at);
  return make_float4(to_sum<float>(four.at[0]), to_sum<float>(four.at[1]), to_sum<float>(four.at[2]),
                     to_sum<float>(four.at[3]));
}
// The entries of the runs [first, end), as tiles[row][group of sources][group of targets][source][target]. A
// thread's position in a tile is the same for all groups.
template <typename T, int POWER>
__device__ void stage_entries(const WalkParams& walk, const WalkTiles& s, const WalkPiece& piece, int first,
                              int end, const int* first_of_run, float* staged, Power<POWER>) {
  // A team of threads, one for each position, has a row, or a part of it if there are more teams than rows.
  const int in_group = 4 * s.tiles(), most = s.threads() / in_group,
            team = static_cast<int>(threadIdx.x) / in_group;
  const int rows = most < s.rows ? most : s.rows, shares = most / rows, share = team / rows;
  if (share >= shares) return;
  const int place = static_cast<int>(threadIdx.x) - team * in_group;
  const int tile = place >> 2, i = place & 3;
  // A tile belongs to the targets `group - before`.
  const int before = 2 * s.reach - tile;
  const int left = piece.left > before ? piece.left : before;
  const int right = piece.right < before + piece.targets ? piece.right : before + piece.targets;
  const int width = static_cast<int>(walk.width);
  const int64_t nodes = walk.height * walk.width, size = walk.stencil.size;
  const bool dense = walk.layout == Layout::dense;
  const int64_t of_source = dense ? nodes : size - 1;  // from an entry to that of the next source
  for (int row_of_tiles = team - share * rows; first + row_of_tiles < end; row_of_tiles += rows) {
    const int r = first + row_of_tiles;
    const int half = walk.stencil.run[r].dx, sy = piece.y + walk.stencil.run[r].dy;
    // The source is in the window of the tile's target t if from - t <= all.
    const unsigned from = half + 4 * (s.reach - tile) + i, all = 2 * half;
    const int64_t row = piece.b * nodes + int64_t{sy} * width;
    const T* at = static_cast<const T*>(walk.affinity) +
                  (dense ? row * nodes + int64_t{piece.y} * width : row * size + first_of_run[r] + half);
    float* to = staged + (row_of_tiles * s.sources() + left + share) * s.entry_pitch() + 4 * place;
    int sx = piece.x + 4 * (left + share - s.reach) + i, x = piece.x + 4 * (left + share - before);
    at += sx * of_source + x;
    const int64_t step = 4 * shares * (of_source + 1);
    if (POWER != 0 && s.wide) {
#pragma unroll 2
      for (int group = left + share; group < right; group += shares) {
        const float4 value = load_four(at);
        *reinterpret_cast<float4*>(to) = make_float4(from <= all ? Power<POWER>::of(walk, value.x) : 0,
                                                     from - 1 <= all ? Power<POWER>::of(walk, value.y) : 0,
                                                     from - 2 <= all ? Power<POWER>::of(walk, value.z) : 0,
                                                     from - 3 <= all ? Power<POWER>::of(walk, value.w) : 0);
        at += step;
        to += shares * s.entry_pitch();
      }
    } else {
      for (int group = left + share; group < right; group += shares) {
#pragma unroll(POWER == 0 ? 1 : 4)
        for (int t = 0; t < 4; ++t) {
          const bool inside = from - t <= all && sx < width && x + t < width;
          to[t] = inside ? Power<POWER>::of(walk, to_sum<float>(at[t])) : 0;
        }
        at += step;
        to += shares * s.entry_pitch();
        sx += 4 * shares, x += 4 * shares;
      }
    }
  }
}

// Tiles for `sets` threads per group and row, at most `threads` in total. False if that doesn't fit.
bool find_tiles(const WalkParams& walk, int sets, int classes, int threads, WalkTiles& s) {
  const int64_t in_row = ceil_div(walk.width, 4);
  if (walk.kind == Kind::f64 || walk.height * walk.width > int64_t{1} << 28) return false;
  s = {};
  s.passes = 1;
  s.across = ceil_div(in_row, 16);
  s.groups = static_cast<int>(ceil_div(in_row, s.across));
  s.reach = (walk.stencil.reach_x + 3) / 4;
  s.classes = classes;
  s.sets = sets;
  // As many rows as threads and shared memory allow, distributed evenly over the rounds.
  int64_t most = threads / (s.groups * s.sets);
  s.rows = 1;
  const int64_t in_row_bytes = s.shared() * int64_t{sizeof(float)};
  const int64_t budget = walk_tile_bytes(current_gpu());
  if (most > budget / in_row_bytes) most = budget / in_row_bytes;
  if (most < 1) return false;
  s.rows = static_cast<int>(ceil_div(walk.stencil.runs, ceil_div(walk.stencil.runs, most)));
  const int64_t bytes = walk.kind == Kind::f32 ? 16 : 8;
  s.wide = walk.layout == Layout::dense && walk.width % 4 == 0 && aligned(walk.affinity, bytes);
  return s.threads() >= 4 * s.tiles();  // stage_entries has a thread for each position in a group's tiles
}
// A block for each segment of a row of targets, a second dimension for images and passes.
dim3 tile_grid(const WalkParams& walk, const WalkTiles& s) {
  return block_grid(walk.height * s.across, walk.batch * s.passes);
}

}  // namespace
}  // namespace afa
