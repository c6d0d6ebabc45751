// Pseudo labels from class activation maps and images (AFA, CVPR 2022): the steps before and after PAR.
// Resizing is bilinear with align_corners=False, as in F.interpolate, unless noted otherwise.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

constexpr int kMaxThresholds = 2;

// Positions of `to` samples along one axis of `from` samples; the tables, with `to` entries, are for the CPU.
struct Axis {
  int64_t from = 0, to = 0;
  const int32_t* left = nullptr;
  const int32_t* right = nullptr;
  const void* weight = nullptr;  // the share of `right`, in the accumulation type
};

// The part of an image that is refined, in pixels, and its size in PAR.
struct Region {
  int64_t y = 0, x = 0, height = 0, width = 0, small_height = 0, small_width = 0;
};

// Each image's present classes, packed: its j-th is map plane[b * most + j] of C and has label number[...].
struct Classes {
  int64_t most = 0;
  const int32_t* plane = nullptr;   // [B, most]
  const int32_t* number = nullptr;  // [B, most]
  const int32_t* count = nullptr;   // [B]; -1: more than `most`, and the image is ignored as a whole
};

// CUDA: computes the arrays of Classes, and the inputs of PAR, from the flags of present classes.
struct PackParams {
  int64_t batch = 0, classes = 0, most = 0, thresholds = 0, height = 0, width = 0, downscale = 1;
  bool background_map = false;           // maps 0 to thresholds - 1 are the background's
  const bool* present = nullptr;         // [B, C]
  const int64_t* class_index = nullptr;  // [B, C], or null for 0, 1, ...
  const int64_t* box = nullptr;          // [B, 4] (y0, y1, x0, x1), or null
  int32_t* plane = nullptr;
  int32_t* number = nullptr;
  int32_t* count = nullptr;
  bool* mask = nullptr;       // [B, maps]
  int64_t* extent = nullptr;  // [B, 2]: the region's small height and width; or null
};

// Images as inputs of PAR: downscaled, and bytes divided by 255.
struct ShrinkParams {
  Kind kind = Kind::f32;     // float32 or float64: of `out`, and of `in` where that is not bytes
  bool bytes = false;        // `in` is uint8
  const void* in = nullptr;  // planes of rows.from x columns.from, unit stride in x
  int64_t in_stride_p = 0, in_stride_y = 0;
  void* out = nullptr;  // [planes, rows.to, columns.to]
  int64_t planes = 0;
  Axis rows, columns;
  const int64_t* box = nullptr;  // CUDA: each image's region goes to the top left corner of its planes
  int64_t channels = 1, downscale = 1;
};

// Maps of PAR from CAMs: the softmax over a background score and the present classes, without the background.
struct ScoreParams {
  Kind kind = Kind::f32;  // of the CAMs; maps are float64 for float64, else float32
  int64_t batch = 0, thresholds = 0;
  double background[kMaxThresholds] = {};  // highest first
  const void* cams = nullptr;              // [B, C, H, W]; CPU: unit stride in x, in the type of the maps
  int64_t cam_stride_b = 0, cam_stride_c = 0, cam_stride_y = 0, cam_stride_x = 1;
  Classes classes;
  void* maps = nullptr;  // [B, most * thresholds, rows.to, columns.to]: map j * thresholds + t
  Axis rows, columns;
};

// Maps of PAR from scores on any grid over the image: upsampled to the image, cropped to the region and
// resized to its downscaled size with align_corners=True, in one step.
struct PlaceParams {
  Kind kind = Kind::f32;  // of the scores; CPU and maps: the accumulation type
  int64_t batch = 0, thresholds = 0, planes = 0, height = 0, width = 0, downscale = 1;
  const void* scores[kMaxThresholds] = {};  // [B, planes, grid_height, grid_width], background first
  int64_t grid_height = 0, grid_width = 0;
  Classes classes;
  void* maps = nullptr;  // [B, (most + 1) * thresholds, map_height, map_width], in the top left corner
  int64_t map_height = 0, map_width = 0;
  const int64_t* box = nullptr;  // CUDA
  // CPU: four samples and their weights for each row and column of the maps.
  const int32_t* row_at = nullptr;
  const int32_t* column_at = nullptr;
  const void* row_weight = nullptr;
  const void* column_weight = nullptr;
};

// Labels from refined maps: upsampling, the maximum of background and classes for each threshold, and the
// combination of the thresholds.
struct ChoiceParams {
  Kind kind = Kind::f32;  // of the maps
  int64_t batch = 0, thresholds = 0, height = 0, width = 0;
  bool background_map = false;  // otherwise the background is `total` minus the classes
  double total = 1;
  const void* maps = nullptr;  // [B, maps, map_height, map_width]
  int64_t map_height = 0, map_width = 0;
  Classes classes;
  const int64_t* box = nullptr;  // [B, 4], or null; outside all is ignored
  int64_t* labels = nullptr;     // [B, height, width]
  int32_t ignore = 255;
  Axis rows, columns;     // from maps to the image, or to its region
  int64_t y = 0, x = 0;   // CPU: the first pixel of that region
  bool regional = false;  // CUDA: the maps cover each box's region, so that rows and columns are the region's
  int64_t downscale = 1;
};

namespace {  // one copy for each file: see geometry.h

template <typename T>
struct Tap {
  int64_t left, right;
  T weight;
};

// All operations are in T, as in F.interpolate, so that both round the same way.
template <typename T>
AFA_HOST_DEVICE inline Tap<T> tap(const Axis& axis, int64_t i) {
  const T scale = static_cast<T>(axis.from) / static_cast<T>(axis.to);
  T at = scale * (static_cast<T>(i) + static_cast<T>(0.5)) - static_cast<T>(0.5);
  if (at < 0) at = 0;
  const int64_t left = clamp_index(static_cast<int64_t>(at), axis.from);
  return {left, clamp_index(left + 1, axis.from), at - static_cast<T>(left)};
}

template <typename T>
struct FourTaps {
  int64_t at[4];
  T weight[4];
};

// Position of pixel i of `to` in the `grid` samples that cover the `size` pixels of the image. The `to`
// pixels cover `from` pixels starting at `start`, with align_corners=True.
template <typename T>
AFA_HOST_DEVICE inline FourTaps<T> place_taps(int64_t i, int64_t from, int64_t to, int64_t start,
                                              int64_t grid, int64_t size) {
  const T scale = to > 1 ? static_cast<T>(from - 1) / static_cast<T>(to - 1) : T{0};
  const T position = scale * static_cast<T>(i);
  const int64_t left = clamp_index(static_cast<int64_t>(position), from);
  const int64_t pixel[2] = {left, clamp_index(left + 1, from)};
  const T share[2] = {1 - (position - static_cast<T>(left)), position - static_cast<T>(left)};
  FourTaps<T> taps;
  Axis axis;
  axis.from = grid;
  axis.to = size;
  for (int n = 0; n < 2; ++n) {
    const Tap<T> sample = tap<T>(axis, start + pixel[n]);
    taps.at[2 * n] = sample.left;
    taps.at[2 * n + 1] = sample.right;
    taps.weight[2 * n] = share[n] * (1 - sample.weight);
    taps.weight[2 * n + 1] = share[n] * sample.weight;
  }
  return taps;
}

// The box clipped to the image; the whole image without one.
AFA_HOST_DEVICE inline Region region_of(const int64_t* box, int64_t b, int64_t height, int64_t width,
                                        int64_t downscale) {
  Region r;
  r.height = height;
  r.width = width;
  if (box != nullptr) {
    const int64_t* edge = box + 4 * b;
    r.y = clamp_index(edge[0], height + 1);
    r.x = clamp_index(edge[2], width + 1);
    r.height = clamp_index(edge[1], height + 1) - r.y;
    r.width = clamp_index(edge[3], width + 1) - r.x;
    if (r.height <= 0 || r.width <= 0) r.height = r.width = 0;
  }
  if (r.height > 0) {
    r.small_height = r.height < downscale ? 1 : r.height / downscale;
    r.small_width = r.width < downscale ? 1 : r.width / downscale;
  }
  return r;
}

}  // namespace

// CPU, rows `begin` to `end` of, in this order: planes * rows.to; B * rows.to; maps * map_height of one
// image; B * height. The function below returns the number of doubles in `scratch`.
AFA_SIMD_DECLARE(void shrink_rows(const ShrinkParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void label_score_rows(const ScoreParams& p, int64_t begin, int64_t end, double* scratch))
AFA_SIMD_DECLARE(void label_place_rows(const PlaceParams& p, int64_t begin, int64_t end, double* scratch))
AFA_SIMD_DECLARE(void label_choice_rows(const ChoiceParams& p, int64_t begin, int64_t end, double* scratch))

constexpr int64_t kRowSlack = 16;  // rows in scratch are read and written in whole vectors
inline int64_t score_scratch(const ScoreParams& p) {
  return 2 * p.classes.most * (p.columns.to + kRowSlack);
}
inline int64_t choice_scratch(const ChoiceParams& p) {
  return p.columns.from + 2 + 6 * p.columns.to;
}

// CUDA: return nullptr, or an error message.
const char* launch_label_pack(const PackParams& p, void* stream);
const char* launch_shrink(const ShrinkParams& p, void* stream);
const char* launch_label_scores(const ScoreParams& p, void* stream);
const char* launch_label_place(const PlaceParams& p, void* stream);
const char* launch_label_choices(const ChoiceParams& p, void* stream);

}  // namespace afa
