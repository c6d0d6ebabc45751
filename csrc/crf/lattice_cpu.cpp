// The kernels of the permutohedral lattice on the CPU; compiled once per SIMD level. Their design is
// described in lattice_cpu.h.
#include "crf/lattice_cpu.h"

#include "crf/chunks.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int64_t kRowsAhead = 12;  // prefetched

template <typename S, int K>
inline void prefetch_row(const S* row) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t k = 0; k < K * kChunk; k += kLine) __builtin_prefetch(row + k);
}

// A product rounded to float. The compiler cannot fuse it with an addition, so that all levels and the CUDA
// kernels find the same vertices.
inline Floats rounded_product(const Floats& a, const Floats& b) {
  return __builtin_convertvector(__builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles),
                                 Floats);
}

template <int D>
void simplices(const SimplexParams& p, int64_t begin, int64_t end, uint64_t* keys, bool* valid) {
  constexpr int E = D + 1;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
  const int bits = key_bits(D);
  const float limit = static_cast<float>(key_limit(D));
  const Floats inverse = Floats{} + 1.0f / E;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    Floats elevated[E], sum = {};
    for (int j = D; j > 0; --j) {
      const float* plane = p.features + (j - 1) * p.pixels;
      Floats f = {};
      if (is_run(p.order + first, count)) {
        f = get(plane + p.order[first]);
      } else {
        for (int64_t i = 0; i < count; ++i) f[i] = plane[p.order[first + i]];
      }
      const Floats scaled = rounded_product(f, Floats{} + p.scale[j - 1]);
      elevated[j] = sum - rounded_product(scaled, Floats{} + static_cast<float>(j));
      sum += scaled;
    }
    elevated[0] = sum;
    Floats nearest[E], rest[E], largest = {};
    for (int i = 0; i < E; ++i) {
      const Floats v = rounded_product(inverse, elevated[i]);
      largest = upper(largest, upper(v, -v));
      nearest[i] = (v + kRound) - kRound;
      rest[i] = elevated[i] - nearest[i] * static_cast<float>(E);
    }
    const Ints good = (largest < limit) & (sum - sum == 0);  // the second: no feature is NaN or infinite
    for (int i = 0; i < kChunk; ++i) *valid = *valid && good[i] != 0;
    if (!*valid) return;
    Ints cell[E], total = {};
    for (int i = 0; i < E; ++i) {
      cell[i] = __builtin_convertvector(nearest[i], Ints);
      total += cell[i];
    }
    Ints rank[E] = {};
    for (int i = 0; i < D; ++i) {
      for (int j = i + 1; j < E; ++j) {
        const Ints less = rest[i] < rest[j];
        rank[i] -= less;
        rank[j] += less + 1;
      }
    }
    Floats sorted[E] = {};
    for (int i = 0; i < E; ++i) {
      rank[i] += total;
      const Ints step = (rank[i] > D) - (rank[i] < 0);  // -1 where above, 1 where below
      rank[i] += step * E;
      cell[i] += step;
      rest[i] -= __builtin_convertvector(step * E, Floats);
      const Floats value = rounded_product(rest[i], inverse);
      for (int r = 0; r < E; ++r) sorted[r] = rank[i] == r ? value : sorted[r];
    }
    Floats share[E];
    share[0] = sorted[D] + (1.0f - sorted[0]);
    for (int r = 1; r < E; ++r) share[r] = sorted[D - r] - sorted[D - r + 1];
    for (int64_t i = 0; i < count; ++i) {
      float* weight = p.weight + (first + i) * E;
      uint64_t* key = keys + (first - begin + i) * E;
      uint64_t unit[E];
      uint64_t at = 0;
      for (int j = 0; j < E; ++j) {
        const uint64_t one = j < D ? uint64_t{1} << (3 + j * bits) : 0;
        unit[rank[j][i]] = one;
        at += one * static_cast<uint64_t>(cell[j][i] + key_bias(D));
      }
      key[0] = at;
      weight[0] = share[0][i];
      for (int r = 1; r < E; ++r) {
        at += 1 - unit[D - r + 1];
        key[r] = at;
        weight[r] = share[r][i];
      }
    }
  }
}

template <typename T, int K>
void splat(const SplatParams& p, int64_t block) {
  using S = Sum<T>;
  constexpr int64_t kRow = K * kChunk;
  const CpuLattice& lattice = p.lattice;
  const int64_t corners = lattice.dims + 1, end = (block + 1) * kBlock;
  const int64_t last = end < lattice.pixels ? end : lattice.pixels;
  S* const rows = static_cast<S*>(p.rows) + lattice.block[block] * kRow;
  const int64_t values = (lattice.block[block + 1] - lattice.block[block]) * kRow;
  for (int64_t k = 0; k < values; k += kChunk) put(rows + k, Chunk<S>{});
  alignas(64) S pixels[kPixelBlock * kRow];
  for (int64_t first = block * kBlock; first < last; first += kPixelBlock) {
    const int64_t count = last - first < kPixelBlock ? last - first : kPixelBlock;
    gather_rows<T, S>(p.gather, first, count, pixels);
    for (int64_t i = 0; i < count; ++i) {
      Chunk<S> value[K];
      for (int k = 0; k < K; ++k) value[k] = get(pixels + i * kRow + k * kChunk);
      const S factor = p.factor == nullptr ? S{1} : static_cast<S>(p.factor[first + i]);
      const uint16_t* const local = lattice.local + (first + i) * corners;
      const float* const weight = lattice.weight + (first + i) * corners;
      for (int64_t e = 0; e < corners; ++e) {
        const S share = factor * static_cast<S>(weight[e]);
        S* const row = rows + local[e] * kRow;
        for (int k = 0; k < K; ++k) put(row + k * kChunk, get(row + k * kChunk) + share * value[k]);
      }
    }
  }
}

template <typename S, int K>
void merge(const MergeParams& p, int64_t begin, int64_t end) {
  const S* const rows = static_cast<const S*>(p.rows);
  S* const table = static_cast<S*>(p.table);
  const S scale = static_cast<S>(p.scale);
  const int32_t *const start = p.lattice.start, *const row = p.lattice.row;
  const int64_t stride = p.stride, last = start[end];
  for (int64_t v = begin; v < end; ++v) {
    Chunk<S> sum[K] = {};
    for (int64_t r = start[v]; r < start[v + 1]; ++r) {
      if (r + kRowsAhead < last) prefetch_row<S, K>(rows + row[r + kRowsAhead] * stride);
      const S* const from = rows + row[r] * stride;
      for (int k = 0; k < K; ++k) sum[k] += get(from + k * kChunk);
    }
    for (int k = 0; k < K; ++k) put(table + v * stride + k * kChunk, scale * sum[k]);
  }
}

template <typename S, int K>
void blur(const BlurParams& p, int64_t begin, int64_t end) {
  S* const table = static_cast<S*>(p.table);
  const int64_t stride = p.stride, vertices = p.lattice.vertices;
  const int32_t* const chain = p.lattice.chain + p.axis * vertices;
  while (begin < end && chain[begin] >= 0) ++begin;  // belongs to an earlier range
  if (begin == end) return;
  const S half = static_cast<S>(0.5);
  Chunk<S> below[K] = {}, own[K];
  S* to = table + ~chain[begin] * stride;
  for (int k = 0; k < K; ++k) own[k] = get(to + k * kChunk);
  for (int64_t i = begin + 1;; ++i) {
    const bool finished = i == vertices || (i >= end && chain[i] < 0);
    if (finished || chain[i] < 0) {
      for (int k = 0; k < K; ++k) put(to + k * kChunk, own[k] + half * below[k]);
      if (finished) return;
      to = table + ~chain[i] * stride;
      for (int k = 0; k < K; ++k) {
        below[k] = Chunk<S>{};
        own[k] = get(to + k * kChunk);
      }
    } else {
      S* const next = table + chain[i] * stride;
      for (int k = 0; k < K; ++k) {
        const Chunk<S> above = get(next + k * kChunk);
        put(to + k * kChunk, own[k] + half * (above + below[k]));
        below[k] = own[k];
        own[k] = above;
      }
      to = next;
    }
    if (i + kRowsAhead < vertices) {
      const int32_t later = chain[i + kRowsAhead];
      prefetch_row<S, K>(table + (later < 0 ? ~later : later) * stride);
    }
  }
}

template <typename T, int K>
void slice(const SliceParams& p, int64_t block) {
  using S = Sum<T>;
  constexpr int64_t kRow = K * kChunk;
  const CpuLattice& lattice = p.lattice;
  const int64_t corners = lattice.dims + 1, end = (block + 1) * kBlock;
  const int64_t last = end < lattice.pixels ? end : lattice.pixels;
  const S* const table = static_cast<const S*>(p.table);
  const int32_t* const vertex = lattice.vertex + lattice.block[block];
  alignas(64) S pixels[kPixelBlock * kRow];
  for (int64_t first = block * kBlock; first < last; first += kPixelBlock) {
    const int64_t count = last - first < kPixelBlock ? last - first : kPixelBlock;
    for (int64_t i = 0; i < count; ++i) {
      Chunk<S> sum[K] = {};
      const uint16_t* const local = lattice.local + (first + i) * corners;
      const float* const weight = lattice.weight + (first + i) * corners;
      for (int64_t e = 0; e < corners; ++e) {
        const S* const row = table + vertex[local[e]] * kRow;
        const S share = static_cast<S>(weight[e]);
        for (int k = 0; k < K; ++k) sum[k] += share * get(row + k * kChunk);
      }
      const S factor = static_cast<S>(p.factor[first + i]);
      for (int k = 0; k < K; ++k) put(pixels + i * kRow + k * kChunk, factor * sum[k]);
    }
    write_planes<T>(pixels, kRow, p.channels, nullptr, p.order + first, count, lattice.pixels,
                    static_cast<T*>(p.planes));
  }
}

template <typename F>
void with_sum(Kind kind, const F& f) {
  if (kind == Kind::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace

void lattice_simplices(const SimplexParams& p, int64_t begin, int64_t end, uint64_t* keys, bool* valid) {
  switch (p.dims) {
    case 1:
      return simplices<1>(p, begin, end, keys, valid);
    case 2:
      return simplices<2>(p, begin, end, keys, valid);
    case 3:
      return simplices<3>(p, begin, end, keys, valid);
    case 4:
      return simplices<4>(p, begin, end, keys, valid);
    case 5:
      return simplices<5>(p, begin, end, keys, valid);
    default:
      return simplices<6>(p, begin, end, keys, valid);
  }
}

void lattice_splat(const SplatParams& p, int64_t begin, int64_t end) {
  with_type(p.gather.kind, [&](auto type) {
    with_width(p.gather.chunks, [&](auto width) {
      for (int64_t block = begin; block < end; ++block) {
        splat<decltype(type), decltype(width)::value>(p, block);
      }
    });
  });
}

void lattice_merge(Kind kind, const MergeParams& p, int64_t begin, int64_t end) {
  with_sum(kind, [&](auto type) {
    with_width(p.chunks, [&](auto width) { merge<decltype(type), decltype(width)::value>(p, begin, end); });
  });
}

void lattice_blur(Kind kind, const BlurParams& p, int64_t begin, int64_t end) {
  with_sum(kind, [&](auto type) {
    with_width(p.chunks, [&](auto width) { blur<decltype(type), decltype(width)::value>(p, begin, end); });
  });
}

void lattice_slice(const SliceParams& p, int64_t begin, int64_t end) {
  with_type(p.kind, [&](auto type) {
    with_width(p.chunks, [&](auto width) {
      for (int64_t block = begin; block < end; ++block) {
        slice<decltype(type), decltype(width)::value>(p, block);
      }
    });
  });
}

}  // namespace AFA_SIMD
}  // namespace afa
