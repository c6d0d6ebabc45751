// Pseudo labels from class activation maps and images (AFA, CVPR 2022): what comes before and after PAR.
// Resizing is bilinear with align_corners=False, as in F.interpolate.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

constexpr int kMaxThresholds = 2;

// Where each of `to` samples along one axis falls among `from`; the tables, of `to` entries, are for the CPU.
struct Axis {
  int64_t from = 0, to = 0;
  const int32_t* left = nullptr;
  const int32_t* right = nullptr;
  const void* weight = nullptr;  // the share of `right`, in the type sums are formed in
};

struct ShrinkParams {
  Kind kind = Kind::f32;     // float32 or float64: of `out`, and of `in` where that is not bytes
  bool bytes = false;        // `in` is uint8, and stands for values over 255
  const void* in = nullptr;  // [planes, rows.from, columns.from] contiguous
  void* out = nullptr;       // [planes, rows.to, columns.to]
  int64_t planes = 0;
  Axis rows, columns;
};

// An image's present classes are packed: its j-th is map `plane[j]` of the CAMs and has label `number[j]`.
struct LabelParams {
  Kind kind = Kind::f32;  // of the CAMs; the refined maps are float64 for float64, else float32
  int64_t batch = 0, classes = 0, most = 0, thresholds = 0;
  double background[kMaxThresholds];  // the background's scores, highest first
  double total = 1;                   // what PAR makes of a constant 1
  const void* cams = nullptr;         // [B, C, H, W]; CPU: unit stride in x, in the type of the maps
  int64_t cam_stride_b = 0, cam_stride_c = 0, cam_stride_y = 0, cam_stride_x = 1;
  int32_t* plane = nullptr;      // [B, most]
  int32_t* number = nullptr;     // [B, most]
  int32_t* count = nullptr;      // [B]; -1: more than `most`, and the image is ignored as a whole
  void* maps = nullptr;          // [B, most * thresholds, h, w]: map j * thresholds + t
  const int64_t* box = nullptr;  // [B, 4] (y0, y1, x0, x1), or null
  int64_t* labels = nullptr;     // [B, H, W]
  int32_t ignore = 255;
  Axis down_rows, down_columns;  // H to h, W to w
  Axis up_rows, up_columns;      // h to H, w to W
};

// CUDA: fills plane, number, count and mask from the flags of presence.
struct PackParams {
  int64_t batch = 0, classes = 0, most = 0, thresholds = 0;
  const bool* present = nullptr;         // [B, C]
  const int64_t* class_index = nullptr;  // [B, C], or null for 0, 1, ...
  int32_t* plane = nullptr;
  int32_t* number = nullptr;
  int32_t* count = nullptr;
  bool* mask = nullptr;  // [B, most * thresholds]
};

namespace {  // one copy for each file: see geometry.h

template <typename T>
struct Tap {
  int64_t left, right;
  T weight;
};

// In T throughout, as F.interpolate computes it, so that both round alike.
template <typename T>
AFA_HOST_DEVICE inline Tap<T> tap(const Axis& axis, int64_t i) {
  const T scale = static_cast<T>(axis.from) / static_cast<T>(axis.to);
  T at = scale * (static_cast<T>(i) + static_cast<T>(0.5)) - static_cast<T>(0.5);
  if (at < 0) at = 0;
  const int64_t left = clamp_index(static_cast<int64_t>(at), axis.from);
  return {left, clamp_index(left + 1, axis.from), at - static_cast<T>(left)};
}

}  // namespace

// CPU. `shrink_rows`: rows of the planes * rows.to; `label_score_rows`: of the B * h; `label_choice_rows`: of
// the B * H. `scratch` holds score_scratch and choice_scratch doubles.
AFA_SIMD_DECLARE(void shrink_rows(const ShrinkParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void label_score_rows(const LabelParams& p, int64_t begin, int64_t end, double* scratch))
AFA_SIMD_DECLARE(void label_choice_rows(const LabelParams& p, int64_t begin, int64_t end, double* scratch))

constexpr int64_t kRowSlack = 16;  // rows in scratch are read and written by whole vectors
inline int64_t score_scratch(const LabelParams& p) {
  return 2 * p.most * (p.down_columns.to + kRowSlack);
}
inline int64_t choice_scratch(const LabelParams& p) {
  return p.up_columns.from + 2 + 5 * p.up_columns.to;
}

// CUDA: return nullptr, or an error's text.
const char* label_pack_cuda(const PackParams& p, void* stream);
const char* shrink_cuda(const ShrinkParams& p, void* stream);
const char* label_scores_cuda(const LabelParams& p, void* stream);
const char* label_choices_cuda(const LabelParams& p, void* stream);

}  // namespace afa
