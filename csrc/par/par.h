// Pixel-adaptive refinement (PAR; AFA, CVPR 2022, section 3.3) and its predecessor PAMR ("Single-Stage
// Semantic Segmentation from Image Labels", CVPR 2020, section 3.3).
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

struct ParAffinityParams {
  Stencil stencil;
  Kind kind = Kind::f32;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  const void* images =
      nullptr;  // [B, channels, H, W], unit stride in x; CPU: rows padded as for stencil_step
  int64_t image_stride_b = 0, image_stride_c = 0, image_stride_y = 0;
  int64_t image_pad = 0;
  const int64_t* extent = nullptr;  // CUDA: [B, 2], see par_affinity_within
  void* weights = nullptr;          // [B, K, H, W] contiguous
  // PAR: logit -(difference / ((sigma + 1e-8) * w1))^2, sigma over the neighbors. PAMR: -|difference| /
  // (1e-8 + 0.1 * sigma), sigma over the neighbors and the center, counted once per dilation. Both are
  // averaged over the channels.
  bool pamr = false;
  double w1 = 0;
  // PAR: w2 * softmax(position logits); equal for a dilation's four edge neighbors and for its four corner
  // neighbors.
  double edge[kMaxDilations] = {};
  double corner[kMaxDilations] = {};
  float edge32[kMaxDilations] = {}, corner32[kMaxDilations] = {};  // CUDA: the same for sums in float32
};

// Rows `begin` to `end` of the batch's B * H rows; float32 and float64.
AFA_SIMD_DECLARE(void par_affinity_rows(const ParAffinityParams& p, int64_t begin, int64_t end))

const char* launch_par_affinity(const ParAffinityParams& p, void* stream);

}  // namespace afa
