// The stencil on CUDA: steps, adjoint and the gradient of the weights. All kernels gather, so no atomics are
// needed and results are reproducible. Sums are in float32 (float64 for float64), also between steps.
//
// step, adjoint: any neighbors. A thread owns one pixel and 4, 8 or 12 classes. Values are stored in groups
// of four classes per pixel, so that every neighbor is a 16-byte load, coalesced over the warp, and one
// weight and one offset are used for all classes of the thread.
//
// weight gradient: a thread owns one pixel and eight neighbors; it reads a class's gradient once for all
// eight.
#include "stencil/steps.cuh"

namespace afa {
namespace {

static_assert(kThreads == kStencilThreads, "the rule counts the blocks that are launched");

// A pixel's values of a group of classes.
template <typename Sum>
struct alignas(16) Four {
  Sum of[kGroup];
};

// With 16-byte accesses, which the compiler doesn't generate from the structure by itself.
__device__ inline Four<float> load(const Four<float>* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Four<double> load(const Four<double>* from) {
  const double2* halves = reinterpret_cast<const double2*>(from);
  const double2 a = halves[0], b = halves[1];
  return {{a.x, a.y, b.x, b.y}};
}
__device__ inline void store(Four<float>* to, const Four<float>& v) {
  *reinterpret_cast<float4*>(to) = make_float4(v.of[0], v.of[1], v.of[2], v.of[3]);
}
__device__ inline void store(Four<double>* to, const Four<double>& v) {
  double2* halves = reinterpret_cast<double2*>(to);
  halves[0] = make_double2(v.of[0], v.of[1]);
  halves[1] = make_double2(v.of[2], v.of[3]);
}

template <typename Sum>
__device__ inline void add_product(Four<Sum>& sum, Sum weight, const Four<Sum>& value) {
#pragma unroll
  for (int c = 0; c < kGroup; ++c) sum.of[c] += weight * value.of[c];
}

__device__ inline bool is_group_active(const StencilParams& p, int64_t b, int64_t group) {
  for (int64_t c = group * kGroup; c < (group + 1) * kGroup; ++c) {
    if (c < p.classes && is_active(p, b, c)) return true;
  }
  return false;
}

__device__ inline int64_t groups_of(const StencilParams& p) {
  return (p.classes + kGroup - 1) / kGroup;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) group_kernel(const __grid_constant__ StencilParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t pixels = p.height * p.width, groups = groups_of(p);
  for (int64_t index = blockIdx.y; index < p.batch * groups; index += gridDim.y) {
    const int64_t b = index / groups, first = index % groups * kGroup;
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      Four<Sum> values;
#pragma unroll
      for (int c = 0; c < kGroup; ++c) {
        const bool on = first + c < p.classes && is_active(p, b, first + c);
        const T* plane = static_cast<const T*>(p.in.data) + (b * p.classes + first + c) * pixels;
        values.of[c] = on ? to_sum<Sum>(plane[pixel]) : Sum{0};
      }
      store(static_cast<Four<Sum>*>(p.out.data) + index * pixels + pixel, values);
    }
  }
}

// Calls f with the positions of a run's neighbors in their row, in order; near a border they are clamped.
template <typename F>
__device__ inline void each_of_run(const Run& run, int x, int width, bool inside, const F& f) {
  int at = x + run.dx;
  if (inside) {
#pragma unroll 4
    for (int j = 0; j < run.count; ++j, at += run.step) f(at);
  } else {
#pragma unroll 2
    for (int j = 0; j < run.count; ++j, at += run.step) f(clamped(at, width));
  }
}

// One step. KEPT: a thread has one pixel, whose weights are in shared memory from `kept` with stride
// kThreads.
template <typename T, bool ADJOINT, int GROUPS, bool KEPT = false>
__device__ inline void gather_step(const StencilParams& p, const void* in, void* out, bool grouped_out,
                                   [[maybe_unused]] const T* kept = nullptr) {
  const int64_t weight_stride = KEPT ? kThreads : p.weight_stride_k;
  using Sum = typename SumOf<T>::type;
  const auto pixels = static_cast<uint32_t>(p.height * p.width);
  const auto stride = static_cast<uint32_t>(p.width);
  const int64_t groups = groups_of(p), sets = (groups + GROUPS - 1) / GROUPS;
  for (int64_t index = blockIdx.y; index < p.batch * sets; index += gridDim.y) {
    const int64_t b = index / sets, first = index % sets * GROUPS;
    // A group without active classes repeats another group, and its result is not written.
    int64_t group[GROUPS], some = -1;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      group[g] = first + g < groups && is_group_active(p, b, first + g) ? b * groups + first + g : -1;
      if (group[g] >= 0) some = group[g];
    }
    const Four<Sum>* values[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      values[g] = static_cast<const Four<Sum>*>(in) + (group[g] >= 0 ? group[g]
                                                       : some < 0    ? 0
                                                                     : some) *
                                                          pixels;
    }
    const int height = static_cast<int>(ADJOINT || p.extent == nullptr ? p.height : p.extent[2 * b]);
    const int width = static_cast<int>(ADJOINT || p.extent == nullptr ? p.width : p.extent[2 * b + 1]);
    const int reach = p.stencil.reach_x;
    for (int64_t item = first_item(); item < pixels; item += item_stride()) {
      const auto pixel = static_cast<uint32_t>(item);
      const int y = static_cast<int>(pixel / stride), x = static_cast<int>(pixel - y * stride);
      if (!ADJOINT && (y >= height || x >= width)) continue;
      Four<Sum> sum[GROUPS] = {};
      if (some >= 0) {
        const T* weights = KEPT ? kept : static_cast<const T*>(p.weights) + b * p.weight_stride_b;
        if (!ADJOINT && !KEPT) weights += pixel;
        const bool inside = x >= reach && x < width - reach && (!ADJOINT || (x > 0 && x < width - 1));
        for (int r = 0; r < p.stencil.runs; ++r) {
          const Run run = p.stencil.run[r];
          const Four<Sum>* row[GROUPS];
          const auto to_row = [&](int at) {
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) row[g] = values[g] + int64_t{at} * stride;
          };
          const auto add = [&](Sum weight, int at) {
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) add_product(sum[g], weight, load(row[g] + at));
          };
          if (!ADJOINT) {
            to_row(clamped(y + run.dy, height));
            each_of_run(run, x, width, inside, [&](int at) {
              add(to_sum<Sum>(*weights), at);
              weights += weight_stride;
            });
            continue;
          }
          // The pixels that read this one: one in the interior, all pixels clamped to it at a border.
          const Range ys = clamp_preimage(y, run.dy, height);
          for (int64_t reader = ys.begin; reader < ys.end; ++reader) {
            to_row(static_cast<int>(reader));
            const T* in_row = weights + reader * p.weight_stride_y;
            if (inside) {
              each_of_run({run.dy, -run.dx, -run.step, run.count}, x, width, true, [&](int at) {
                add(to_sum<Sum>(in_row[at]), at);
                in_row += weight_stride;
              });
            } else {
              for (int j = 0; j < run.count; ++j, in_row += weight_stride) {
                const Range xs = clamp_preimage(x, run.dx + int64_t{j} * run.step, width);
                for (int64_t at = xs.begin; at < xs.end; ++at)
                  add(to_sum<Sum>(in_row[at]), static_cast<int>(at));
              }
            }
          }
          weights += run.count * weight_stride;
        }
      }
      if (grouped_out) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          if (group[g] >= 0) store(static_cast<Four<Sum>*>(out) + group[g] * pixels + pixel, sum[g]);
        }
      } else {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
          for (int c = 0; c < kGroup; ++c) {
            const int64_t at = (first + g) * kGroup + c;
            if (at >= p.classes) continue;
            const bool on = is_active(p, b, at);
            if (!on && !p.zero_masked) continue;
            const Sum value = on ? sum[g].of[c] : Sum{0};
            static_cast<T*>(out)[(b * p.classes + at) * pixels + pixel] = from_sum<T>(value);
          }
        }
      }
    }
  }
}

template <typename T, bool ADJOINT, int GROUPS>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(stencil_blocks_per_sm(GROUPS)))
    stencil_kernel(const __grid_constant__ StencilParams p, int first_step, int end_step) {
  for (int t = first_step; t < end_step; ++t) {
    gather_step<T, ADJOINT, GROUPS>(p, source_of(p, t), result_of(p, t), t + 1 < p.steps || p.out.grouped);
    if (t + 1 < end_step) grid_sync();
  }
}

// All steps, if the grid has a thread for each pixel and group of classes: it reads its weights once.
template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(stencil_blocks_per_sm(1)))
    stencil_kept_kernel(const __grid_constant__ StencilParams p) {
  AFA_DYNAMIC_SHARED(T, shared);
  T* const kept = shared + threadIdx.x;
  const int64_t pixel = first_item(), b = blockIdx.y / groups_of(p);
  if (pixel < p.height * p.width) {
    const T* from = static_cast<const T*>(p.weights) + b * p.weight_stride_b + pixel;
#pragma unroll 4
    for (int k = 0; k < p.stencil.size; ++k, from += p.weight_stride_k) kept[k * kThreads] = *from;
  }
  for (int t = 0; t < p.steps; ++t) {
    gather_step<T, false, 1, true>(p, source_of(p, t), result_of(p, t), t + 1 < p.steps || p.out.grouped,
                                   kept);
    if (t + 1 < p.steps) grid_sync();
  }
}

constexpr int kNeighbors = 8;  // per thread of weight_grad_kernel

template <typename Sum>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(const __grid_constant__ StencilParams p) {
  const auto pixels = static_cast<uint32_t>(p.height * p.width);
  const auto stride = static_cast<uint32_t>(p.width);
  const int64_t groups = groups_of(p), parts = (p.stencil.size + kNeighbors - 1) / kNeighbors;
  for (int64_t index = blockIdx.y; index < p.batch * parts; index += gridDim.y) {
    const int64_t b = index / parts, begin = index % parts * kNeighbors;
    for (int64_t item = first_item(); item < pixels; item += item_stride()) {
      const auto pixel = static_cast<uint32_t>(item);
      const uint32_t y = pixel / stride, x = pixel - y * stride;
      // The neighbors' positions; past the last neighbor, its position is repeated.
      uint32_t source[kNeighbors];
      int r = 0;
      int64_t j = begin;
      while (p.stencil.run[r].count <= j) j -= p.stencil.run[r++].count;
#pragma unroll
      for (int i = 0; i < kNeighbors; ++i) {
        const Run run = p.stencil.run[r];
        source[i] = static_cast<uint32_t>(clamp_index(int64_t{y} + run.dy, p.height)) * stride +
                    static_cast<uint32_t>(clamp_index(int64_t{x} + run.dx + j * run.step, p.width));
        if (begin + i + 1 < p.stencil.size && ++j == run.count) {
          ++r;
          j = 0;
        }
      }
      Sum sum[kNeighbors] = {};
      for (int64_t g = 0; g < groups; ++g) {
        if (!is_group_active(p, b, g)) continue;
        const int64_t plane = (b * groups + g) * pixels;
        const Four<Sum> grad = load(static_cast<const Four<Sum>*>(p.out.data) + plane + pixel);
        const Four<Sum>* in = static_cast<const Four<Sum>*>(p.in.data) + plane;
#pragma unroll
        for (int i = 0; i < kNeighbors; ++i) {
          const Four<Sum> value = load(in + source[i]);
#pragma unroll
          for (int c = 0; c < kGroup; ++c) sum[i] += grad.of[c] * value.of[c];
        }
      }
      Sum* to = static_cast<Sum*>(p.grad_weights) + (b * p.stencil.size + begin) * pixels + pixel;
#pragma unroll
      for (int i = 0; i < kNeighbors; ++i) {
        if (begin + i < p.stencil.size) to[i * int64_t{pixels}] += sum[i];
      }
    }
  }
}

// ---- launches

// Launches stencil_kept_kernel if all its blocks can run at once; returns whether it did.
template <typename T>
bool launch_kept(const StencilParams& p, void* stream) {
  const int64_t columns = ceil_div(p.height * p.width, kThreads),
                sets = p.batch * ceil_div(p.classes, kGroup);
  const size_t bytes = p.stencil.size * kThreads * sizeof(T);
  const auto kernel = stencil_kept_kernel<T>;
  if (p.steps < 2 || bytes > static_cast<size_t>(current_gpu().shared_of_block)) return false;
  if (sets > kMaxGridY || columns * sets > resident_blocks(kernel, kThreads, bytes)) return false;
  return AFA_LAUNCH_COOPERATIVE(kernel, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(sets)),
                                dim3(kThreads), bytes, stream, p);
}

template <typename T, bool ADJOINT, int GROUPS>
void launch_steps(const StencilParams& p, bool resident, void* stream) {
  const int64_t sets = p.batch * ceil_div(ceil_div(p.classes, kGroup), GROUPS);
  const dim3 grid = grid_for(p.height * p.width, sets);
  const auto kernel = stencil_kernel<T, ADJOINT, GROUPS>;
  const int64_t blocks = resident && p.steps > 1 ? resident_blocks(kernel, kThreads, 0) : 0;
  if (blocks > 0) {
    const int64_t y = grid.y < blocks ? grid.y : blocks, x = blocks / y;
    const dim3 resident_grid(static_cast<unsigned>(grid.x < x ? grid.x : x), static_cast<unsigned>(y));
    if (AFA_LAUNCH_COOPERATIVE(kernel, resident_grid, dim3(kThreads), size_t{0}, stream, p, 0,
                               static_cast<int>(p.steps))) {
      return;
    }
  }
  for (int t = 0; t < p.steps; ++t) AFA_LAUNCH((kernel), grid, kThreads, stream, p, t, t + 1);
}

template <bool ADJOINT>
void launch_steps(const StencilParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
#define AFA_CASE(name, groups, resident, kept)                                           \
  case StencilVariant::name:                                                             \
    if (kept && !ADJOINT && launch_kept<T>(p, stream)) break;                            \
    launch_steps<T, ADJOINT, (ADJOINT && groups > 2 ? 2 : groups)>(p, resident, stream); \
    break;
    switch (p.variant) { AFA_STENCIL_VARIANTS(AFA_CASE) }
#undef AFA_CASE
  });
}

}  // namespace

const char* launch_stencil_group(const StencilParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((group_kernel<decltype(type)>),
               grid_for(p.height * p.width, p.batch * ceil_div(p.classes, kGroup)), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_stencil_step(const StencilParams& p, void* stream) {
  launch_steps<false>(p, stream);
  return launch_error();
}

const char* launch_stencil_adjoint(const StencilParams& p, void* stream) {
  launch_steps<true>(p, stream);
  return launch_error();
}

const char* launch_stencil_weight_grad(const StencilParams& p, void* stream) {
  const dim3 grid = grid_for(p.height * p.width, p.batch * ceil_div(p.stencil.size, kNeighbors));
  if (p.kind == Kind::f64) {
    AFA_LAUNCH((weight_grad_kernel<double>), grid, kThreads, stream, p);
  } else {
    AFA_LAUNCH((weight_grad_kernel<float>), grid, kThreads, stream, p);
  }
  return launch_error();
}

}  // namespace afa
