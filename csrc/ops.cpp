// The only place operators are registered, and the Python module afa_ext._C.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "common/simd.h"

// One line an operator: X(name, "arguments -> results"). Shapes: images [B, 3, H, W]; masks, scores and their
// gradients [B, C, H, W]; weights [B, 8*len(dilations), H, W]; affinity [B, N, N or window];
// transition and window affinities by offset [B, window, h, w]; class_mask, present bool [B, C]; class_index
// int64 [B, C]; box int64 [B, 4]; attention [B, K, N, N]; weight [K]; bias [1]; tokens int64 [B, h, w];
// labels uint8, like affinity; sums [3]: the loss and the weights of a same and of a different pair.
#define AFA_OPERATORS(X)                                                                                   \
  X(par_affinity, "(Tensor images, int[] dilations, float w1, float w2) -> Tensor")                        \
  X(pamr_affinity, "(Tensor images, int[] dilations) -> Tensor")                                           \
  X(par_propagate,                                                                                         \
    "(Tensor weights, Tensor masks, int[] dilations, int num_iter, Tensor? class_mask) -> Tensor")         \
  X(par_propagate_backward_masks,                                                                          \
    "(Tensor grad, Tensor weights, int[] dilations, int num_iter, Tensor? class_mask) -> Tensor")          \
  X(par_propagate_backward_weights,                                                                        \
    "(Tensor grad, Tensor weights, Tensor masks, int[] dilations, int num_iter, Tensor? class_mask) -> "   \
    "Tensor")                                                                                              \
  X(walk_transition,                                                                                       \
    "(Tensor affinity, SymInt height, SymInt width, int radius, str window, float power, bool normalize, " \
    "float eps) -> Tensor")                                                                                \
  X(walk_transition_backward,                                                                              \
    "(Tensor grad, Tensor affinity, SymInt height, SymInt width, int radius, str window, float power, "    \
    "bool normalize, float eps) -> Tensor")                                                                \
  X(walk_transpose, "(Tensor transition, int radius, str window) -> Tensor")                               \
  X(walk_step,                                                                                             \
    "(Tensor scores, Tensor affinity, int radius, str window, float power, bool normalize, float eps, "    \
    "Tensor? class_mask) -> Tensor")                                                                       \
  X(walk_propagate,                                                                                        \
    "(Tensor scores, Tensor transition, int radius, str window, int steps, Tensor? class_mask) -> Tensor") \
  X(walk_propagate_backward_scores,                                                                        \
    "(Tensor grad, Tensor transition, int radius, str window, int steps, Tensor? class_mask) -> Tensor")   \
  X(walk_propagate_backward_transition,                                                                    \
    "(Tensor grad, Tensor scores, Tensor transition, int radius, str window, int steps, "                  \
    "Tensor? class_mask) -> Tensor")                                                                       \
  X(edge_affinity, "(Tensor edge, int radius) -> Tensor")                                                  \
  X(feature_affinity, "(Tensor features, int radius) -> Tensor")                                           \
  X(feature_affinity_backward, "(Tensor grad, Tensor features, Tensor affinity, int radius) -> Tensor")    \
  X(pseudo_labels,                                                                                         \
    "(Tensor images, Tensor cams, Tensor present, Tensor? class_index, Tensor? box, Tensor? weights, "     \
    "float low, float high, int downscale, int[] dilations, int num_iter, float w1, float w2, "            \
    "int max_classes, int ignore_index) -> Tensor")                                                        \
  X(refine_labels,                                                                                         \
    "(Tensor images, Tensor scores, Tensor? low_scores, Tensor present, Tensor? class_index, "             \
    "Tensor? box, Tensor? weights, int downscale, int[] dilations, int num_iter, float w1, float w2, "     \
    "int max_classes, int ignore_index) -> Tensor")                                                        \
  X(affinity_from_attention,                                                                               \
    "(Tensor attention, Tensor weight, Tensor bias, SymInt height, SymInt width, int? radius, "            \
    "bool windowed) -> Tensor")                                                                            \
  X(affinity_from_attention_backward_attention,                                                            \
    "(Tensor grad, Tensor affinity, Tensor weight, SymInt height, SymInt width, int? radius, "             \
    "bool windowed) -> Tensor")                                                                            \
  X(affinity_from_attention_backward_weight,                                                               \
    "(Tensor grad, Tensor affinity, Tensor attention, SymInt height, SymInt width, int? radius, "          \
    "bool windowed) -> Tensor")                                                                            \
  X(affinity_labels, "(Tensor tokens, int radius, int ignore_index, bool windowed) -> Tensor")             \
  X(affinity_loss, "(Tensor affinity, Tensor labels) -> Tensor")                                           \
  X(affinity_loss_backward, "(Tensor grad, Tensor sums, Tensor labels) -> Tensor")

#define AFA_DEFINE(name, schema) m.def(#name schema);
#define AFA_IMPLEMENT(name, schema) m.impl(#name, TORCH_BOX(&afa::name));

#ifdef AFA_CUDA_ON_HOST
// The CUDA kernels, compiled for the CPU by the tests, under a name of their own.
STABLE_TORCH_LIBRARY(afa_ext_cuda_on_host,
                     m){AFA_OPERATORS(AFA_DEFINE)} STABLE_TORCH_LIBRARY_IMPL(afa_ext_cuda_on_host, CPU,
                                                                             m){AFA_OPERATORS(AFA_IMPLEMENT)}
#else
STABLE_TORCH_LIBRARY(afa_ext, m){AFA_OPERATORS(AFA_DEFINE)} STABLE_TORCH_LIBRARY_IMPL(afa_ext, CPU, m){
    AFA_OPERATORS(AFA_IMPLEMENT)} STABLE_TORCH_LIBRARY_IMPL(afa_ext, CUDA, m) {
  AFA_OPERATORS(AFA_IMPLEMENT)
}

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace {

pybind11::dict build_info() {
  pybind11::list compiled;
  for (auto level : {afa::SimdLevel::baseline, afa::SimdLevel::avx2, afa::SimdLevel::avx512}) {
    if (afa::simd_compiled(level)) compiled.append(afa::simd_name(level));
  }
  pybind11::dict info;
  info["compiler"] = AFA_BUILD_COMPILER;
  info["build_type"] = AFA_BUILD_TYPE;
  info["torch_headers"] = AFA_BUILD_TORCH;
#ifdef AFA_WITH_CUDA
  info["cuda"] = AFA_BUILD_CUDA;
  info["cuda_architectures"] = AFA_BUILD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = pybind11::none();
  info["cuda_architectures"] = "";
#endif
  info["simd_levels"] = compiled;
  info["simd"] = afa::simd_name(afa::simd_level());
  return info;
}

}  // namespace

#define AFA_NAME(name, schema) names.push_back(#name);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of afa_ext, registered as torch.ops.afa_ext.*";
  m.def(
      "build_info", &build_info,
      "How this library was built: compiler, CUDA version and architectures (None without CUDA), the version "
      "of the torch headers, the SIMD levels it holds and the one in use.");
  m.def(
      "operators",
      [] {
        std::vector<std::string> names;
        AFA_OPERATORS(AFA_NAME)
        return names;
      },
      "The names of all registered operators.");
}
#endif
