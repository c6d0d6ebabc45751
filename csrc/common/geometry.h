// The neighborhoods used by PAR and the random walks, small enough to be kernel arguments.
// Plain C++ without standard-library templates: included by CUDA sources and by the files compiled once per
// SIMD level (otherwise the linker could keep the AVX-512 version of an inline function for all levels).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define AFA_HOST_DEVICE __host__ __device__
#else
#define AFA_HOST_DEVICE
#endif

namespace afa {

enum class Kind : int32_t { f32, f64, f16, bf16 };

constexpr int kMaxDilations = 32;
constexpr int kMaxRadius = 63;
constexpr int kMaxRuns = 2 * kMaxRadius + 2;
// A larger dilation reaches the border of any image from every pixel, so capping it does not change the
// result.
constexpr int64_t kMaxReach = int64_t{1} << 28;

// `count` neighbors in one row: (dy, dx), (dy, dx + step), ...
struct Run {
  int32_t dy, dx, step, count;
};

// Ordered neighbors; the k-th of `size` corresponds to the k-th plane of the weights.
struct Stencil {
  int32_t runs = 0;
  int32_t size = 0;
  int32_t reach_x = 0;  // max |dx|
  Run run[kMaxRuns] = {};
};

namespace {  // one copy for each file: see above

AFA_HOST_DEVICE inline int64_t clamp_index(int64_t i, int64_t size) {
  return i < 0 ? 0 : (i >= size ? size - 1 : i);
}

AFA_HOST_DEVICE inline int64_t clip_offset(int64_t offset, int64_t limit) {
  return offset > limit ? limit : (offset < -limit ? -limit : offset);
}

struct Range {
  int64_t begin, end;
};

// All i in [0, size) for which clamp_index(i + offset, size) == target.
AFA_HOST_DEVICE inline Range clamp_preimage(int64_t target, int64_t offset, int64_t size) {
  int64_t begin = target == 0 ? 0 : target - offset;
  int64_t end = target == size - 1 ? size : target - offset + 1;
  return {begin < 0 ? 0 : begin, end > size ? size : end};
}

}  // namespace
}  // namespace afa
