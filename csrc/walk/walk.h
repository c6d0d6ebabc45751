// The transition matrix of a windowed random walk: from an affinity to the weights of a stencil, and back.
//
// The transition is stored by target: T[b, k, y, x] is the weight that node (y, x) gives to the node that
// reaches it by the window's offset k, and 0 if that node is outside the grid.
//
// A single step needs no transition: walk_step reads the window of the affinity once, for both the column
// sums and the scores.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"
#include "heuristics.h"

namespace afa {

// Memory layout of an affinity: [B, N, N]; [B, N, K], contiguous by node; [B, K, N], contiguous by offset.
enum class Layout : int32_t { dense, by_node, by_offset };

struct WalkParams {
  Stencil stencil;        // from a target to its sources, in the order of the window
  Kind kind = Kind::f32;  // of the affinity; transitions are float64 for float64, float32 for all others
  int64_t batch = 0, height = 0, width = 0;
  Layout layout = Layout::dense;
  const void* affinity = nullptr;
  double power = 1;
  int32_t whole_power = 1;  // power if it is a small integer, otherwise 0
  bool normalize = false;   // divide a column by its sum + eps
  double eps = 0;
  const void* in = nullptr;  // [B, K, h, w]: transition (transpose), its gradient (backward)
  void* out = nullptr;       // [B, K, h, w]; backward: [B, N, N or K], zero outside the window beforehand
};

struct WalkStepParams {
  WalkParams walk;  // dense or by_node
  int64_t classes = 0;
  // [B, C, h, w] for CUDA; for the CPU the active classes' scores of each image as [N, active classes], those
  // of image b from active_begin[b] * N.
  const void* scores = nullptr;
  void* out = nullptr;                    // [B, C, h, w]
  WalkStepVariant variant = {};           // CUDA
  const bool* class_mask = nullptr;       // CUDA: [B, C] on the device, or null for all
  const int64_t* active = nullptr;        // CPU: the active planes, in order
  const int64_t* active_begin = nullptr;  // CPU: [B + 1] where each image's begin
};

namespace {

// Index of the affinity's entry from the source to the target, both as y * width + x.
AFA_HOST_DEVICE inline int64_t affinity_index(const WalkParams& p, int64_t b, int64_t source, int64_t target,
                                              int64_t k) {
  const int64_t nodes = p.height * p.width;
  switch (p.layout) {
    case Layout::dense:
      return (b * nodes + source) * nodes + target;
    case Layout::by_node:
      return (b * nodes + source) * p.stencil.size + k;
    default:
      return (b * p.stencil.size + k) * nodes + source;
  }
}

// Index of the entry's gradient: by_offset is only a layout for reading.
AFA_HOST_DEVICE inline int64_t gradient_index(const WalkParams& p, int64_t b, int64_t source, int64_t target,
                                              int64_t k) {
  const int64_t nodes = p.height * p.width;
  return (b * nodes + source) * (p.layout == Layout::dense ? nodes : p.stencil.size) +
         (p.layout == Layout::dense ? target : k);
}

template <typename T>
AFA_HOST_DEVICE inline T whole_power(T value, int32_t power) {
  T result = power & 1 ? value : T{} + 1;
  while (power >>= 1) {
    value *= value;
    if (power & 1) result *= value;
  }
  return result;
}

}  // namespace

// Rows `begin` to `end` of the batch's B * h target rows; float32 and float64. `scratch` has 2 * w values.
AFA_SIMD_DECLARE(void walk_transition_rows(const WalkParams& p, int64_t begin, int64_t end, double* scratch))
AFA_SIMD_DECLARE(void walk_transition_backward_rows(const WalkParams& p, int64_t begin, int64_t end,
                                                    void* scratch))
AFA_SIMD_DECLARE(void walk_transpose_rows(const WalkParams& p, int64_t begin, int64_t end))
// `scratch` has kStepLanes values for each of at most (2r + 1) * (2r + kStepLanes) sources.
constexpr int64_t kStepLanes = 16;
AFA_SIMD_DECLARE(void walk_step_rows(const WalkStepParams& p, int64_t begin, int64_t end, void* scratch))

const char* launch_walk_transition(const WalkParams& p, void* stream);
const char* launch_walk_transition_backward(const WalkParams& p, void* stream);
const char* launch_walk_transpose(const WalkParams& p, void* stream);
const char* launch_walk_step(const WalkStepParams& p, void* stream);

}  // namespace afa
