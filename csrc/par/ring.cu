// Steps of a stencil with PAR's default neighbors on CUDA.
//
// A block owns a tile of 32 columns and a part of the classes: the active class number n with
// n % gridDim.y == blockIdx.y. A thread owns 1, 2 or 4 pixels of a column and keeps the 48 weights of each in
// registers for all classes (and for all steps, if a cooperative launch has a block for every tile). For one
// class after another, asynchronous copies load the tile's values with a halo of 24 into shared memory, one
// or two classes ahead. The copies clamp at borders, so the rest of the code has no special cases: each value
// that a thread's pixels need is read once, at an offset known to the compiler. Slower: a thread per pixel
// and four classes that reads neighbors and weights from global memory (stencil_cuda.cu does this for any
// neighbors).
#include <type_traits>
#include <utility>

#include "common/async_copy.cuh"
#include "common/vectors.cuh"
#include "par/ring.cuh"
#include "par/ring.h"
#include "stencil/steps.cuh"

namespace afa {
namespace {

// Iterates over the active classes of an image in order, 32 at a time with a ballot, so that a warp skips
// absent classes at no cost. All lanes of a warp have the same class.
class ActiveClasses {
 public:
  // The classes of this block's part.
  __device__ ActiveClasses(const bool* class_mask, int classes)
      : mask_(class_mask), classes_(classes), lane_(static_cast<int>(threadIdx.x) % 32) {
    look();
    pass(blockIdx.y);
  }

  // The current class; the number of classes if none is left.
  __device__ int current() const {
    return bits_ == 0 ? classes_ : base_ + __ffs(static_cast<int>(bits_)) - 1;
  }
  __device__ void next() { pass(gridDim.y); }

 private:
  // Skips this many active classes.
  __device__ void pass(unsigned count) {
    for (unsigned i = 0; i < count && bits_ != 0; ++i) {
      bits_ &= bits_ - 1;
      if (bits_ == 0) {
        base_ += 32;
        look();
      }
    }
  }
  // Advances to the next group of 32 classes, starting at base_, that has an active one.
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

template <int STACK>
struct RingTile {
  static constexpr int kWarps = ring_warps(STACK);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = ring_blocks_per_sm(STACK);
  static constexpr int kHeight = kWarps * STACK;
  static constexpr int kPitch = kRingTileWidth + 2 * kRingReach;
  static constexpr int kRows = kHeight + 2 * kRingReach;
  static constexpr int kFloats = kPitch * kRows;
  static constexpr int kStages = STACK == 1 ? 2 : 3;
  static constexpr int kBytes = kStages * kFloats * 4;
};

// The products of one value with the weights of all pixels that read it.
template <int STACK, int VALUE, int... PIXEL>
__device__ inline void add_value(const float* at, const float (&weight)[STACK][kRingSize],
                                 float (&sum)[STACK], std::integer_sequence<int, PIXEL...>) {
  using Table = RingTable<STACK>;
  constexpr int offset = Table::kValues.row[VALUE] * RingTile<STACK>::kPitch + Table::kValues.column[VALUE];
  const float value = at[offset];
  (
      [&] {
        constexpr int k = Table::kValues.neighbor[VALUE][PIXEL];
        if constexpr (k >= 0) sum[PIXEL] += weight[PIXEL][k] * value;
      }(),
      ...);
}

template <int STACK, int... VALUE>
__device__ inline void add_values(const float* at, const float (&weight)[STACK][kRingSize],
                                  float (&sum)[STACK], std::integer_sequence<int, VALUE...>) {
  (add_value<STACK, VALUE>(at, weight, sum, std::make_integer_sequence<int, STACK>{}), ...);
}

// Position of a tile.
struct Tile {
  int b, y, x;        // image, first pixel
  int height, width;  // of its image
};

// Returns the same number, but the compiler can't assume so: values that depend on it are recomputed where
// they are needed, instead of occupying registers that the weights need.
__device__ inline int formed_here(int i) {
#ifndef AFA_CUDA_ON_HOST
  asm volatile("" : "+r"(i));
#endif
  return i;
}

// Starts the copy of a class's values, including the halo: a warp copies a row of 20 vectors of four. `plane`
// has floats or, if the masks have a narrower type, values of T, which the threads convert themselves.
template <typename T, int STACK>
__device__ inline void fill(float* stage, const void* plane, bool wide, int stride, const Tile& tile) {
  using Shape = RingTile<STACK>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane >= Shape::kPitch / 4) return;
  const int column = formed_here(tile.x - kRingReach + 4 * lane),
            top = formed_here(tile.y - kRingReach + warp);
  float* to = stage + warp * Shape::kPitch + 4 * lane;
  [[maybe_unused]] constexpr int kUnrolled = STACK == 4 ? 5 : 2;  // more would need too many registers
  const auto each_row = [&](const auto& f) {
#pragma unroll kUnrolled
    for (int row = 0; row < Shape::kRows; row += Shape::kWarps) {
      f(to + row * Shape::kPitch, clamped(top + row, tile.height) * stride);
    }
  };
  if (std::is_same<T, float>::value || wide) {
    const float* const from = static_cast<const float*>(plane);
    if (column >= 0 && column + 3 < tile.width && stride % 4 == 0 && aligned(plane)) {
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

// Writes a thread's values of a class that are inside the image.
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
  const int tiles_x = (stride + kRingTileWidth - 1) / kRingTileWidth;
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
      tile.x = in_image % tiles_x * kRingTileWidth;
      tile.height = static_cast<int>(p.extent == nullptr ? p.height : p.extent[2 * tile.b]);
      tile.width = static_cast<int>(p.extent == nullptr ? p.width : p.extent[2 * tile.b + 1]);
      if (tile.y >= tile.height || tile.x >= tile.width) continue;
      const int y = tile.y + row, x = tile.x + lane;

      const bool* const mask = p.class_mask == nullptr ? nullptr : p.class_mask + tile.b * p.classes;
      // Start copying one more class into a stage; commit a group of copies even if there is none.
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

      __syncthreads();  // all threads are done with the previous tile
#pragma unroll 1
      for (int stage = 0; stage + 1 < Shape::kStages; ++stage) ask(stage);
      if (t == first_step || tiles > static_cast<int>(gridDim.x)) {
        // Pixels outside the image use the weights of its last pixel; they are not written.
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
        __syncthreads();  // all threads see this class's values, and are done with those of the previous
                          // class
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
      for (int c = static_cast<int>(blockIdx.y); c < classes; c += static_cast<int>(gridDim.y)) {
        if (!is_active(p, tile.b, c)) write(c, kZeros);
      }
    }
    if (t + 1 < end_step) grid_sync();
  }
}

template <typename T, int STACK>
void launch_ring(const StencilParams& p, bool resident, int64_t class_groups, void* stream) {
  using Shape = RingTile<STACK>;
  const int64_t tiles = ring_tiles({p.batch, p.classes, p.height, p.width, p.steps}, STACK);
  const auto kernel = ring_kernel<T, STACK>;
  const auto grid_of = [&](int64_t most) {
    return dim3(static_cast<unsigned>(tiles < most ? tiles : most), static_cast<unsigned>(class_groups));
  };
  const int64_t blocks =
      resident && p.steps > 1 ? resident_blocks(kernel, Shape::kThreads, size_t{Shape::kBytes}) : 0;
  if (blocks >= class_groups) {
    if (AFA_LAUNCH_COOPERATIVE(kernel, grid_of(blocks / class_groups), dim3(Shape::kThreads),
                               size_t{Shape::kBytes}, stream, p, 0, static_cast<int>(p.steps))) {
      return;
    }
  }
  const dim3 grid = grid_of(block_grid(tiles).x);
  for (int t = 0; t < p.steps; ++t) {
    AFA_LAUNCH_SHARED(kernel, grid, dim3(Shape::kThreads), size_t{Shape::kBytes}, stream, p, t, t + 1);
  }
}

}  // namespace

const char* launch_par_ring(const StencilParams& p, RingVariant variant, int64_t class_groups, void* stream) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < sizeof(double)) {
#define AFA_CASE(name, stack, resident)                       \
  case RingVariant::name:                                     \
    launch_ring<T, stack>(p, resident, class_groups, stream); \
    break;
      switch (variant) { AFA_RING_VARIANTS(AFA_CASE) }
#undef AFA_CASE
    }
  });
  return launch_error();
}

}  // namespace afa
