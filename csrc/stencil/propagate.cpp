#include "stencil/propagate.h"

#include <algorithm>
#include <vector>

#include "common/device.h"
#include "common/variants.h"

namespace afa {
namespace {

struct Sizes {
  int64_t batch, classes, height, width;
};

Sizes sizes_of(const Tensor& planes) {
  return {planes.size(0), planes.size(1), planes.size(2), planes.size(3)};
}

void add_run(Stencil& stencil, int64_t dy, int64_t dx, int64_t step, int64_t count) {
  stencil.run[stencil.runs++] = {static_cast<int32_t>(dy), static_cast<int32_t>(dx),
                                 static_cast<int32_t>(step), static_cast<int32_t>(count)};
  stencil.size += static_cast<int32_t>(count);
  stencil.reach_x = std::max(stencil.reach_x, static_cast<int32_t>(std::abs(dx)));
}

StencilParams make_params(const Stencil& stencil, const Sizes& s, const Tensor& weights) {
  StencilParams p;
  p.stencil = stencil;
  p.kind = kind_of(weights, "weights");
  p.batch = s.batch;
  p.classes = s.classes;
  p.height = s.height;
  p.width = s.width;
  p.weights = weights.const_data_ptr();
  p.weight_stride_b = weights.stride(0);
  p.weight_stride_k = weights.stride(1);
  p.weight_stride_y = weights.stride(2);
  return p;
}

Planes whole_planes(const Tensor& t) {
  return {t.mutable_data_ptr(), t.size(2) * t.size(3), t.size(3), 0};
}

void check_steps(const char* op, int64_t steps) {
  AFA_CHECK(steps >= 1 && steps <= INT32_MAX, op, ": the number of steps must be at least 1, got ", steps);
}

// ---- CPU ----

void attach(const ActivePlanes& active, StencilParams& p) {
  p.active = active.plane.data();
  p.active_begin = active.begin.data();
}

// The multiply-adds of one image row, for distributing rows to threads.
int64_t row_work(const StencilParams& p) {
  return p.active_begin[p.batch] * p.stencil.size * p.width / std::max<int64_t>(p.batch, 1);
}

void step_cpu(const StencilParams& p) {
  parallel_rows(p.batch * p.height, row_work(p), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offsets(p.stencil.size);
    AFA_SIMD_CALL(stencil_step, p, begin, end, offsets.data());
  });
}

void adjoint_cpu(const StencilParams& p) {
  parallel_rows(p.batch * p.height, 2 * row_work(p), [&](int64_t begin, int64_t end) {
    const int64_t reach = std::min<int64_t>(p.stencil.reach_x, p.width - 1);
    std::vector<double> scratch(4 * (p.width + 2 * reach));
    AFA_SIMD_CALL(stencil_adjoint, p, begin, end, scratch.data());
  });
}

void weight_grad_cpu(const StencilParams& p) {
  parallel_rows(p.batch * p.height, 2 * row_work(p),
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(stencil_weight_grad, p, begin, end); });
}

// ---- CUDA ----

constexpr const char* kNames[] = {AFA_STENCIL_VARIANTS(AFA_VARIANT_NAME)};
const KernelVariants kStencil("stencil", kNames);

StencilVariant pick_variant(const StencilParams& p) {
  return kStencil.pick(stencil_variant(current_gpu(), p.batch, p.classes, p.height * p.width, p.steps));
}

ScalarType type_of(const StencilParams& p) {
  return p.kind == Kind::f64 ? ScalarType::Double : ScalarType::Float;
}

// Allocates grouped planes and checks the limits of launch_stencil_group.
Tensor empty_grouped(const StencilParams& p, const Tensor& like) {
  AFA_CHECK(p.height <= INT32_MAX && p.width <= INT32_MAX && p.height * p.width <= UINT32_MAX,
            "maps on CUDA must be smaller than 2^31 in height and width and 2^32 in pixels, got ", p.height,
            " x ", p.width);
  const int64_t groups = (p.classes + kGroup - 1) / kGroup;
  return empty(like, {p.batch, groups, p.height * p.width, kGroup}, type_of(p));
}

Planes grouped_planes(const Tensor& t) {
  Planes planes;
  planes.data = t.mutable_data_ptr();
  planes.wide = planes.grouped = true;
  return planes;
}

// [B, C, H, W] of the weights' type, contiguous, as grouped planes.
Tensor grouped(const char* op, StencilParams p, const Tensor& source,
               [[maybe_unused]] const CudaScope& scope) {
  const Tensor out = empty_grouped(p, source);
  p.in.data = source.mutable_data_ptr();
  p.out = grouped_planes(out);
  AFA_CUDA_LAUNCH(op, launch_stencil_group(p, scope.stream()));
  return out;
}

// Steps or adjoint steps from `source` to `out`, both contiguous and in the weights' type.
void general_steps(const char* op, StencilParams& p, bool adjoint, const Tensor& source, const Tensor& out,
                   [[maybe_unused]] const CudaScope& scope) {
  const Tensor last = grouped(op, p, source, scope);
  const Tensor other = p.steps > 1 ? empty_grouped(p, source) : out;
  p.out.data = out.mutable_data_ptr();
  p.in = grouped_planes(last);
  p.spare[0] = other.mutable_data_ptr();
  p.spare[1] = last.mutable_data_ptr();
  p.variant = pick_variant(p);
  if (adjoint) {
    AFA_CUDA_LAUNCH(op, launch_stencil_adjoint(p, scope.stream()));
  } else {
    AFA_CUDA_LAUNCH(op, launch_stencil_step(p, scope.stream()));
  }
}

// The gradient of the weights is added to p.grad_weights.
void weights_backward_cuda(const char* op, StencilParams& p, int64_t steps, const Tensor& source,
                           const Tensor& grad, [[maybe_unused]] const CudaScope& scope) {
  p.variant = pick_variant(p);
  p.out.grouped = true;
  std::vector<Tensor> before{grouped(op, p, source, scope)};  // each step
  for (int64_t t = 0; t + 1 < steps; ++t) {
    before.push_back(empty_grouped(p, source));
    p.in = grouped_planes(before[t]);
    p.out = grouped_planes(before[t + 1]);
    AFA_CUDA_LAUNCH(op, launch_stencil_step(p, scope.stream()));
  }
  Tensor after = grouped(op, p, grad, scope);  // the gradient after each step, last first
  for (int64_t t = steps - 1; t >= 0; --t) {
    p.in = grouped_planes(before[t]);
    p.out = grouped_planes(after);
    AFA_CUDA_LAUNCH(op, launch_stencil_weight_grad(p, scope.stream()));
    if (t == 0) break;
    p.in = p.out;
    p.out = grouped_planes(before[t]);  // read for the last time
    AFA_CUDA_LAUNCH(op, launch_stencil_adjoint(p, scope.stream()));
    after = before[t];
  }
}

const bool* device_mask(const std::optional<Tensor>& class_mask) {
  return class_mask ? static_cast<const bool*>(class_mask->const_data_ptr()) : nullptr;
}

std::optional<Tensor> dense_mask(const std::optional<Tensor>& class_mask) {
  if (!class_mask) return std::nullopt;
  return torch::stable::contiguous(*class_mask);
}

// Steps or adjoint steps of planes [B, C, H, W], including checks.
Tensor steps_cuda(const char* op, const Stencil& stencil, const Tensor& weights, const Tensor& planes,
                  int64_t steps, const std::optional<Tensor>& class_mask, const std::optional<Tensor>& extent,
                  bool zero_masked, StepsCuda run) {
  const Sizes s = sizes_of(planes);
  check_class_mask(class_mask, planes);
  check_steps(op, steps);
  const CudaScope scope(planes);
  const Tensor out = empty(planes, {s.batch, s.classes, s.height, s.width}, planes.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor w = torch::stable::contiguous(weights);
  const std::optional<Tensor> mask = dense_mask(class_mask);
  StencilParams p = make_params(stencil, s, w);
  p.steps = static_cast<int32_t>(steps);
  p.class_mask = device_mask(mask);
  p.zero_masked = zero_masked;
  p.extent = extent ? static_cast<const int64_t*>(extent->const_data_ptr()) : nullptr;
  run(op, p, torch::stable::contiguous(planes), out, scope);
  return out;
}

template <typename T>
void fill_padded(const T* from, const Planes& to, const ActivePlanes& active, int64_t height, int64_t width) {
  const auto batch = static_cast<int64_t>(active.begin.size()) - 1;
  const int64_t most = active.begin.back() / (batch > 0 ? batch : 1) + 1;
  parallel_rows(batch * height, most * width, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / height, y = item % height;
      const int64_t first = active.begin[b], count = active.begin[b + 1] - first;
      T* row = static_cast<T*>(to.data) + (first * height + y * count) * to.plane_stride;
      for (int64_t i = first; i < first + count; ++i, row += to.plane_stride) {
        const T* source = from + (active.plane[i] * height + y) * width;
        std::fill(row - to.pad, row, source[0]);
        std::copy(source, source + width, row);
        std::fill(row + width, row + width + to.pad, source[width - 1]);
      }
    }
  });
}

}  // namespace

void check_class_mask(const std::optional<Tensor>& class_mask, const Tensor& planes) {
  if (!class_mask) return;
  check_shape(*class_mask, "class_mask", "[B, C]", {planes.size(0), planes.size(1)});
  AFA_CHECK(class_mask->scalar_type() == ScalarType::Bool, "class_mask must be bool, got ",
            type_name(class_mask->scalar_type()));
  check_device(*class_mask, "class_mask", planes, "the masks");
}

ActivePlanes::ActivePlanes(int64_t batch, int64_t classes, const std::optional<Tensor>& class_mask) {
  const std::optional<Tensor> dense = dense_mask(class_mask);
  const bool* keep = device_mask(dense);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < classes; ++c) {
      if (keep == nullptr || keep[b * classes + c]) plane.push_back(b * classes + c);
    }
    begin.push_back(static_cast<int64_t>(plane.size()));
  }
}

PaddedPlanes::PaddedPlanes(const Tensor& like, const ActivePlanes& active, int64_t reach) {
  // x = 0 is aligned to a cache line. The row stride is an odd number of lines, so that neighboring classes
  // never share a cache set.
  constexpr int64_t kLine = 16;
  const Sizes s = sizes_of(like);
  const int64_t pad = std::min(reach, s.width - 1);
  const int64_t left = (pad + kLine - 1) / kLine;
  const int64_t row = (left + (s.width + pad + kLine - 1) / kLine) | 1;
  storage = empty(like, {active.begin.back() * s.height * row * kLine + kSlack}, sum_type(like));
  char* first = static_cast<char*>(storage.mutable_data_ptr()) + left * kLine * storage.element_size();
  planes = {first, row * kLine, 0, pad, true};
}

void PaddedPlanes::fill(const Tensor& source, const ActivePlanes& active) {
  const Sizes s = sizes_of(source);
  if (source.scalar_type() == ScalarType::Double) {
    fill_padded(static_cast<const double*>(source.const_data_ptr()), planes, active, s.height, s.width);
  } else {
    fill_padded(static_cast<const float*>(source.const_data_ptr()), planes, active, s.height, s.width);
  }
}

Stencil ring_stencil(const std::vector<int64_t>& dilations) {
  AFA_CHECK(!dilations.empty() && dilations.size() <= kMaxDilations, "dilations must have 1 to ",
            kMaxDilations, " integers, got ", dilations.size());
  Stencil stencil;
  for (int64_t dilation : dilations) {
    AFA_CHECK(dilation >= 1, "dilations' entries must be at least 1, got ", dilation);
    const int64_t d = std::min(dilation, kMaxReach);
    add_run(stencil, -d, -d, d, 3);
    add_run(stencil, 0, -d, 2 * d, 2);
    add_run(stencil, d, -d, d, 3);
  }
  return stencil;
}

Stencil window_stencil(int64_t radius, const std::string& window) {
  const bool disc = window == "disc";
  AFA_CHECK(disc || window == "square", "window must be 'square' or 'disc', got '", window, "'");
  AFA_CHECK(radius >= (disc ? 1 : 0) && radius <= kMaxRadius, "radius must be between ", disc ? 1 : 0,
            " and ", kMaxRadius, ", got ", radius);
  Stencil stencil;
  for (int64_t dy = -radius; dy <= radius; ++dy) {
    int64_t half = radius;
    if (disc) {
      while (half >= 0 && dy * dy + half * half >= radius * radius) --half;
      if (half < 0) continue;
    }
    add_run(stencil, -dy, half, -1, 2 * half + 1);
  }
  return stencil;
}

// ---- operators on the CPU ----

Tensor stencil_propagate_cpu(const char* op, const Stencil& stencil, const Tensor& weights,
                             const Tensor& planes, int64_t steps, const std::optional<Tensor>& class_mask) {
  const Sizes s = sizes_of(planes);
  check_class_mask(class_mask, planes);
  check_steps(op, steps);
  const ScalarType type = sum_type(planes);
  const Tensor out = class_mask ? zeros(planes, {s.batch, s.classes, s.height, s.width}, type)
                                : empty(planes, {s.batch, s.classes, s.height, s.width}, type);
  if (out.numel() > 0) {
    const Tensor w = contiguous_as(weights, type);
    const ActivePlanes active(s.batch, s.classes, class_mask);
    StencilParams p = make_params(stencil, s, w);
    attach(active, p);
    PaddedPlanes first(planes, active, stencil.reach_x);
    std::optional<PaddedPlanes> second;
    if (steps > 1) second.emplace(planes, active, stencil.reach_x);
    first.fill(contiguous_as(planes, type), active);
    for (int64_t t = 0; t < steps; ++t) {
      p.upwards = t % 2 == 1;  // starts with the rows and weights that the last step left in the cache
      p.in = t % 2 == 0 ? first.planes : second->planes;
      p.out = t + 1 == steps ? whole_planes(out) : (t % 2 == 0 ? second->planes : first.planes);
      step_cpu(p);
    }
  }
  return contiguous_as(out, planes.scalar_type());
}

Tensor stencil_propagate_backward_cpu(const char* op, const Stencil& stencil, const Tensor& grad,
                                      const Tensor& weights, int64_t steps,
                                      const std::optional<Tensor>& class_mask) {
  const Sizes s = sizes_of(grad);
  check_class_mask(class_mask, grad);
  check_steps(op, steps);
  const ScalarType type = sum_type(grad);
  const Tensor out = class_mask ? zeros(grad, {s.batch, s.classes, s.height, s.width}, type)
                                : empty(grad, {s.batch, s.classes, s.height, s.width}, type);
  if (out.numel() > 0) {
    const Tensor w = contiguous_as(weights, type);
    const Tensor source = contiguous_as(grad, type);
    const Tensor other = steps > 1 ? torch::stable::empty_like(out) : out;
    const ActivePlanes active(s.batch, s.classes, class_mask);
    StencilParams p = make_params(stencil, s, w);
    attach(active, p);
    p.in = whole_planes(source);
    for (int64_t t = 0; t < steps; ++t) {
      p.out = whole_planes((steps - t) % 2 == 1 ? out : other);
      adjoint_cpu(p);
      p.in = p.out;
    }
  }
  return contiguous_as(out, grad.scalar_type());
}

Tensor stencil_weights_backward_cpu(const char* op, const Stencil& stencil, const Tensor& grad,
                                    const Tensor& weights, const Tensor& planes, int64_t steps,
                                    const std::optional<Tensor>& class_mask) {
  const Sizes s = sizes_of(planes);
  check_class_mask(class_mask, planes);
  check_steps(op, steps);
  const ScalarType type = sum_type(planes);
  const Tensor out = zeros(weights, {s.batch, stencil.size, s.height, s.width}, sum_type(weights));
  if (planes.numel() > 0) {
    const Tensor w = contiguous_as(weights, type);
    const Tensor source = contiguous_as(planes, type);
    const Tensor outgoing = contiguous_as(grad, type);
    StencilParams p = make_params(stencil, s, w);
    p.grad_weights = out.mutable_data_ptr();
    // The planes before each step, then the gradient after each step, last first.
    const ActivePlanes active(s.batch, s.classes, class_mask);
    attach(active, p);
    std::vector<PaddedPlanes> padded;
    padded.emplace_back(planes, active, stencil.reach_x);
    padded[0].fill(source, active);
    for (int64_t t = 0; t + 1 < steps; ++t) {
      padded.emplace_back(planes, active, stencil.reach_x);
      p.in = padded[t].planes;
      p.out = padded[t + 1].planes;
      step_cpu(p);
    }
    const Tensor buffers[2] = {torch::stable::empty_like(source), torch::stable::empty_like(source)};
    Planes current = whole_planes(outgoing);
    for (int64_t t = steps - 1; t >= 0; --t) {
      p.in = padded[t].planes;
      p.out = current;
      weight_grad_cpu(p);
      if (t == 0) break;
      p.in = current;
      p.out = whole_planes(buffers[t % 2]);
      adjoint_cpu(p);
      current = p.out;
    }
  }
  return contiguous_as(out, weights.scalar_type());
}

// ---- operators on CUDA ----

void stencil_steps_cuda(const char* op, StencilParams& p, const Tensor& source, const Tensor& out,
                        const CudaScope& scope) {
  general_steps(op, p, false, source, out, scope);
}

Tensor stencil_propagate_cuda(const char* op, const Stencil& stencil, const Tensor& weights,
                              const Tensor& planes, int64_t steps, const std::optional<Tensor>& class_mask,
                              const std::optional<Tensor>& extent, bool zero_masked, StepsCuda run) {
  return steps_cuda(op, stencil, weights, planes, steps, class_mask, extent, zero_masked, run);
}

Tensor stencil_propagate_backward_cuda(const char* op, const Stencil& stencil, const Tensor& grad,
                                       const Tensor& weights, int64_t steps,
                                       const std::optional<Tensor>& class_mask) {
  const StepsCuda adjoint_steps = [](const char* op, StencilParams& p, const Tensor& source,
                                     const Tensor& out, const CudaScope& scope) {
    general_steps(op, p, true, source, out, scope);
  };
  return steps_cuda(op, stencil, weights, grad, steps, class_mask, std::nullopt, true, adjoint_steps);
}

Tensor stencil_weights_backward_cuda(const char* op, const Stencil& stencil, const Tensor& grad,
                                     const Tensor& weights, const Tensor& planes, int64_t steps,
                                     const std::optional<Tensor>& class_mask) {
  const Sizes s = sizes_of(planes);
  check_class_mask(class_mask, planes);
  check_steps(op, steps);
  const CudaScope scope(planes);
  const Tensor out = zeros(weights, {s.batch, stencil.size, s.height, s.width}, sum_type(weights));
  if (planes.numel() > 0) {
    const Tensor w = torch::stable::contiguous(weights);
    const std::optional<Tensor> mask = dense_mask(class_mask);
    StencilParams p = make_params(stencil, s, w);
    p.grad_weights = out.mutable_data_ptr();
    p.class_mask = device_mask(mask);
    weights_backward_cuda(op, p, steps, torch::stable::contiguous(planes), torch::stable::contiguous(grad),
                          scope);
  }
  return contiguous_as(out, weights.scalar_type());
}

}  // namespace afa
