// The list of all operators: names and schemas. ops.cpp registers it, module.cpp exposes it to Python.
#pragma once

// One line per operator: X(name, "arguments -> results"). Shapes: images [B, 3, H, W]; masks, scores and
// their gradients [B, C, H, W]; weights [B, 8*len(dilations), H, W]; affinity [B, N, N or window]; transition
// and window affinities by offset [B, window, h, w]; class_mask, present bool [B, C]; class_index int64 [B,
// C]; box int64 [B, 4]; attention [B, K, N, N]; weight [K]; bias [1]; tokens int64 [B, h, w]; labels uint8,
// like affinity; sums [10]: see finish_loss in affinity/affinity.h.
// clang-format off
#define AFA_OPERATORS(X)                                                                                \
  X(par_affinity,                                                                                       \
    "(Tensor images, int[] dilations, float w1, float w2) -> Tensor")                                   \
  X(pamr_affinity,                                                                                      \
    "(Tensor images, int[] dilations) -> Tensor")                                                       \
  X(par_propagate,                                                                                      \
    "(Tensor weights, Tensor masks, int[] dilations, int num_iter, Tensor? class_mask) -> Tensor")      \
  X(par_propagate_backward_masks,                                                                       \
    "(Tensor grad, Tensor weights, int[] dilations, int num_iter, Tensor? class_mask) -> Tensor")       \
  X(par_propagate_backward_weights,                                                                     \
    "(Tensor grad, Tensor weights, Tensor masks, int[] dilations, int num_iter, "                       \
    "Tensor? class_mask) -> Tensor")                                                                    \
  X(walk_transition,                                                                                    \
    "(Tensor affinity, SymInt height, SymInt width, int radius, str window, float power, "              \
    "bool normalize, float eps) -> Tensor")                                                             \
  X(walk_transition_backward,                                                                           \
    "(Tensor grad, Tensor affinity, SymInt height, SymInt width, int radius, str window, float power, " \
    "bool normalize, float eps) -> Tensor")                                                             \
  X(walk_transpose,                                                                                     \
    "(Tensor transition, int radius, str window) -> Tensor")                                            \
  X(walk_step,                                                                                          \
    "(Tensor scores, Tensor affinity, int radius, str window, float power, bool normalize, float eps, " \
    "Tensor? class_mask) -> Tensor")                                                                    \
  X(walk_propagate,                                                                                     \
    "(Tensor scores, Tensor transition, int radius, str window, int steps, "                            \
    "Tensor? class_mask) -> Tensor")                                                                    \
  X(walk_propagate_backward_scores,                                                                     \
    "(Tensor grad, Tensor transition, int radius, str window, int steps, "                              \
    "Tensor? class_mask) -> Tensor")                                                                    \
  X(walk_propagate_backward_transition,                                                                 \
    "(Tensor grad, Tensor scores, Tensor transition, int radius, str window, int steps, "               \
    "Tensor? class_mask) -> Tensor")                                                                    \
  X(edge_affinity,                                                                                      \
    "(Tensor edge, int radius) -> Tensor")                                                              \
  X(feature_affinity,                                                                                   \
    "(Tensor features, int radius) -> Tensor")                                                          \
  X(feature_affinity_backward,                                                                          \
    "(Tensor grad, Tensor features, Tensor affinity, int radius) -> Tensor")                            \
  X(pseudo_labels,                                                                                      \
    "(Tensor images, Tensor cams, Tensor present, Tensor? class_index, Tensor? box, Tensor? weights, "  \
    "float low, float high, int downscale, int[] dilations, int num_iter, float w1, float w2, "         \
    "int max_classes, int ignore_index) -> Tensor")                                                     \
  X(refine_labels,                                                                                      \
    "(Tensor images, Tensor scores, Tensor? low_scores, Tensor present, Tensor? class_index, "          \
    "Tensor? box, Tensor? weights, int downscale, int[] dilations, int num_iter, float w1, float w2, "  \
    "int max_classes, int ignore_index) -> Tensor")                                                     \
  X(affinity_from_attention,                                                                            \
    "(Tensor attention, Tensor weight, Tensor bias, SymInt height, SymInt width, int? radius, "         \
    "bool windowed) -> Tensor")                                                                         \
  X(affinity_from_attention_backward_attention,                                                         \
    "(Tensor grad, Tensor affinity, Tensor weight, SymInt height, SymInt width, int? radius, "          \
    "bool windowed) -> Tensor")                                                                         \
  X(affinity_from_attention_backward_weight,                                                            \
    "(Tensor grad, Tensor affinity, Tensor attention, SymInt height, SymInt width, int? radius, "       \
    "bool windowed) -> Tensor")                                                                         \
  X(affinity_labels,                                                                                    \
    "(Tensor tokens, int radius, int ignore_index, bool windowed, int? background) -> Tensor")          \
  X(affinity_loss,                                                                                      \
    "(Tensor affinity, Tensor labels, float weight_different, float weight_same, "                      \
    "float weight_foreground, Tensor? counts) -> Tensor")                                               \
  X(affinity_loss_backward,                                                                             \
    "(Tensor grad, Tensor sums, Tensor labels) -> Tensor")                                              \
  X(lattice_build,                                                                                      \
    "(Tensor features) -> Tensor")                                                                      \
  X(lattice_filter,                                                                                     \
    "(Tensor values, Tensor lattice, int dims, str normalize, bool reverse) -> Tensor")                 \
  X(mean_field,                                                                                         \
    "(Tensor scores, Tensor gaussian, Tensor bilateral, float gaussian_weight, "                        \
    "float bilateral_weight, Tensor? compatibility, Tensor? class_mask, bool probabilities, "           \
    "int num_iter) -> Tensor")
// clang-format on
