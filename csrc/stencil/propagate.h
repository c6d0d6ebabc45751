// The stencil on tensors: called by par.cpp and walk.cpp after their arguments are checked.
#pragma once

#include <optional>

#include "common/tensor.h"
#include "stencil/stencil.h"

namespace afa {

// The 8 neighbors of a pixel at every dilation (at most kMaxDilations).
Stencil ring_stencil(const std::vector<int64_t>& dilations);
// The sources of a node of the grid: the negated offsets of a random walk's window, in the window's order.
// `window` is "square" (Chebyshev radius) or "disc" (x^2 + y^2 < radius^2).
Stencil window_stencil(int64_t radius, const std::string& window);

// class_mask is bool [B, C], on the device of the planes [B, C, H, W].
void check_class_mask(const std::optional<Tensor>& class_mask, const Tensor& planes);

// CPU: the planes b * C + c selected by class_mask, ordered by image.
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

// weights [B, K, H, W] and planes [B, C, H, W] of the same type and device, class_mask bool [B, C] (false:
// output 0).
Tensor stencil_propagate_cpu(const char* op, const Stencil& stencil, const Tensor& weights,
                             const Tensor& planes, int64_t steps, const std::optional<Tensor>& class_mask);
// Launches p.steps steps from `source` to `out`, both contiguous [B, C, H, W] in the weights' type.
using StepsCuda = void (*)(const char* op, StencilParams& p, const Tensor& source, const Tensor& out,
                           const CudaScope& scope);
void stencil_steps_cuda(const char* op, StencilParams& p, const Tensor& source, const Tensor& out,
                        const CudaScope& scope);
// extent, int64 [B, 2]: only the first extent[b] = (rows, columns) of image b are used; the rest of the
// output is undefined. `run`: the kernel for these neighbors.
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
// The gradient with respect to weights. Stores the planes of every step: steps * B * C * H * W values.
Tensor stencil_weights_backward_cpu(const char* op, const Stencil& stencil, const Tensor& grad,
                                    const Tensor& weights, const Tensor& planes, int64_t steps,
                                    const std::optional<Tensor>& class_mask);
Tensor stencil_weights_backward_cuda(const char* op, const Stencil& stencil, const Tensor& grad,
                                     const Tensor& weights, const Tensor& planes, int64_t steps,
                                     const std::optional<Tensor>& class_mask);

}  // namespace afa
