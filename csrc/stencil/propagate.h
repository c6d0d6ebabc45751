// The stencil on tensors: what par.cpp and walk.cpp call once their arguments are checked.
#pragma once

#include <optional>

#include "common/tensor.h"
#include "stencil/stencil.h"

namespace afa {

// The 3x3 ring without its center, at every dilation (at most kMaxDilations).
Stencil ring_stencil(const std::vector<int64_t>& dilations);
// What reaches a node of the grid: the offsets of a random walk's window, reversed, in the window's order.
// `window` is "square" (Chebyshev radius) or "disc" (x^2 + y^2 < radius^2).
Stencil window_stencil(int64_t radius, const std::string& window);

// class_mask is bool [B, C], on the device of the planes [B, C, H, W].
void check_class_mask(const std::optional<Tensor>& class_mask, const Tensor& planes);

// CPU: the planes b * C + c that class_mask leaves, image by image.
struct ActivePlanes {
  std::vector<int64_t> plane;
  std::vector<int64_t> begin{0};

  ActivePlanes(int64_t batch, int64_t classes, const std::optional<Tensor>& class_mask);
};

// CPU: the active planes by row, with min(reach, W - 1) replicated columns on each side, in one allocation.
struct PaddedPlanes {
  Tensor storage;
  Planes planes;

  PaddedPlanes(const Tensor& like, const ActivePlanes& active, int64_t reach);  // [B, C, H, W]
  void fill(const Tensor& source,
            const ActivePlanes& active);  // copies a contiguous float32 or float64 tensor
};

// weights [B, K, H, W], planes [B, C, H, W] of one type and device, class_mask bool [B, C] (false: output 0).
Tensor stencil_propagate_cpu(const char* op, const Stencil& stencil, const Tensor& weights,
                             const Tensor& planes, int64_t steps, const std::optional<Tensor>& class_mask);
// Launches p.steps steps from `source` to `out`, both contiguous [B, C, H, W] of the weights' type.
using StepsCuda = void (*)(const char* op, StencilParams& p, const Tensor& source, const Tensor& out,
                           const CudaScope& scope);
void stencil_steps_cuda(const char* op, StencilParams& p, const Tensor& source, const Tensor& out,
                        const CudaScope& scope);
// extent, int64 [B, 2]: of image b only its first extent[b] = (rows, columns) count; the rest of the output
// is undefined. `run`: the kernel for these neighbors.
Tensor stencil_propagate_cuda(const char* op, const Stencil& stencil, const Tensor& weights,
                              const Tensor& planes, int64_t steps, const std::optional<Tensor>& class_mask,
                              const std::optional<Tensor>& extent = std::nullopt, bool zero_masked = true,
                              StepsCuda run = stencil_steps_cuda);
// The gradient with respect to planes of <grad, stencil_propagate(...)>.
Tensor stencil_propagate_backward_cpu(const char* op, const Stencil& stencil, const Tensor& grad,
                                      const Tensor& weights, int64_t steps,
                                      const std::optional<Tensor>& class_mask);
Tensor stencil_propagate_backward_cuda(const char* op, const Stencil& stencil, const Tensor& grad,
                                       const Tensor& weights, int64_t steps,
                                       const std::optional<Tensor>& class_mask);
// The gradient with respect to weights. Keeps the planes of every step: steps * B * C * H * W values.
Tensor stencil_weights_backward_cpu(const char* op, const Stencil& stencil, const Tensor& grad,
                                    const Tensor& weights, const Tensor& planes, int64_t steps,
                                    const std::optional<Tensor>& class_mask);
Tensor stencil_weights_backward_cuda(const char* op, const Stencil& stencil, const Tensor& grad,
                                     const Tensor& weights, const Tensor& planes, int64_t steps,
                                     const std::optional<Tensor>& class_mask);

}  // namespace afa
