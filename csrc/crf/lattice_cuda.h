// The lattice and the mean field on CUDA: parameters of the launches. `words` is the buffer of one image.
#pragma once

#include "crf/lattice.h"

namespace afa {

struct Lattice {
  int64_t pixels = 0, dims = 0, vertices = 0;
  const int32_t* offset = nullptr;
  const float* weight = nullptr;
  const int32_t* pixel = nullptr;  // ~pixel where a vertex begins
  const float* share = nullptr;
  const int32_t* first = nullptr;
  const float* norm = nullptr;
  const int32_t* neighbor = nullptr;
};

namespace {

AFA_HOST_DEVICE inline Lattice lattice_at(const LatticeLayout& layout, const int32_t* words) {
  Lattice lattice;
  lattice.pixels = layout.pixels;
  lattice.dims = layout.dims;
  lattice.vertices = words[0];
  lattice.offset = words + layout.offset();
  lattice.weight = reinterpret_cast<const float*>(words + layout.weight());
  lattice.pixel = words + layout.pixel();
  lattice.share = reinterpret_cast<const float*>(words + layout.share());
  lattice.first = words + layout.first();
  lattice.norm = reinterpret_cast<const float*>(words + layout.norm());
  lattice.neighbor = words + layout.neighbor();
  return lattice;
}

}  // namespace

constexpr int kDigitBits = 8;
constexpr int64_t kDigits = 1 << kDigitBits;
constexpr int64_t kSortThreads = kDigits;
constexpr int64_t kSortTile = 8 * kSortThreads;

namespace {
AFA_HOST_DEVICE inline int64_t sort_tiles(int64_t items) {
  return (items + kSortTile - 1) / kSortTile;
}
}  // namespace

struct LatticeBuildParams {
  LatticeLayout layout;
  const float* features = nullptr;  // [dims, N]
  float scale[kMaxFeatures] = {};
  int32_t* words = nullptr;
  uint64_t* keys[2] = {};     // [N * E] each; the second is a copy to sort into
  int32_t* entries[2] = {};   // likewise: which corner of which pixel
  int32_t* counts = nullptr;  // [kDigits, tiles], then [kDigits] totals
};

// A step of the filter, on channels [first, first + width) of rows [N, row]. Rows and tables are padded to
// vectors.
struct LatticeStepParams {
  LatticeLayout layout;
  Kind kind = Kind::f32;  // float32 or float64: of all values
  const int32_t* words = nullptr;
  Normalize normalize = Normalize::none;
  int64_t first = 0, width = 0, row = 0;
  int64_t vector = 1;  // channels of a vector: 1, 2 or 4
  int64_t axis = 0;
  const void* in = nullptr;  // splat: rows, or null for ones; else a table [V, width]
  void* out = nullptr;       // slice: rows; else a table
  void* heads = nullptr;     // splat: [runs, width]
  float gain = 1;            // slice
};

// A step of one lattice, or of two in one launch. These have the same pixels, channels and rows, and share
// tables of `room` rows, where the second follows the first. That is enough for the second lattice, and for
// both unless nearly every corner of every pixel is a vertex. Otherwise only the second is in the tables: no
// step does anything for the first, except overflow, which filters by it, and slice, which adds the rows that
// overflow has written.
struct LatticeStepsParams {
  int64_t begin = 0, count = 0;  // of[begin], ..., of[count - 1]
  int64_t room = 0;
  void* spare = nullptr;  // overflow: two tables for the first lattice
  LatticeStepParams of[2];
};

// Planes [channels, N] from and to rows [N, row].
struct RowsParams {
  Kind kind = Kind::f32;  // of the planes; rows are in the type of sums
  int64_t pixels = 0, channels = 0, row = 0, vector = 1;
  const void* from = nullptr;
  void* to = nullptr;
};

struct LogitsParams {
  Kind kind = Kind::f32;  // of the scores
  int64_t pixels = 0, channels = 0;
  const void* scores = nullptr;  // [C, N]
  const bool* mask = nullptr;    // [C]: others get -1e30
  bool probabilities = false;    // log(max(score, 1e-5)); else -score
  float* logits = nullptr;       // [C, N]
};

// softmax(logits + filtered)
struct SoftmaxParams {
  int64_t pixels = 0, channels = 0, row = 0;
  int lanes = 1;                         // of a pixel: a power of two
  float* planes = nullptr;               // [C, N]: logits
  const float* filtered = nullptr;       // [N, row], weighted sums; or null
  const float* compatibility = nullptr;  // [C, C], or null
  float* out = nullptr;                  // [N, row], can be `filtered`; null: to `planes`
  const bool* mask = nullptr;            // [C]: in planes, others get 0
};

const char* launch_lattice_build(const LatticeBuildParams& p, void* stream);
const char* launch_lattice_splat(const LatticeStepsParams& p, void* stream);
const char* launch_lattice_overflow(const LatticeStepsParams& p, void* stream);
const char* launch_lattice_blur(const LatticeStepsParams& p, void* stream);
// The sum of the lattices' filters.
const char* launch_lattice_slice(const LatticeStepsParams& p, void* stream);
const char* launch_rows_from_planes(const RowsParams& p, void* stream);
const char* launch_planes_from_rows(const RowsParams& p, void* stream);
const char* launch_logits(const LogitsParams& p, void* stream);
// The slice of all channels, and the softmax. `lanes` are enough for one vector each; no compatibility.
const char* launch_field_slice(const LatticeStepsParams& steps, const SoftmaxParams& p, void* stream);
const char* launch_field_softmax(const SoftmaxParams& p, void* stream);

}  // namespace afa
