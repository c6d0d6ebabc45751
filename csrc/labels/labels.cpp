#include "labels/labels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "par/propagate.h"

namespace afa {
namespace {

// An axis and its tables, for the CPU kernels.
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

void check_images(const Tensor& images, int64_t batch, int64_t height, int64_t width, const Tensor& like,
                  const char* like_name) {
  check_shape(images, "images", "[B, 3, H, W]", {batch, -1, height, width});
  AFA_CHECK(images.size(1) >= 1, "images must have at least one color channel, got shape ",
            shape_string(images));
  if (images.scalar_type() != ScalarType::Byte) kind_of(images, "images");
  check_device(images, "images", like, like_name);
}

void check_flags(const Tensor& present, const std::optional<Tensor>& class_index,
                 const std::optional<Tensor>& box, int64_t batch, int64_t classes, const Tensor& like,
                 const char* like_name) {
  check_shape(present, "present", "[B, C]", {batch, classes});
  check_type(present, "present", ScalarType::Bool);
  check_device(present, "present", like, like_name);
  if (class_index) {
    check_shape(*class_index, "class_index", "[B, C]", {batch, classes});
    check_type(*class_index, "class_index", ScalarType::Long);
    check_device(*class_index, "class_index", like, like_name);
  }
  if (box) {
    check_shape(*box, "box", "[B, 4]", {batch, 4});
    check_type(*box, "box", ScalarType::Long);
    check_device(*box, "box", like, like_name);
  }
}

void check_settings(int64_t downscale, int64_t num_iter, int64_t max_classes, int64_t ignore_index) {
  AFA_CHECK(downscale >= 1, "downscale must be at least 1, got ", downscale);
  AFA_CHECK(num_iter >= 0, "num_iter must be at least 0, got ", num_iter);
  AFA_CHECK(max_classes >= 0, "max_classes must be at least 0, got ", max_classes);
  AFA_CHECK(ignore_index == static_cast<int32_t>(ignore_index), "ignore_index must fit 32 bits, got ",
            ignore_index);
}

void check_weights(const std::optional<Tensor>& weights, const std::vector<int64_t>& dilations, int64_t batch,
                   const Region& whole, const Tensor& like, const char* like_name) {
  if (!weights) return;
  check_shape(*weights, "weights", "[B, 8*len(dilations), h, w]",
              {batch, 8 * static_cast<int64_t>(dilations.size()), whole.small_height, whole.small_width});
  check_type(*weights, "weights", sum_type(like));
  check_device(*weights, "weights", like, like_name);
}

Kind kind_of_sums(const Tensor& t) {
  return sum_type(t) == ScalarType::Double ? Kind::f64 : Kind::f32;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

const int64_t* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
}

// Bytes stay bytes; all other types are converted to the accumulation type.
Tensor readable_images(const Tensor& images, ScalarType type) {
  return contiguous_as(images, images.scalar_type() == ScalarType::Byte ? ScalarType::Byte : type);
}

ShrinkParams shrink_params(const Tensor& images, const Tensor& out) {
  ShrinkParams p;
  p.kind = kind_of(out, "images");
  p.bytes = images.scalar_type() == ScalarType::Byte;
  p.in = images.const_data_ptr();
  p.in_stride_y = images.size(3);
  p.in_stride_p = images.size(2) * images.size(3);
  p.out = out.mutable_data_ptr();
  p.planes = images.size(0) * images.size(1);
  p.channels = images.size(1);
  return p;
}

void shrink_cpu(const ShrinkParams& p) {
  parallel_rows(p.planes * p.rows.to, 4 * p.columns.to,
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(shrink_rows, p, begin, end); });
}

void choose_cpu(const ChoiceParams& p) {
  parallel_rows(p.batch * p.height, 8 * (p.classes.most + 1) * p.width, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(choice_scratch(p));
    AFA_SIMD_CALL(label_choice_rows, p, begin, end, scratch.data());
  });
}

// Memory limit for a batch's maps, PAR's copies of them and its weights on CUDA, where the host does not know
// how many classes are present. Beyond it the batch is processed a few images at a time, at least one.
#ifndef AFA_LABEL_SCRATCH_BYTES  // the tests build with little, so that small batches are split too
#define AFA_LABEL_SCRATCH_BYTES (int64_t{1} << 30)
#endif
constexpr int64_t kScratchBytes = AFA_LABEL_SCRATCH_BYTES;

// The number of images at a time. Three copies of the maps exist while PAR alternates between its two
// buffers.
int64_t images_at_once(int64_t batch, int64_t maps, int64_t planes, const Region& whole, const Tensor& like) {
  const int64_t bytes = (3 * maps + planes) * whole.small_height * whole.small_width *
                        (sum_type(like) == ScalarType::Double ? 8 : 4);
  return std::clamp<int64_t>(kScratchBytes / std::max<int64_t>(bytes, 1), 1, batch);
}

// Some images of a tensor of images.
Tensor part_of(const Tensor& t, int64_t first, int64_t count) {
  if (count == t.size(0)) return t;
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}
std::optional<Tensor> part_of(const std::optional<Tensor>& t, int64_t first, int64_t count) {
  if (!t) return std::nullopt;
  return part_of(*t, first, count);
}
Classes part_of(const Classes& all, int64_t first) {
  return {all.most, all.plane + first * all.most, all.number + first * all.most, all.count + first};
}

const void* advance(const void* from, int64_t elements, const Tensor& of) {
  return static_cast<const char*>(from) + elements * static_cast<int64_t>(of.element_size());
}

// The present classes of a batch, packed on the host.
class HostClasses {
 public:
  Classes classes;
  std::optional<Tensor> mask;  // bool [B, maps]; none if every image has `most` classes

  // Throws if an image has more than max_classes (0: any number).
  HostClasses(const Tensor& present, const std::optional<Tensor>& class_index, int64_t max_classes) {
    const int64_t batch = present.size(0), all = present.size(1);
    const Tensor flags = torch::stable::contiguous(present);
    const bool* flag = static_cast<const bool*>(flags.const_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      count_.push_back(static_cast<int32_t>(std::count(flag + b * all, flag + (b + 1) * all, true)));
      AFA_CHECK(max_classes == 0 || count_[b] <= max_classes, "max_classes is ", max_classes, ", but image ",
                b, " has ", count_[b], " classes");
      classes.most = std::max<int64_t>(classes.most, count_[b]);
    }
    const std::optional<Tensor> index = dense(class_index);
    plane_.resize(batch * classes.most);
    number_.resize(batch * classes.most);
    for (int64_t b = 0; b < batch; ++b) {
      int64_t at = b * classes.most;
      for (int64_t i = b * all; i < (b + 1) * all; ++i) {
        if (!flag[i]) continue;
        plane_[at] = static_cast<int32_t>(i - b * all);
        number_[at++] = static_cast<int32_t>(1 + (index ? pointer(index)[i] : i - b * all));
      }
    }
    classes.plane = plane_.data();
    classes.number = number_.data();
    classes.count = count_.data();
  }

  void make_mask(const Tensor& like, int64_t thresholds) {
    const int64_t maps = classes.most * thresholds;
    if (std::all_of(count_.begin(), count_.end(), [&](int32_t n) { return n == classes.most; })) return;
    mask = empty(like, {static_cast<int64_t>(count_.size()), maps}, ScalarType::Bool);
    bool* keep = static_cast<bool*>(mask->mutable_data_ptr());
    for (int32_t n : count_) {
      for (int64_t i = 0; i < maps; ++i) *keep++ = i < n * thresholds;
    }
  }

  // The CAMs in a layout that the kernels can read. Other planes (half precision, strided rows) are copied,
  // but only those of present classes.
  Tensor readable_cams(const Tensor& cams) {
    const ScalarType type = sum_type(cams);
    if (cams.scalar_type() == type && (cams.stride(3) == 1 || cams.size(3) == 1)) return cams;
    const int64_t batch = cams.size(0);
    const Tensor packed = empty(cams, {batch, classes.most, cams.size(2), cams.size(3)}, type);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < count_[b]; ++j) {
        int32_t& from = plane_[b * classes.most + j];
        Tensor to = torch::stable::select(torch::stable::select(packed, 0, b), 0, j);
        torch::stable::copy_(to, torch::stable::select(torch::stable::select(cams, 0, b), 0, from));
        from = static_cast<int32_t>(j);
      }
    }
    return packed;
  }

 private:
  std::vector<int32_t> plane_, number_, count_;
};

// The present classes of a batch, packed on the device, with the inputs of PAR: the maps in use and, on
// request, each image's downscaled size.
class DeviceClasses {
 public:
  Classes classes;
  Tensor mask;                   // bool [B, maps]
  std::optional<Tensor> extent;  // int64 [B, 2]

  DeviceClasses(const char* op, [[maybe_unused]] const CudaScope& scope, PackParams p, const Tensor& present,
                const std::optional<Tensor>& class_index, int64_t max_classes, bool with_extent) {
    p.batch = present.size(0);
    p.classes = present.size(1);
    p.most = classes.most = max_classes == 0 ? p.classes : std::min(max_classes, p.classes);
    const int64_t maps = (p.most + (p.background_map ? 1 : 0)) * p.thresholds;
    const Tensor flags = torch::stable::contiguous(present);
    const std::optional<Tensor> index = dense(class_index);
    storage_ = {empty(present, {p.batch, p.most}, ScalarType::Int),
                empty(present, {p.batch, p.most}, ScalarType::Int),
                empty(present, {p.batch}, ScalarType::Int)};
    mask = empty(present, {p.batch, maps}, ScalarType::Bool);
    if (with_extent) extent = empty(present, {p.batch, 2}, ScalarType::Long);
    p.present = static_cast<const bool*>(flags.const_data_ptr());
    p.class_index = pointer(index);
    classes.plane = p.plane = static_cast<int32_t*>(storage_[0].mutable_data_ptr());
    classes.number = p.number = static_cast<int32_t*>(storage_[1].mutable_data_ptr());
    classes.count = p.count = static_cast<int32_t*>(storage_[2].mutable_data_ptr());
    p.mask = static_cast<bool*>(mask.mutable_data_ptr());
    p.extent = extent ? static_cast<int64_t*>(extent->mutable_data_ptr()) : nullptr;
    AFA_CUDA_LAUNCH(op, launch_label_pack(p, scope.stream()));
  }

 private:
  std::vector<Tensor> storage_;
};

// Four samples for each of `to` maps' rows or columns: see place_taps.
struct PlaceTables {
  std::vector<int32_t> at;
  std::vector<float> narrow;
  std::vector<double> wide;

  PlaceTables(Kind kind, int64_t from, int64_t to, int64_t start, int64_t grid, int64_t size) {
    if (kind == Kind::f64) {
      fill(wide, from, to, start, grid, size);
    } else {
      fill(narrow, from, to, start, grid, size);
    }
  }

  const void* weight() const { return wide.empty() ? static_cast<const void*>(narrow.data()) : wide.data(); }

 private:
  template <typename T>
  void fill(std::vector<T>& weight, int64_t from, int64_t to, int64_t start, int64_t grid, int64_t size) {
    for (int64_t i = 0; i < to; ++i) {
      const FourTaps<T> taps = place_taps<T>(i, from, to, start, grid, size);
      for (int n = 0; n < 4; ++n) {
        at.push_back(static_cast<int32_t>(taps.at[n]));
        weight.push_back(taps.weight[n]);
      }
    }
  }
};

struct ParSettings {
  const std::vector<int64_t>& dilations;
  int64_t num_iter;
  double w1, w2;
};

// refine_labels on the CPU: one image at a time, cropped to its region, since the host knows the boxes.
void refine_each_image(const Tensor& images, const Tensor& scores, const std::optional<Tensor>& low_scores,
                       const HostClasses& packed, const std::optional<Tensor>& weights, int64_t downscale,
                       const ParSettings& par, ChoiceParams choice) {
  const ScalarType type = sum_type(scores);
  const Kind kind = kind_of_sums(scores);
  const Tensor colors = readable_images(images, type);
  const Tensor wide[2] = {contiguous_as(scores, type),
                          low_scores ? contiguous_as(*low_scores, type) : contiguous_as(scores, type)};
  const int64_t planes = scores.size(1), image_pixels = choice.height * choice.width;
  const Classes all = packed.classes;
  const int64_t* boxes = choice.box;
  int64_t* labels = choice.labels;
  choice.batch = 1;
  choice.kind = kind;
  for (int64_t b = 0; b < scores.size(0); ++b) {
    const Region r = region_of(boxes, b, choice.height, choice.width, downscale);
    const Classes own = {all.count[b], all.plane + b * all.most, all.number + b * all.most, all.count + b};
    choice.classes = own;
    choice.box = boxes == nullptr ? nullptr : boxes + 4 * b;
    choice.labels = labels + b * image_pixels;
    choice.y = r.y;
    choice.x = r.x;
    choice.map_height = r.small_height;
    choice.map_width = r.small_width;
    AxisTables tables[4];
    choice.rows = tables[0].fill(r.small_height, r.height, kind);
    choice.columns = tables[1].fill(r.small_width, r.width, kind);
    std::optional<Tensor> maps;
    if (r.height > 0 && own.most > 0) {
      maps = empty(scores, {1, (own.most + 1) * choice.thresholds, r.small_height, r.small_width}, type);
      PlaceParams place;
      place.kind = kind;
      place.thresholds = choice.thresholds;
      place.grid_height = scores.size(2);
      place.grid_width = scores.size(3);
      for (int t = 0; t < kMaxThresholds; ++t) {
        place.scores[t] = static_cast<const char*>(wide[t].const_data_ptr()) +
                          b * planes * place.grid_height * place.grid_width * wide[t].element_size();
      }
      place.classes = own;
      place.maps = maps->mutable_data_ptr();
      place.map_height = r.small_height;
      place.map_width = r.small_width;
      const PlaceTables rows(kind, r.height, r.small_height, r.y, place.grid_height, choice.height);
      const PlaceTables columns(kind, r.width, r.small_width, r.x, place.grid_width, choice.width);
      place.row_at = rows.at.data();
      place.column_at = columns.at.data();
      place.row_weight = rows.weight();
      place.column_weight = columns.weight();
      const int64_t row_work = 4 * (place.grid_width + place.map_width);
      parallel_rows(maps->size(1) * place.map_height, row_work, [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(place.grid_width);
        AFA_SIMD_CALL(label_place_rows, place, begin, end, scratch.data());
      });
      if (par.num_iter > 0) {
        Tensor affinity;
        if (weights) {
          Tensor every = *weights;
          affinity = torch::stable::narrow(every, 0, b, 1);
        } else {
          const Tensor small = empty(colors, {1, colors.size(1), r.small_height, r.small_width}, type);
          ShrinkParams shrink = shrink_params(colors, small);
          shrink.planes = colors.size(1);
          shrink.in = static_cast<const char*>(shrink.in) +
                      (b * colors.size(1) * image_pixels + r.y * choice.width + r.x) * colors.element_size();
          shrink.rows = tables[2].fill(r.height, r.small_height, kind);
          shrink.columns = tables[3].fill(r.width, r.small_width, kind);
          shrink_cpu(shrink);
          affinity = par_affinity_cpu(small, par.dilations, par.w1, par.w2);
        }
        maps = par_propagate_cpu(affinity, *maps, par.dilations, par.num_iter, std::nullopt);
      }
      choice.maps = maps->const_data_ptr();
    }
    choose_cpu(choice);
  }
}

// The parameters of a call of pseudo_labels for both devices, after its arguments are checked.
struct PseudoLabels {
  Region whole;
  ScoreParams score;
  ChoiceParams choice;
};

PseudoLabels check_pseudo_labels(const Tensor& images, const Tensor& cams, const Tensor& present,
                                 const std::optional<Tensor>& class_index, const std::optional<Tensor>& box,
                                 const std::optional<Tensor>& weights, double low, double high,
                                 int64_t downscale, const std::vector<int64_t>& dilations, int64_t num_iter,
                                 double w2, int64_t max_classes, int64_t ignore_index) {
  check_shape(cams, "cams", "[B, C, H, W]", {-1, -1, -1, -1});
  kind_of(cams, "cams");
  const int64_t batch = cams.size(0), height = cams.size(2), width = cams.size(3);
  check_images(images, batch, height, width, cams, "cams");
  check_flags(present, class_index, box, batch, cams.size(1), cams, "cams");
  AFA_CHECK(high >= low, "high must be at least low (", low, "), got ", high);
  check_settings(downscale, num_iter, max_classes, ignore_index);
  PseudoLabels call;
  call.whole = region_of(nullptr, 0, height, width, downscale);
  check_weights(weights, dilations, batch, call.whole, cams, "cams");
  call.score.thresholds = call.choice.thresholds = high > low ? 2 : 1;
  call.score.background[0] = high;
  call.score.background[1] = low;
  call.score.rows = {height, call.whole.small_height};
  call.score.columns = {width, call.whole.small_width};
  call.choice.kind = kind_of_sums(cams);
  call.choice.height = height;
  call.choice.width = width;
  // PAR is linear and maps a constant 1 to (1 + w2)^num_iter, so the refined background is this value minus
  // the refined classes, and its map need not be refined.
  call.choice.total = std::pow(1 + w2, static_cast<double>(num_iter));
  call.choice.map_height = call.whole.small_height;
  call.choice.map_width = call.whole.small_width;
  call.choice.ignore = static_cast<int32_t>(ignore_index);
  call.choice.rows = {call.whole.small_height, height};
  call.choice.columns = {call.whole.small_width, width};
  return call;
}

void attach_cams(ScoreParams& p, const Tensor& cams) {
  p.kind = kind_of(cams, "cams");
  p.cam_stride_b = cams.stride(0);
  p.cam_stride_c = cams.stride(1);
  p.cam_stride_y = cams.stride(2);
  p.cam_stride_x = cams.stride(3);
}

// The same for a call of refine_labels, without pointers.
ChoiceParams check_refine_labels(const Tensor& images, const Tensor& scores,
                                 const std::optional<Tensor>& low_scores, const Tensor& present,
                                 const std::optional<Tensor>& class_index, const std::optional<Tensor>& box,
                                 const std::optional<Tensor>& weights, int64_t downscale,
                                 const std::vector<int64_t>& dilations, int64_t num_iter, int64_t max_classes,
                                 int64_t ignore_index) {
  check_shape(images, "images", "[B, 3, H, W]", {-1, -1, -1, -1});
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3);
  check_shape(scores, "scores", "[B, C+1, h, w]", {batch, -1, -1, -1});
  kind_of(scores, "scores");
  AFA_CHECK(scores.size(1) >= 1, "scores must include the background map, got shape ", shape_string(scores));
  check_images(images, batch, height, width, scores, "scores");
  if (low_scores) {
    check_shape(*low_scores, "low_scores", "[B, C+1, h, w]",
                {batch, scores.size(1), scores.size(2), scores.size(3)});
    check_like(*low_scores, "low_scores", scores, "scores");
  }
  check_flags(present, class_index, box, batch, scores.size(1) - 1, scores, "scores");
  check_settings(downscale, num_iter, max_classes, ignore_index);
  const Region whole = region_of(nullptr, 0, height, width, downscale);
  check_weights(weights, dilations, batch, whole, scores, "scores");
  AFA_CHECK(!weights || !box, "weights and box must not be given together: each box has its own weights");
  AFA_CHECK(images.numel() == 0 || scores.numel() > 0, "scores must have at least one position, got shape ",
            shape_string(scores));
  ChoiceParams choice;
  choice.kind = kind_of_sums(scores);
  choice.batch = batch;
  choice.thresholds = low_scores ? 2 : 1;
  choice.height = height;
  choice.width = width;
  choice.background_map = true;
  choice.ignore = static_cast<int32_t>(ignore_index);
  return choice;
}

}  // namespace

// ---- CPU ----

Tensor pseudo_labels_cpu(const Tensor& images, const Tensor& cams, const Tensor& present,
                         const std::optional<Tensor>& class_index, const std::optional<Tensor>& box,
                         const std::optional<Tensor>& weights, double low, double high, int64_t downscale,
                         const std::vector<int64_t>& dilations, int64_t num_iter, double w1, double w2,
                         int64_t max_classes, int64_t ignore_index) {
  PseudoLabels call = check_pseudo_labels(images, cams, present, class_index, box, weights, low, high,
                                          downscale, dilations, num_iter, w2, max_classes, ignore_index);
  const Region& whole = call.whole;
  ScoreParams& score = call.score;
  ChoiceParams& choice = call.choice;
  const int64_t batch = cams.size(0);
  const Tensor labels = empty(cams, {batch, choice.height, choice.width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  const ScalarType type = sum_type(cams);
  HostClasses packed(present, class_index, max_classes);
  packed.make_mask(cams, score.thresholds);
  const Tensor source = packed.readable_cams(cams);
  attach_cams(score, source);
  AxisTables tables[4];
  score.rows = tables[0].fill(score.rows.from, score.rows.to, choice.kind);
  score.columns = tables[1].fill(score.columns.from, score.columns.to, choice.kind);
  choice.rows = tables[2].fill(choice.rows.from, choice.rows.to, choice.kind);
  choice.columns = tables[3].fill(choice.columns.from, choice.columns.to, choice.kind);
  score.batch = choice.batch = batch;
  score.classes = choice.classes = packed.classes;
  const int64_t most = packed.classes.most;
  // Scores at reduced size, refined.
  Tensor maps = empty(cams, {batch, most * score.thresholds, whole.small_height, whole.small_width}, type);
  if (most > 0) {
    score.cams = source.const_data_ptr();
    score.maps = maps.mutable_data_ptr();
    parallel_rows(batch * score.rows.to, 40 * most * score.columns.to, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(score_scratch(score));
      AFA_SIMD_CALL(label_score_rows, score, begin, end, scratch.data());
    });
    if (num_iter > 0) {
      Tensor affinity;
      if (weights) {
        affinity = *weights;
      } else {
        const Tensor colors = readable_images(images, type);
        const Tensor small =
            empty(images, {batch, images.size(1), whole.small_height, whole.small_width}, type);
        ShrinkParams shrink = shrink_params(colors, small);
        shrink.rows = score.rows;
        shrink.columns = score.columns;
        shrink_cpu(shrink);
        affinity = par_affinity_cpu(small, dilations, w1, w2);
      }
      maps = par_propagate_cpu(affinity, maps, dilations, num_iter, packed.mask);
    }
  }
  const std::optional<Tensor> boxes = dense(box);
  choice.maps = maps.const_data_ptr();
  choice.box = pointer(boxes);
  choice.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  choose_cpu(choice);
  return labels;
}

Tensor refine_labels_cpu(const Tensor& images, const Tensor& scores, const std::optional<Tensor>& low_scores,
                         const Tensor& present, const std::optional<Tensor>& class_index,
                         const std::optional<Tensor>& box, const std::optional<Tensor>& weights,
                         int64_t downscale, const std::vector<int64_t>& dilations, int64_t num_iter,
                         double w1, double w2, int64_t max_classes, int64_t ignore_index) {
  ChoiceParams choice = check_refine_labels(images, scores, low_scores, present, class_index, box, weights,
                                            downscale, dilations, num_iter, max_classes, ignore_index);
  const Tensor labels = empty(scores, {choice.batch, choice.height, choice.width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  const std::optional<Tensor> boxes = dense(box);
  choice.box = pointer(boxes);
  choice.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  const HostClasses packed(present, class_index, max_classes);
  refine_each_image(images, scores, low_scores, packed, weights, downscale, {dilations, num_iter, w1, w2},
                    choice);
  return labels;
}

// ---- CUDA ----

Tensor pseudo_labels_cuda(const Tensor& images, const Tensor& cams, const Tensor& present,
                          const std::optional<Tensor>& class_index, const std::optional<Tensor>& box,
                          const std::optional<Tensor>& weights, double low, double high, int64_t downscale,
                          const std::vector<int64_t>& dilations, int64_t num_iter, double w1, double w2,
                          int64_t max_classes, int64_t ignore_index) {
  PseudoLabels call = check_pseudo_labels(images, cams, present, class_index, box, weights, low, high,
                                          downscale, dilations, num_iter, w2, max_classes, ignore_index);
  const Region& whole = call.whole;
  ScoreParams& score = call.score;
  ChoiceParams& choice = call.choice;
  const CudaScope scope(cams);
  const int64_t batch = cams.size(0), pixels = choice.height * choice.width;
  const Tensor labels = empty(cams, {batch, choice.height, choice.width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  const ScalarType type = sum_type(cams);
  PackParams pack;
  pack.thresholds = score.thresholds;
  const DeviceClasses packed("pseudo_labels", scope, pack, present, class_index, max_classes, false);
  attach_cams(score, cams);
  const std::optional<Tensor> boxes = dense(box);
  const int64_t most = packed.classes.most, maps_of_image = most * score.thresholds;
  const int64_t weight_planes = 8 * static_cast<int64_t>(dilations.size()) + images.size(1);
  const int64_t together = images_at_once(batch, maps_of_image, weight_planes, whole, cams);
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t count = std::min(together, batch - first);
    score.batch = choice.batch = count;
    score.classes = choice.classes = part_of(packed.classes, first);
    // Scores at reduced size, refined.
    Tensor maps = empty(cams, {count, maps_of_image, whole.small_height, whole.small_width}, type);
    if (most > 0) {
      score.cams = advance(cams.const_data_ptr(), first * score.cam_stride_b, cams);
      score.maps = maps.mutable_data_ptr();
      AFA_CUDA_LAUNCH("pseudo_labels", launch_label_scores(score, scope.stream()));
      if (num_iter > 0) {
        Tensor affinity;
        if (weights) {
          affinity = part_of(*weights, first, count);
        } else {
          const Tensor colors = readable_images(part_of(images, first, count), type);
          const Tensor small =
              empty(images, {count, images.size(1), whole.small_height, whole.small_width}, type);
          ShrinkParams shrink = shrink_params(colors, small);
          shrink.rows = score.rows;
          shrink.columns = score.columns;
          shrink.downscale = downscale;
          AFA_CUDA_LAUNCH("pseudo_labels", launch_shrink(shrink, scope.stream()));
          affinity = par_affinity_cuda(small, dilations, w1, w2);
        }
        maps = par_iterations_cuda("pseudo_labels", ring_stencil(dilations), affinity, maps, num_iter,
                                   part_of(packed.mask, first, count), std::nullopt, false);
      }
    }
    choice.maps = maps.const_data_ptr();
    choice.box = boxes ? pointer(boxes) + 4 * first : nullptr;
    choice.labels = static_cast<int64_t*>(labels.mutable_data_ptr()) + first * pixels;
    AFA_CUDA_LAUNCH("pseudo_labels", launch_label_choices(choice, scope.stream()));
  }
  return labels;
}

Tensor refine_labels_cuda(const Tensor& images, const Tensor& scores, const std::optional<Tensor>& low_scores,
                          const Tensor& present, const std::optional<Tensor>& class_index,
                          const std::optional<Tensor>& box, const std::optional<Tensor>& weights,
                          int64_t downscale, const std::vector<int64_t>& dilations, int64_t num_iter,
                          double w1, double w2, int64_t max_classes, int64_t ignore_index) {
  ChoiceParams choice = check_refine_labels(images, scores, low_scores, present, class_index, box, weights,
                                            downscale, dilations, num_iter, max_classes, ignore_index);
  const CudaScope scope(scores);
  const int64_t batch = choice.batch, height = choice.height, width = choice.width;
  const Region whole = region_of(nullptr, 0, height, width, downscale);
  const Tensor labels = empty(scores, {batch, height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  const std::optional<Tensor> boxes = dense(box);
  PackParams pack;
  pack.thresholds = choice.thresholds;
  pack.background_map = true;
  pack.height = height;
  pack.width = width;
  pack.downscale = downscale;
  pack.box = pointer(boxes);
  const DeviceClasses packed("refine_labels", scope, pack, present, class_index, max_classes,
                             box.has_value());
  const ScalarType type = sum_type(scores);
  const Tensor dense_scores[2] = {torch::stable::contiguous(scores),
                                  torch::stable::contiguous(low_scores ? *low_scores : scores)};
  PlaceParams place;
  place.kind = kind_of(scores, "scores");
  place.thresholds = choice.thresholds;
  place.planes = scores.size(1);
  place.height = height;
  place.width = width;
  place.downscale = downscale;
  place.grid_height = scores.size(2);
  place.grid_width = scores.size(3);
  place.map_height = choice.map_height = whole.small_height;
  place.map_width = choice.map_width = whole.small_width;
  choice.rows.from = place.map_height;
  choice.rows.to = height;
  choice.columns.from = place.map_width;
  choice.columns.to = width;
  choice.regional = box.has_value();
  choice.downscale = downscale;

  const int64_t maps_of_image = (packed.classes.most + 1) * choice.thresholds;
  const int64_t weight_planes = 8 * static_cast<int64_t>(dilations.size()) + images.size(1);
  const int64_t together = images_at_once(batch, maps_of_image, weight_planes, whole, scores);
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t count = std::min(together, batch - first);
    const Tensor mask = part_of(packed.mask, first, count);
    const std::optional<Tensor> extent = part_of(packed.extent, first, count);
    place.batch = choice.batch = count;
    place.classes = choice.classes = part_of(packed.classes, first);
    place.box = choice.box = boxes ? pointer(boxes) + 4 * first : nullptr;
    for (int t = 0; t < kMaxThresholds; ++t) {
      const int64_t skipped = first * place.planes * place.grid_height * place.grid_width;
      place.scores[t] = advance(dense_scores[t].const_data_ptr(), skipped, scores);
    }
    Tensor maps = empty(scores, {count, maps_of_image, place.map_height, place.map_width}, type);
    place.maps = maps.mutable_data_ptr();
    AFA_CUDA_LAUNCH("refine_labels", launch_label_place(place, scope.stream()));
    if (num_iter > 0) {
      Tensor affinity;
      if (weights) {
        affinity = part_of(*weights, first, count);
      } else {
        const Tensor colors = readable_images(part_of(images, first, count), type);
        const Tensor small = empty(images, {count, images.size(1), place.map_height, place.map_width}, type);
        ShrinkParams shrink = shrink_params(colors, small);
        shrink.rows.from = height;
        shrink.rows.to = place.map_height;
        shrink.columns.from = width;
        shrink.columns.to = place.map_width;
        shrink.box = place.box;
        shrink.downscale = downscale;
        AFA_CUDA_LAUNCH("refine_labels", launch_shrink(shrink, scope.stream()));
        affinity = par_affinity_within_cuda(small, dilations, w1, w2, extent);
      }
      maps = par_iterations_cuda("refine_labels", ring_stencil(dilations), affinity, maps, num_iter, mask,
                                 extent, false);
    }
    choice.maps = maps.const_data_ptr();
    choice.labels = static_cast<int64_t*>(labels.mutable_data_ptr()) + first * height * width;
    AFA_CUDA_LAUNCH("refine_labels", launch_label_choices(choice, scope.stream()));
  }
  return labels;
}

}  // namespace afa
