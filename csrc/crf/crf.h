// The permutohedral lattice ("Fast High-Dimensional Filtering Using the Permutohedral Lattice", Adams, Baek
// and Davis 2010) and the mean field of a dense CRF on it (Krahenbuhl and Koltun 2011).
//
// A lattice is built once from an image's features and kept in one int32 buffer, whose parts LatticeLayout
// gives. Filtering splats pixels onto the vertices of their simplices, blurs along dims + 1 directions, and
// slices back. Splatting sums over each vertex's own list of pixels, in their order: no atomics, and the
// result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

constexpr int kMaxFeatures = 6;
constexpr int64_t kLatticeHeader = 16;  // words; the first is the number of vertices
constexpr int64_t kChunk = 8;           // channels that the CPU kernels take together
constexpr int64_t kMaxChunks = 4;       // chunks of a tile: the width of a vertex table
constexpr int64_t kPixelBlock = 32;     // pixels whose channels a CPU task keeps in cache
constexpr int64_t kBuildBlock = 8192;   // pixels whose vertices are found together

// Which pixel factors surround the filter: 1 / sqrt(norm) on both sides, or 1 / norm on one.
enum class Normalize : int32_t { none, symmetric, before, after };

// Where the parts of one image's buffer begin, in words. `vertices` is at most pixels * (dims + 1); lists are
// stored without gaps, so that only what is used is touched.
struct LatticeLayout {
  int64_t pixels = 0, dims = 0;
  AFA_HOST_DEVICE int64_t corners() const { return dims + 1; }
  AFA_HOST_DEVICE int64_t entries() const { return pixels * corners(); }
  AFA_HOST_DEVICE int64_t offset() const { return kLatticeHeader; }             // [N, E] vertex of a corner
  AFA_HOST_DEVICE int64_t weight() const { return offset() + entries(); }       // [N, E] float
  AFA_HOST_DEVICE int64_t pixel() const { return weight() + entries(); }        // [N * E], by vertex
  AFA_HOST_DEVICE int64_t share() const { return pixel() + entries(); }         // [N * E] float, by vertex
  AFA_HOST_DEVICE int64_t norm() const { return share() + entries(); }          // [N] float: filtered ones
  AFA_HOST_DEVICE int64_t start() const { return norm() + pixels; }             // [V + 1]
  AFA_HOST_DEVICE int64_t neighbor() const { return start() + entries() + 1; }  // [E, V, 2]; V where missing
  AFA_HOST_DEVICE int64_t words() const { return neighbor() + 2 * corners() * entries(); }
};

struct Lattice {
  int64_t pixels = 0, dims = 0, vertices = 0;
  const int32_t* offset = nullptr;
  const float* weight = nullptr;
  const int32_t* pixel = nullptr;
  const float* share = nullptr;
  const float* norm = nullptr;
  const int32_t* start = nullptr;
  const int32_t* neighbor = nullptr;
};

namespace {  // one copy for each file: see geometry.h

AFA_HOST_DEVICE inline Lattice lattice_at(const LatticeLayout& layout, const int32_t* words) {
  Lattice lattice;
  lattice.pixels = layout.pixels;
  lattice.dims = layout.dims;
  lattice.vertices = words[0];
  lattice.offset = words + layout.offset();
  lattice.weight = reinterpret_cast<const float*>(words + layout.weight());
  lattice.pixel = words + layout.pixel();
  lattice.share = reinterpret_cast<const float*>(words + layout.share());
  lattice.norm = reinterpret_cast<const float*>(words + layout.norm());
  lattice.start = words + layout.start();
  lattice.neighbor = words + layout.neighbor();
  return lattice;
}

// A vertex's key in 64 bits: its remainder in the low 3, then its dims coordinates divided by dims + 1, each
// with a bias.
AFA_HOST_DEVICE inline int key_bits(int64_t dims) {
  const int64_t bits = 60 / dims;
  return static_cast<int>(bits < 21 ? bits : 21);
}
AFA_HOST_DEVICE inline int64_t key_bias(int64_t dims) {
  return int64_t{1} << (key_bits(dims) - 1);
}
// Divided coordinates stay below this, so that neighbors do not leave their bits.
AFA_HOST_DEVICE inline int64_t key_limit(int64_t dims) {
  return key_bias(dims) - 4;
}
AFA_HOST_DEVICE inline uint64_t key_unit(int64_t dims, int64_t axis) {
  return axis < dims ? uint64_t{1} << (3 + axis * key_bits(dims)) : 0;
}
// The neighbor along an axis: dims added to that coordinate, 1 taken from all others.
AFA_HOST_DEVICE inline uint64_t key_neighbor(uint64_t key, int64_t dims, int64_t axis) {
  const uint64_t up = key_unit(dims, axis);
  if ((key & 7) != 0) return key - 1 + up;
  uint64_t all = 0;
  for (int64_t i = 0; i < dims; ++i) all += key_unit(dims, i);
  return key + static_cast<uint64_t>(dims) - all + up;
}
// The other way.
AFA_HOST_DEVICE inline uint64_t key_neighbor_below(uint64_t key, int64_t dims, int64_t axis) {
  const uint64_t up = key_unit(dims, axis);
  if ((key & 7) != static_cast<uint64_t>(dims)) return key + 1 - up;
  uint64_t all = 0;
  for (int64_t i = 0; i < dims; ++i) all += key_unit(dims, i);
  return key - static_cast<uint64_t>(dims) + all - up;
}
AFA_HOST_DEVICE inline uint64_t key_hash(uint64_t key) {
  key ^= key >> 32;
  key *= 0x9e3779b97f4a7c15u;
  return key ^ (key >> 29);
}

// What the filter's sum is multiplied by: Krahenbuhl's constant for the gain of blurring.
AFA_HOST_DEVICE inline float lattice_gain(int64_t dims) {
  return 1.0f / (1.0f + 1.0f / static_cast<float>(int64_t{1} << dims));
}

}  // namespace

// ---- CUDA: one image; `words` is its buffer ----

constexpr int kDigitBits = 5;
constexpr int64_t kDigits = 1 << kDigitBits;
constexpr int64_t kSortItems = 32;  // of a thread
constexpr int64_t kSortTile = 128 * kSortItems;

struct LatticeBuildParams {
  LatticeLayout layout;
  const float* features = nullptr;  // [dims, N]
  float scale[kMaxFeatures] = {};
  int32_t* words = nullptr;
  uint64_t* keys[2] = {};     // [N * E] each; the second is a copy to sort into
  int32_t* entries[2] = {};   // likewise: which corner of which pixel
  int32_t* counts = nullptr;  // [kDigits, tiles]
  float* values[2] = {};      // [N * E] each: the filter of ones
};

// A step of the filter, on channels [first, first + width) of `channels`.
struct LatticeStepParams {
  LatticeLayout layout;
  Kind kind = Kind::f32;  // float32 or float64: of all values
  const int32_t* words = nullptr;
  Normalize normalize = Normalize::none;
  int64_t first = 0, width = 0, channels = 0;
  int64_t axis = 0;
  const void* in = nullptr;  // splat: rows [N, channels], or null for ones; else a table [V, width]
  void* out = nullptr;       // slice: rows [N, channels]; else a table
  float gain = 1;            // slice
  bool add = false;          // slice: to what is there
};

// Planes [channels, N] from and to rows [N, channels].
struct RowsParams {
  Kind kind = Kind::f32;  // of the planes; rows are in the type of sums
  int64_t pixels = 0, channels = 0;
  const void* from = nullptr;
  void* to = nullptr;
  const bool* mask = nullptr;  // [channels]: from planes, others get -1e30; to planes, others get 0
  bool log = false;            // log(max(value, 1e-5)), rows in float32
  bool negate = false;         // -value, rows in float32
};

struct SoftmaxParams {
  int64_t pixels = 0, channels = 0;
  const float* logits = nullptr;         // [N, C]
  const float* filtered = nullptr;       // [N, C]: weighted sum of both kernels; or null
  const float* compatibility = nullptr;  // [C, C], or null
  float* out = nullptr;                  // [N, C]
};

const char* launch_lattice_build(const LatticeBuildParams& p, void* stream);
const char* launch_lattice_splat(const LatticeStepParams& p, void* stream);
const char* launch_lattice_blur(const LatticeStepParams& p, void* stream);
const char* launch_lattice_slice(const LatticeStepParams& p, void* stream);
const char* launch_rows_from_planes(const RowsParams& p, void* stream);
const char* launch_planes_from_rows(const RowsParams& p, void* stream);
const char* launch_field_softmax(const SoftmaxParams& p, void* stream);

// ---- CPU ----

// The CPU kernels number pixels along a Z-order curve of blocks of 8 x 4: what is near in the image is near
// in memory, in rows as in columns. `order` maps these numbers to y * W + x.
constexpr int64_t kBlockWidth = 8, kBlockHeight = 4;

struct SimplexParams {
  int64_t pixels = 0, dims = 0;
  const int32_t* order = nullptr;
  const float* features = nullptr;  // [dims, N]
  float* weight = nullptr;          // [N, dims + 1]
  float scale[kMaxFeatures] = {};
};

// One tile of channels.
struct SplatParams {
  Lattice lattice;
  const void* in = nullptr;  // [N, stride] from the tile's first channel on
  int64_t stride = 0, chunks = 1;
  const float* share = nullptr;  // by vertex, as Lattice::share
  void* table = nullptr;         // [V + 1, chunks * kChunk]; the last row is zeroed
};
struct BlurParams {
  Lattice lattice;
  int64_t axis = 0, chunks = 1;
  const void* in = nullptr;
  void* out = nullptr;
};

struct GatherParams {
  Kind kind = Kind::f32;
  int64_t pixels = 0, stride = 0, channels = 0, chunks = 1;
  const int32_t* order = nullptr;
  const void* planes = nullptr;    // [channels, N], or all planes if `index`
  const int32_t* index = nullptr;  // which planes
  const float* factor = nullptr;   // [N]
  void* rows = nullptr;            // [N, stride]
  bool log = false;                // log(max(value, 1e-5)) instead of the value
  bool negate = false;             // -value instead
  float padding = 0;               // of channels up to the chunks' end
};
struct SliceParams {
  Kind kind = Kind::f32;
  Lattice lattice;
  int64_t channels = 0, chunks = 1;
  const int32_t* order = nullptr;
  const void* table = nullptr;
  const float* factor = nullptr;  // [N]
  void* planes = nullptr;         // [channels, N]
};

// One step of the mean field: rows of logits plus both kernels' filtered values, through a softmax.
constexpr int kMaxKernels = 2;
struct FieldParams {
  int64_t pixels = 0, channels = 0;
  int64_t row = 0;  // channels padded to chunks
  int kernels = 0;
  struct {
    Lattice lattice;
    const float* table = nullptr;   // tile after tile: [V + 1, chunks * kChunk]
    const float* factor = nullptr;  // [N]: normalization, gain and weight
  } kernel[kMaxKernels];
  const float* logits = nullptr;         // [N, row]
  const float* compatibility = nullptr;  // [channels, row], or null for Potts
  float* rows = nullptr;                 // [N, row]; where null, the planes are written:
  float* planes = nullptr;               // [all channels, N]
  const int32_t* order = nullptr;
  const int32_t* index = nullptr;  // [channels]: the plane of each channel
};

namespace {

inline int64_t chunks_for(int64_t channels) {
  return (channels + kChunk - 1) / kChunk;
}
// Chunks are spread evenly over tiles.
inline int64_t tiles_for(int64_t chunks) {
  return (chunks + kMaxChunks - 1) / kMaxChunks;
}
inline int64_t tile_begin(int64_t tile, int64_t chunks) {
  return chunks * tile / tiles_for(chunks);
}
inline int64_t field_scratch(const FieldParams& p) {
  return (kPixelBlock + 1) * p.row;
}

}  // namespace

// Keys [end - begin, dims + 1] and weights of pixels; *valid is cleared where a feature is not finite or out
// of range.
AFA_SIMD_DECLARE(void lattice_simplices(const SimplexParams& p, int64_t begin, int64_t end, uint64_t* keys,
                                        bool* valid))
// Vertices.
AFA_SIMD_DECLARE(void lattice_splat(Kind kind, const SplatParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void lattice_blur(Kind kind, const BlurParams& p, int64_t begin, int64_t end))
// Blocks of kPixelBlock pixels.
AFA_SIMD_DECLARE(void lattice_gather(const GatherParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void lattice_slice(const SliceParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void field_step(const FieldParams& p, int64_t begin, int64_t end, float* scratch))

}  // namespace afa
