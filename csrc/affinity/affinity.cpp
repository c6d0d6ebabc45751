#include "affinity/affinity.h"

#include <array>
#include <vector>

#include "common/variants.h"
#include "ops.h"

namespace afa {
namespace {

constexpr const char* kNames[] = {AFA_AFFINITY_VARIANTS(AFA_VARIANT_NAME)};
const KernelVariants kForward("affinity", kNames);

PairLayout make_layout(int64_t batch, int64_t height, int64_t width, std::optional<int64_t> radius,
                       bool windowed) {
  AFA_CHECK(height >= 0 && width >= 0, "grid must not be negative, got ", height, " x ", width);
  AFA_CHECK(radius || !windowed, "windowed needs radius");
  AFA_CHECK(!radius || (*radius >= 0 && *radius <= kMaxRadius), "radius must be between 0 and ", kMaxRadius,
            ", got ", radius.value_or(0));
  PairLayout pairs;
  pairs.batch = batch;
  pairs.height = height;
  pairs.width = width;
  pairs.radius = radius.value_or(-1);
  pairs.windowed = windowed;
  return pairs;
}

void check_attention(const Tensor& attention, int64_t nodes) {
  check_shape(attention, "attention", "[B, K, N, N]", {-1, -1, nodes, nodes});
  kind_of(attention, "attention");
}

void check_weight(const Tensor& weight, int64_t maps, const Tensor& like, const char* like_name) {
  check_shape(weight, "weight", "[K]", {maps});
  check_like(weight, "weight", like, like_name);
}

// The pairs of `grad` and `affinity`, and the parameters common to the backward passes.
AffinityParams backward_params(const Tensor& grad, const Tensor& affinity, int64_t height, int64_t width,
                               std::optional<int64_t> radius, bool windowed) {
  AffinityParams p;
  check_shape(affinity, "affinity", "[B, N, N or window]", {-1, -1, -1});
  p.pairs = make_layout(affinity.size(0), height, width, radius, windowed);
  check_shape(affinity, "affinity", "[B, N, N or window]",
              {p.pairs.batch, nodes_of(p.pairs), pairs_of_node(p.pairs)});
  check_shape(grad, "grad", "[B, N, N or window]",
              {p.pairs.batch, nodes_of(p.pairs), pairs_of_node(p.pairs)});
  p.kind = kind_of(affinity, "affinity");
  check_like(grad, "grad", affinity, "affinity");
  return p;
}

// Each task's own sums, aligned to a cache line.
class Scratch {
 public:
  Scratch(int64_t count, const Tensor& like)
      : bytes_(static_cast<size_t>(count) * (sum_type(like) == ScalarType::Double ? 8 : 4) + kLineBytes) {}
  void* data() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<void*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
  }

 private:
  static constexpr uintptr_t kLineBytes = 64;
  std::vector<char> bytes_;
};

template <typename F>
void over_blocks(const AffinityParams& p, const Tensor& like, const F& f) {
  const int64_t work = p.maps * nodes_of(p.pairs) * kAffinityRows;
  parallel_rows(p.pairs.batch * blocks_of(p.pairs), work, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kAffinityRows * scratch_stride(p.pairs), like);
    f(begin, end, scratch.data());
  });
}

template <typename S>
void add_partials(const void* partial, int64_t parts, int64_t size, void* out) {
  const S* from = static_cast<const S*>(partial);
  for (int64_t k = 0; k < size; ++k) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += static_cast<double>(from[part * size + k]);
    static_cast<S*>(out)[k] = static_cast<S>(sum);
  }
}

template <typename S>
void add_losses(const AffinityLossParams& p, const std::vector<double>& partial) {
  constexpr size_t kSums = 2 * kPairGroups;
  double total[kSums] = {};
  for (size_t n = 0; n < partial.size(); ++n) total[n % kSums] += partial[n];
  finish_loss(p, total, static_cast<S*>(p.sums));
}

using LossWeights = std::array<double, kPairGroups>;

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return torch::stable::contiguous(*t);
}

int64_t loss_blocks(int64_t count) {
  return (count + kLossBlock - 1) / kLossBlock;
}

void check_labels(const Tensor& labels, const Tensor& other, const char* other_name) {
  AFA_CHECK(labels.scalar_type() == ScalarType::Byte, "labels must be uint8, got ",
            type_name(labels.scalar_type()));
  check_device(labels, "labels", other, other_name);
}

AffinityParams check_forward(const Tensor& attention, const Tensor& weight, const Tensor& bias,
                             int64_t height, int64_t width, std::optional<int64_t> radius, bool windowed) {
  check_shape(attention, "attention", "[B, K, N, N]", {-1, -1, -1, -1});
  AffinityParams p;
  p.pairs = make_layout(attention.size(0), height, width, radius, windowed);
  p.maps = attention.size(1);
  check_attention(attention, nodes_of(p.pairs));
  AFA_CHECK(p.maps >= 1, "attention must have at least one map, got shape ", shape_string(attention));
  check_weight(weight, p.maps, attention, "attention");
  check_shape(bias, "bias", "[1]", {1});
  check_like(bias, "bias", attention, "attention");
  return p;
}

AffinityParams check_backward_attention(const Tensor& grad, const Tensor& affinity, const Tensor& weight,
                                        int64_t height, int64_t width, std::optional<int64_t> radius,
                                        bool windowed) {
  AffinityParams p = backward_params(grad, affinity, height, width, radius, windowed);
  check_weight(weight, -1, affinity, "affinity");
  p.maps = weight.size(0);
  return p;
}

AffinityParams check_backward_weight(const Tensor& grad, const Tensor& affinity, const Tensor& attention,
                                     int64_t height, int64_t width, std::optional<int64_t> radius,
                                     bool windowed) {
  AffinityParams p = backward_params(grad, affinity, height, width, radius, windowed);
  check_attention(attention, nodes_of(p.pairs));
  check_shape(attention, "attention", "[B, K, N, N]", {p.pairs.batch, -1, -1, -1});
  check_like(attention, "attention", affinity, "affinity");
  p.maps = attention.size(1);
  return p;
}

AffinityLabelParams check_tokens(const Tensor& tokens, int64_t radius, int64_t ignore_index, bool windowed,
                                 std::optional<int64_t> background) {
  check_shape(tokens, "tokens", "[B, h, w]", {-1, -1, -1});
  AFA_CHECK(tokens.scalar_type() == ScalarType::Long, "tokens must be int64, got ",
            type_name(tokens.scalar_type()));
  AffinityLabelParams p;
  p.pairs = make_layout(tokens.size(0), tokens.size(1), tokens.size(2), radius, windowed);
  p.ignore = ignore_index;
  p.split = background.has_value();
  p.background = background.value_or(0);
  return p;
}

AffinityLossParams check_loss(const Tensor& affinity, const Tensor& labels, const LossWeights& weights,
                              const std::optional<Tensor>& counts) {
  AffinityLossParams p;
  for (int g = 0; g < kPairGroups; ++g) p.weight[g] = weights[static_cast<size_t>(g)];
  if (counts.has_value()) {
    check_shape(*counts, "counts", "[3]", {kPairGroups});
    AFA_CHECK(counts->scalar_type() == ScalarType::Long, "counts must be int64, got ",
              type_name(counts->scalar_type()));
    check_device(*counts, "counts", affinity, "affinity");
  }
  p.kind = kind_of(affinity, "affinity");
  AFA_CHECK(shape_string(affinity) == shape_string(labels), "labels must have the shape of affinity, ",
            shape_string(affinity), ", got ", shape_string(labels));
  check_labels(labels, affinity, "affinity");
  p.count = affinity.numel();
  return p;
}

AffinityLossParams check_loss_backward(const Tensor& grad, const Tensor& sums, const Tensor& labels) {
  AffinityLossParams p;
  check_shape(sums, "sums", "[10]", {kLossSums});
  p.kind = kind_of(sums, "sums");
  AFA_CHECK(p.kind == Kind::f32 || p.kind == Kind::f64, "sums must be float32 or float64, got ",
            type_name(sums.scalar_type()));
  check_shape(grad, "grad", "[10]", {kLossSums});
  check_like(grad, "grad", sums, "sums");
  check_labels(labels, sums, "sums");
  p.count = labels.numel();
  return p;
}

}  // namespace

// ---- CPU ----

Tensor affinity_from_attention_cpu(const Tensor& attention, const Tensor& weight, const Tensor& bias,
                                   int64_t height, int64_t width, std::optional<int64_t> radius,
                                   bool windowed) {
  AffinityParams p = check_forward(attention, weight, bias, height, width, radius, windowed);
  const int64_t nodes = nodes_of(p.pairs), size = pairs_of_node(p.pairs);
  const ScalarType type = sum_type(attention);
  // A dense affinity is 0 outside its window.
  const auto pairs = [&](ScalarType of) {
    return radius && !windowed ? zeros(attention, {p.pairs.batch, nodes, size}, of)
                               : empty(attention, {p.pairs.batch, nodes, size}, of);
  };
  const Tensor affinity = pairs(attention.scalar_type());
  if (affinity.numel() == 0) return affinity;
  const Tensor source = torch::stable::contiguous(attention);
  const Tensor w = contiguous_as(weight, type), shift = contiguous_as(bias, type);
  const Tensor mixed = type == attention.scalar_type() ? affinity : pairs(type);
  p.kind = kind_of(source, "attention");
  p.attention = source.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.bias = shift.const_data_ptr();
  p.affinity = affinity.mutable_data_ptr();
  p.mixed = mixed.mutable_data_ptr();
  parallel_rows(p.pairs.batch * nodes, p.maps * nodes, [&](int64_t begin, int64_t end) {
    const Scratch scratch(windowed ? nodes : 0, attention);
    AFA_SIMD_CALL(affinity_mix_rows, p, begin, end, scratch.data());
  });
  const int64_t items = p.pairs.batch * (windowed ? nodes : (tiles_of(p.pairs) + 1) / 2);
  const int64_t work = windowed ? 16 * size : 16 * nodes * kAffinityTile;
  parallel_rows(items, work,
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(affinity_sigmoid_items, p, begin, end); });
  return affinity;
}

Tensor affinity_from_attention_backward_attention_cpu(const Tensor& grad, const Tensor& affinity,
                                                      const Tensor& weight, int64_t height, int64_t width,
                                                      std::optional<int64_t> radius, bool windowed) {
  AffinityParams p = check_backward_attention(grad, affinity, weight, height, width, radius, windowed);
  const int64_t nodes = nodes_of(p.pairs);
  const Tensor out =
      empty_in_huge_pages(affinity, {p.pairs.batch, p.maps, nodes, nodes}, affinity.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor a = torch::stable::contiguous(affinity), g = torch::stable::contiguous(grad);
  const Tensor w = contiguous_as(weight, sum_type(affinity));
  p.affinity = a.mutable_data_ptr();
  p.grad = g.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.grad_attention = out.mutable_data_ptr();
  over_blocks(p, affinity, [&](int64_t begin, int64_t end, void* scratch) {
    AFA_SIMD_CALL(affinity_backward_attention_blocks, p, begin, end, scratch);
  });
  return out;
}

Tensor affinity_from_attention_backward_weight_cpu(const Tensor& grad, const Tensor& affinity,
                                                   const Tensor& attention, int64_t height, int64_t width,
                                                   std::optional<int64_t> radius, bool windowed) {
  AffinityParams p = check_backward_weight(grad, affinity, attention, height, width, radius, windowed);
  const Tensor out = zeros(affinity, {p.maps + 1}, sum_type(affinity));
  if (affinity.numel() == 0) return out;
  const Tensor a = torch::stable::contiguous(affinity), g = torch::stable::contiguous(grad);
  const Tensor source = torch::stable::contiguous(attention);
  const int64_t parts = p.pairs.batch * blocks_of(p.pairs);
  const Tensor partial = empty(affinity, {parts, p.maps + 1}, sum_type(affinity));
  p.affinity = a.mutable_data_ptr();
  p.grad = g.const_data_ptr();
  p.attention = source.const_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.grad_weight = out.mutable_data_ptr();
  over_blocks(p, affinity, [&](int64_t begin, int64_t end, void* scratch) {
    AFA_SIMD_CALL(affinity_backward_weight_blocks, p, begin, end, scratch);
  });
  if (p.kind == Kind::f64) {
    add_partials<double>(p.partial, parts, p.maps + 1, p.grad_weight);
  } else {
    add_partials<float>(p.partial, parts, p.maps + 1, p.grad_weight);
  }
  return out;
}

Tensor affinity_labels_cpu(const Tensor& tokens, int64_t radius, int64_t ignore_index, bool windowed,
                           std::optional<int64_t> background) {
  AffinityLabelParams p = check_tokens(tokens, radius, ignore_index, windowed, background);
  const int64_t nodes = nodes_of(p.pairs), size = pairs_of_node(p.pairs);
  const Tensor labels = empty(tokens, {p.pairs.batch, nodes, size}, ScalarType::Byte);
  if (labels.numel() == 0) return labels;
  const Tensor source = torch::stable::contiguous(tokens);
  p.tokens = static_cast<const int64_t*>(source.const_data_ptr());
  p.labels = static_cast<uint8_t*>(labels.mutable_data_ptr());
  parallel_rows(p.pairs.batch * nodes, size,
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(affinity_label_rows, p, begin, end); });
  return labels;
}

Tensor affinity_loss_cpu(const Tensor& affinity, const Tensor& labels, double weight_different,
                         double weight_same, double weight_foreground, const std::optional<Tensor>& counts) {
  AffinityLossParams p =
      check_loss(affinity, labels, {weight_different, weight_same, weight_foreground}, counts);
  const Tensor a = torch::stable::contiguous(affinity), l = torch::stable::contiguous(labels);
  const Tensor sums = empty(affinity, {kLossSums}, sum_type(affinity));
  const std::optional<Tensor> whole = contiguous_or_none(counts);
  if (whole.has_value()) p.counts = static_cast<const int64_t*>(whole->const_data_ptr());
  p.sums = sums.mutable_data_ptr();
  std::vector<double> partial(2 * kPairGroups * loss_blocks(p.count));
  if (p.count > 0) {
    p.affinity = a.const_data_ptr();
    p.labels = static_cast<const uint8_t*>(l.const_data_ptr());
    p.partial = partial.data();
    parallel_rows(loss_blocks(p.count), 4 * kLossBlock,
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(affinity_loss_blocks, p, begin, end); });
  }
  if (p.kind == Kind::f64) {
    add_losses<double>(p, partial);
  } else {
    add_losses<float>(p, partial);
  }
  return sums;
}

Tensor affinity_loss_backward_cpu(const Tensor& grad, const Tensor& sums, const Tensor& labels) {
  AffinityLossParams p = check_loss_backward(grad, sums, labels);
  const Tensor l = torch::stable::contiguous(labels), g = torch::stable::contiguous(grad);
  const Tensor s = torch::stable::contiguous(sums);
  const Tensor out = torch::stable::new_empty(l, l.sizes(), sums.scalar_type());
  if (p.count == 0) return out;
  p.labels = static_cast<const uint8_t*>(l.const_data_ptr());
  p.grad = g.const_data_ptr();
  p.sums = s.mutable_data_ptr();
  p.grad_affinity = out.mutable_data_ptr();
  parallel_rows(loss_blocks(p.count), 4 * kLossBlock, [&](int64_t begin, int64_t end) {
    AFA_SIMD_CALL(affinity_loss_backward_blocks, p, begin, end);
  });
  return out;
}

// ---- CUDA ----

Tensor affinity_from_attention_cuda(const Tensor& attention, const Tensor& weight, const Tensor& bias,
                                    int64_t height, int64_t width, std::optional<int64_t> radius,
                                    bool windowed) {
  AffinityParams p = check_forward(attention, weight, bias, height, width, radius, windowed);
  const CudaScope scope(attention);
  const int64_t nodes = nodes_of(p.pairs), size = pairs_of_node(p.pairs);
  // The kernel writes only the pairs inside the window.
  const Tensor affinity = radius ? zeros(attention, {p.pairs.batch, nodes, size}, attention.scalar_type())
                                 : empty(attention, {p.pairs.batch, nodes, size}, attention.scalar_type());
  if (affinity.numel() == 0) return affinity;
  const Tensor source = torch::stable::contiguous(attention);
  const Tensor w = contiguous_as(weight, sum_type(attention)),
               shift = contiguous_as(bias, sum_type(attention));
  p.kind = kind_of(source, "attention");
  p.attention = source.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.bias = shift.const_data_ptr();
  p.affinity = affinity.mutable_data_ptr();
  p.variant = kForward.pick(affinity_variant());
  AFA_CUDA_LAUNCH("affinity_from_attention", launch_affinity(p, scope.stream()));
  return affinity;
}

Tensor affinity_from_attention_backward_attention_cuda(const Tensor& grad, const Tensor& affinity,
                                                       const Tensor& weight, int64_t height, int64_t width,
                                                       std::optional<int64_t> radius, bool windowed) {
  AffinityParams p = check_backward_attention(grad, affinity, weight, height, width, radius, windowed);
  const CudaScope scope(affinity);
  const int64_t nodes = nodes_of(p.pairs);
  const Tensor out = empty(affinity, {p.pairs.batch, p.maps, nodes, nodes}, affinity.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor a = torch::stable::contiguous(affinity), g = torch::stable::contiguous(grad);
  const Tensor w = contiguous_as(weight, sum_type(affinity));
  p.affinity = a.mutable_data_ptr();
  p.grad = g.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.grad_attention = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("affinity_from_attention_backward_attention",
                  launch_affinity_backward_attention(p, scope.stream()));
  return out;
}

Tensor affinity_from_attention_backward_weight_cuda(const Tensor& grad, const Tensor& affinity,
                                                    const Tensor& attention, int64_t height, int64_t width,
                                                    std::optional<int64_t> radius, bool windowed) {
  AffinityParams p = check_backward_weight(grad, affinity, attention, height, width, radius, windowed);
  const CudaScope scope(affinity);
  const Tensor out = zeros(affinity, {p.maps + 1}, sum_type(affinity));
  if (affinity.numel() == 0) return out;
  const Tensor a = torch::stable::contiguous(affinity), g = torch::stable::contiguous(grad);
  const Tensor source = torch::stable::contiguous(attention);
  const Tensor partial = empty(affinity, {weight_parts_of(p.pairs), p.maps + 1}, sum_type(affinity));
  p.affinity = a.mutable_data_ptr();
  p.grad = g.const_data_ptr();
  p.attention = source.const_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.grad_weight = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("affinity_from_attention_backward_weight",
                  launch_affinity_backward_weight(p, scope.stream()));
  return out;
}

Tensor affinity_labels_cuda(const Tensor& tokens, int64_t radius, int64_t ignore_index, bool windowed,
                            std::optional<int64_t> background) {
  AffinityLabelParams p = check_tokens(tokens, radius, ignore_index, windowed, background);
  const CudaScope scope(tokens);
  const Tensor labels =
      empty(tokens, {p.pairs.batch, nodes_of(p.pairs), pairs_of_node(p.pairs)}, ScalarType::Byte);
  if (labels.numel() == 0) return labels;
  const Tensor source = torch::stable::contiguous(tokens);
  p.tokens = static_cast<const int64_t*>(source.const_data_ptr());
  p.labels = static_cast<uint8_t*>(labels.mutable_data_ptr());
  AFA_CUDA_LAUNCH("affinity_labels", launch_affinity_labels(p, scope.stream()));
  return labels;
}

Tensor affinity_loss_cuda(const Tensor& affinity, const Tensor& labels, double weight_different,
                          double weight_same, double weight_foreground, const std::optional<Tensor>& counts) {
  AffinityLossParams p =
      check_loss(affinity, labels, {weight_different, weight_same, weight_foreground}, counts);
  const CudaScope scope(affinity);
  const Tensor a = torch::stable::contiguous(affinity), l = torch::stable::contiguous(labels);
  const Tensor sums = empty(affinity, {kLossSums}, sum_type(affinity));
  const std::optional<Tensor> whole = contiguous_or_none(counts);
  if (whole.has_value()) p.counts = static_cast<const int64_t*>(whole->const_data_ptr());
  const Tensor partial = empty(affinity, {loss_blocks(p.count), 2 * kPairGroups}, ScalarType::Double);
  if (p.count > 0) {
    p.affinity = a.const_data_ptr();
    p.labels = static_cast<const uint8_t*>(l.const_data_ptr());
    p.partial = static_cast<double*>(partial.mutable_data_ptr());
  }
  p.sums = sums.mutable_data_ptr();
  AFA_CUDA_LAUNCH("affinity_loss", launch_affinity_loss(p, scope.stream()));
  return sums;
}

Tensor affinity_loss_backward_cuda(const Tensor& grad, const Tensor& sums, const Tensor& labels) {
  AffinityLossParams p = check_loss_backward(grad, sums, labels);
  const CudaScope scope(labels);
  const Tensor l = torch::stable::contiguous(labels), g = torch::stable::contiguous(grad);
  const Tensor s = torch::stable::contiguous(sums);
  const Tensor out = torch::stable::new_empty(l, l.sizes(), sums.scalar_type());
  if (p.count == 0) return out;
  p.labels = static_cast<const uint8_t*>(l.const_data_ptr());
  p.grad = g.const_data_ptr();
  p.sums = s.mutable_data_ptr();
  p.grad_affinity = out.mutable_data_ptr();
  AFA_CUDA_LAUNCH("affinity_loss_backward", launch_affinity_loss_backward(p, scope.stream()));
  return out;
}

}  // namespace afa
