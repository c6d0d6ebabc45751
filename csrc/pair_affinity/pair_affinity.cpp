#include "pair_affinity/pair_affinity.h"

#include <vector>

#include "ops.h"
#include "stencil/propagate.h"

namespace afa {
namespace {

// For planes [B, C, h, w] or, without channels, [B, h, w].
PairAffinityParams make_params(const Tensor& planes, int64_t radius) {
  PairAffinityParams p;
  p.stencil = window_stencil(radius, "disc");
  const int64_t d = planes.dim();
  p.batch = planes.size(0);
  p.channels = d == 4 ? planes.size(1) : 1;
  p.height = planes.size(d - 2);
  p.width = planes.size(d - 1);
  return p;
}

// The multiply-adds of one row of nodes, for distributing rows to threads; `entry` is the cost of one pair.
int64_t row_work(const PairAffinityParams& p, int64_t entry) {
  return p.stencil.size * p.width * entry;
}

PairAffinityParams check_edge(const Tensor& edge, int64_t radius) {
  check_shape(edge, "edge", "[B, h, w]", {-1, -1, -1});
  kind_of(edge, "edge");
  return make_params(edge, radius);
}

PairAffinityParams check_features(const Tensor& features, int64_t radius) {
  check_shape(features, "features", "[B, C, h, w]", {-1, -1, -1, -1});
  AFA_CHECK(features.size(1) > 0, "features must have at least one channel, got shape ",
            shape_string(features));
  kind_of(features, "features");
  return make_params(features, radius);
}

PairAffinityParams check_features_backward(const Tensor& grad, const Tensor& features, const Tensor& affinity,
                                           int64_t radius) {
  check_shape(features, "features", "[B, C, h, w]", {-1, -1, -1, -1});
  kind_of(features, "features");
  const PairAffinityParams p = make_params(features, radius);
  for (const auto& [tensor, name] : {std::pair{&grad, "grad"}, std::pair{&affinity, "affinity"}}) {
    check_shape(*tensor, name, "[B, window, h, w]", {p.batch, p.stencil.size, p.height, p.width});
    check_like(*tensor, name, features, "features");
  }
  return p;
}

}  // namespace

// ---- CPU ----

Tensor edge_affinity_cpu(const Tensor& edge, int64_t radius) {
  PairAffinityParams p = check_edge(edge, radius);
  const ScalarType type = sum_type(edge);
  const Tensor out = empty(edge, {p.batch, p.stencil.size, p.height, p.width}, type);
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(edge, type);
    p.kind = kind_of(source, "edge");
    p.in = source.const_data_ptr();
    p.out = out.mutable_data_ptr();
    parallel_rows(p.batch * p.height, row_work(p, radius),
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(edge_affinity_rows, p, begin, end); });
  }
  return contiguous_as(out, edge.scalar_type());
}

Tensor feature_affinity_cpu(const Tensor& features, int64_t radius) {
  PairAffinityParams p = check_features(features, radius);
  const ScalarType type = sum_type(features);
  const Tensor out = empty(features, {p.batch, p.stencil.size, p.height, p.width}, type);
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(features, type);
    p.kind = kind_of(source, "features");
    p.in = source.const_data_ptr();
    p.out = out.mutable_data_ptr();
    parallel_rows(p.batch * p.height, row_work(p, p.channels),
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(feature_affinity_rows, p, begin, end); });
  }
  return contiguous_as(out, features.scalar_type());
}

Tensor feature_affinity_backward_cpu(const Tensor& grad, const Tensor& features, const Tensor& affinity,
                                     int64_t radius) {
  PairAffinityParams p = check_features_backward(grad, features, affinity, radius);
  const ScalarType type = sum_type(features);
  const Tensor out = empty(features, {p.batch, p.channels, p.height, p.width}, type);
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(features, type);
    const Tensor values = contiguous_as(affinity, type);
    const Tensor outgoing = contiguous_as(grad, type);
    p.kind = kind_of(source, "features");
    p.in = source.const_data_ptr();
    p.affinity = values.const_data_ptr();
    p.grad = outgoing.const_data_ptr();
    p.out = out.mutable_data_ptr();
    parallel_rows(p.batch * p.height, row_work(p, 2 * p.channels), [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(p.stencil.size * (p.width + kFactorSlack));
      AFA_SIMD_CALL(feature_affinity_backward_rows, p, begin, end, scratch.data());
    });
  }
  return contiguous_as(out, features.scalar_type());
}

// ---- CUDA ----

Tensor edge_affinity_cuda(const Tensor& edge, int64_t radius) {
  PairAffinityParams p = check_edge(edge, radius);
  const CudaScope scope(edge);
  const Tensor out = empty(edge, {p.batch, p.stencil.size, p.height, p.width}, edge.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor source = torch::stable::contiguous(edge);
  p.kind = kind_of(source, "edge");
  p.in = source.const_data_ptr();
  p.out = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("edge_affinity", launch_edge_affinity(p, scope.stream()));
  return out;
}

Tensor feature_affinity_cuda(const Tensor& features, int64_t radius) {
  PairAffinityParams p = check_features(features, radius);
  const CudaScope scope(features);
  const Tensor out = empty(features, {p.batch, p.stencil.size, p.height, p.width}, features.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor source = torch::stable::contiguous(features);
  p.kind = kind_of(source, "features");
  p.in = source.const_data_ptr();
  p.out = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("feature_affinity", launch_feature_affinity(p, scope.stream()));
  return out;
}

Tensor feature_affinity_backward_cuda(const Tensor& grad, const Tensor& features, const Tensor& affinity,
                                      int64_t radius) {
  PairAffinityParams p = check_features_backward(grad, features, affinity, radius);
  const CudaScope scope(features);
  const Tensor out = empty(features, {p.batch, p.channels, p.height, p.width}, features.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor source = torch::stable::contiguous(features);
  const Tensor values = torch::stable::contiguous(affinity);
  const Tensor outgoing = torch::stable::contiguous(grad);
  p.kind = kind_of(source, "features");
  p.in = source.const_data_ptr();
  p.affinity = values.const_data_ptr();
  p.grad = outgoing.const_data_ptr();
  p.out = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("feature_affinity_backward", launch_feature_affinity_backward(p, scope.stream()));
  return out;
}

}  // namespace afa
