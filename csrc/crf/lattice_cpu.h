// The lattice on the CPU: the parts of its buffer, and the kernels that are compiled once per SIMD level.
//
// Pixels are numbered along a Z-order curve and divided into blocks. A block has its own rows for the
// vertices of its pixels, which stay in the second-level cache while its pixels are splatted, in order; the
// rows of all blocks are then merged, in order, into the table of the vertices. So threads never share a row,
// and sums do not depend on the number of threads.
//
// Channels are contiguous for each pixel and vertex, and padded to chunks of 8.
#pragma once

#include <cstdint>

#include "crf/lattice.h"

namespace afa {

constexpr int64_t kChunk = 8;        // channels of a vector
constexpr int64_t kMaxChunks = 4;    // chunks of a tile: the channels that the filter takes at a time
constexpr int64_t kPixelBlock = 32;  // pixels whose rows are kept in the first-level cache
constexpr int64_t kBlock = 4096;     // pixels of a block; its vertices have numbers of 16 bits
static_assert(kBlock % kPixelBlock == 0 && kBlock * (kMaxFeatures + 1) < (1 << 16));

// Pixels are numbered along a Z-order curve through tiles of 8 x 4 pixels: neighbors in the image, in rows
// and in columns, are near in memory. An array `order` has the position y * W + x of each pixel.
constexpr int64_t kTileWidth = 8, kTileHeight = 4;

inline int64_t blocks_of(int64_t pixels) {
  return (pixels + kBlock - 1) / kBlock;
}

struct CpuLattice {
  int64_t pixels = 0, dims = 0;
  int64_t vertices = 0, rows = 0;   // rows: the sum of the blocks' numbers of vertices
  const float* weight = nullptr;    // [N, E]
  const float* norm = nullptr;      // [N]
  const uint16_t* local = nullptr;  // [N, E]: the row of a corner, from its block's first row
  const int32_t* block = nullptr;   // [blocks + 1]: first row of each block
  const int32_t* vertex = nullptr;  // [rows]: the vertex of each row
  const int32_t* start = nullptr;   // [V + 1]: into `row`
  const int32_t* row = nullptr;     // [rows]: the rows of each vertex, in order
  const int32_t* chain = nullptr;   // [E, V]: the vertices in the order of BlurParams
};

namespace {

inline CpuLattice cpu_lattice_at(const LatticeLayout& layout, const int32_t* words) {
  CpuLattice lattice;
  lattice.pixels = layout.pixels;
  lattice.dims = layout.dims;
  lattice.vertices = words[0];
  lattice.rows = words[1];
  const int64_t entries = layout.entries();
  lattice.weight = reinterpret_cast<const float*>(words + layout.weight());
  lattice.norm = reinterpret_cast<const float*>(words + layout.norm());
  const int32_t* next = words + layout.offset();
  lattice.local = reinterpret_cast<const uint16_t*>(next);
  lattice.block = next += (entries + 1) / 2;
  lattice.vertex = next += blocks_of(layout.pixels) + 1;
  lattice.start = next += entries;
  lattice.row = next += entries + 1;
  lattice.chain = next += entries;
  return lattice;
}

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

}  // namespace

struct SimplexParams {
  int64_t pixels = 0, dims = 0;
  const int32_t* order = nullptr;
  const float* features = nullptr;  // [dims, N]
  float* weight = nullptr;          // [N, dims + 1]
  float scale[kMaxFeatures] = {};
};

// Planes [channels, N] to rows [pixels of the call, stride].
struct GatherParams {
  Kind kind = Kind::f32;
  int64_t pixels = 0, stride = 0, channels = 0, chunks = 1;
  const int32_t* order = nullptr;
  const void* planes = nullptr;    // [channels, N], or all planes if there is an index
  const int32_t* index = nullptr;  // the plane of each channel
  bool log = false;                // log(max(value, 1e-5)), rows in float32
  bool negate = false;             // -value, rows in float32
  float padding = 0;               // of channels up to the end of the last chunk
};

// The steps of a filter, on a tile of channels. Tables and rows have the type of sums.
struct SplatParams {
  GatherParams gather;
  CpuLattice lattice;
  const float* factor = nullptr;  // [N], or null
  void* rows = nullptr;           // [rows, chunks * kChunk]
};
struct MergeParams {
  CpuLattice lattice;
  int64_t chunks = 1, stride = 0;  // of both tables
  const void* rows = nullptr;      // [rows, stride]
  void* table = nullptr;           // [V, stride]
  float scale = 1;
};
// table[v] += (table[above] + table[below]) / 2, with the neighbors along an axis, in place. The vertices are
// sorted into chains of neighbors, so that a chain is read once; the first of a chain is stored as ~v.
struct BlurParams {
  CpuLattice lattice;
  int64_t axis = 0, chunks = 1, stride = 0;
  void* table = nullptr;  // [V, stride]
};
struct SliceParams {
  Kind kind = Kind::f32;
  CpuLattice lattice;
  int64_t channels = 0, chunks = 1;
  const int32_t* order = nullptr;
  const void* table = nullptr;    // [V, chunks * kChunk]
  const float* factor = nullptr;  // [N]
  void* planes = nullptr;         // [channels, N]
};

// Keys [end - begin, dims + 1] and weights of pixels; *valid is cleared if a feature is not finite or out of
// range.
AFA_SIMD_DECLARE(void lattice_simplices(const SimplexParams& p, int64_t begin, int64_t end, uint64_t* keys,
                                        bool* valid))
// Blocks of kBlock pixels.
AFA_SIMD_DECLARE(void lattice_splat(const SplatParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void lattice_slice(const SliceParams& p, int64_t begin, int64_t end))
// Vertices; lattice_blur takes the chains that begin in the range.
AFA_SIMD_DECLARE(void lattice_merge(Kind kind, const MergeParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void lattice_blur(Kind kind, const BlurParams& p, int64_t begin, int64_t end))

}  // namespace afa
