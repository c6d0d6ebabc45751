// out[c, y, x] = sum_k weights[k, y, x] * in[c, clamp(y + dy_k), clamp(x + dx_k)], repeated: the computation
// of both PAR (rings of neighbors, replicated borders) and the windowed random walks (whose weights are 0 if
// a neighbor is outside the grid, so that the clamped value doesn't matter).
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"
#include "heuristics.h"

namespace afa {

// Planes of values with a unit stride in x; strides in elements.
struct Planes {
  void* data = nullptr;
  int64_t plane_stride = 0;
  int64_t row_stride = 0;
  int64_t pad = 0;  // columns before x = 0 and after x = W - 1 that have the border's value (CPU only)
  // CPU only: rows y of an image's n active planes are adjacent, so that a tile's rows share pages and have
  // different cache sets; plane_stride is the length of one row, plane_stride * n that of all.
  bool by_row = false;
  bool wide = false;     // CUDA only: in the accumulation type, not in the weights' type
  bool grouped = false;  // CUDA only: kGroup classes of a pixel are adjacent, see launch_stencil_group
};

struct StencilParams {
  Stencil stencil;
  Kind kind = Kind::f32;  // type of weights and planes
  int32_t steps = 1;      // CUDA: of launch_stencil_step, launch_stencil_adjoint and launch_par_ring
  int64_t batch = 0, classes = 0, height = 0, width = 0;
  const void* weights = nullptr;  // [B, K, H, W], unit stride in x
  int64_t weight_stride_b = 0, weight_stride_k = 0, weight_stride_y = 0;
  Planes in;                              // [B * C] planes
  Planes out;                             // [B * C] planes
  void* grad_weights = nullptr;           // [B, K, H, W] contiguous, in the accumulation type
  const bool* class_mask = nullptr;       // CUDA: [B, C] on the device, or null for all
  bool zero_masked = true;                // CUDA: false leaves the output of classes that are off undefined
  const int64_t* extent = nullptr;        // CUDA, only steps: [B, 2], see stencil_propagate
  const int64_t* active = nullptr;        // CPU: the active planes, in order
  const int64_t* active_begin = nullptr;  // CPU: [B + 1] where each image's begin
  void* spare[2] = {};                    // CUDA: as large as `in`, what step t writes for step t + 1
  StencilVariant variant = {};            // CUDA
  bool upwards = false;                   // CPU: stencil_step takes the last row first
};

// CPU: rows `begin` to `end` of the batch's B * H rows, float32 and float64. The planes that stencil_step and
// stencil_weight_grad read are stored by row, padded by min(reach_x, W - 1) columns, and followed by kSlack
// readable elements. In stencil_weight_grad, `out` is the incoming gradient. `offsets` has K elements,
// `scratch` 4 * (W + 2 * reach_x) values.
constexpr int64_t kSlack = 16;  // one vector: short rows are read in whole vectors
AFA_SIMD_DECLARE(void stencil_step(const StencilParams& p, int64_t begin, int64_t end, int64_t* offsets))
AFA_SIMD_DECLARE(void stencil_adjoint(const StencilParams& p, int64_t begin, int64_t end, void* scratch))
AFA_SIMD_DECLARE(void stencil_weight_grad(const StencilParams& p, int64_t begin, int64_t end))

// CUDA: return nullptr, or an error message. Step t reads `in` (t = 0) or spare[(t - 1) % 2] and writes `out`
// (the last) or spare[t % 2]; spare[(steps - 1) % 2] may be `out`, spare[1] may be `in`.
//
// `in` is grouped and wide, except in launch_stencil_group, which converts planes to this layout: [B,
// ceil(C / kGroup), H, W, kGroup], 0 for classes that class_mask excludes. `out` is grouped if out.grouped is
// set; in stencil_weight_grad it is the incoming gradient, grouped. H and W are below 2^31, H * W below 2^32.
constexpr int kGroup = 4;
const char* launch_stencil_group(const StencilParams& p, void* stream);
const char* launch_stencil_step(const StencilParams& p, void* stream);
const char* launch_stencil_adjoint(const StencilParams& p, void* stream);
const char* launch_stencil_weight_grad(const StencilParams& p, void* stream);

}  // namespace afa
