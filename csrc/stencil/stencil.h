// out[c, y, x] = sum_k weights[k, y, x] * in[c, clamp(y + dy_k), clamp(x + dx_k)], repeated: the one
// computation under PAR (rings of neighbours, borders replicated) and under the windowed random walks (whose
// weights are 0 where a neighbour would lie outside, so that the clamped value doesn't matter).
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/plan.h"
#include "common/simd.h"

namespace afa {

// Planes of values with a unit stride in x; strides in elements.
struct Planes {
  void* data = nullptr;
  int64_t plane_stride = 0;
  int64_t row_stride = 0;
  int64_t pad = 0;  // columns before x = 0 and after x = W - 1 that hold the border's value (CPU only)
  // CPU only: row y of an image's n active planes lie side by side, so that a tile's rows share pages and
  // differ in their cache sets; plane_stride is the length of one row, plane_stride * n that of all.
  bool by_row = false;
};

// The variants of stencil_step_cuda: X(name).
#define AFA_STENCIL_STEP_VARIANTS(X) X(classes4)
enum class StencilStepVariant { AFA_STENCIL_STEP_VARIANTS(AFA_VARIANT_NUMBER) };

struct StencilParams {
  Stencil stencil;
  Kind kind = Kind::f32;  // type of weights and planes
  int64_t batch = 0, classes = 0, height = 0, width = 0;
  const void* weights = nullptr;  // [B, K, H, W], unit stride in x
  int64_t weight_stride_b = 0, weight_stride_k = 0, weight_stride_y = 0;
  Planes in;                              // [B * C] planes
  Planes out;                             // [B * C] planes
  void* grad_weights = nullptr;           // [B, K, H, W] contiguous, in the type sums are formed in
  const bool* class_mask = nullptr;       // CUDA: [B, C] on the device, or null for all
  const int64_t* extent = nullptr;        // CUDA, stencil_step alone: [B, 2], see stencil_propagate
  const int64_t* active = nullptr;        // CPU: the active planes, in order
  const int64_t* active_begin = nullptr;  // CPU: [B + 1] where each image's begin
  int variant = 0;                        // CUDA: a StencilStepVariant
  bool upwards = false;                   // CPU: stencil_step takes the last row first
};

// CPU: rows `begin` to `end` of the batch's B * H rows, float32 and float64. The planes stencil_step and
// stencil_weight_grad read are by row, padded by min(reach_x, W - 1) columns, and followed by kSlack readable
// elements. stencil_weight_grad takes the incoming gradient as `out`. `offsets` holds K elements, `scratch`
// 4 * (W + 2 * reach_x) values.
constexpr int64_t kSlack = 16;  // a vector's worth: short rows are read by whole vectors
AFA_SIMD_DECLARE(void stencil_step(const StencilParams& p, int64_t begin, int64_t end, int64_t* offsets))
AFA_SIMD_DECLARE(void stencil_adjoint(const StencilParams& p, int64_t begin, int64_t end, void* scratch))
AFA_SIMD_DECLARE(void stencil_weight_grad(const StencilParams& p, int64_t begin, int64_t end))

// CUDA: return nullptr, or an error's text.
const char* stencil_step_cuda(const StencilParams& p, void* stream);
const char* stencil_adjoint_cuda(const StencilParams& p, void* stream);
const char* stencil_weight_grad_cuda(const StencilParams& p, void* stream);

}  // namespace afa
