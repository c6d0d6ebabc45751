// The transition matrix of a windowed random walk: from an affinity to the weights of a stencil, and back.
//
// The transition is stored by target: T[b, k, y, x] is the probability mass that node (y, x) takes from the
// node that reaches it by the window's offset k, and 0 where that node lies outside the grid.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

struct WalkParams {
  Stencil stencil;        // from a target to its sources, in the order of the window
  Kind kind = Kind::f32;  // of the affinity; transitions are float64 for float64, float32 for all others
  int64_t batch = 0, height = 0, width = 0;
  bool dense = false;  // affinity [B, N, N], else [B, N, K]; contiguous
  const void* affinity = nullptr;
  double power = 1;
  int32_t whole_power = 1;  // power where it is a small integer, else 0
  bool normalize = false;   // divide a column by its sum + eps
  double eps = 0;
  const void* in = nullptr;  // [B, K, h, w]: transition (transpose), its gradient (backward)
  void* out = nullptr;       // [B, K, h, w]; backward: like affinity, zero outside the window beforehand
};

namespace {

// Index of the affinity's entry from the source to the target, both as y * width + x.
AFA_HOST_DEVICE inline int64_t affinity_index(const WalkParams& p, int64_t b, int64_t source, int64_t target,
                                              int64_t k) {
  const int64_t nodes = p.height * p.width;
  return p.dense ? (b * nodes + source) * nodes + target : (b * nodes + source) * p.stencil.size + k;
}

template <typename T>
AFA_HOST_DEVICE inline T whole_power(T value, int32_t power) {
  T result = 1;
  for (int32_t i = 0; i < power; ++i) result *= value;
  return result;
}

}  // namespace

// Rows `begin` to `end` of the batch's B * h target rows; float32 and float64. `scratch` holds 2 * w values.
AFA_SIMD_DECLARE(void walk_transition_rows(const WalkParams& p, int64_t begin, int64_t end, void* scratch))
AFA_SIMD_DECLARE(void walk_transition_backward_rows(const WalkParams& p, int64_t begin, int64_t end,
                                                    void* scratch))
AFA_SIMD_DECLARE(void walk_transpose_rows(const WalkParams& p, int64_t begin, int64_t end))

const char* walk_transition_cuda(const WalkParams& p, void* stream);
const char* walk_transition_backward_cuda(const WalkParams& p, void* stream);
const char* walk_transpose_cuda(const WalkParams& p, void* stream);

}  // namespace afa
