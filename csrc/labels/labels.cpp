#include "labels/labels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"

namespace afa {
namespace {

// An axis with its tables, for the CPU kernels.
struct AxisTables {
  std::vector<int32_t> left, right;
  std::vector<float> narrow;
  std::vector<double> wide;

  Axis fill(int64_t from, int64_t to, Kind kind) {
    Axis axis;
    axis.from = from;
    axis.to = to;
    left.resize(to);
    right.resize(to);
    axis.left = left.data();
    axis.right = right.data();
    axis.weight = kind == Kind::f64 ? fill_weights(axis, wide) : fill_weights(axis, narrow);
    return axis;
  }

 private:
  template <typename T>
  const void* fill_weights(const Axis& axis, std::vector<T>& weight) {
    weight.resize(axis.to);
    for (int64_t i = 0; i < axis.to; ++i) {
      const Tap<T> at = tap<T>(axis, i);
      left[i] = static_cast<int32_t>(at.left);
      right[i] = static_cast<int32_t>(at.right);
      weight[i] = at.weight;
    }
    return weight.data();
  }
};

void check_type(const Tensor& t, const char* name, ScalarType type) {
  AFA_CHECK(t.scalar_type() == type, name, " must be ", type_name(type), ", got ",
            type_name(t.scalar_type()));
}

// images [B, channels, H, W] as PAR compares them: resized, in [0, 1] if they are bytes.
Tensor shrink(const Tensor& images, const Axis& rows, const Axis& columns, ScalarType type,
              const std::optional<CudaScope>& scope) {
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  const Tensor source = contiguous_as(images, bytes ? ScalarType::Byte : type);
  if (!bytes && rows.from == rows.to && columns.from == columns.to) return source;
  const Tensor out = empty(images, {images.size(0), images.size(1), rows.to, columns.to}, type);
  ShrinkParams p;
  p.kind = kind_of(out, "images");
  p.bytes = bytes;
  p.in = source.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.planes = images.size(0) * images.size(1);
  p.rows = rows;
  p.columns = columns;
  if (scope) {
    AFA_CUDA_LAUNCH("pseudo_labels", shrink_cuda(p, scope->stream()));
  } else {
    parallel_rows(p.planes * rows.to, 4 * columns.to,
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(shrink_rows, p, begin, end); });
  }
  return out;
}

// CPU: each image's present classes, packed, and the CAMs in a form the kernels read.
struct PresentClasses {
  std::vector<int32_t> plane, number, count;
  Tensor cams;
  std::optional<Tensor> mask;  // bool [B, most * thresholds]; none if every image has `most` classes

  PresentClasses(LabelParams& p, const Tensor& all_cams, const Tensor& present,
                 const std::optional<Tensor>& class_index, int64_t max_classes)
      : count(p.batch), cams(all_cams) {
    const Tensor flags = torch::stable::contiguous(present);
    const bool* flag = static_cast<const bool*>(flags.const_data_ptr());
    for (int64_t b = 0; b < p.batch; ++b) {
      count[b] = static_cast<int32_t>(std::count(flag + b * p.classes, flag + (b + 1) * p.classes, true));
      AFA_CHECK(max_classes == 0 || count[b] <= max_classes, "max_classes is ", max_classes, ", but image ",
                b, " has ", count[b], " classes");
      p.most = std::max<int64_t>(p.most, count[b]);
    }
    plane.resize(p.batch * p.most);
    number.resize(p.batch * p.most);
    std::optional<Tensor> index;
    if (class_index) index = torch::stable::contiguous(*class_index);
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t at = b * p.most;
      for (int64_t c = 0; c < p.classes; ++c) {
        const int64_t i = b * p.classes + c;
        if (!flag[i]) continue;
        plane[at] = static_cast<int32_t>(c);
        number[at++] =
            static_cast<int32_t>(1 + (index ? static_cast<const int64_t*>(index->const_data_ptr())[i] : c));
      }
    }
    p.plane = plane.data();
    p.number = number.data();
    p.count = count.data();
    if (p.most > 0) {
      read_cams(p);
      make_mask(p);
    }
  }

 private:
  // Planes the kernels can't read as they lie (half precision, strided rows) are copied, but only the present
  // ones.
  void read_cams(LabelParams& p) {
    const ScalarType type = sum_type(cams);
    if (cams.scalar_type() != type || (cams.stride(3) != 1 && cams.size(3) > 1)) {
      const Tensor packed = empty(cams, {p.batch, p.most, cams.size(2), cams.size(3)}, type);
      for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t j = 0; j < count[b]; ++j) {
          int32_t& from = plane[b * p.most + j];
          Tensor to = torch::stable::select(torch::stable::select(packed, 0, b), 0, j);
          torch::stable::copy_(to, torch::stable::select(torch::stable::select(cams, 0, b), 0, from));
          from = static_cast<int32_t>(j);
        }
      }
      cams = packed;
    }
    p.kind = kind_of(cams, "cams");
    p.cams = cams.const_data_ptr();
    p.cam_stride_b = cams.stride(0);
    p.cam_stride_c = cams.stride(1);
    p.cam_stride_y = cams.stride(2);
  }

  void make_mask(const LabelParams& p) {
    if (std::all_of(count.begin(), count.end(), [&](int32_t n) { return n == p.most; })) return;
    mask = empty(cams, {p.batch, p.most * p.thresholds}, ScalarType::Bool);
    bool* keep = static_cast<bool*>(mask->mutable_data_ptr());
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < p.most * p.thresholds; ++i) *keep++ = i < count[b] * p.thresholds;
    }
  }
};

}  // namespace

Tensor pseudo_labels(const Tensor& images, const Tensor& cams, const Tensor& present,
                     const std::optional<Tensor>& class_index, const std::optional<Tensor>& box,
                     const std::optional<Tensor>& weights, double low, double high, int64_t downscale,
                     const std::vector<int64_t>& dilations, int64_t num_iter, double w1, double w2,
                     int64_t max_classes, int64_t ignore_index) {
  check_shape(cams, "cams", "[B, C, H, W]", {-1, -1, -1, -1});
  LabelParams p;
  p.kind = kind_of(cams, "cams");
  p.batch = cams.size(0);
  p.classes = cams.size(1);
  const int64_t height = cams.size(2), width = cams.size(3);
  check_shape(images, "images", "[B, 3, H, W]", {p.batch, -1, height, width});
  if (images.scalar_type() != ScalarType::Byte) kind_of(images, "images");
  check_device(images, "images", cams, "cams");
  check_shape(present, "present", "[B, C]", {p.batch, p.classes});
  check_type(present, "present", ScalarType::Bool);
  check_device(present, "present", cams, "cams");
  if (class_index) {
    check_shape(*class_index, "class_index", "[B, C]", {p.batch, p.classes});
    check_type(*class_index, "class_index", ScalarType::Long);
    check_device(*class_index, "class_index", cams, "cams");
  }
  if (box) {
    check_shape(*box, "box", "[B, 4]", {p.batch, 4});
    check_type(*box, "box", ScalarType::Long);
    check_device(*box, "box", cams, "cams");
  }
  AFA_CHECK(high >= low, "high must be at least low (", low, "), got ", high);
  AFA_CHECK(downscale >= 1, "downscale must be at least 1, got ", downscale);
  AFA_CHECK(num_iter >= 0, "num_iter must be at least 0, got ", num_iter);
  AFA_CHECK(max_classes >= 0, "max_classes must be at least 0, got ", max_classes);
  AFA_CHECK(ignore_index == static_cast<int32_t>(ignore_index), "ignore_index must fit 32 bits, got ",
            ignore_index);
  const ScalarType type = sum_type(cams);
  const int64_t small_height = std::max<int64_t>(1, height / downscale);
  const int64_t small_width = std::max<int64_t>(1, width / downscale);
  if (weights) {
    check_shape(*weights, "weights", "[B, 8*len(dilations), h, w]",
                {p.batch, 8 * static_cast<int64_t>(dilations.size()), small_height, small_width});
    check_type(*weights, "weights", type);
    check_device(*weights, "weights", cams, "cams");
  }

  const bool cuda = on_cuda(cams);
  std::optional<CudaScope> scope;
  if (cuda) scope.emplace(cams);
  const Tensor labels = empty(cams, {p.batch, height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;

  p.thresholds = high > low ? 2 : 1;
  p.background[0] = high;
  p.background[1] = low;
  p.total = std::pow(1 + w2, static_cast<double>(num_iter));
  p.ignore = static_cast<int32_t>(ignore_index);
  p.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  const Kind kind = type == ScalarType::Double ? Kind::f64 : Kind::f32;
  AxisTables tables[4];
  p.down_rows = tables[0].fill(height, small_height, kind);
  p.down_columns = tables[1].fill(width, small_width, kind);
  p.up_rows = tables[2].fill(small_height, height, kind);
  p.up_columns = tables[3].fill(small_width, width, kind);
  std::optional<Tensor> boxes;
  if (box) {
    boxes = torch::stable::contiguous(*box);
    p.box = static_cast<const int64_t*>(boxes->const_data_ptr());
  }

  // The present classes, packed.
  std::optional<PresentClasses> on_host;
  std::optional<Tensor> mask;
  Tensor plane, number, count, flags;
  std::optional<Tensor> index;
  if (cuda) {
    p.most = max_classes == 0 ? p.classes : std::min(max_classes, p.classes);
    PackParams pack;
    pack.batch = p.batch;
    pack.classes = p.classes;
    pack.most = p.most;
    pack.thresholds = p.thresholds;
    plane = empty(cams, {p.batch, p.most}, ScalarType::Int);
    number = empty(cams, {p.batch, p.most}, ScalarType::Int);
    count = empty(cams, {p.batch}, ScalarType::Int);
    mask = empty(cams, {p.batch, p.most * p.thresholds}, ScalarType::Bool);
    flags = torch::stable::contiguous(present);
    if (class_index) index = torch::stable::contiguous(*class_index);
    pack.present = static_cast<const bool*>(flags.const_data_ptr());
    pack.class_index = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
    p.plane = pack.plane = static_cast<int32_t*>(plane.mutable_data_ptr());
    p.number = pack.number = static_cast<int32_t*>(number.mutable_data_ptr());
    p.count = pack.count = static_cast<int32_t*>(count.mutable_data_ptr());
    pack.mask = static_cast<bool*>(mask->mutable_data_ptr());
    AFA_CUDA_LAUNCH("pseudo_labels", label_pack_cuda(pack, scope->stream()));
    p.cams = cams.const_data_ptr();
    p.cam_stride_b = cams.stride(0);
    p.cam_stride_c = cams.stride(1);
    p.cam_stride_y = cams.stride(2);
    p.cam_stride_x = cams.stride(3);
  } else {
    on_host.emplace(p, cams, present, class_index, max_classes);
    mask = on_host->mask;
  }

  // Scores at reduced size, refined. PAR is linear and takes a constant 1 to (1 + w2)^num_iter, so the
  // refined background is that less the refined classes, and its map need not travel along.
  Tensor maps = empty(cams, {p.batch, p.most * p.thresholds, small_height, small_width}, type);
  p.maps = maps.mutable_data_ptr();
  if (p.most > 0) {
    if (cuda) {
      AFA_CUDA_LAUNCH("pseudo_labels", label_scores_cuda(p, scope->stream()));
    } else {
      parallel_rows(p.batch * small_height, 40 * p.most * small_width, [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(score_scratch(p));
        AFA_SIMD_CALL(label_score_rows, p, begin, end, scratch.data());
      });
    }
    if (num_iter > 0) {
      Tensor affinity =
          weights ? *weights
                  : par_affinity(shrink(images, p.down_rows, p.down_columns, type, scope), dilations, w1, w2);
      maps = par_propagate(affinity, maps, dilations, num_iter, mask);
      p.maps = maps.mutable_data_ptr();
    }
  }

  if (cuda) {
    AFA_CUDA_LAUNCH("pseudo_labels", label_choices_cuda(p, scope->stream()));
  } else {
    parallel_rows(p.batch * height, 8 * (p.most + 1) * width, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(choice_scratch(p));
      AFA_SIMD_CALL(label_choice_rows, p, begin, end, scratch.data());
    });
  }
  return labels;
}

}  // namespace afa
