// The mean field of a dense CRF on the CPU; compiled once per SIMD level.
//
// The pixels of a block are taken 32 at a time, whose rows stay in the first-level cache from the slice to
// the splat. Per iteration, memory sees the logits once, and what the lattices need.
#include "crf/mean_field_cpu.h"

#include "crf/chunks.h"

namespace afa {
namespace AFA_SIMD {
namespace {

// The softmax of rows of K chunks, which stay in registers.
template <int K>
void softmax(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i, values += K * kChunk) {
    Floats v[K];
    for (int k = 0; k < K; ++k) v[k] = get(values + k * kChunk);
    Floats top = v[0], sum = {};
    for (int k = 1; k < K; ++k) top = upper(top, v[k]);
    top = largest_lane(top);
    for (int k = 0; k < K; ++k) {
      v[k] = exponential(v[k] - top);
      sum += v[k];
    }
    const Floats inverse = 1.0f / lane_sum(sum);
    for (int k = 0; k < K; ++k) put(values + k * kChunk, v[k] * inverse);
  }
}

// The same for rows of any length.
void softmax_rows(float* values, int64_t count, int64_t row) {
  if (row <= kMaxChunks * kChunk) {
    return with_width(row / kChunk, [&](auto width) { softmax<decltype(width)::value>(values, count); });
  }
  for (int64_t i = 0; i < count; ++i, values += row) {
    Floats top = get(values), sum = {};
    for (int64_t c = kChunk; c < row; c += kChunk) top = upper(top, get(values + c));
    top = largest_lane(top);
    for (int64_t c = 0; c < row; c += kChunk) {
      const Floats power = exponential(get(values + c) - top);
      sum += power;
      put(values + c, power);
    }
    const Floats inverse = 1.0f / lane_sum(sum);
    for (int64_t c = 0; c < row; c += kChunk) put(values + c, get(values + c) * inverse);
  }
}

// rows = logits - C f for each row's filtered values f, which rows hold on entry.
void mix_classes(const FieldParams& p, const float* logits, float* rows, int64_t count, float* mixed) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = rows + i * p.row;
    for (int64_t c = 0; c < p.row; ++c) mixed[c] = 0;
    for (int64_t from = 0; from < p.channels; ++from) {
      const float value = row[from];
      const float* factor = p.compatibility + from * p.row;
      for (int64_t c = 0; c < p.row; ++c) mixed[c] += value * factor[c];
    }
    for (int64_t c = 0; c < p.row; ++c) row[c] = logits[i * p.row + c] - mixed[c];
  }
}

// Copies the rows of a block's vertices from the table, so that they are near each other. The order is known
// in advance, so that waiting for memory overlaps.
void fetch_rows(const FieldParams& p, int64_t block, float* rows) {
  const int32_t* const vertex = p.vertex + p.block[block];
  const int64_t count = p.block[block + 1] - p.block[block], row = p.row;
  const float* const table = p.table;
  constexpr int64_t kAhead = 8, kLine = 16;
  for (int64_t r = 0; r < count; ++r) {
    if (r + kAhead < count) {
      const float* const later = table + vertex[r + kAhead] * row;
      for (int64_t c = 0; c < row; c += kLine) __builtin_prefetch(later + c);
    }
    const float* const from = table + vertex[r] * row;
    for (int64_t c = 0; c < row; c += kChunk) put(rows + r * row + c, get(from + c));
  }
}

template <int K>
void slice(const FieldParams& p, const float* table, int64_t column, int64_t first, int64_t count,
           float* values) {
  const int64_t row = p.row, corners = p.corners;
  const bool add = p.compatibility == nullptr;
  table += column;
  const uint16_t* local = p.local + first * corners;
  const float* share = p.share + first * corners;
  constexpr int64_t kPixelsAhead = 24, kLine = 16;  // prefetched; past the end, prefetching has no effect
  for (int64_t i = 0; i < count; ++i, local += corners, share += corners) {
    const float* const logits = p.logits + (first + i) * row + column;
    for (int64_t c = 0; c < K * kChunk; c += kLine) __builtin_prefetch(logits + kPixelsAhead * row + c);
    __builtin_prefetch(local + kPixelsAhead * corners);
    __builtin_prefetch(share + kPixelsAhead * corners);
    Floats total[K];
    for (int k = 0; k < K; ++k) total[k] = add ? get(logits + k * kChunk) : Floats{};
    for (int64_t e = 0; e < corners; ++e) {
      const float* const from = table + local[e] * row;
      const float weight = share[e];
      for (int k = 0; k < K; ++k) total[k] += weight * get(from + k * kChunk);
    }
    for (int k = 0; k < K; ++k) put(values + i * row + column + k * kChunk, total[k]);
  }
}

template <int K>
void splat(const FieldParams& p, float* rows, int64_t column, int64_t first, int64_t count,
           const float* values) {
  const int64_t row = p.row, corners = p.corners;
  rows += column;
  const uint16_t* local = p.local + first * corners;
  const float* share = p.share + first * corners;
  for (int64_t i = 0; i < count; ++i, local += corners, share += corners) {
    Floats value[K];
    for (int k = 0; k < K; ++k) value[k] = get(values + i * row + column + k * kChunk);
    for (int64_t e = 0; e < corners; ++e) {
      float* const to = rows + local[e] * row;
      const float weight = share[e];
      for (int k = 0; k < K; ++k) put(to + k * kChunk, get(to + k * kChunk) + weight * value[k]);
    }
  }
}

// Calls f with the width and the first column of each tile.
template <typename F>
void over_tiles(int64_t row, const F& f) {
  const int64_t chunks = row / kChunk, tiles = tiles_for(chunks);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t chunk = tile_begin(tile, chunks);
    with_width(tile_begin(tile + 1, chunks) - chunk, [&](auto width) { f(width, chunk * kChunk); });
  }
}

}  // namespace

void field_step(const FieldParams& p, int64_t begin, int64_t end, float* scratch) {
  float* const values = scratch;
  float* const mixed = scratch + kPixelBlock * p.row;
  float* const table = mixed + p.row;
  for (int64_t block = begin; block < end; ++block) {
    float* const rows = p.rows == nullptr ? nullptr : p.rows + p.block[block] * p.row;
    if (rows != nullptr) {
      const int64_t size = (p.block[block + 1] - p.block[block]) * p.row;
      for (int64_t k = 0; k < size; k += kChunk) put(rows + k, Floats{});
    }
    if (p.gather == nullptr) fetch_rows(p, block, table);
    const int64_t limit = (block + 1) * kBlock, last = limit < p.pixels ? limit : p.pixels;
    for (int64_t first = block * kBlock; first < last; first += kPixelBlock) {
      const int64_t count = last - first < kPixelBlock ? last - first : kPixelBlock;
      float* const logits = p.logits + first * p.row;
      if (p.gather != nullptr) {
        with_type(p.gather->kind,
                  [&](auto type) { gather_rows<decltype(type), float>(*p.gather, first, count, logits); });
        for (int64_t c = 0; c < count * p.row; c += kChunk) put(values + c, get(logits + c));
      } else {
        over_tiles(p.row, [&](auto width, int64_t column) {
          slice<decltype(width)::value>(p, table, column, first, count, values);
        });
        if (p.compatibility != nullptr) mix_classes(p, logits, values, count, mixed);
      }
      softmax_rows(values, count, p.row);
      if (rows == nullptr) {
        write_planes<float>(values, p.row, p.channels, p.index, p.order + first, count, p.pixels, p.planes);
        continue;
      }
      over_tiles(p.row, [&](auto width, int64_t column) {
        splat<decltype(width)::value>(p, rows, column, first, count, values);
      });
    }
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
