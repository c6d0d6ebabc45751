// Pseudo labels on CUDA. Packing: one block per image lists its present classes on the device, so the host
// need not know them. Downscaling, scores and choices: a thread owns one pixel of the result (downscaling:
// four in a row) and reads its samples; the neighboring threads read the same rows, from L1. A pixel's
// offsets in a plane are computed once, in 32 bits if the plane allows. The scores read each present CAM once
// from memory, the choices each small map once, and nothing of the size of the upsampled maps is stored.
// Absent classes are skipped at no cost.
#include "labels/labels.h"

#include "common/cuda.cuh"
#include "common/vectors.cuh"

namespace afa {
namespace {

constexpr int kKept = 4;    // classes whose scores a thread keeps instead of sampling them twice
constexpr int kPixels = 4;  // in a row, per thread of the downscaling kernel
// Offsets below this limit are stored in 32 bits.
#ifdef AFA_CUDA_ON_HOST
constexpr int64_t kNarrow = 300;
#else
constexpr int64_t kNarrow = int64_t{1} << 31;
#endif

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams p) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int found[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    int64_t count = 0;
    for (int64_t first = 0; first < p.classes; first += kThreads) {
      const int64_t c = first + thread;
      const bool flag = c < p.classes && p.present[b * p.classes + c];
      const unsigned flags = __ballot_sync(0xffffffffu, flag);
      if (lane == 0) found[warp] = __popc(flags);
      __syncthreads();
      int64_t at = count + __popc(flags & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) at += found[w];
        count += found[w];
      }
      if (flag && at < p.most) {
        const int64_t index = p.class_index == nullptr ? c : p.class_index[b * p.classes + c];
        p.plane[b * p.most + at] = static_cast<int32_t>(c);
        p.number[b * p.most + at] = static_cast<int32_t>(index + 1);
      }
      __syncthreads();
    }
    const int64_t kept = count > p.most ? 0 : count, extra = p.background_map ? 1 : 0;
    const int64_t maps = (p.most + extra) * p.thresholds;
    for (int64_t i = thread; i < maps; i += kThreads) {
      p.mask[b * maps + i] = kept > 0 && i < (kept + extra) * p.thresholds;
    }
    if (thread == 0) {
      p.count[b] = count > p.most ? -1 : static_cast<int32_t>(count);
      if (p.extent != nullptr) {
        const Region region = region_of(p.box, b, p.height, p.width, p.downscale);
        p.extent[2 * b] = region.small_height;
        p.extent[2 * b + 1] = region.small_width;
      }
    }
  }
}

// A byte divided by 255, correctly rounded, in three operations.
template <typename T>
__device__ inline T over_255(T x) {
  const T inverse = T{1} / T{255}, quotient = x * inverse;
  return fma(fma(-quotient, T{255}, x), inverse, quotient);
}

template <typename T, typename In>
__device__ inline T value_of(In in) {
  return sizeof(In) == 1 ? over_255(to_sum<T>(in)) : to_sum<T>(in);
}

// The bilinear sample between two rows and two columns; the offsets of the four values are the same in every
// plane.
template <typename T, typename Index>
struct Sampler {
  Index above_left, above_right, below_left, below_right;
  T across, down;  // weights of the right column and of the lower row

  __device__ Sampler(const Tap<T>& y, const Tap<T>& x, int64_t stride_y, int64_t stride_x)
      : above_left(static_cast<Index>(y.left * stride_y + x.left * stride_x)),
        above_right(static_cast<Index>(y.left * stride_y + x.right * stride_x)),
        below_left(static_cast<Index>(y.right * stride_y + x.left * stride_x)),
        below_right(static_cast<Index>(y.right * stride_y + x.right * stride_x)),
        across(x.weight),
        down(y.weight) {}

  template <typename In>
  __device__ T operator()(const In* plane) const {
    return between(value_of<T>(plane[above_left]), value_of<T>(plane[above_right]),
                   value_of<T>(plane[below_left]), value_of<T>(plane[below_right]));
  }
  __device__ T between(T a, T b, T c, T d) const {
    return (1 - down) * ((1 - across) * a + across * b) + down * ((1 - across) * c + across * d);
  }
};

// kHalves: the columns are downscaled by exactly 2 and aligned to eight of them, so that a thread reads
// vectors: each pixel is halfway between two columns.
template <typename T, typename In, bool kHalves>
__global__ void __launch_bounds__(kThreads) shrink_kernel(const __grid_constant__ ShrinkParams p) {
  const int64_t groups = (p.columns.to + kPixels - 1) / kPixels, items = p.rows.to * groups;
  for (int64_t plane = blockIdx.y; plane < p.planes; plane += gridDim.y) {
    const Region r = region_of(p.box, plane / p.channels, p.rows.from, p.columns.from, p.downscale);
    const Axis rows{r.height, r.small_height}, columns{r.width, r.small_width};
    const In* in = static_cast<const In*>(p.in) + plane * p.in_stride_p + r.y * p.in_stride_y + r.x;
    T* out = static_cast<T*>(p.out) + plane * p.rows.to * p.columns.to;
    for (int64_t item = first_item(); item < items; item += item_stride()) {
      const int64_t y = item / groups, x = (item - y * groups) * kPixels;
      if (y >= r.small_height || x >= r.small_width) continue;
      const Tap<T> row = tap<T>(rows, y);
      T* to = out + y * p.columns.to + x;
      if constexpr (kHalves) {
        const Vec<In, 8> above = load<8>(in + row.left * p.in_stride_y + 2 * x);
        const Vec<In, 8> below = load<8>(in + row.right * p.in_stride_y + 2 * x);
        const Sampler<T, int> sample(row, {0, 0, T{0.5}}, 0, 0);
        Vec<T, kPixels> value;
#pragma unroll
        for (int n = 0; n < kPixels; ++n) {
          value.at[n] = sample.between(value_of<T>(above.at[2 * n]), value_of<T>(above.at[2 * n + 1]),
                                       value_of<T>(below.at[2 * n]), value_of<T>(below.at[2 * n + 1]));
        }
        store(to, value);
      } else {
        for (int n = 0; n < kPixels && x + n < r.small_width; ++n) {
          to[n] = Sampler<T, int64_t>(row, tap<T>(columns, x + n), p.in_stride_y, 1)(in);
        }
      }
    }
  }
}

template <typename In, typename Index>
__global__ void __launch_bounds__(kThreads, min_blocks<In>(sizeof(Index) == 8 ? 5 : 7))
    score_kernel(const __grid_constant__ ScoreParams p) {
  using T = typename SumOf<In>::type;
  const int64_t width = p.columns.to, pixels = p.rows.to * width, most = p.classes.most;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const In* cams = static_cast<const In*>(p.cams) + b * p.cam_stride_b;
    const int32_t* planes = p.classes.plane + b * most;
    T* maps = static_cast<T*>(p.maps) + b * most * p.thresholds * pixels;
    const int count = p.classes.count[b];
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / width, x = pixel - y * width;
      const Sampler<T, Index> sample(tap<T>(p.rows, y), tap<T>(p.columns, x), p.cam_stride_y, p.cam_stride_x);
      auto score = [&](int j) { return sample(cams + planes[j] * p.cam_stride_c); };
      T top = 0, sum = 0;  // the classes' largest score, and the sum of exponentials relative to it
      auto add = [&](int j, T value) {
        if (j == 0 || value > top) {
          sum = (j == 0 ? 0 : sum * exp(top - value)) + 1;
          top = value;
        } else {
          sum += exp(value - top);
        }
      };
      T kept[kKept];
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        kept[j] = 0;
        if (j < count) kept[j] = score(j);
      }
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        if (j < count) add(j, kept[j]);
      }
      for (int j = kKept; j < count; ++j) add(j, score(j));
      T largest[kMaxThresholds], inverse[kMaxThresholds];
#pragma unroll
      for (int t = 0; t < kMaxThresholds; ++t) {
        if (t >= p.thresholds) break;
        const T background = static_cast<T>(p.background[t]);
        largest[t] = top > background ? top : background;
        inverse[t] = 1 / (sum * exp(top - largest[t]) + exp(background - largest[t]));
      }
      auto write = [&](int j, T value) {
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          maps[(j * p.thresholds + t) * pixels + pixel] = exp(value - largest[t]) * inverse[t];
        }
      };
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        if (j < count) write(j, kept[j]);
      }
      for (int j = kKept; j < count; ++j) write(j, score(j));
    }
  }
}

template <typename In, typename Index>
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ PlaceParams p) {
  using T = typename SumOf<In>::type;
  const int64_t pixels = p.map_height * p.map_width, grid = p.grid_height * p.grid_width;
  const int64_t most = p.classes.most;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const Region r = region_of(p.box, b, p.height, p.width, p.downscale);
    T* maps = static_cast<T*>(p.maps) + b * (most + 1) * p.thresholds * pixels;
    const int64_t count = p.classes.count[b];
    if (count <= 0) continue;
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.map_width, x = pixel - y * p.map_width;
      if (y >= r.small_height || x >= r.small_width) continue;
      const FourTaps<T> rows = place_taps<T>(y, r.height, r.small_height, r.y, p.grid_height, p.height);
      const FourTaps<T> columns = place_taps<T>(x, r.width, r.small_width, r.x, p.grid_width, p.width);
      Index at[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) at[m][n] = static_cast<Index>(rows.at[m] * p.grid_width + columns.at[n]);
      }
      for (int64_t j = 0; j <= count; ++j) {
        const int64_t plane = b * p.planes + (j == 0 ? 0 : 1 + p.classes.plane[b * most + j - 1]);
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          const In* scores = static_cast<const In*>(p.scores[t]) + plane * grid;
          T sum = 0;
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            T across = 0;
#pragma unroll
            for (int n = 0; n < 4; ++n) across += columns.weight[n] * to_sum<T>(scores[at[m][n]]);
            sum += rows.weight[m] * across;
          }
          maps[(j * p.thresholds + t) * pixels + pixel] = sum;
        }
      }
    }
  }
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(5))
    choice_kernel(const __grid_constant__ ChoiceParams p) {
  [[maybe_unused]] constexpr int kAtOnce =
      sizeof(Index) == 8 ? 1 : 4;  // classes: more would need too many registers
  const int64_t pixels = p.height * p.width, map_pixels = p.map_height * p.map_width;
  const int64_t most = p.classes.most, extra = p.background_map ? 1 : 0;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const T* maps = static_cast<const T*>(p.maps) + b * (most + extra) * p.thresholds * map_pixels;
    const int32_t* numbers = p.classes.number + b * most;
    const int64_t* box = p.box == nullptr ? nullptr : p.box + 4 * b;
    const int64_t count = p.classes.count[b];
    Axis rows = p.rows, columns = p.columns;
    int64_t first_y = 0, first_x = 0;
    if (p.regional) {
      const Region r = region_of(p.box, b, p.height, p.width, p.downscale);
      rows = {r.small_height, r.height};
      columns = {r.small_width, r.width};
      first_y = r.y;
      first_x = r.x;
    }
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.width, x = pixel - y * p.width;
      const bool inside = box == nullptr || (y >= box[0] && y < box[1] && x >= box[2] && x < box[3]);
      int32_t label = inside && count >= 0 ? 0 : p.ignore;
      if (inside && count > 0) {
        const Sampler<T, Index> sample(tap<T>(rows, y - first_y), tap<T>(columns, x - first_x), p.map_width,
                                       1);
        auto value = [&](int64_t map) { return sample(maps + map * map_pixels); };
        int32_t choice[kMaxThresholds] = {};  // for each threshold: 0, or the class's label
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          T best = 0, background = p.background_map ? value(t) : static_cast<T>(p.total);
#pragma unroll kAtOnce
          for (int64_t j = 0; j < count; ++j) {
            const T score = value((j + extra) * p.thresholds + t);
            if (j == 0 || score > best || (score != score && best == best)) {
              best = score;
              choice[t] = numbers[j];
            }
            if (!p.background_map) background -= score;
          }
          if (best <= background || background != background) choice[t] = 0;
        }
        label = choice[0];
        if (p.thresholds > 1 && label == 0 && choice[1] != 0) label = p.ignore;
      }
      p.labels[b * pixels + pixel] = label;
    }
  }
}

// Calls f with an integer type for offsets up to `last`, forward or backward.
template <typename F>
void with_index(int64_t last, const F& f) {
  last<kNarrow && last> - kNarrow ? f(int32_t{}) : f(int64_t{});
}

}  // namespace

const char* launch_label_pack(const PackParams& p, void* stream) {
  AFA_LAUNCH(pack_kernel, grid_for(p.batch * kThreads, 1), kThreads, stream, p);
  return launch_error();
}

const char* launch_shrink(const ShrinkParams& p, void* stream) {
  const dim3 grid = grid_for(p.rows.to * ceil_div(p.columns.to, kPixels), p.planes);
  auto launch = [&](auto type, auto source) {
    using T = decltype(type);
    using In = decltype(source);
    constexpr int kVector = sizeof(In) == 1 ? 8 : 16;
    const bool in_step = p.columns.from == 2 * p.columns.to && p.columns.to % kPixels == 0 &&
                         p.in_stride_y % 8 == 0 && p.in_stride_p % 8 == 0;
    // Up to 2^20 columns, their positions are exact in float32.
    if (p.box == nullptr && p.downscale == 2 && in_step && p.columns.from <= int64_t{1} << 20 &&
        aligned(p.in, kVector) && aligned(p.out)) {
      AFA_LAUNCH((shrink_kernel<T, In, true>), grid, kThreads, stream, p);
    } else {
      AFA_LAUNCH((shrink_kernel<T, In, false>), grid, kThreads, stream, p);
    }
  };
  if (p.kind == Kind::f64) {
    p.bytes ? launch(double{}, uint8_t{}) : launch(double{}, double{});
  } else {
    p.bytes ? launch(float{}, uint8_t{}) : launch(float{}, float{});
  }
  return launch_error();
}

const char* launch_label_scores(const ScoreParams& p, void* stream) {
  const dim3 grid = grid_for(p.rows.to * p.columns.to, p.batch);
  with_type(p.kind, [&](auto type) {
    with_index(p.rows.from * p.cam_stride_y + p.columns.from * p.cam_stride_x, [&](auto index) {
      AFA_LAUNCH((score_kernel<decltype(type), decltype(index)>), grid, kThreads, stream, p);
    });
  });
  return launch_error();
}

const char* launch_label_place(const PlaceParams& p, void* stream) {
  const dim3 grid = grid_for(p.map_height * p.map_width, p.batch);
  with_type(p.kind, [&](auto type) {
    with_index(p.grid_height * p.grid_width, [&](auto index) {
      AFA_LAUNCH((place_kernel<decltype(type), decltype(index)>), grid, kThreads, stream, p);
    });
  });
  return launch_error();
}

const char* launch_label_choices(const ChoiceParams& p, void* stream) {
  const dim3 grid = grid_for(p.height * p.width, p.batch);
  with_index(p.map_height * p.map_width, [&](auto index) {
    using Index = decltype(index);
    if (p.kind == Kind::f64) {
      AFA_LAUNCH((choice_kernel<double, Index>), grid, kThreads, stream, p);
    } else {
      AFA_LAUNCH((choice_kernel<float, Index>), grid, kThreads, stream, p);
    }
  });
  return launch_error();
}

}  // namespace afa
