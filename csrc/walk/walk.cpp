#include "walk/walk.h"

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "common/variants.h"
#include "ops.h"
#include "stencil/propagate.h"

namespace afa {
namespace {

constexpr double kMaxWholePower = 64;

constexpr const char* kNames[] = {AFA_WALK_STEP_VARIANTS(AFA_VARIANT_NAME)};
const KernelVariants kStep("walk_step", kNames);

// Whether [B, N, K] is a view of a contiguous [B, K, N].
bool by_offset(const Tensor& affinity) {
  return affinity.stride(1) == 1 && affinity.stride(2) == affinity.size(1) &&
         affinity.stride(0) == affinity.size(1) * affinity.size(2);
}

// The affinity in p.layout and `type`.
Tensor laid_out(const WalkParams& p, const Tensor& affinity, ScalarType type) {
  const Tensor memory = p.layout == Layout::by_offset ? torch::stable::transpose(affinity, 1, 2) : affinity;
  return contiguous_as(memory, type);
}

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
  const bool dense = affinity.size(2) == height * width;
  p.layout = dense ? Layout::dense : by_offset(affinity) ? Layout::by_offset : Layout::by_node;
  AFA_CHECK(dense || affinity.size(2) == p.stencil.size, "affinity must have size ", height * width,
            " (dense) or ", p.stencil.size, " (windowed) in dimension 2, got ", shape_string(affinity));
  AFA_CHECK(power > 0, "power must be greater than 0, got ", power);
  const bool whole = power <= kMaxWholePower && power == static_cast<int32_t>(power);
  p.whole_power = whole ? static_cast<int32_t>(power) : 0;
  kind_of(affinity, "affinity");
  return p;
}

int64_t row_work(const WalkParams& p) {
  return 4 * p.width * p.stencil.size;
}

// [B * C, N] planes as [N, active classes] for each image.
template <typename T>
void classes_last(const ActivePlanes& active, const Tensor& planes, const Tensor& out) {
  const int64_t batch = planes.size(0), nodes = planes.size(2) * planes.size(3);
  const T* from = static_cast<const T*>(planes.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  parallel_rows(batch * planes.size(2), planes.size(3) * planes.size(1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / planes.size(2), first = item % planes.size(2) * planes.size(3);
      const int64_t classes = active.begin[b + 1] - active.begin[b];
      for (int64_t c = 0; c < classes; ++c) {
        const T* plane = from + active.plane[active.begin[b] + c] * nodes;
        T* node = to + active.begin[b] * nodes + c;
        for (int64_t n = first; n < first + planes.size(3); ++n) node[n * classes] = plane[n];
      }
    }
  });
}

// The window, after transition and planes are checked against it.
Stencil checked_window(int64_t radius, const std::string& window, const Tensor& transition,
                       std::initializer_list<std::pair<const Tensor&, const char*>> planes) {
  const Stencil stencil = window_stencil(radius, window);
  check_shape(transition, "transition", "[B, window, h, w]", {-1, stencil.size, -1, -1});
  kind_of(transition, "transition");
  for (const auto& [tensor, name] : planes) {
    check_shape(tensor, name, "[B, C, h, w]",
                {transition.size(0), -1, transition.size(2), transition.size(3)});
    check_like(tensor, name, transition, "transition");
  }
  return stencil;
}

WalkParams check_transition_backward(const Tensor& grad, const Tensor& affinity, int64_t height,
                                     int64_t width, int64_t radius, const std::string& window, double power,
                                     bool normalize, double eps) {
  const WalkParams p = make_params(affinity, height, width, radius, window, power, normalize, eps);
  check_shape(grad, "grad", "[B, window, h, w]", {p.batch, p.stencil.size, height, width});
  AFA_CHECK(grad.scalar_type() == sum_type(affinity), "grad must have the type of the transition (",
            type_name(sum_type(affinity)), "), got ", type_name(grad.scalar_type()));
  check_device(grad, "grad", affinity, "affinity");
  return p;
}

WalkParams check_transpose(const Tensor& transition, int64_t radius, const std::string& window) {
  WalkParams p;
  p.stencil = window_stencil(radius, window);
  check_shape(transition, "transition", "[B, window, h, w]", {-1, p.stencil.size, -1, -1});
  kind_of(transition, "transition");
  p.batch = transition.size(0);
  p.height = transition.size(2);
  p.width = transition.size(3);
  return p;
}

WalkStepParams check_step(const Tensor& scores, const Tensor& affinity, int64_t radius,
                          const std::string& window, double power, bool normalize, double eps,
                          const std::optional<Tensor>& class_mask) {
  check_shape(scores, "scores", "[B, C, h, w]", {-1, -1, -1, -1});
  WalkStepParams p;
  p.walk = make_params(affinity, scores.size(2), scores.size(3), radius, window, power, normalize, eps);
  p.classes = scores.size(1);
  check_shape(scores, "scores", "[B, C, h, w]", {p.walk.batch, -1, -1, -1});
  AFA_CHECK(scores.scalar_type() == sum_type(affinity), "scores must have the type of the transition (",
            type_name(sum_type(affinity)), "), got ", type_name(scores.scalar_type()));
  check_device(scores, "scores", affinity, "affinity");
  check_class_mask(class_mask, scores);
  if (p.walk.layout == Layout::by_offset) p.walk.layout = Layout::by_node;  // read by copy
  return p;
}

}  // namespace

// ---- CPU ----

Tensor walk_transition_cpu(const Tensor& affinity, int64_t height, int64_t width, int64_t radius,
                           const std::string& window, double power, bool normalize, double eps) {
  WalkParams p = make_params(affinity, height, width, radius, window, power, normalize, eps);
  const Tensor out = empty(affinity, {p.batch, p.stencil.size, height, width}, sum_type(affinity));
  if (out.numel() == 0) return out;
  const Tensor source = laid_out(p, affinity, sum_type(affinity));
  p.kind = kind_of(source, "affinity");
  p.affinity = source.const_data_ptr();
  p.out = out.mutable_data_ptr();
  parallel_rows(p.batch * height, row_work(p), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(2 * p.width);
    AFA_SIMD_CALL(walk_transition_rows, p, begin, end, scratch.data());
  });
  return out;
}

Tensor walk_transition_backward_cpu(const Tensor& grad, const Tensor& affinity, int64_t height, int64_t width,
                                    int64_t radius, const std::string& window, double power, bool normalize,
                                    double eps) {
  WalkParams p =
      check_transition_backward(grad, affinity, height, width, radius, window, power, normalize, eps);
  const ScalarType type = sum_type(affinity);
  const Tensor out = zeros(affinity, {affinity.size(0), affinity.size(1), affinity.size(2)}, type);
  if (out.numel() > 0) {
    const Tensor source = laid_out(p, affinity, type);
    const Tensor outgoing = torch::stable::contiguous(grad);
    p.kind = kind_of(source, "affinity");
    p.affinity = source.const_data_ptr();
    p.in = outgoing.const_data_ptr();
    p.out = out.mutable_data_ptr();
    parallel_rows(p.batch * height, row_work(p), [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(2 * p.width);
      AFA_SIMD_CALL(walk_transition_backward_rows, p, begin, end, scratch.data());
    });
  }
  return contiguous_as(out, affinity.scalar_type());
}

Tensor walk_transpose_cpu(const Tensor& transition, int64_t radius, const std::string& window) {
  WalkParams p = check_transpose(transition, radius, window);
  const ScalarType type = sum_type(transition);
  const Tensor out = empty(transition, {p.batch, p.stencil.size, p.height, p.width}, type);
  if (out.numel() > 0) {
    const Tensor source = contiguous_as(transition, type);
    p.kind = kind_of(source, "transition");
    p.in = source.const_data_ptr();
    p.out = out.mutable_data_ptr();
    parallel_rows(p.batch * p.height, row_work(p),
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(walk_transpose_rows, p, begin, end); });
  }
  return contiguous_as(out, transition.scalar_type());
}

Tensor walk_step_cpu(const Tensor& scores, const Tensor& affinity, int64_t radius, const std::string& window,
                     double power, bool normalize, double eps, const std::optional<Tensor>& class_mask) {
  WalkStepParams p = check_step(scores, affinity, radius, window, power, normalize, eps, class_mask);
  const int64_t batch = p.walk.batch, height = p.walk.height, width = p.walk.width;
  const ScalarType type = scores.scalar_type();
  const Tensor out = class_mask ? zeros(scores, {batch, p.classes, height, width}, type)
                                : empty(scores, {batch, p.classes, height, width}, type);
  if (out.numel() == 0) return out;
  const Tensor entries = laid_out(p.walk, affinity, sum_type(affinity));
  const Tensor source = torch::stable::contiguous(scores);
  p.walk.kind = kind_of(entries, "affinity");
  p.walk.affinity = entries.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const ActivePlanes active(batch, p.classes, class_mask);
  p.active = active.plane.data();
  p.active_begin = active.begin.data();
  const int64_t nodes = height * width;
  const Tensor by_node = empty(scores, {static_cast<int64_t>(active.plane.size()) * nodes}, type);
  if (type == ScalarType::Double) {
    classes_last<double>(active, source, by_node);
  } else {
    classes_last<float>(active, source, by_node);
  }
  p.scores = by_node.const_data_ptr();
  const int64_t work = width * p.walk.stencil.size * (4 + active.begin.back() / batch);
  parallel_rows(batch * height, work, [&](int64_t begin, int64_t end) {
    const int64_t rows = std::min(2 * radius + 1, height), columns = std::min(2 * radius + kStepLanes, width);
    std::vector<double> scratch(rows * columns * kStepLanes);
    AFA_SIMD_CALL(walk_step_rows, p, begin, end, scratch.data());
  });
  return out;
}

// ---- CUDA ----

Tensor walk_transition_cuda(const Tensor& affinity, int64_t height, int64_t width, int64_t radius,
                            const std::string& window, double power, bool normalize, double eps) {
  WalkParams p = make_params(affinity, height, width, radius, window, power, normalize, eps);
  const CudaScope scope(affinity);
  const Tensor out = empty(affinity, {p.batch, p.stencil.size, height, width}, sum_type(affinity));
  if (out.numel() == 0) return out;
  const Tensor source = laid_out(p, affinity, affinity.scalar_type());
  p.kind = kind_of(source, "affinity");
  p.affinity = source.const_data_ptr();
  p.out = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("walk_transition", launch_walk_transition(p, scope.stream()));
  return out;
}

Tensor walk_transition_backward_cuda(const Tensor& grad, const Tensor& affinity, int64_t height,
                                     int64_t width, int64_t radius, const std::string& window, double power,
                                     bool normalize, double eps) {
  WalkParams p =
      check_transition_backward(grad, affinity, height, width, radius, window, power, normalize, eps);
  const CudaScope scope(affinity);
  const Tensor out =
      zeros(affinity, {affinity.size(0), affinity.size(1), affinity.size(2)}, affinity.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor source = laid_out(p, affinity, affinity.scalar_type());
  const Tensor outgoing = torch::stable::contiguous(grad);
  p.kind = kind_of(source, "affinity");
  p.affinity = source.const_data_ptr();
  p.in = outgoing.const_data_ptr();
  p.out = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("walk_transition_backward", launch_walk_transition_backward(p, scope.stream()));
  return out;
}

Tensor walk_transpose_cuda(const Tensor& transition, int64_t radius, const std::string& window) {
  WalkParams p = check_transpose(transition, radius, window);
  const CudaScope scope(transition);
  const Tensor out =
      empty(transition, {p.batch, p.stencil.size, p.height, p.width}, transition.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor source = torch::stable::contiguous(transition);
  p.kind = kind_of(source, "transition");
  p.in = source.const_data_ptr();
  p.out = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("walk_transpose", launch_walk_transpose(p, scope.stream()));
  return out;
}

Tensor walk_step_cuda(const Tensor& scores, const Tensor& affinity, int64_t radius, const std::string& window,
                      double power, bool normalize, double eps, const std::optional<Tensor>& class_mask) {
  WalkStepParams p = check_step(scores, affinity, radius, window, power, normalize, eps, class_mask);
  const CudaScope scope(scores);
  const Tensor out =
      empty(scores, {p.walk.batch, p.classes, p.walk.height, p.walk.width}, scores.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor entries = laid_out(p.walk, affinity, affinity.scalar_type());
  const Tensor source = torch::stable::contiguous(scores);
  std::optional<Tensor> mask;
  if (class_mask) mask = torch::stable::contiguous(*class_mask);
  p.walk.kind = kind_of(entries, "affinity");
  p.walk.affinity = entries.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.class_mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  p.scores = source.const_data_ptr();
  p.variant = kStep.pick(walk_step_variant());
  AFA_CUDA_LAUNCH("walk_step", launch_walk_step(p, scope.stream()));
  return out;
}

// ---- many steps ----

Tensor walk_propagate_cpu(const Tensor& scores, const Tensor& transition, int64_t radius,
                          const std::string& window, int64_t steps, const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_window(radius, window, transition, {{scores, "scores"}});
  return stencil_propagate_cpu("walk_propagate", stencil, transition, scores, steps, class_mask);
}

Tensor walk_propagate_backward_scores_cpu(const Tensor& grad, const Tensor& transition, int64_t radius,
                                          const std::string& window, int64_t steps,
                                          const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_window(radius, window, transition, {{grad, "grad"}});
  return stencil_propagate_backward_cpu("walk_propagate_backward_scores", stencil, grad, transition, steps,
                                        class_mask);
}

Tensor walk_propagate_backward_transition_cpu(const Tensor& grad, const Tensor& scores,
                                              const Tensor& transition, int64_t radius,
                                              const std::string& window, int64_t steps,
                                              const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_window(radius, window, transition, {{scores, "scores"}, {grad, "grad"}});
  return stencil_weights_backward_cpu("walk_propagate_backward_transition", stencil, grad, transition, scores,
                                      steps, class_mask);
}

Tensor walk_propagate_cuda(const Tensor& scores, const Tensor& transition, int64_t radius,
                           const std::string& window, int64_t steps,
                           const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_window(radius, window, transition, {{scores, "scores"}});
  return stencil_propagate_cuda("walk_propagate", stencil, transition, scores, steps, class_mask);
}

Tensor walk_propagate_backward_scores_cuda(const Tensor& grad, const Tensor& transition, int64_t radius,
                                           const std::string& window, int64_t steps,
                                           const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_window(radius, window, transition, {{grad, "grad"}});
  return stencil_propagate_backward_cuda("walk_propagate_backward_scores", stencil, grad, transition, steps,
                                         class_mask);
}

Tensor walk_propagate_backward_transition_cuda(const Tensor& grad, const Tensor& scores,
                                               const Tensor& transition, int64_t radius,
                                               const std::string& window, int64_t steps,
                                               const std::optional<Tensor>& class_mask) {
  const Stencil stencil = checked_window(radius, window, transition, {{scores, "scores"}, {grad, "grad"}});
  return stencil_weights_backward_cuda("walk_propagate_backward_transition", stencil, grad, transition,
                                       scores, steps, class_mask);
}

}  // namespace afa
