#include "par/par.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>
#include <vector>

#include "ops.h"
#include "par/propagate.h"

namespace afa {
namespace {

// w2 * softmax over all neighbors of -(p / ((sigma_p + 1e-8) * w1))^2 with p = d (edge) or sqrt(2) * d
// (corner).
void position_weights(const std::vector<int64_t>& dilations, double w1, double w2, ParAffinityParams& p) {
  const double count = 8.0 * static_cast<double>(dilations.size());
  const double corner = std::sqrt(2.0);
  double mean = 0;
  for (int64_t d : dilations) mean += 4 * static_cast<double>(d) * (1 + corner) / count;
  double squares = 0;
  for (int64_t d : dilations) {
    squares += 4 * std::pow(static_cast<double>(d) - mean, 2) +
               4 * std::pow(static_cast<double>(d) * corner - mean, 2);
  }
  const double scale = 1 / ((std::sqrt(squares / (count - 1)) + 1e-8) * w1);
  auto logit = [&](double distance) { return -std::pow(distance * scale, 2); };
  double top = -INFINITY, sum = 0;
  for (int64_t d : dilations) top = std::max(top, logit(static_cast<double>(d)));
  for (int64_t d : dilations) {
    const double distance = static_cast<double>(d);
    sum += 4 * std::exp(logit(distance) - top) + 4 * std::exp(logit(distance * corner) - top);
  }
  for (size_t i = 0; i < dilations.size(); ++i) {
    const double distance = static_cast<double>(dilations[i]);
    p.edge[i] = w2 * std::exp(logit(distance) - top) / sum;
    p.corner[i] = w2 * std::exp(logit(distance * corner) - top) / sum;
    p.edge32[i] = static_cast<float>(p.edge[i]);
    p.corner32[i] = static_cast<float>(p.corner[i]);
  }
}

// The ring of neighbors, after weights and planes are checked against it.
Stencil checked_ring(const std::vector<int64_t>& dilations, const Tensor& weights,
                     std::initializer_list<std::pair<const Tensor&, const char*>> planes) {
  const Stencil stencil = ring_stencil(dilations);
  check_shape(weights, "weights", "[B, 8*len(dilations), H, W]", {-1, stencil.size, -1, -1});
  kind_of(weights, "weights");
  for (const auto& [tensor, name] : planes) {
    check_shape(tensor, name, "[B, C, H, W]", {weights.size(0), -1, weights.size(2), weights.size(3)});
    check_like(tensor, name, weights, "weights");
  }
  return stencil;
}

// Checks the images and sets the parameters for both devices; the weights [B, K, H, W] have `type`.
Tensor check_images(const Tensor& images, const std::vector<int64_t>& dilations, ScalarType type,
                    ParAffinityParams& p) {
  check_shape(images, "images", "[B, 3, H, W]", {-1, -1, -1, -1});
  AFA_CHECK(images.size(1) >= 1, "images must have at least one color channel, got shape ",
            shape_string(images));
  kind_of(images, "images");
  p.stencil = ring_stencil(dilations);
  p.batch = images.size(0);
  p.channels = images.size(1);
  p.height = images.size(2);
  p.width = images.size(3);
  return empty(images, {p.batch, p.stencil.size, p.height, p.width}, type);
}

Tensor affinity_cpu(const Tensor& images, const std::vector<int64_t>& dilations, ParAffinityParams p) {
  const ScalarType type = sum_type(images);
  const Tensor weights = check_images(images, dilations, type, p);
  if (weights.numel() == 0) return contiguous_as(weights, images.scalar_type());
  const Tensor dense = contiguous_as(images, type);
  const ActivePlanes all(p.batch, p.channels, std::nullopt);
  PaddedPlanes padded(dense, all, p.stencil.reach_x);
  padded.fill(dense, all);
  p.kind = kind_of(dense, "images");
  p.weights = weights.mutable_data_ptr();
  p.images = padded.planes.data;
  p.image_pad = padded.planes.pad;
  p.image_stride_c = padded.planes.plane_stride;
  p.image_stride_y = p.channels * p.image_stride_c;
  p.image_stride_b = p.height * p.image_stride_y;
  parallel_rows(p.batch * p.height, p.width * p.stencil.size * (3 * p.channels + 20),
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(par_affinity_rows, p, begin, end); });
  return contiguous_as(weights, images.scalar_type());
}

Tensor affinity_cuda(const char* op, const Tensor& images, const std::vector<int64_t>& dilations,
                     const std::optional<Tensor>& extent, ParAffinityParams p) {
  const CudaScope scope(images);
  const Tensor weights = check_images(images, dilations, images.scalar_type(), p);
  if (weights.numel() == 0) return weights;
  const Tensor dense = torch::stable::contiguous(images);
  p.kind = kind_of(dense, "images");
  p.weights = weights.mutable_data_ptr();
  p.images = dense.const_data_ptr();
  p.image_stride_y = p.width;
  p.image_stride_c = p.height * p.width;
  p.image_stride_b = p.channels * p.image_stride_c;
  p.extent = extent ? static_cast<const int64_t*>(extent->const_data_ptr()) : nullptr;
  AFA_CUDA_LAUNCH(op, launch_par_affinity(p, scope.stream()));
  return weights;
}

ParAffinityParams par_params(const std::vector<int64_t>& dilations, double w1, double w2) {
  AFA_CHECK(w1 > 0, "w1 must be greater than 0, got ", w1);
  ParAffinityParams p;
  p.w1 = w1;
  ring_stencil(dilations);  // checks them
  position_weights(dilations, w1, w2, p);
  return p;
}

ParAffinityParams pamr_params() {
  ParAffinityParams p;
  p.pamr = true;
  return p;
}

}  // namespace

Tensor par_affinity_cpu(const Tensor& images, const std::vector<int64_t>& dilations, double w1, double w2) {
  return affinity_cpu(images, dilations, par_params(dilations, w1, w2));
}

Tensor par_affinity_cuda(const Tensor& images, const std::vector<int64_t>& dilations, double w1, double w2) {
  return par_affinity_within_cuda(images, dilations, w1, w2, std::nullopt);
}

Tensor par_affinity_within_cuda(const Tensor& images, const std::vector<int64_t>& dilations, double w1,
                                double w2, const std::optional<Tensor>& extent) {
  return affinity_cuda("par_affinity", images, dilations, extent, par_params(dilations, w1, w2));
}

Tensor pamr_affinity_cpu(const Tensor& images, const std::vector<int64_t>& dilations) {
  return affinity_cpu(images, dilations, pamr_params());
}

Tensor pamr_affinity_cuda(const Tensor& images, const std::vector<int64_t>& dilations) {
  return affinity_cuda("pamr_affinity", images, dilations, std::nullopt, pamr_params());
}

Tensor par_propagate_cpu(const Tensor& weights, const Tensor& masks, const std::vector<int64_t>& dilations,
                         int64_t num_iter, const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_ring(dilations, weights, {{masks, "masks"}});
  return stencil_propagate_cpu("par_propagate", stencil, weights, masks, num_iter, class_mask);
}

Tensor par_propagate_backward_masks_cpu(const Tensor& grad, const Tensor& weights,
                                        const std::vector<int64_t>& dilations, int64_t num_iter,
                                        const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_ring(dilations, weights, {{grad, "grad"}});
  return stencil_propagate_backward_cpu("par_propagate_backward_masks", stencil, grad, weights, num_iter,
                                        class_mask);
}

Tensor par_propagate_backward_weights_cpu(const Tensor& grad, const Tensor& weights, const Tensor& masks,
                                          const std::vector<int64_t>& dilations, int64_t num_iter,
                                          const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_ring(dilations, weights, {{masks, "masks"}, {grad, "grad"}});
  return stencil_weights_backward_cpu("par_propagate_backward_weights", stencil, grad, weights, masks,
                                      num_iter, class_mask);
}

Tensor par_propagate_cuda(const Tensor& weights, const Tensor& masks, const std::vector<int64_t>& dilations,
                          int64_t num_iter, const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_ring(dilations, weights, {{masks, "masks"}});
  return par_iterations_cuda("par_propagate", stencil, weights, masks, num_iter, class_mask);
}

Tensor par_propagate_backward_masks_cuda(const Tensor& grad, const Tensor& weights,
                                         const std::vector<int64_t>& dilations, int64_t num_iter,
                                         const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_ring(dilations, weights, {{grad, "grad"}});
  return stencil_propagate_backward_cuda("par_propagate_backward_masks", stencil, grad, weights, num_iter,
                                         class_mask);
}

Tensor par_propagate_backward_weights_cuda(const Tensor& grad, const Tensor& weights, const Tensor& masks,
                                           const std::vector<int64_t>& dilations, int64_t num_iter,
                                           const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_ring(dilations, weights, {{masks, "masks"}, {grad, "grad"}});
  return stencil_weights_backward_cuda("par_propagate_backward_weights", stencil, grad, weights, masks,
                                       num_iter, class_mask);
}

}  // namespace afa
