// The host functions of all operators, as registered in ops.cpp: name_cpu and name_cuda, with one signature.
// For shapes and meaning see the schemas in operators.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/tensor.h"

#define AFA_DECLARE(name, ...)    \
  Tensor name##_cpu(__VA_ARGS__); \
  Tensor name##_cuda(__VA_ARGS__)

namespace afa {

// clang-format off
AFA_DECLARE(par_affinity,
            const Tensor& images, const std::vector<int64_t>& dilations, double w1, double w2);
// Like par_affinity_cuda, but not registered. extent, int64 [B, 2]: only the first extent[b] = (rows,
// columns) of image b are used; the rest of the output is undefined.
Tensor par_affinity_within_cuda(const Tensor& images, const std::vector<int64_t>& dilations, double w1,
                                double w2, const std::optional<Tensor>& extent);
AFA_DECLARE(pamr_affinity,
            const Tensor& images, const std::vector<int64_t>& dilations);
AFA_DECLARE(par_propagate,
            const Tensor& weights, const Tensor& masks, const std::vector<int64_t>& dilations,
            int64_t num_iter, const std::optional<Tensor>& class_mask);
AFA_DECLARE(par_propagate_backward_masks,
            const Tensor& grad, const Tensor& weights, const std::vector<int64_t>& dilations,
            int64_t num_iter, const std::optional<Tensor>& class_mask);
AFA_DECLARE(par_propagate_backward_weights,
            const Tensor& grad, const Tensor& weights, const Tensor& masks,
            const std::vector<int64_t>& dilations, int64_t num_iter,
            const std::optional<Tensor>& class_mask);

AFA_DECLARE(walk_transition,
            const Tensor& affinity, int64_t height, int64_t width, int64_t radius,
            const std::string& window, double power, bool normalize, double eps);
AFA_DECLARE(walk_transition_backward,
            const Tensor& grad, const Tensor& affinity, int64_t height, int64_t width, int64_t radius,
            const std::string& window, double power, bool normalize, double eps);
AFA_DECLARE(walk_transpose,
            const Tensor& transition, int64_t radius, const std::string& window);
AFA_DECLARE(walk_step,
            const Tensor& scores, const Tensor& affinity, int64_t radius, const std::string& window,
            double power, bool normalize, double eps, const std::optional<Tensor>& class_mask);
AFA_DECLARE(walk_propagate,
            const Tensor& scores, const Tensor& transition, int64_t radius, const std::string& window,
            int64_t steps, const std::optional<Tensor>& class_mask);
AFA_DECLARE(walk_propagate_backward_scores,
            const Tensor& grad, const Tensor& transition, int64_t radius, const std::string& window,
            int64_t steps, const std::optional<Tensor>& class_mask);
AFA_DECLARE(walk_propagate_backward_transition,
            const Tensor& grad, const Tensor& scores, const Tensor& transition, int64_t radius,
            const std::string& window, int64_t steps, const std::optional<Tensor>& class_mask);

AFA_DECLARE(edge_affinity,
            const Tensor& edge, int64_t radius);
AFA_DECLARE(feature_affinity,
            const Tensor& features, int64_t radius);
AFA_DECLARE(feature_affinity_backward,
            const Tensor& grad, const Tensor& features, const Tensor& affinity, int64_t radius);

AFA_DECLARE(pseudo_labels,
            const Tensor& images, const Tensor& cams, const Tensor& present,
            const std::optional<Tensor>& class_index, const std::optional<Tensor>& box,
            const std::optional<Tensor>& weights, double low, double high, int64_t downscale,
            const std::vector<int64_t>& dilations, int64_t num_iter, double w1, double w2,
            int64_t max_classes, int64_t ignore_index);
AFA_DECLARE(refine_labels,
            const Tensor& images, const Tensor& scores, const std::optional<Tensor>& low_scores,
            const Tensor& present, const std::optional<Tensor>& class_index,
            const std::optional<Tensor>& box, const std::optional<Tensor>& weights, int64_t downscale,
            const std::vector<int64_t>& dilations, int64_t num_iter, double w1, double w2,
            int64_t max_classes, int64_t ignore_index);

AFA_DECLARE(affinity_from_attention,
            const Tensor& attention, const Tensor& weight, const Tensor& bias, int64_t height,
            int64_t width, std::optional<int64_t> radius, bool windowed);
AFA_DECLARE(affinity_from_attention_backward_attention,
            const Tensor& grad, const Tensor& affinity, const Tensor& weight, int64_t height, int64_t width,
            std::optional<int64_t> radius, bool windowed);
// [K + 1]: the gradients of weight, then that of bias.
AFA_DECLARE(affinity_from_attention_backward_weight,
            const Tensor& grad, const Tensor& affinity, const Tensor& attention, int64_t height,
            int64_t width, std::optional<int64_t> radius, bool windowed);
AFA_DECLARE(affinity_labels,
            const Tensor& tokens, int64_t radius, int64_t ignore_index, bool windowed,
            std::optional<int64_t> background);
AFA_DECLARE(affinity_loss,
            const Tensor& affinity, const Tensor& labels, double weight_different, double weight_same,
            double weight_foreground, const std::optional<Tensor>& counts);
AFA_DECLARE(affinity_loss_backward,
            const Tensor& grad, const Tensor& sums, const Tensor& labels);

AFA_DECLARE(lattice_build,
            const Tensor& features);
AFA_DECLARE(lattice_filter,
            const Tensor& values, const Tensor& lattice, int64_t dims, const std::string& normalize,
            bool reverse);
AFA_DECLARE(mean_field,
            const Tensor& scores, const Tensor& gaussian, const Tensor& bilateral, double gaussian_weight,
            double bilateral_weight, const std::optional<Tensor>& compatibility,
            const std::optional<Tensor>& class_mask, bool probabilities, int64_t num_iter);
// clang-format on

}  // namespace afa
