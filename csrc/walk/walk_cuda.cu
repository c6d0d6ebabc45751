// The walk's transition and its single step on CUDA. Nothing outside the window is read.
//
// transition: an entry is read once: its power waits in the result for the column's sum. A block owns a piece
// of a row of targets and stages, for some rows of sources at a time, their entries to these targets (in
// tiles of 4 x 4, raised to the power, 0 outside the window): gathered, each would lie in a line of its own.
// Planes by offset are gathered, as a warp's entries lie side by side, and so is what doesn't fit such tiles
// (float64, wide windows): a thread owns one target and walks along the window's rows with one pointer. So
// does the backward pass. transpose: a thread owns the entries of one row of the window.
//
// step: the same tiles, and beside them the sources' scores, one source's classes together. A thread adds up
// eight classes for four targets: 48 bytes from shared memory for 32 multiply-adds. One class is 1
// everywhere, and its sum that of the column. Where that does not fit, a thread owns one target of up to
// eight classes.
#include "common/cuda.cuh"
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

// A power known to the compiler, 1 or 2; 0: that of p.
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

// value * factor as a product in double would be rounded, or nearly: the factor as the sum of two floats. One
// beyond a float's range stands beside values so small that they can be scaled up.
class Factor {
 public:
  __device__ explicit Factor(double factor) : scale_(factor > 1e38 ? 0x1p64f : 1.0f) {
    factor /= scale_;
    high_ = static_cast<float>(factor);
    low_ = static_cast<float>(factor - high_);
  }
  __device__ float times(float value) const {
    value *= scale_;
    return fmaf(value, high_, value * low_);
  }

 private:
  float scale_, high_, low_;
};
class DoubleFactor {
 public:
  __device__ explicit DoubleFactor(double factor) : factor_(factor) {}
  __device__ double times(double value) const { return value * factor_; }

 private:
  double factor_;
};
inline __device__ Factor factor_for(float, double factor) {
  return Factor(factor);
}
inline __device__ DoubleFactor factor_for(double, double factor) {
  return DoubleFactor(factor);
}

// A column's sum, as exact as one in double: an error that a column shares would grow with every step of a
// long walk. For floats it carries what each addition lost (Kahan), as GeForce GPUs add doubles at a 64th of
// the rate.
template <typename Sum>
class ColumnSum {
 public:
  __device__ void add(Sum value) {
    const Sum corrected = value - lost_, next = sum_ + corrected;
    lost_ = (next - sum_) - corrected;
    sum_ = next;
  }
  __device__ double total() const { return static_cast<double>(sum_) - static_cast<double>(lost_); }

 private:
  Sum sum_ = 0, lost_ = 0;
};

template <>
class ColumnSum<double> {
 public:
  __device__ void add(double value) { sum_ += value; }
  __device__ double total() const { return sum_; }

 private:
  double sum_ = 0;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) walk_transition_kernel(const __grid_constant__ WalkParams p) {
  using Sum = typename SumOf<T>::type;
  const T* affinity = static_cast<const T*>(p.affinity);
  const int64_t nodes = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    each_node(p, [&](const Node& node) {
      Sum* const out = static_cast<Sum*>(p.out) + b * p.stencil.size * nodes + node.index;
      ColumnSum<Sum> sum;
      with_power(p, [&](auto power) {
        Sum* entry = out;
        each_source(p, b, node, [&](int64_t, bool inside, int64_t, int64_t at) {
          const Sum value = inside ? power.of(p, to_sum<Sum>(affinity[at])) : Sum{0};
          sum.add(value);
          *entry = value;
          entry += nodes;
        });
      });
      if (!p.normalize) return;
      const auto factor = factor_for(Sum{}, 1 / (p.eps + sum.total()));
      Sum* entry = out;
#pragma unroll 4
      for (int k = 0; k < p.stencil.size; ++k, entry += nodes) *entry = factor.times(*entry);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(6))
    walk_transition_backward_kernel(const __grid_constant__ WalkParams p) {
  using Sum = typename SumOf<T>::type;
  const T* affinity = static_cast<const T*>(p.affinity);
  T* out = static_cast<T*>(p.out);
  const int64_t nodes = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    each_node(p, [&](const Node& node) {
      const Sum* const grad = static_cast<const Sum*>(p.in) + b * p.stencil.size * nodes + node.index;
      // The gradient lies where the entry does, but for by_offset, which is a way to read only.
      const bool in_place = p.layout != Layout::by_offset;
      with_power(p, [&](auto power) {
        Sum sum = 1, dot = 0;
        if (p.normalize) {
          sum = static_cast<Sum>(p.eps);
          const Sum* slope = grad;
          each_source(p, b, node, [&](int64_t, bool inside, int64_t, int64_t at) {
            if (inside) {
              const Sum value = power.of(p, to_sum<Sum>(affinity[at]));
              sum += value;
              dot += *slope * value;
            }
            slope += nodes;
          });
          dot /= sum;
        }
        const Sum inverse = 1 / sum;
        const Sum* slope = grad;
        each_source(p, b, node, [&](int64_t k, bool inside, int64_t source, int64_t at) {
          if (inside) {
            const Sum local = power.derivative(p, to_sum<Sum>(affinity[at]));
            out[in_place ? at : gradient_index(p, b, source, node.index, k)] =
                from_sum<T>((*slope - dot) * inverse * local);
          }
          slope += nodes;
        });
      });
    });
  }
}

// Entry k of a target is entry K - 1 - k of the source; as k grows by one, the source moves one to the left.
template <typename T>
__global__ void __launch_bounds__(kThreads) walk_transpose_kernel(const __grid_constant__ WalkParams p) {
  const int64_t nodes = p.height * p.width;
  for (int64_t index = blockIdx.y; index < p.batch * p.stencil.runs; index += gridDim.y) {
    const int64_t b = index / p.stencil.runs, r = index - b * p.stencil.runs;
    int64_t first = 0;
    for (int i = 0; i < r; ++i) first += p.stencil.run[i].count;
    const Run run = p.stencil.run[r];
    const T* in = static_cast<const T*>(p.in) + (b * p.stencil.size + p.stencil.size - 1 - first) * nodes;
    T* out = static_cast<T*>(p.out) + (b * p.stencil.size + first) * nodes;
    each_node(p, [&](const Node& node) {
      const int64_t sy = node.y + run.dy;
      const int64_t end = sy >= 0 && sy < p.height ? p.width : 0;
      int64_t sx = node.x + run.dx, from = sy * p.width + sx;
      T* to = out + node.index;
#pragma unroll 4
      for (int j = 0; j < run.count; ++j, --sx, from -= nodes + 1, to += nodes) {
        T value = from_sum<T>(0.0f);
        if (sx >= 0 && sx < end) value = in[from];
        *to = value;
      }
    });
  }
}

// ---- a single step

constexpr int kStepClasses = 8, kStepThreads = 224;
// The shared memory of a block: a third of the SM's where that is large (A100 163 KB, H100 227 KB), half of
// it on GeForce (99 KB), so that other blocks compute while one stages. The runtime keeps 1 KB for each
// block.
inline int64_t step_shared_bytes() {
  const int64_t of_sm = shared_bytes_of_sm();
  const int64_t of_block = shared_bytes_of_block();
  const int64_t share = of_sm / (of_sm > (128 << 10) ? 3 : 2) - (1 << 10);
  return share < of_block ? share : of_block;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(5))
    walk_step_kernel(const __grid_constant__ WalkStepParams p) {
  using Sum = typename SumOf<T>::type;
  const WalkParams& walk = p.walk;
  const T* affinity = static_cast<const T*>(walk.affinity);
  const int64_t nodes = walk.height * walk.width;
  const int64_t groups = (p.classes + kStepClasses - 1) / kStepClasses;
  for (int64_t index = blockIdx.y; index < walk.batch * groups; index += gridDim.y) {
    const int64_t b = index / groups, first = index % groups * kStepClasses;
    const int64_t plane = b * p.classes + first;
    const int64_t count = p.classes - first < kStepClasses ? p.classes - first : kStepClasses;
    const Sum* scores = static_cast<const Sum*>(p.scores) + plane * nodes;
    Sum* out = static_cast<Sum*>(p.out) + plane * nodes;
    bool on[kStepClasses];
    for (int c = 0; c < kStepClasses; ++c) {
      on[c] = c < count && (p.class_mask == nullptr || p.class_mask[plane + c]);
    }
    each_node(walk, [&](const Node& node) {
      Sum total = static_cast<Sum>(walk.eps);
      Sum sum[kStepClasses] = {};
      each_source(walk, b, node, [&](int64_t, bool inside, int64_t source, int64_t at) {
        if (!inside) return;
        const Sum value = raised(walk, to_sum<Sum>(affinity[at]));
        total += value;
#pragma unroll
        for (int c = 0; c < kStepClasses; ++c) {
          if (on[c]) sum[c] += value * scores[c * nodes + source];
        }
      });
      const Sum factor = walk.normalize ? 1 / total : Sum{1};
#pragma unroll
      for (int c = 0; c < kStepClasses; ++c) {
        if (c < count) out[c * nodes + node.index] = on[c] ? sum[c] * factor : Sum{0};
      }
    });
  }
}

// Blocks an SM shall hold: as many as leave the registers that the compiler needs.
template <typename T>
constexpr int step_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return 2;
#else
  return sizeof(T) == 4 ? 3 : 2;
#endif
}

// How a tiled kernel shares its work out to blocks and threads. A group: four nodes side by side, from
// an x that four divides.
struct StepTiles {
  int rows;                // of sources, at once
  int groups;              // of targets of a block
  int reach;               // groups of sources on each side of a group of targets
  int sets;                // threads a group and row: one for eight classes, or one for each target
  int classes;             // of a pass, but for the last, the ones; the transition has none
  int64_t across, passes;  // blocks side by side in a row of targets; passes over the classes
  bool wide;               // whether four entries can be read at once
  bool wide_scores;        // and four scores

  AFA_HOST_DEVICE int threads() const { return groups * sets * rows; }
  AFA_HOST_DEVICE int sources() const { return groups + 2 * reach; }  // groups of them
  // Tiles of 4 x 4 entries from one group of sources, and that group's scores. Four more values a group: its
  // neighbours' lie in other banks.
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

// One block's piece of a row of targets.
struct StepPiece {
  int64_t b;
  int y, x;         // the first target
  int targets;      // groups of them
  int first, end;   // the runs of the stencil whose sources lie in the grid: from `first`, under `end`
  int left, right;  // the groups of sources that lie in the grid: from `left`, under `right`
};

__device__ inline StepPiece piece_of(const WalkParams& walk, const StepTiles& s, int64_t b, int64_t item) {
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

__device__ inline float4 load_four(const float* at) {
  return *reinterpret_cast<const float4*>(at);
}
template <typename T>
__device__ float4 load_four(const T* at) {
  const uint2 four = *reinterpret_cast<const uint2*>(at);
  const T* value = reinterpret_cast<const T*>(&four);
  return make_float4(to_sum<float>(value[0]), to_sum<float>(value[1]), to_sum<float>(value[2]),
                     to_sum<float>(value[3]));
}

__device__ inline void add_four(float (&sum)[4], float4 value) {
  sum[0] += value.x;
  sum[1] += value.y;
  sum[2] += value.z;
  sum[3] += value.w;
}

// The entries of the runs from `first` under `end`, as tiles[row][group of sources][group of targets][source]
// [target]. A thread's place in a tile stays the same from group to group.
template <typename T, int POWER>
__device__ void stage_entries(const WalkParams& walk, const StepTiles& s, const StepPiece& piece, int first,
                              int end, const int* first_of_run, float* staged, Power<POWER>) {
  // A team of threads, one for each place, has a row, or a share of it where there are more teams than rows.
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
    // The source is in the window of the tile's target t where from - t <= all.
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

// The scores of the sources of run r, as [group of sources][source][class], those of classes that are off, or
// whose source lies outside the grid, 0. `scores` is the first class's plane. A thread takes four sources of
// four classes at a time; `four` and `group` say which first, and `lanes` threads share the work.
__device__ inline void stage_scores(const WalkParams& walk, const StepTiles& s, const StepPiece& piece, int r,
                                    int four, int group, int lanes, const float* scores, uint32_t on,
                                    float* staged) {
  const int groups = piece.right - piece.left, step = lanes / groups, rest = lanes - step * groups;
  const int width = static_cast<int>(walk.width), nodes = static_cast<int>(walk.height) * width;
  const int left = piece.x + 4 * (piece.left - s.reach);
  const float* row = scores + int64_t{piece.y + walk.stencil.run[r].dy} * width + left;
  staged += piece.left * s.score_pitch();
  while (four < s.slots() / 4) {
    float4 of_class[4];
    const float* at = row + 4 * group + int64_t{4 * four} * nodes;
    const int beyond = width - left - 4 * group;  // sources to the end of the row
#pragma unroll
    for (int c = 0; c < 4; ++c, at += nodes) {
      const float other = 4 * four + c == s.slots() - 1 ? 1.0f : 0.0f;
      of_class[c] = make_float4(other, other, other, other);
      if ((on >> (4 * four + c) & 1) == 0) continue;
      if (s.wide_scores) {
        of_class[c] = load_four(at);
      } else {
        of_class[c].x = at[0];
        if (1 < beyond) of_class[c].y = at[1];
        if (2 < beyond) of_class[c].z = at[2];
        if (3 < beyond) of_class[c].w = at[3];
      }
    }
    float* const to = staged + group * s.score_pitch() + 4 * four;
    const int next = s.slots();
    *reinterpret_cast<float4*>(to) = make_float4(of_class[0].x, of_class[1].x, of_class[2].x, of_class[3].x);
    *reinterpret_cast<float4*>(to + next) =
        make_float4(of_class[0].y, of_class[1].y, of_class[2].y, of_class[3].y);
    *reinterpret_cast<float4*>(to + 2 * next) =
        make_float4(of_class[0].z, of_class[1].z, of_class[2].z, of_class[3].z);
    *reinterpret_cast<float4*>(to + 3 * next) =
        make_float4(of_class[0].w, of_class[1].w, of_class[2].w, of_class[3].w);
    four += step;
    group += rest;
    if (group >= groups) group -= groups, ++four;
  }
}

template <typename T>
__global__ void __launch_bounds__(kStepThreads, step_blocks<T>())
    walk_step_tiled_kernel(const __grid_constant__ WalkStepParams p, const __grid_constant__ StepTiles s) {
  AFA_DYNAMIC_SHARED(float, shared);
  __shared__ int first_of_run[kMaxRuns];
  const WalkParams& walk = p.walk;
  const int width = static_cast<int>(walk.width), height = static_cast<int>(walk.height);
  const int64_t nodes = walk.height * walk.width;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread % s.groups, set = thread / s.groups % s.sets,
            strand = thread / (s.groups * s.sets);
  count_offsets(walk.stencil, first_of_run);
  float* const entries = shared;
  float* const scores = entries + s.rows * s.sources() * s.entry_pitch();
  for (int64_t index = blockIdx.y; index < walk.batch * s.passes; index += gridDim.y) {
    const int64_t b = index / s.passes, first_class = index % s.passes * s.classes;
    const int64_t plane = b * p.classes + first_class;
    const int count =
        p.classes - first_class < s.classes ? static_cast<int>(p.classes - first_class) : s.classes;
    uint32_t on = (uint32_t{1} << count) - 1;
    if (p.class_mask != nullptr) {
      for (int c = 0; c < count; ++c) on &= ~(uint32_t{!p.class_mask[plane + c]} << c);
    }
    for (int64_t item = blockIdx.x; item < height * s.across; item += gridDim.x) {
      const StepPiece piece = piece_of(walk, s, b, item);
      const int y = piece.y, x = piece.x;
      const int in_strand = set * s.groups + group;
      const int first_four = in_strand / (piece.right - piece.left);
      const int first_group = in_strand - first_four * (piece.right - piece.left);
      float sum[kStepClasses][4] = {};
      for (int first = piece.first; first < piece.end; first += s.rows) {
        const int end = first + s.rows < piece.end ? first + s.rows : piece.end;
        __syncthreads();
        with_power(walk, [&](auto power) {
          stage_entries<T>(walk, s, piece, first, end, first_of_run, entries, power);
        });
        if (first + strand < end) {
          stage_scores(walk, s, piece, first + strand, first_four, first_group, s.groups * s.sets,
                       static_cast<const float*>(p.scores) + plane * nodes, on,
                       scores + strand * s.sources() * s.score_pitch());
        }
        __syncthreads();
        if (first + strand >= end || group >= piece.targets) continue;
        const int reach = (walk.stencil.run[first + strand].dx + 3) / 4;
        const int here = group + s.reach;
        const int low = here - reach > piece.left ? here - reach : piece.left;
        const int high = here + reach < piece.right ? here + reach : piece.right - 1;
        const int start = strand * s.sources() + low;
        const float* entry = entries + start * s.entry_pitch() + (here - low + s.reach) * 16;
        const float* score = scores + start * s.score_pitch() + set * kStepClasses;
        for (int a = low; a <= high; ++a, entry += s.entry_pitch() - 16, score += s.score_pitch()) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float4 value = *reinterpret_cast<const float4*>(entry + 4 * i);
            const float4 low_half = *reinterpret_cast<const float4*>(score + i * s.slots());
            const float4 high_half = *reinterpret_cast<const float4*>(score + i * s.slots() + 4);
            const float of_class[kStepClasses] = {low_half.x,  low_half.y,  low_half.z,  low_half.w,
                                                  high_half.x, high_half.y, high_half.z, high_half.w};
#pragma unroll
            for (int c = 0; c < kStepClasses; ++c) {
              sum[c][0] += value.x * of_class[c];
              sum[c][1] += value.y * of_class[c];
              sum[c][2] += value.z * of_class[c];
              sum[c][3] += value.w * of_class[c];
            }
          }
        }
      }
      // The strands' sums, [strand][class][target], are added up in order.
      __syncthreads();
      const int targets = 4 * s.groups;
      float* const mine = shared + (strand * s.slots() + set * kStepClasses) * targets + 4 * group;
#pragma unroll
      for (int c = 0; c < kStepClasses; ++c) {
        *reinterpret_cast<float4*>(mine + c * targets) =
            make_float4(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
      }
      __syncthreads();
      float* const out = static_cast<float*>(p.out) + plane * nodes + int64_t{y} * width + x;
      for (int i = thread; i < count * s.groups; i += s.threads()) {
        const int c = i / s.groups, target = 4 * (i - c * s.groups);
        if (x + target >= width) continue;
        const float* from = shared + target;
        const float eps = static_cast<float>(walk.eps);
        float value[4] = {}, total[4] = {eps, eps, eps, eps};
        for (int row = 0; row < s.rows; ++row, from += s.slots() * targets) {
          add_four(value, load_four(from + c * targets));
          add_four(total, load_four(from + (s.slots() - 1) * targets));
        }
        const bool is_on = on >> c & 1;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          value[t] = !is_on ? 0 : walk.normalize ? value[t] * (1 / total[t]) : value[t];
        }
        float* const to = out + c * nodes + target;
        if (s.wide_scores) {
          *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
        } else {
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (x + target + t < width) to[t] = value[t];
          }
        }
      }
    }
  }
}

// The transition, from entries that are not already side by side for neighbouring targets: a thread owns a
// target and some rows of its window.
template <typename T>
__global__ void __launch_bounds__(kStepThreads, 3)
    walk_transition_tiled_kernel(const __grid_constant__ WalkParams p, const __grid_constant__ StepTiles s) {
  AFA_DYNAMIC_SHARED(float, entries);
  __shared__ int first_of_run[kMaxRuns];
  const int64_t nodes = p.height * p.width;
  const int thread = static_cast<int>(threadIdx.x), targets = 4 * s.groups;
  const int strand = thread / targets, target = thread - strand * targets;
  const int width = static_cast<int>(p.width), pitch = s.entry_pitch();
  count_offsets(p.stencil, first_of_run);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    for (int64_t item = blockIdx.x; item < p.height * s.across; item += gridDim.x) {
      const StepPiece piece = piece_of(p, s, b, item);
      const int x = piece.x + target;
      const bool mine = x < width;
      float* const out =
          static_cast<float*>(p.out) + b * p.stencil.size * nodes + int64_t{piece.y} * width + x;
      // The last source of a run, to the right of the target, by row, column and tile as one; and the target
      // in its tile.
      const float* const tiles = entries + (target / 4 + 2 * s.reach) * 16 + target % 4;
      ColumnSum<float> sum;
      for (int first = piece.first; first < piece.end; first += s.rows) {
        const int end = first + s.rows < piece.end ? first + s.rows : piece.end;
        __syncthreads();
        with_power(
            p, [&](auto power) { stage_entries<T>(p, s, piece, first, end, first_of_run, entries, power); });
        __syncthreads();
        const int r = first + strand;
        if (r >= end || !mine) continue;
        const float* const row = tiles + strand * s.sources() * pitch;
        const int half = p.stencil.run[r].dx;
        float* entry = out + first_of_run[r] * nodes;
        int source = target + 4 * s.reach + half;
        for (int sx = x + half; sx >= x - half; --sx, --source, entry += nodes) {
          float value = 0;
          if (sx >= 0 && sx < width) value = row[(source >> 2) * (pitch - 16) + (source & 3) * 4];
          sum.add(value);
          *entry = value;
        }
      }
      double total = p.eps;
      if (p.normalize) {
        double* const sums = reinterpret_cast<double*>(entries);
        __syncthreads();
        sums[strand * targets + target] = sum.total();
        __syncthreads();
        for (int i = 0; i < s.rows; ++i) total += sums[i * targets + target];
      }
      if (!mine) continue;
      // Each thread goes over the rows it wrote, and over those whose sources lie outside the grid.
      const Factor factor(p.normalize ? 1 / total : 1);
      for (int r = 0; r < p.stencil.runs; ++r) {
        const bool outside = r < piece.first || r >= piece.end;
        const int whose = outside ? r : r - piece.first;
        if (whose % s.rows != strand || (!outside && !p.normalize)) continue;
        float* entry = out + first_of_run[r] * nodes;
        for (int j = p.stencil.run[r].count; j > 0; --j, entry += nodes) {
          *entry = outside ? 0 : factor.times(*entry);
        }
      }
    }
  }
}

// Tiles for `sets` threads a group and row, at most `threads` in all. False where that doesn't fit.
bool find_tiles(const WalkParams& walk, int sets, int classes, int threads, StepTiles& s) {
  const int64_t in_row = ceil_div(walk.width, 4);
  if (walk.kind == Kind::f64 || walk.height * walk.width > int64_t{1} << 28) return false;
  s = {};
  s.passes = 1;
  s.across = ceil_div(in_row, 16);
  s.groups = static_cast<int>(ceil_div(in_row, s.across));
  s.reach = (walk.stencil.reach_x + 3) / 4;
  s.classes = classes;
  s.sets = sets;
  // As many rows as there are threads and shared memory for, shared out evenly to the rounds.
  int64_t most = threads / (s.groups * s.sets);
  s.rows = 1;
  const int64_t in_row_bytes = s.shared() * int64_t{sizeof(float)};
  const int64_t budget = step_shared_bytes();
  if (most > budget / in_row_bytes) most = budget / in_row_bytes;
  if (most < 1) return false;
  s.rows = static_cast<int>(ceil_div(walk.stencil.runs, ceil_div(walk.stencil.runs, most)));
  const uintptr_t bytes = walk.kind == Kind::f32 ? 16 : 8;
  s.wide = walk.layout == Layout::dense && walk.width % 4 == 0 &&
           reinterpret_cast<uintptr_t>(walk.affinity) % bytes == 0;
  return s.threads() >= 4 * s.tiles();  // stage_entries has a thread for each place in a group's tiles
}

bool find_step_tiles(const WalkStepParams& p, int threads, StepTiles& s) {
  const int64_t passes = ceil_div(p.classes, 4 * kStepClasses - 1);
  const int classes = static_cast<int>(ceil_div(p.classes, passes));
  if (!find_tiles(p.walk, classes / kStepClasses + 1, classes, threads, s)) return false;
  s.passes = passes;
  s.wide_scores = p.walk.width % 4 == 0 && reinterpret_cast<uintptr_t>(p.scores) % 16 == 0 &&
                  reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  return true;
}

// A block for each piece of a row of targets, a second dimension for images and passes.
dim3 tile_grid(const WalkParams& walk, const StepTiles& s) {
  const int64_t rows = walk.height * s.across, groups = walk.batch * s.passes;
  return block_grid(rows, groups);
}

dim3 node_grid(const WalkParams& p) {
  return grid_for(p.height * p.width, p.batch);
}

}  // namespace

const char* launch_walk_transition(const WalkParams& p, void* stream) {
  StepTiles s;
  if (p.layout != Layout::by_offset && find_tiles(p, 4, 0, kStepThreads, s)) {
    with_type(p.kind, [&](auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) < sizeof(double)) {
        AFA_LAUNCH_SHARED((walk_transition_tiled_kernel<T>), tile_grid(p, s), s.threads(),
                          s.shared() * sizeof(float), stream, p, s);
      }
    });
    return launch_error();
  }
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transition_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_walk_transition_backward(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transition_backward_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_walk_step(const WalkStepParams& p, void* stream) {
  const auto variant = static_cast<WalkStepVariant>(p.variant);
  const int threads = variant == WalkStepVariant::tiled128   ? 128
                      : variant == WalkStepVariant::tiled160 ? 160
                                                             : kStepThreads;
  StepTiles s;
  if (variant != WalkStepVariant::by_target && find_step_tiles(p, threads, s)) {
    with_type(p.walk.kind, [&](auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) < sizeof(double)) {
        AFA_LAUNCH_SHARED((walk_step_tiled_kernel<T>), tile_grid(p.walk, s), s.threads(),
                          s.shared() * sizeof(float), stream, p, s);
      }
    });
    return launch_error();
  }
  const int64_t groups = ceil_div(p.classes, kStepClasses);
  with_type(p.walk.kind, [&](auto type) {
    AFA_LAUNCH((walk_step_kernel<decltype(type)>),
               grid_for(p.walk.height * p.walk.width, p.walk.batch * groups), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_walk_transpose(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transpose_kernel<decltype(type)>),
               grid_for(p.height * p.width, p.batch * p.stencil.runs), kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
