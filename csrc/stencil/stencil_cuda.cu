// The stencil on CUDA: steps, adjoint and the gradient of the weights. All gather, so that no atomics are
// needed and results are the same every time; sums are formed and, between steps, kept in float32 (float64
// for float64).
//
// ring: steps with PAR's default neighbours. A block owns a tile of 32 columns; a thread owns 1,
// 2 or 4 pixels of a column and holds their 48 weights each in registers for all classes (and all steps,
// where a cooperative launch has a block for every tile). Class after class, the tile's values with a halo of
// 24 come into shared memory by asynchronous copies, one or two classes ahead; clamping at borders is done by
// these copies, and what follows has one path: each value that a thread's pixels read is read once, at an
// offset known to the compiler.
//
// step, adjoint: any neighbours. A thread owns one pixel and 4, 8 or 12 classes; values lie in groups of four
// classes a pixel, so that any neighbour is a 16-byte load, coalesced over the warp, and one weight and one
// offset serve all classes of the thread.
//
// weight gradient: a thread owns one pixel and eight neighbours; it reads a class's gradient once for these.
#include <type_traits>
#include <utility>

#include "common/async_copy.cuh"
#include "stencil/ring.cuh"
#include "stencil/stencil.h"

namespace afa {
namespace {

// What step t reads and writes.
__device__ inline const void* source_of(const StencilParams& p, int t) {
  return t == 0 ? p.in.data : p.spare[(t - 1) % 2];
}
__device__ inline void* result_of(const StencilParams& p, int t) {
  return t + 1 == p.steps ? p.out.data : p.spare[t % 2];
}

__device__ inline bool is_active(const StencilParams& p, int64_t b, int64_t c) {
  return p.class_mask == nullptr || p.class_mask[b * p.classes + c];
}

// The active classes of an image in order, found 32 at a time by a ballot, so that absent ones cost a warp
// nothing. All lanes of a warp go through the same classes together.
class ActiveClasses {
 public:
  __device__ ActiveClasses(const bool* class_mask, int classes)
      : mask_(class_mask), classes_(classes), lane_(static_cast<int>(threadIdx.x) % 32) {
    look();
  }

  // The class at hand; the number of classes where none is left.
  __device__ int current() const {
    return bits_ == 0 ? classes_ : base_ + __ffs(static_cast<int>(bits_)) - 1;
  }
  __device__ void next() {
    bits_ &= bits_ - 1;
    if (bits_ == 0) {
      base_ += 32;
      look();
    }
  }

 private:
  // Moves on to the first 32 classes from base_ on that hold an active one.
  __device__ void look() {
    for (; base_ < classes_; base_ += 32) {
      const int c = base_ + lane_;
      bits_ = __ballot_sync(0xffffffffu, c < classes_ && (mask_ == nullptr || mask_[c]));
      if (bits_ != 0) return;
    }
    bits_ = 0;
  }

  const bool* mask_;
  int classes_, lane_, base_ = 0;
  unsigned bits_ = 0;
};

// ---- PAR's default neighbours
// -----------------------------------------------------------------------------------

constexpr int kTileWidth = 32;

template <int STACK>
struct RingTile {
  // As many as the registers allow that hold the weights: 1 block of an SM, with STACK = 1 two.
  static constexpr int kWarps = STACK == 2 ? 12 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = STACK == 1 ? 2 : 1;
  static constexpr int kHeight = kWarps * STACK;
  static constexpr int kPitch = kTileWidth + 2 * kRingReach;
  static constexpr int kRows = kHeight + 2 * kRingReach;
  static constexpr int kFloats = kPitch * kRows;
  static constexpr int kStages = STACK == 1 ? 2 : 3;
  static constexpr int kBytes = kStages * kFloats * 4;
};

// The products with one value, of all pixels that read it.
template <int STACK, int VALUE, int... PIXEL>
__device__ inline void add_value(const float* at, const float (&weight)[STACK][kRingSize],
                                 float (&sum)[STACK], std::integer_sequence<int, PIXEL...>) {
  using Table = RingTable<STACK>;
  constexpr int offset = Table::kValues.row[VALUE] * RingTile<STACK>::kPitch + Table::kValues.column[VALUE];
  const float value = at[offset];
  (
      [&] {
        constexpr int k = Table::kValues.neighbour[VALUE][PIXEL];
        if constexpr (k >= 0) sum[PIXEL] += weight[PIXEL][k] * value;
      }(),
      ...);
}

template <int STACK, int... VALUE>
__device__ inline void add_values(const float* at, const float (&weight)[STACK][kRingSize],
                                  float (&sum)[STACK], std::integer_sequence<int, VALUE...>) {
  (add_value<STACK, VALUE>(at, weight, sum, std::make_integer_sequence<int, STACK>{}), ...);
}

// Where a tile lies.
struct Tile {
  int b, y, x;        // image, first pixel
  int height, width;  // of its image
};

__device__ inline int clamped(int i, int size) {
  return i < 0 ? 0 : i >= size ? size - 1 : i;
}

// The same number, which the compiler takes for another each time: what depends on it is formed where it is
// needed, not kept in registers that the weights take.
__device__ inline int formed_here(int i) {
#ifndef AFA_CUDA_ON_HOST
  asm volatile("" : "+r"(i));
#endif
  return i;
}

// Begins to copy a class's values, with the halo: a warp takes a row of 20 pieces of four. `plane` is of
// floats, or, where the masks come in a narrower type, of T, which the threads widen themselves.
template <typename T, int STACK>
__device__ inline void fill(float* stage, const void* plane, bool wide, int stride, const Tile& tile) {
  using Shape = RingTile<STACK>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane >= Shape::kPitch / 4) return;
  const int column = formed_here(tile.x - kRingReach + 4 * lane),
            top = formed_here(tile.y - kRingReach + warp);
  float* to = stage + warp * Shape::kPitch + 4 * lane;
  [[maybe_unused]] constexpr int kUnrolled = STACK == 4 ? 5 : 2;  // more doesn't leave enough registers
  const auto each_row = [&](const auto& f) {
#pragma unroll kUnrolled
    for (int row = 0; row < Shape::kRows; row += Shape::kWarps) {
      f(to + row * Shape::kPitch, clamped(top + row, tile.height) * stride);
    }
  };
  if (std::is_same<T, float>::value || wide) {
    const float* const from = static_cast<const float*>(plane);
    if (column >= 0 && column + 3 < tile.width && stride % 4 == 0 &&
        reinterpret_cast<uintptr_t>(plane) % 16 == 0) {
      each_row([&](float* at, int start) { copy_async<16>(at, from + column + start); });
    } else {
      each_row([&](float* at, int start) {
#pragma unroll
        for (int j = 0; j < 4; ++j) copy_async<4>(at + j, from + clamped(column + j, tile.width) + start);
      });
    }
  } else {
    const T* const from = static_cast<const T*>(plane);
    each_row([&](float* at, int start) {
#pragma unroll
      for (int j = 0; j < 4; ++j) at[j] = to_sum<float>(from[start + clamped(column + j, tile.width)]);
    });
  }
}

// Writes a thread's values of a class, those inside the image.
template <typename T, int STACK>
__device__ inline void store(void* plane, bool wide, int stride, int y, int x, const Tile& tile,
                             const float (&value)[STACK]) {
  if (x >= tile.width) return;
  const int first = formed_here(y);
#pragma unroll
  for (int i = 0; i < STACK; ++i) {
    const int row = first + kStackStep * i;
    if (row >= tile.height) continue;
    const int at = row * stride + x;
    if (std::is_same<T, float>::value || wide) {
      static_cast<float*>(plane)[at] = value[i];
    } else {
      static_cast<T*>(plane)[at] = from_sum<T>(value[i]);
    }
  }
}

template <typename T, int STACK>
__global__ void __launch_bounds__(RingTile<STACK>::kThreads, RingTile<STACK>::kBlocks)
    ring_kernel(const __grid_constant__ StencilParams p, int first_step, int end_step) {
  using Shape = RingTile<STACK>;
  AFA_DYNAMIC_SHARED(float, stages);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = warp / kStackStep * (kStackStep * STACK) + warp % kStackStep;  // of the uppermost pixel
  const int classes = static_cast<int>(p.classes), stride = static_cast<int>(p.width);
  const int tiles_x = (stride + kTileWidth - 1) / kTileWidth;
  const int tiles_y = (static_cast<int>(p.height) + Shape::kHeight - 1) / Shape::kHeight;
  const int tiles = static_cast<int>(p.batch) * tiles_y * tiles_x;
  float weight[STACK][kRingSize];
  for (int t = first_step; t < end_step; ++t) {
    const bool wide_in = t > 0 || p.in.wide, wide_out = t + 1 < p.steps || p.out.wide;
    for (int index = static_cast<int>(blockIdx.x); index < tiles; index += static_cast<int>(gridDim.x)) {
      Tile tile;
      tile.b = index / (tiles_y * tiles_x);
      const int in_image = index - tile.b * (tiles_y * tiles_x);
      tile.y = in_image / tiles_x * Shape::kHeight;
      tile.x = in_image % tiles_x * kTileWidth;
      tile.height = static_cast<int>(p.extent == nullptr ? p.height : p.extent[2 * tile.b]);
      tile.width = static_cast<int>(p.extent == nullptr ? p.width : p.extent[2 * tile.b + 1]);
      if (tile.y >= tile.height || tile.x >= tile.width) continue;
      const int y = tile.y + row, x = tile.x + lane;

      const bool* const mask = p.class_mask == nullptr ? nullptr : p.class_mask + tile.b * p.classes;
      // One more class begins to come into a stage; a group of copies even where there is none.
      ActiveClasses asked(mask, classes);
      const auto ask = [&](int stage) {
        if (asked.current() < classes) {
          const int64_t plane = (int64_t{tile.b} * p.classes + asked.current()) * p.height * p.width;
          const void* from = static_cast<const char*>(source_of(p, t)) +
                             plane * static_cast<int64_t>(wide_in ? sizeof(float) : sizeof(T));
          fill<T, STACK>(stages + stage * Shape::kFloats, from, wide_in, stride, tile);
          asked.next();
        }
        commit_async();
      };
      const auto write = [&](int c, const float (&value)[STACK]) {
        const int64_t plane = (int64_t{tile.b} * p.classes + c) * p.height * p.width;
        void* to = static_cast<char*>(result_of(p, t)) +
                   plane * static_cast<int64_t>(wide_out ? sizeof(float) : sizeof(T));
        store<T, STACK>(to, wide_out, stride, y, x, tile, value);
      };

      __syncthreads();  // all are done with the tile before
#pragma unroll 1
      for (int stage = 0; stage + 1 < Shape::kStages; ++stage) ask(stage);
      if (t == first_step || tiles > static_cast<int>(gridDim.x)) {
        // Pixels past the image take its last one's weights: nothing is written for them.
        const T* const weights =
            static_cast<const T*>(p.weights) + tile.b * p.weight_stride_b + clamped(x, stride);
#pragma unroll
        for (int i = 0; i < STACK; ++i) {
          const T* at = weights + clamped(y + kStackStep * i, static_cast<int>(p.height)) * p.weight_stride_y;
#pragma unroll
          for (int k = 0; k < kRingSize; ++k, at += p.weight_stride_k) weight[i][k] = to_sum<float>(*at);
        }
      }
      int stage = 0;
      for (ActiveClasses active(mask, classes); active.current() < classes; active.next()) {
        wait_async<Shape::kStages - 2>();
        __syncthreads();  // all have this class's values, and are done with those of the class before
        ask(stage == 0 ? Shape::kStages - 1 : stage - 1);
        float sum[STACK] = {};
        add_values<STACK>(
            stages + stage * Shape::kFloats + (row + kRingReach) * Shape::kPitch + lane + kRingReach, weight,
            sum, std::make_integer_sequence<int, RingValues<STACK>::kCount>{});
        write(active.current(), sum);
        stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      }
      if (t + 1 < p.steps || p.class_mask == nullptr || !p.zero_masked) continue;
      constexpr float kZeros[STACK] = {};
      for (int c = 0; c < classes; ++c) {
        if (!is_active(p, tile.b, c)) write(c, kZeros);
      }
    }
    if (t + 1 < end_step) grid_sync();
  }
}

// ---- any neighbours
// ---------------------------------------------------------------------------------------------

// A pixel's values of a group of classes.
template <typename Sum>
struct alignas(16) Four {
  Sum of[kGroup];
};

// By 16-byte accesses, which the compiler doesn't make of the structure by itself.
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

// Calls f with where the neighbours of a run lie in their row, one after the other; those of a pixel near a
// border are clamped.
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

template <typename T, bool ADJOINT, int GROUPS>
__device__ inline void gather_step(const StencilParams& p, const void* in, void* out, bool grouped_out) {
  using Sum = typename SumOf<T>::type;
  const auto pixels = static_cast<uint32_t>(p.height * p.width);
  const auto stride = static_cast<uint32_t>(p.width);
  const int64_t groups = groups_of(p), sets = (groups + GROUPS - 1) / GROUPS;
  for (int64_t index = blockIdx.y; index < p.batch * sets; index += gridDim.y) {
    const int64_t b = index / sets, first = index % sets * GROUPS;
    // A group without an active class is computed as another one again, and not written.
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
        const T* weights = static_cast<const T*>(p.weights) + b * p.weight_stride_b;
        if (!ADJOINT) weights += pixel;
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
              weights += p.weight_stride_k;
            });
            continue;
          }
          // The pixels that read this one: in the interior one, at a border those that are clamped to it.
          const Range ys = clamp_preimage(y, run.dy, height);
          for (int64_t reader = ys.begin; reader < ys.end; ++reader) {
            to_row(static_cast<int>(reader));
            const T* in_row = weights + reader * p.weight_stride_y;
            if (inside) {
              each_of_run({run.dy, -run.dx, -run.step, run.count}, x, width, true, [&](int at) {
                add(to_sum<Sum>(in_row[at]), at);
                in_row += p.weight_stride_k;
              });
            } else {
              for (int j = 0; j < run.count; ++j, in_row += p.weight_stride_k) {
                const Range xs = clamp_preimage(x, run.dx + int64_t{j} * run.step, width);
                for (int64_t at = xs.begin; at < xs.end; ++at)
                  add(to_sum<Sum>(in_row[at]), static_cast<int>(at));
              }
            }
          }
          weights += run.count * p.weight_stride_k;
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
__global__ void __launch_bounds__(kThreads, min_blocks<T>(GROUPS == 1   ? 5
                                                          : GROUPS == 2 ? 4
                                                                        : 3))
    stencil_kernel(const __grid_constant__ StencilParams p, int first_step, int end_step) {
  for (int t = first_step; t < end_step; ++t) {
    gather_step<T, ADJOINT, GROUPS>(p, source_of(p, t), result_of(p, t), t + 1 < p.steps || p.out.grouped);
    if (t + 1 < end_step) grid_sync();
  }
}

constexpr int kNeighbours = 8;  // a thread, of weight_grad_kernel

template <typename Sum>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(const __grid_constant__ StencilParams p) {
  const auto pixels = static_cast<uint32_t>(p.height * p.width);
  const auto stride = static_cast<uint32_t>(p.width);
  const int64_t groups = groups_of(p), parts = (p.stencil.size + kNeighbours - 1) / kNeighbours;
  for (int64_t index = blockIdx.y; index < p.batch * parts; index += gridDim.y) {
    const int64_t b = index / parts, begin = index % parts * kNeighbours;
    for (int64_t item = first_item(); item < pixels; item += item_stride()) {
      const auto pixel = static_cast<uint32_t>(item);
      const uint32_t y = pixel / stride, x = pixel - y * stride;
      // Where the neighbours lie. Past the last, the last again.
      uint32_t source[kNeighbours];
      int r = 0;
      int64_t j = begin;
      while (p.stencil.run[r].count <= j) j -= p.stencil.run[r++].count;
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) {
        const Run run = p.stencil.run[r];
        source[i] = static_cast<uint32_t>(clamp_index(int64_t{y} + run.dy, p.height)) * stride +
                    static_cast<uint32_t>(clamp_index(int64_t{x} + run.dx + j * run.step, p.width));
        if (begin + i + 1 < p.stencil.size && ++j == run.count) {
          ++r;
          j = 0;
        }
      }
      Sum sum[kNeighbours] = {};
      for (int64_t g = 0; g < groups; ++g) {
        if (!is_group_active(p, b, g)) continue;
        const int64_t plane = (b * groups + g) * pixels;
        const Four<Sum> grad = load(static_cast<const Four<Sum>*>(p.out.data) + plane + pixel);
        const Four<Sum>* in = static_cast<const Four<Sum>*>(p.in.data) + plane;
#pragma unroll
        for (int i = 0; i < kNeighbours; ++i) {
          const Four<Sum> value = load(in + source[i]);
#pragma unroll
          for (int c = 0; c < kGroup; ++c) sum[i] += grad.of[c] * value.of[c];
        }
      }
      Sum* to = static_cast<Sum*>(p.grad_weights) + (b * p.stencil.size + begin) * pixels + pixel;
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) {
        if (begin + i < p.stencil.size) to[i * int64_t{pixels}] += sum[i];
      }
    }
  }
}

// ---- launches
// ---------------------------------------------------------------------------------------------------

template <typename T, int STACK>
void launch_ring(const StencilParams& p, bool resident, void* stream) {
  using Shape = RingTile<STACK>;
  const int64_t tiles = p.batch * ceil_div(p.height, Shape::kHeight) * ceil_div(p.width, kTileWidth);
  const auto kernel = ring_kernel<T, STACK>;
  const int64_t blocks =
      resident && p.steps > 1 ? resident_blocks(kernel, Shape::kThreads, size_t{Shape::kBytes}) : 0;
  if (blocks > 0) {
    const dim3 grid(static_cast<unsigned>(tiles < blocks ? tiles : blocks));
    if (AFA_LAUNCH_COOPERATIVE(kernel, grid, dim3(Shape::kThreads), size_t{Shape::kBytes}, stream, p, 0,
                               static_cast<int>(p.steps))) {
      return;
    }
  }
  const dim3 grid = block_grid(tiles);
  for (int t = 0; t < p.steps; ++t) {
    AFA_LAUNCH_SHARED(kernel, grid, dim3(Shape::kThreads), size_t{Shape::kBytes}, stream, p, t, t + 1);
  }
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
#define AFA_CASE(name, groups, resident)                                                 \
  case StencilStepVariant::name:                                                         \
    launch_steps<T, ADJOINT, (ADJOINT && groups > 2 ? 2 : groups)>(p, resident, stream); \
    break;
    switch (static_cast<StencilStepVariant>(p.variant)) { AFA_STENCIL_STEP_VARIANTS(AFA_CASE) }
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

const char* launch_stencil_ring(const StencilParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
#define AFA_CASE(name, stack, resident)         \
  case StencilRingVariant::name:                \
    launch_ring<T, stack>(p, resident, stream); \
    break;
      switch (static_cast<StencilRingVariant>(p.variant)) { AFA_STENCIL_RING_VARIANTS(AFA_CASE) }
#undef AFA_CASE
    }
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
  const dim3 grid = grid_for(p.height * p.width, p.batch * ceil_div(p.stencil.size, kNeighbours));
  if (p.kind == Kind::f64) {
    AFA_LAUNCH((weight_grad_kernel<double>), grid, kThreads, stream, p);
  } else {
    AFA_LAUNCH((weight_grad_kernel<float>), grid, kThreads, stream, p);
  }
  return launch_error();
}

}  // namespace afa
