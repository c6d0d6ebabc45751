// One step of the walk on CUDA, computed from the affinity without storing a transition.
//
// walk_step_tiled_kernel: shared memory has tiles of entries (tiles.cuh) and the sources' scores, with the
// classes of a source adjacent. A thread sums eight classes for four targets: 48 bytes from shared memory for
// 32 multiply-adds. An extra class is 1 everywhere, so that its sum is the column sum.
// walk_step_kernel: if the tiles do not fit, a thread owns one target of up to eight classes.
#include "walk/tiles.cuh"

namespace afa {
namespace {

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

// Resident blocks per SM: as many as the registers that the compiler needs allow.
template <typename T>
constexpr int step_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return 2;
#else
  return sizeof(T) == 4 ? 3 : 2;
#endif
}
__device__ inline void add_four(float (&sum)[4], float4 value) {
  sum[0] += value.x;
  sum[1] += value.y;
  sum[2] += value.z;
  sum[3] += value.w;
}
// The scores of the sources of run r, as [group of sources][source][class]; 0 for inactive classes and for
// sources outside the grid. `scores` is the first class's plane. A thread loads four sources of four classes
// at a time, starting with `four` and `group`; `lanes` threads share the work.
__device__ inline void stage_scores(const WalkParams& walk, const WalkTiles& s, const WalkPiece& piece, int r,
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
__global__ void __launch_bounds__(kTileThreads, step_blocks<T>())
    walk_step_tiled_kernel(const __grid_constant__ WalkStepParams p, const __grid_constant__ WalkTiles s) {
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
      const WalkPiece piece = piece_of(walk, s, b, item);
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
      // The partial sums, [part][class][target], are added in order.
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
bool find_step_tiles(const WalkStepParams& p, int threads, WalkTiles& s) {
  const int64_t passes = ceil_div(p.classes, 4 * kStepClasses - 1);
  const int classes = static_cast<int>(ceil_div(p.classes, passes));
  if (!find_tiles(p.walk, classes / kStepClasses + 1, classes, threads, s)) return false;
  s.passes = passes;
  s.wide_scores = p.walk.width % 4 == 0 && aligned(p.scores) && aligned(p.out);
  return true;
}
}  // namespace

const char* launch_walk_step(const WalkStepParams& p, void* stream) {
  int threads = 0;
  switch (p.variant) {
#define AFA_CASE(name, most)  \
  case WalkStepVariant::name: \
    threads = most;           \
    break;
    AFA_WALK_STEP_VARIANTS(AFA_CASE)
#undef AFA_CASE
  }
  WalkTiles s;
  if (threads > 0 && find_step_tiles(p, threads, s)) {
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
}  // namespace afa
