#include "walk/walk.h"

#include <vector>

#include "ops.h"
#include "stencil/propagate.h"

namespace afa {
namespace {

constexpr double kMaxWholePower = 64;

WalkParams make_params(const Tensor& affinity, int64_t height, int64_t width, int64_t radius,
                       const std::string& window, double power, bool normalize, double eps) {
  WalkParams p;
  p.stencil = window_stencil(radius, window);
  p.height = height;
  p.width = width;
  p.power = power;
  p.normalize = normalize;
  p.eps = eps;
  AFA_CHECK(height >= 0 && width >= 0, "grid must not be negative, got ", height, " x ", width);
  check_shape(affinity, "affinity", "[B, N, N or window]", {-1, height * width, -1});
  p.batch = affinity.size(0);
  p.dense = affinity.size(2) == height * width;
  AFA_CHECK(p.dense || affinity.size(2) == p.stencil.size, "affinity must have size ", height * width,
            " (dense) or ", p.stencil.size, " (windowed) in dimension 2, got ", shape_string(affinity));
  AFA_CHECK(power > 0, "power must be greater than 0, got ", power);
  const bool whole = power <= kMaxWholePower && power == static_cast<int32_t>(power);
  p.whole_power = whole ? static_cast<int32_t>(power) : 0;
  kind_of(affinity, "affinity");
  return p;
}

// CPU kernels work in the type sums are formed in, CUDA kernels in the tensor's own.
ScalarType work_type(const Tensor& t) {
  return on_cuda(t) ? t.scalar_type() : sum_type(t);
}

int64_t row_work(const WalkParams& p) {
  return 4 * p.width * p.stencil.size;
}

void check_transition(const Stencil& stencil, const Tensor& transition, const Tensor& planes,
                      const char* name) {
  check_shape(transition, "transition", "[B, window, h, w]", {-1, stencil.size, -1, -1});
  check_shape(planes, name, "[B, C, h, w]", {transition.size(0), -1, transition.size(2), transition.size(3)});
  kind_of(transition, "transition");
  check_like(planes, name, transition, "transition");
}

}  // namespace

Tensor walk_transition(const Tensor& affinity, int64_t height, int64_t width, int64_t radius,
                       const std::string& window, double power, bool normalize, double eps) {
  WalkParams p = make_params(affinity, height, width, radius, window, power, normalize, eps);
  const bool cuda = on_cuda(affinity);
  std::optional<CudaScope> scope;
  if (cuda) scope.emplace(affinity);
  const Tensor out = empty(affinity, {p.batch, p.stencil.size, height, width}, sum_type(affinity));
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(affinity, work_type(affinity));
    p.kind = kind_of(source, "affinity");
    p.affinity = source.const_data_ptr();
    p.out = out.mutable_data_ptr();
    if (cuda) {
      AFA_CUDA_LAUNCH("walk_transition", walk_transition_cuda(p, scope->stream()));
    } else {
      parallel_rows(p.batch * height, row_work(p), [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(2 * p.width);
        AFA_SIMD_CALL(walk_transition_rows, p, begin, end, scratch.data());
      });
    }
  }
  return out;
}

Tensor walk_transition_backward(const Tensor& grad, const Tensor& affinity, int64_t height, int64_t width,
                                int64_t radius, const std::string& window, double power, bool normalize,
                                double eps) {
  WalkParams p = make_params(affinity, height, width, radius, window, power, normalize, eps);
  check_shape(grad, "grad", "[B, window, h, w]", {p.batch, p.stencil.size, height, width});
  AFA_CHECK(grad.scalar_type() == sum_type(affinity), "grad must have the type of the transition (",
            type_name(sum_type(affinity)), "), got ", type_name(grad.scalar_type()));
  check_device(grad, "grad", affinity, "affinity");
  const bool cuda = on_cuda(affinity);
  std::optional<CudaScope> scope;
  if (cuda) scope.emplace(affinity);
  const ScalarType type = work_type(affinity);
  const Tensor out = zeros(affinity, {affinity.size(0), affinity.size(1), affinity.size(2)}, type);
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(affinity, type);
    const Tensor outgoing = torch::stable::contiguous(grad);
    p.kind = kind_of(source, "affinity");
    p.affinity = source.const_data_ptr();
    p.in = outgoing.const_data_ptr();
    p.out = out.mutable_data_ptr();
    if (cuda) {
      AFA_CUDA_LAUNCH("walk_transition_backward", walk_transition_backward_cuda(p, scope->stream()));
    } else {
      parallel_rows(p.batch * height, row_work(p), [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(2 * p.width);
        AFA_SIMD_CALL(walk_transition_backward_rows, p, begin, end, scratch.data());
      });
    }
  }
  return contiguous_as(out, affinity.scalar_type());
}

Tensor walk_transpose(const Tensor& transition, int64_t radius, const std::string& window) {
  WalkParams p;
  p.stencil = window_stencil(radius, window);
  check_shape(transition, "transition", "[B, window, h, w]", {-1, p.stencil.size, -1, -1});
  kind_of(transition, "transition");
  p.batch = transition.size(0);
  p.height = transition.size(2);
  p.width = transition.size(3);
  const bool cuda = on_cuda(transition);
  std::optional<CudaScope> scope;
  if (cuda) scope.emplace(transition);
  const ScalarType type = work_type(transition);
  const Tensor out = empty(transition, {p.batch, p.stencil.size, p.height, p.width}, type);
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(transition, type);
    p.kind = kind_of(source, "transition");
    p.in = source.const_data_ptr();
    p.out = out.mutable_data_ptr();
    if (cuda) {
      AFA_CUDA_LAUNCH("walk_transpose", walk_transpose_cuda(p, scope->stream()));
    } else {
      parallel_rows(p.batch * p.height, row_work(p),
                    [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(walk_transpose_rows, p, begin, end); });
    }
  }
  return contiguous_as(out, transition.scalar_type());
}

Tensor walk_propagate(const Tensor& scores, const Tensor& transition, int64_t radius,
                      const std::string& window, int64_t steps, const std::optional<Tensor>& class_mask) {
  const Stencil stencil = window_stencil(radius, window);
  check_transition(stencil, transition, scores, "scores");
  return stencil_propagate("walk_propagate", stencil, transition, scores, steps, class_mask);
}

Tensor walk_propagate_backward_scores(const Tensor& grad, const Tensor& transition, int64_t radius,
                                      const std::string& window, int64_t steps,
                                      const std::optional<Tensor>& class_mask) {
  const Stencil stencil = window_stencil(radius, window);
  check_transition(stencil, transition, grad, "grad");
  return stencil_propagate_backward("walk_propagate_backward_scores", stencil, grad, transition, steps,
                                    class_mask);
}

Tensor walk_propagate_backward_transition(const Tensor& grad, const Tensor& scores, const Tensor& transition,
                                          int64_t radius, const std::string& window, int64_t steps,
                                          const std::optional<Tensor>& class_mask) {
  const Stencil stencil = window_stencil(radius, window);
  check_transition(stencil, transition, scores, "scores");
  check_transition(stencil, transition, grad, "grad");
  return stencil_weights_backward("walk_propagate_backward_transition", stencil, grad, transition, scores,
                                  steps, class_mask);
}

}  // namespace afa
