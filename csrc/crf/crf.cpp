#include "crf/crf.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ops.h"

namespace afa {
namespace {

// ---- checks, which both devices share ----

Normalize normalize_of(const std::string& name) {
  if (name == "none") return Normalize::none;
  if (name == "symmetric") return Normalize::symmetric;
  if (name == "before") return Normalize::before;
  AFA_CHECK(name == "after", "normalize must be none, symmetric, before or after, got ", name);
  return Normalize::after;
}

LatticeLayout check_features(const Tensor& features) {
  check_shape(features, "features", "[B, D, H, W]", {-1, -1, -1, -1});
  AFA_CHECK(features.scalar_type() == ScalarType::Float, "features must be float32, got ",
            type_name(features.scalar_type()));
  const LatticeLayout layout{features.size(2) * features.size(3), features.size(1)};
  AFA_CHECK(layout.dims >= 1 && layout.dims <= kMaxFeatures, "features must have 1 to ", kMaxFeatures,
            " dimensions, got shape ", shape_string(features));
  AFA_CHECK(layout.entries() < (int64_t{1} << 31), "features must have fewer than 2^31 pixels times ",
            layout.corners(), " corners, got shape ", shape_string(features));
  return layout;
}

// `name` as the error names the lattice; its batch is that of the values, or 1 for all images.
void check_lattice(const Tensor& lattice, const char* name, const LatticeLayout& layout, const Tensor& values,
                   const char* values_name) {
  check_shape(lattice, name, "[B, words]", {-1, layout.words()});
  AFA_CHECK(lattice.size(0) == values.size(0) || lattice.size(0) == 1, name, " must have batch ",
            values.size(0), " or 1, got shape ", shape_string(lattice));
  AFA_CHECK(lattice.scalar_type() == ScalarType::Int, name, " must be int32, got ",
            type_name(lattice.scalar_type()));
  check_device(lattice, name, values, values_name);
}

LatticeLayout check_filter(const Tensor& values, const Tensor& lattice, int64_t dims) {
  check_shape(values, "values", "[B, C, H, W]", {-1, -1, -1, -1});
  kind_of(values, "values");
  AFA_CHECK(dims >= 1 && dims <= kMaxFeatures, "dims must be 1 to ", kMaxFeatures, ", got ", dims);
  const LatticeLayout layout{values.size(2) * values.size(3), dims};
  check_lattice(lattice, "lattice", layout, values, "values");
  return layout;
}

struct Field {
  LatticeLayout layout[kMaxKernels];
};

Field check_field(const Tensor& scores, const Tensor& gaussian, const Tensor& bilateral,
                  const std::optional<Tensor>& compatibility, const std::optional<Tensor>& class_mask,
                  int64_t num_iter) {
  check_shape(scores, "scores", "[B, C, H, W]", {-1, -1, -1, -1});
  kind_of(scores, "scores");
  const int64_t pixels = scores.size(2) * scores.size(3);
  const Field field = {{{pixels, 2}, {pixels, 5}}};
  check_lattice(gaussian, "gaussian", field.layout[0], scores, "scores");
  check_lattice(bilateral, "bilateral", field.layout[1], scores, "scores");
  AFA_CHECK(num_iter >= 0, "num_iter must be at least 0, got ", num_iter);
  if (compatibility) {
    check_shape(*compatibility, "compatibility", "[C, C]", {scores.size(1), scores.size(1)});
    AFA_CHECK(compatibility->scalar_type() == ScalarType::Float, "compatibility must be float32, got ",
              type_name(compatibility->scalar_type()));
    check_device(*compatibility, "compatibility", scores, "scores");
  }
  if (class_mask) {
    check_shape(*class_mask, "class_mask", "[B, C]", {scores.size(0), scores.size(1)});
    AFA_CHECK(class_mask->scalar_type() == ScalarType::Bool, "class_mask must be bool, got ",
              type_name(class_mask->scalar_type()));
    check_device(*class_mask, "class_mask", scores, "scores");
  }
  return field;
}

void fill_scale(int64_t dims, float* scale) {
  const float deviation = static_cast<float>(std::sqrt(2.0 / 3.0) * static_cast<double>(dims + 1));
  for (int64_t i = 0; i < dims; ++i) {
    scale[i] = static_cast<float>(1.0 / std::sqrt(static_cast<double>((i + 2) * (i + 1))) * deviation);
  }
}

// ---- building a lattice on the CPU ----

void add_blocks(int64_t y, int64_t x, int64_t size, int64_t height, int64_t width,
                std::vector<int32_t>& order) {
  if (y * kBlockHeight >= height || x * kBlockWidth >= width) return;
  if (size > 1) {
    const int64_t half = size / 2;
    for (int n = 0; n < 4; ++n) add_blocks(y + n / 2 * half, x + n % 2 * half, half, height, width, order);
    return;
  }
  for (int64_t row = y * kBlockHeight; row < std::min((y + 1) * kBlockHeight, height); ++row) {
    for (int64_t column = x * kBlockWidth; column < std::min((x + 1) * kBlockWidth, width); ++column) {
      order.push_back(static_cast<int32_t>(row * width + column));
    }
  }
}

std::vector<int32_t> pixel_order(int64_t height, int64_t width) {
  std::vector<int32_t> order;
  order.reserve(height * width);
  int64_t size = 1;
  while (size * kBlockHeight < height || size * kBlockWidth < width) size *= 2;
  add_blocks(0, 0, size, height, width, order);
  return order;
}

// Numbers keys in the order they come.
class KeyTable {
 public:
  std::vector<uint64_t> keys;

  explicit KeyTable(int64_t expected) {
    size_t size = 1024;
    while (size < 2 * static_cast<size_t>(expected)) size *= 2;
    slots_.assign(size, {kEmpty, 0});
  }
  int32_t add(uint64_t key) {
    size_t at = place(key);
    if (slots_[at].key == key) return slots_[at].number;
    if (2 * (keys.size() + 1) > slots_.size()) {
      grow();
      at = place(key);
    }
    slots_[at] = {key, static_cast<int32_t>(keys.size())};
    keys.push_back(key);
    return slots_[at].number;
  }
  int32_t find(uint64_t key, int32_t missing) const {
    const Slot& slot = slots_[place(key)];
    return slot.key == key ? slot.number : missing;
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key;
    int32_t number;
  };
  std::vector<Slot> slots_;

  size_t place(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t at = key_hash(key) & mask;
    while (slots_[at].key != key && slots_[at].key != kEmpty) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    std::vector<Slot> old(2 * slots_.size(), {kEmpty, 0});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key != kEmpty) slots_[place(slot.key)] = slot;
    }
  }
};

struct LocalVertices {
  std::vector<uint64_t> keys;
  std::vector<int32_t> count, number, next;  // entries; vertex; where the next entry goes in its list
};

// The vertices of a block of pixels, numbered in the order of their first entry; offsets hold these numbers.
LocalVertices find_vertices(const SimplexParams& p, int64_t begin, int64_t end, int32_t* offset,
                            bool* valid) {
  const int64_t corners = p.dims + 1;
  std::vector<uint64_t> keys((end - begin) * corners);
  AFA_SIMD_CALL(lattice_simplices, p, begin, end, keys.data(), valid);
  LocalVertices local;
  if (!*valid) return local;
  KeyTable table(4096);
  std::vector<uint64_t> last(corners, 0);
  std::vector<int32_t> number(corners, 0);
  for (int64_t i = 0; i < end - begin; ++i) {
    for (int64_t e = 0; e < corners; ++e) {
      const uint64_t key = keys[i * corners + e];
      if (key != last[e] || i == 0) {
        last[e] = key;
        number[e] = table.add(key);
        if (local.count.size() < table.keys.size()) local.count.push_back(0);
      }
      ++local.count[number[e]];
      offset[(begin + i) * corners + e] = number[e];
    }
  }
  local.keys.swap(table.keys);
  return local;
}

// norm: the filter of ones.
void filter_ones(const LatticeLayout& layout, int32_t* words) {
  const Lattice lattice = lattice_at(layout, words);
  const int64_t vertices = lattice.vertices, corners = layout.corners();
  std::vector<float> from(vertices + 1, 0.0f), to(vertices + 1, 0.0f);
  parallel_rows(vertices, 16, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      float sum = 0;
      for (int64_t e = lattice.start[v]; e < lattice.start[v + 1]; ++e) sum += lattice.share[e];
      from[v] = sum;
    }
  });
  for (int64_t axis = 0; axis < corners; ++axis) {
    const int32_t* neighbor = lattice.neighbor + 2 * axis * vertices;
    parallel_rows(vertices, 8, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        to[v] = from[v] + 0.5f * (from[neighbor[2 * v]] + from[neighbor[2 * v + 1]]);
      }
    });
    from.swap(to);
  }
  float* norm = reinterpret_cast<float*>(words + layout.norm());
  const float gain = lattice_gain(layout.dims);
  parallel_rows(layout.pixels, 4 * corners, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0;
      for (int64_t e = i * corners; e < (i + 1) * corners; ++e)
        sum += lattice.weight[e] * from[lattice.offset[e]];
      norm[i] = gain * sum;
    }
  });
}

// False if a feature is not finite or too far from 0.
bool build_lattice(const LatticeLayout& layout, const int32_t* order, const float* features, int32_t* words) {
  SimplexParams p;
  p.pixels = layout.pixels;
  p.dims = layout.dims;
  p.order = order;
  p.features = features;
  p.weight = reinterpret_cast<float*>(words + layout.weight());
  fill_scale(p.dims, p.scale);
  int32_t* offset = words + layout.offset();
  const int64_t corners = layout.corners();
  const int64_t blocks = (layout.pixels + kBuildBlock - 1) / kBuildBlock;
  const auto end_of = [&](int64_t block) { return std::min((block + 1) * kBuildBlock, layout.pixels); };

  std::vector<LocalVertices> local(blocks);
  std::atomic<bool> all_valid{true};
  parallel_rows(blocks, kBuildBlock * corners * 16, [&](int64_t begin, int64_t end) {
    bool valid = true;
    for (int64_t block = begin; block < end && valid; ++block) {
      local[block] = find_vertices(p, block * kBuildBlock, end_of(block), offset, &valid);
    }
    if (!valid) all_valid = false;
  });
  if (!all_valid) return false;

  // Blocks in order, so that vertices are numbered by their first entry in the whole image.
  int64_t expected = 0;
  for (const LocalVertices& block : local) expected = std::max<int64_t>(expected, block.keys.size());
  KeyTable table(4 * expected);
  std::vector<int32_t> next;
  for (LocalVertices& block : local) {
    block.number.resize(block.keys.size());
    for (size_t k = 0; k < block.keys.size(); ++k) {
      block.number[k] = table.add(block.keys[k]);
      if (next.size() < table.keys.size()) next.push_back(0);
      next[block.number[k]] += block.count[k];
    }
  }
  const int64_t vertices = table.keys.size();
  words[0] = static_cast<int32_t>(vertices);
  int32_t* start = words + layout.start();
  int32_t total = 0;
  for (int64_t v = 0; v < vertices; ++v) {
    start[v] = total;
    total += next[v];
    next[v] = start[v];
  }
  start[vertices] = total;
  for (LocalVertices& block : local) {
    block.next.resize(block.keys.size());
    for (size_t k = 0; k < block.keys.size(); ++k) {
      block.next[k] = next[block.number[k]];
      next[block.number[k]] += block.count[k];
    }
  }

  int32_t* pixel = words + layout.pixel();
  float* share = reinterpret_cast<float*>(words + layout.share());
  parallel_rows(blocks, kBuildBlock * corners * 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      LocalVertices& own = local[block];
      for (int64_t i = block * kBuildBlock; i < end_of(block); ++i) {
        for (int64_t e = i * corners; e < (i + 1) * corners; ++e) {
          const int32_t k = offset[e], to = own.next[k]++;
          offset[e] = own.number[k];
          pixel[to] = static_cast<int32_t>(i);
          share[to] = p.weight[e];
        }
      }
    }
  });

  // If w is v's neighbor up an axis, v is w's down it: one search serves both.
  int32_t* neighbor = words + layout.neighbor();
  const int32_t missing = static_cast<int32_t>(vertices);
  parallel_rows(2 * corners * vertices, 1,
                [&](int64_t begin, int64_t end) { std::fill(neighbor + begin, neighbor + end, missing); });
  parallel_rows(vertices, 64 * corners, [&](int64_t begin, int64_t end) {
    for (int64_t axis = 0; axis < corners; ++axis) {
      int32_t* of_axis = neighbor + 2 * axis * vertices;
      for (int64_t v = begin; v < end; ++v) {
        const int32_t other = table.find(key_neighbor(table.keys[v], layout.dims, axis), missing);
        of_axis[2 * v] = other;
        if (other != missing) of_axis[2 * other + 1] = static_cast<int32_t>(v);
      }
    }
  });
  filter_ones(layout, words);
  return true;
}

// ---- filtering on the CPU ----

template <typename F>
void over_pixels(int64_t pixels, int64_t work, const F& f) {
  parallel_rows((pixels + kPixelBlock - 1) / kPixelBlock, kPixelBlock * work / 8, f);  // in vectors of 8
}

// 1 / sqrt(norm) or 1 / norm as pydensecrf computes them, times `scale`; or `scale` alone.
std::vector<float> pixel_factors(const Lattice& lattice, Normalize normalize, bool before, float scale) {
  std::vector<float> factor(lattice.pixels);
  for (int64_t i = 0; i < lattice.pixels; ++i) {
    const float norm = lattice.norm[i] + 1e-20f;
    float f = 1.0f;
    if (normalize == Normalize::symmetric) f = 1.0f / std::sqrt(norm);
    if (normalize == (before ? Normalize::before : Normalize::after)) f = 1.0f / norm;
    factor[i] = f * scale;
  }
  return factor;
}

// Splats and blurs one tile. Both tables hold V + 1 rows; the result is in the first.
void splat_and_blur(Kind kind, const SplatParams& splat, void* first, void* second, bool reverse) {
  const Lattice& lattice = splat.lattice;
  const int64_t corners = lattice.dims + 1, lanes = splat.chunks * kChunk;
  void* from = corners % 2 == 0 ? first : second;
  void* to = corners % 2 == 0 ? second : first;
  SplatParams s = splat;
  s.table = from;
  const int64_t entries = lattice.pixels * corners / std::max<int64_t>(lattice.vertices, 1) + 1;
  parallel_rows(lattice.vertices + 1, entries * lanes / 8,
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_splat, kind, s, begin, end); });
  for (int64_t n = 0; n < corners; ++n) {
    BlurParams blur;
    blur.lattice = lattice;
    blur.axis = reverse ? corners - 1 - n : n;
    blur.chunks = splat.chunks;
    blur.in = from;
    blur.out = to;
    parallel_rows(lattice.vertices + 1, lanes / 4,
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_blur, kind, blur, begin, end); });
    std::swap(from, to);
  }
}

const int32_t* image_lattice(const Tensor& lattice, int64_t image, const LatticeLayout& layout) {
  const int32_t* words = static_cast<const int32_t*>(lattice.const_data_ptr());
  return words + (lattice.size(0) == 1 ? 0 : image * layout.words());
}

template <typename T>
T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}

}  // namespace

// ---- CPU ----

Tensor lattice_build_cpu(const Tensor& features) {
  const LatticeLayout layout = check_features(features);
  const int64_t batch = features.size(0);
  const Tensor lattice = empty_in_huge_pages(features, {batch, layout.words()}, ScalarType::Int);
  if (batch == 0) return lattice;
  const Tensor dense = torch::stable::contiguous(features);
  int32_t* words = static_cast<int32_t*>(lattice.mutable_data_ptr());
  const float* from = static_cast<const float*>(dense.const_data_ptr());
  const std::vector<int32_t> order = pixel_order(features.size(2), features.size(3));
  for (int64_t b = 0; b < batch; ++b) {
    AFA_CHECK(build_lattice(layout, order.data(), from + b * layout.dims * layout.pixels,
                            words + b * layout.words()),
              "features must be finite and within about ", key_limit(layout.dims),
              " standard deviations of 0, which those of image ", b, " are not");
  }
  return lattice;
}

Tensor lattice_filter_cpu(const Tensor& values, const Tensor& lattice, int64_t dims,
                          const std::string& normalize, bool reverse) {
  const LatticeLayout layout = check_filter(values, lattice, dims);
  const Normalize mode = normalize_of(normalize);
  const int64_t batch = values.size(0), channels = values.size(1), pixels = layout.pixels;
  const Tensor out = torch::stable::new_empty(values, values.sizes());
  if (out.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(values), words = torch::stable::contiguous(lattice);
  const Kind kind = kind_of(values, "values"), sums = kind == Kind::f64 ? Kind::f64 : Kind::f32;
  const int64_t bytes = static_cast<int64_t>(values.element_size());
  const int64_t chunks = chunks_for(channels), tiles = tiles_for(chunks);
  const int64_t widest = std::min(chunks, kMaxChunks) * kChunk;
  const Tensor rows = empty_in_huge_pages(values, {pixels, widest}, sum_type(values));
  const std::vector<int32_t> order = pixel_order(values.size(2), values.size(3));
  for (int64_t b = 0; b < batch; ++b) {
    const Lattice own = lattice_at(layout, image_lattice(words, b, layout));
    const std::vector<float> before = pixel_factors(own, mode, true, 1);
    const std::vector<float> after = pixel_factors(own, mode, false, lattice_gain(dims));
    const Tensor first = empty_in_huge_pages(values, {own.vertices + 1, widest}, sum_type(values));
    const Tensor second = empty_in_huge_pages(values, {own.vertices + 1, widest}, sum_type(values));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t chunk = tile_begin(tile, chunks), width = tile_begin(tile + 1, chunks) - chunk;
      const int64_t plane = (b * channels + chunk * kChunk) * pixels * bytes;
      GatherParams gather;
      gather.kind = kind;
      gather.pixels = pixels;
      gather.stride = width * kChunk;
      gather.channels = std::min(width * kChunk, channels - chunk * kChunk);
      gather.chunks = width;
      gather.order = order.data();
      gather.planes = static_cast<const char*>(dense.const_data_ptr()) + plane;
      gather.factor = before.data();
      gather.rows = rows.mutable_data_ptr();
      over_pixels(pixels, 2 * gather.stride,
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_gather, gather, begin, end); });
      SplatParams splat;
      splat.lattice = own;
      splat.in = gather.rows;
      splat.stride = gather.stride;
      splat.chunks = width;
      splat.share = own.share;
      splat_and_blur(sums, splat, first.mutable_data_ptr(), second.mutable_data_ptr(), reverse);
      SliceParams slice;
      slice.kind = kind;
      slice.lattice = own;
      slice.channels = gather.channels;
      slice.chunks = width;
      slice.order = order.data();
      slice.table = first.const_data_ptr();
      slice.factor = after.data();
      slice.planes = static_cast<char*>(out.mutable_data_ptr()) + plane;
      over_pixels(pixels, 4 * gather.stride,
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_slice, slice, begin, end); });
    }
  }
  return out;
}

Tensor mean_field_cpu(const Tensor& scores, const Tensor& gaussian, const Tensor& bilateral,
                      double gaussian_weight, double bilateral_weight,
                      const std::optional<Tensor>& compatibility, const std::optional<Tensor>& class_mask,
                      bool probabilities, int64_t num_iter) {
  const Field field = check_field(scores, gaussian, bilateral, compatibility, class_mask, num_iter);
  const int64_t batch = scores.size(0), channels = scores.size(1), pixels = scores.size(2) * scores.size(3);
  const Tensor out =
      class_mask
          ? zeros(scores, {batch, channels, scores.size(2), scores.size(3)}, ScalarType::Float)
          : empty_in_huge_pages(scores, {batch, channels, scores.size(2), scores.size(3)}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(scores);
  const Tensor lattices[kMaxKernels] = {torch::stable::contiguous(gaussian),
                                        torch::stable::contiguous(bilateral)};
  const float weights[kMaxKernels] = {static_cast<float>(gaussian_weight),
                                      static_cast<float>(bilateral_weight)};
  const Kind kind = kind_of(scores, "scores");
  const int64_t bytes = static_cast<int64_t>(scores.element_size());
  std::optional<Tensor> mask, matrix;
  if (class_mask) mask = torch::stable::contiguous(*class_mask);
  if (compatibility) matrix = torch::stable::contiguous(*compatibility);

  const std::vector<int32_t> order = pixel_order(scores.size(2), scores.size(3));
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int32_t> kept;  // the classes in play
    for (int64_t c = 0; c < channels; ++c) {
      if (!mask || static_cast<const bool*>(mask->const_data_ptr())[b * channels + c]) {
        kept.push_back(static_cast<int32_t>(c));
      }
    }
    const int64_t classes = static_cast<int64_t>(kept.size());
    if (classes == 0) continue;
    const int64_t chunks = chunks_for(classes), tiles = tiles_for(chunks), row = chunks * kChunk;
    const int64_t widest = std::min(chunks, kMaxChunks) * kChunk;
    const Tensor logits = empty_in_huge_pages(scores, {pixels, row}, ScalarType::Float);
    const Tensor current = empty_in_huge_pages(scores, {pixels, row}, ScalarType::Float);
    float* rows = static_cast<float*>(current.mutable_data_ptr());

    FieldParams p;
    p.pixels = pixels;
    p.row = row;
    p.channels = classes;
    p.logits = static_cast<const float*>(logits.const_data_ptr());
    p.planes = at<float>(out.mutable_data_ptr(), b * channels * pixels);
    p.index = kept.data();
    p.order = order.data();
    std::vector<float> mixing;  // symmetric, as pydensecrf makes it
    if (matrix) {
      const float* m = static_cast<const float*>(matrix->const_data_ptr());
      mixing.assign(classes * row, 0.0f);
      for (int64_t i = 0; i < classes; ++i) {
        for (int64_t j = 0; j < classes; ++j) {
          mixing[i * row + j] = 0.5f * (m[kept[i] * channels + kept[j]] + m[kept[j] * channels + kept[i]]);
        }
      }
      p.compatibility = mixing.data();
    }
    std::vector<float> factor[kMaxKernels], share[kMaxKernels];
    std::vector<Tensor> table;
    int64_t most = 0;
    for (int n = 0; n < kMaxKernels; ++n) {
      if (weights[n] == 0 || num_iter == 0) continue;
      const Lattice own = lattice_at(field.layout[n], image_lattice(lattices[n], b, field.layout[n]));
      const int64_t corners = own.dims + 1;
      const std::vector<float> root = pixel_factors(own, Normalize::symmetric, true, 1);
      factor[p.kernels].resize(pixels);
      const float scale = weights[n] * lattice_gain(own.dims);
      for (int64_t i = 0; i < pixels; ++i) factor[p.kernels][i] = root[i] * scale;
      share[p.kernels].resize(pixels * corners);
      float* shares = share[p.kernels].data();
      parallel_rows(pixels * corners, 2, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) shares[e] = own.share[e] * root[own.pixel[e]];
      });
      table.push_back(empty_in_huge_pages(scores, {own.vertices + 1, row}, ScalarType::Float));
      p.kernel[p.kernels].lattice = own;
      p.kernel[p.kernels].table = static_cast<const float*>(table.back().const_data_ptr());
      p.kernel[p.kernels].factor = factor[p.kernels].data();
      ++p.kernels;
      most = std::max(most, own.vertices + 1);
    }
    const Tensor other = empty_in_huge_pages(scores, {most, widest}, ScalarType::Float);

    GatherParams gather;
    gather.kind = kind;
    gather.pixels = pixels;
    gather.stride = row;
    gather.channels = classes;
    gather.chunks = chunks;
    gather.order = order.data();
    gather.planes = static_cast<const char*>(dense.const_data_ptr()) + b * channels * pixels * bytes;
    gather.index = kept.data();
    gather.rows = logits.mutable_data_ptr();
    gather.log = probabilities;
    gather.negate = !probabilities;
    gather.padding = -1e30f;
    over_pixels(pixels, 8 * row,
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_gather, gather, begin, end); });
    const auto step = [&](const FieldParams& now) {
      over_pixels(pixels, 16 * row, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(field_scratch(now));
        AFA_SIMD_CALL(field_step, now, begin, end, scratch.data());
      });
    };
    FieldParams initial = p;
    initial.kernels = 0;
    initial.compatibility = nullptr;
    initial.rows = num_iter > 0 ? rows : nullptr;
    step(initial);
    for (int64_t iteration = 0; iteration < num_iter; ++iteration) {
      for (int n = 0; n < p.kernels; ++n) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t chunk = tile_begin(tile, chunks);
          SplatParams splat;
          splat.lattice = p.kernel[n].lattice;
          splat.in = rows + chunk * kChunk;
          splat.stride = row;
          splat.chunks = tile_begin(tile + 1, chunks) - chunk;
          splat.share = share[n].data();
          float* own_table =
              at<float>(table[n].mutable_data_ptr(), chunk * kChunk * (splat.lattice.vertices + 1));
          splat_and_blur(Kind::f32, splat, own_table, other.mutable_data_ptr(), false);
        }
      }
      p.rows = iteration + 1 < num_iter ? rows : nullptr;
      step(p);
    }
  }
  return out;
}

// ---- CUDA ----

namespace {

constexpr int64_t kTableWidth = 32;  // channels that are filtered at a time, for the tables' size

// Two tables for a lattice's vertices, of which there may be one per corner of each pixel.
struct Tables {
  Tensor first, second;
  Tables(const LatticeLayout& layout, int64_t width, const Tensor& like, ScalarType type)
      : first(empty(like, {layout.entries(), width}, type)),
        second(empty(like, {layout.entries(), width}, type)) {}
};

// Filters all channels of rows [N, channels], a few at a time; the result is written or added to `out`.
void filter_on_cuda([[maybe_unused]] const char* op, LatticeStepParams step, const void* in, void* out,
                    const Tables& tables, bool reverse, [[maybe_unused]] void* stream) {
  const int64_t corners = step.layout.corners();
  for (int64_t first = 0; first < step.channels; first += kTableWidth) {
    step.first = first;
    step.width = std::min(kTableWidth, step.channels - first);
    void* from = tables.first.mutable_data_ptr();
    void* to = tables.second.mutable_data_ptr();
    step.in = in;
    step.out = from;
    AFA_CUDA_LAUNCH(op, launch_lattice_splat(step, stream));
    for (int64_t n = 0; n < corners; ++n) {
      step.axis = reverse ? corners - 1 - n : n;
      step.in = from;
      step.out = to;
      AFA_CUDA_LAUNCH(op, launch_lattice_blur(step, stream));
      std::swap(from, to);
    }
    step.in = from;
    step.out = out;
    AFA_CUDA_LAUNCH(op, launch_lattice_slice(step, stream));
  }
}

}  // namespace

Tensor lattice_build_cuda(const Tensor& features) {
  const LatticeLayout layout = check_features(features);
  const CudaScope scope(features);
  const int64_t batch = features.size(0), entries = layout.entries();
  const Tensor lattice = empty(features, {batch, layout.words()}, ScalarType::Int);
  if (batch == 0 || entries == 0) return lattice;
  const Tensor dense = torch::stable::contiguous(features);
  const int64_t tiles = (entries + kSortTile - 1) / kSortTile;
  const Tensor keys = empty(features, {2, entries}, ScalarType::Long);
  const Tensor numbers = empty(features, {2, entries}, ScalarType::Int);
  const Tensor counts = empty(features, {kDigits, tiles}, ScalarType::Int);
  const Tensor values = empty(features, {2, entries}, ScalarType::Float);
  LatticeBuildParams p;
  p.layout = layout;
  fill_scale(layout.dims, p.scale);
  for (int n = 0; n < 2; ++n) {
    p.keys[n] = at<uint64_t>(keys.mutable_data_ptr(), n * entries);
    p.entries[n] = at<int32_t>(numbers.mutable_data_ptr(), n * entries);
    p.values[n] = at<float>(values.mutable_data_ptr(), n * entries);
  }
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    p.features = static_cast<const float*>(dense.const_data_ptr()) + b * layout.dims * layout.pixels;
    p.words = at<int32_t>(lattice.mutable_data_ptr(), b * layout.words());
    AFA_CUDA_LAUNCH("lattice_build", launch_lattice_build(p, scope.stream()));
  }
  return lattice;
}

Tensor lattice_filter_cuda(const Tensor& values, const Tensor& lattice, int64_t dims,
                           const std::string& normalize, bool reverse) {
  const LatticeLayout layout = check_filter(values, lattice, dims);
  const Normalize mode = normalize_of(normalize);
  const CudaScope scope(values);
  const int64_t batch = values.size(0), channels = values.size(1), pixels = layout.pixels;
  const Tensor out = torch::stable::new_empty(values, values.sizes());
  if (out.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(values), words = torch::stable::contiguous(lattice);
  const Kind kind = kind_of(values, "values");
  const Tensor from = empty(values, {pixels, channels}, sum_type(values));
  const Tensor to = empty(values, {pixels, channels}, sum_type(values));
  const Tables tables(layout, std::min(channels, kTableWidth), values, sum_type(values));
  LatticeStepParams step;
  step.layout = layout;
  step.kind = kind == Kind::f64 ? Kind::f64 : Kind::f32;
  step.normalize = mode;
  step.channels = channels;
  step.gain = lattice_gain(dims);
  RowsParams rows;
  rows.kind = kind;
  rows.pixels = pixels;
  rows.channels = channels;
  const int64_t bytes = channels * pixels * static_cast<int64_t>(values.element_size());
  for (int64_t b = 0; b < batch; ++b) {
    rows.from = static_cast<const char*>(dense.const_data_ptr()) + b * bytes;
    rows.to = from.mutable_data_ptr();
    AFA_CUDA_LAUNCH("lattice_filter", launch_rows_from_planes(rows, scope.stream()));
    step.words = image_lattice(words, b, layout);
    filter_on_cuda("lattice_filter", step, from.const_data_ptr(), to.mutable_data_ptr(), tables, reverse,
                   scope.stream());
    rows.from = to.const_data_ptr();
    rows.to = static_cast<char*>(out.mutable_data_ptr()) + b * bytes;
    AFA_CUDA_LAUNCH("lattice_filter", launch_planes_from_rows(rows, scope.stream()));
  }
  return out;
}

Tensor mean_field_cuda(const Tensor& scores, const Tensor& gaussian, const Tensor& bilateral,
                       double gaussian_weight, double bilateral_weight,
                       const std::optional<Tensor>& compatibility, const std::optional<Tensor>& class_mask,
                       bool probabilities, int64_t num_iter) {
  const Field field = check_field(scores, gaussian, bilateral, compatibility, class_mask, num_iter);
  const CudaScope scope(scores);
  const int64_t batch = scores.size(0), channels = scores.size(1), pixels = scores.size(2) * scores.size(3);
  const Tensor out = empty(scores, {batch, channels, scores.size(2), scores.size(3)}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(scores);
  const Tensor lattices[kMaxKernels] = {torch::stable::contiguous(gaussian),
                                        torch::stable::contiguous(bilateral)};
  const float weights[kMaxKernels] = {static_cast<float>(gaussian_weight),
                                      static_cast<float>(bilateral_weight)};
  std::optional<Tensor> mask, matrix;
  if (class_mask) mask = torch::stable::contiguous(*class_mask);
  if (compatibility) matrix = torch::stable::contiguous(*compatibility);
  const Tensor logits = empty(scores, {pixels, channels}, ScalarType::Float);
  const Tensor current = empty(scores, {pixels, channels}, ScalarType::Float);
  const Tensor filtered = empty(scores, {pixels, channels}, ScalarType::Float);
  const Tables tables(field.layout[1], std::min(channels, kTableWidth), scores, ScalarType::Float);
  const int64_t bytes = channels * pixels * static_cast<int64_t>(scores.element_size());

  for (int64_t b = 0; b < batch; ++b) {
    RowsParams rows;
    rows.kind = kind_of(scores, "scores");
    rows.pixels = pixels;
    rows.channels = channels;
    rows.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) + b * channels : nullptr;
    rows.from = static_cast<const char*>(dense.const_data_ptr()) + b * bytes;
    rows.to = logits.mutable_data_ptr();
    rows.log = probabilities;
    rows.negate = !probabilities;
    AFA_CUDA_LAUNCH("mean_field", launch_rows_from_planes(rows, scope.stream()));
    SoftmaxParams softmax;
    softmax.pixels = pixels;
    softmax.channels = channels;
    softmax.logits = static_cast<const float*>(logits.const_data_ptr());
    softmax.out = static_cast<float*>(current.mutable_data_ptr());
    AFA_CUDA_LAUNCH("mean_field", launch_field_softmax(softmax, scope.stream()));
    for (int64_t iteration = 0; iteration < num_iter; ++iteration) {
      bool any = false;
      for (int n = 0; n < kMaxKernels; ++n) {
        if (weights[n] == 0) continue;
        LatticeStepParams step;
        step.layout = field.layout[n];
        step.words = image_lattice(lattices[n], b, field.layout[n]);
        step.normalize = Normalize::symmetric;
        step.channels = channels;
        step.gain = lattice_gain(step.layout.dims) * weights[n];
        step.add = any;
        filter_on_cuda("mean_field", step, current.const_data_ptr(), filtered.mutable_data_ptr(), tables,
                       false, scope.stream());
        any = true;
      }
      if (!any) break;
      softmax.filtered = static_cast<const float*>(filtered.const_data_ptr());
      softmax.compatibility = matrix ? static_cast<const float*>(matrix->const_data_ptr()) : nullptr;
      AFA_CUDA_LAUNCH("mean_field", launch_field_softmax(softmax, scope.stream()));
    }
    rows.kind = Kind::f32;
    rows.from = current.const_data_ptr();
    rows.to = at<float>(out.mutable_data_ptr(), b * channels * pixels);
    rows.log = rows.negate = false;
    AFA_CUDA_LAUNCH("mean_field", launch_planes_from_rows(rows, scope.stream()));
  }
  return out;
}

}  // namespace afa
