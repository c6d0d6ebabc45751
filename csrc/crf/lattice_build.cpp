// Builds permutohedral lattices.
#include <atomic>
#include <cmath>

#include "crf/lattice_host.h"
#include "ops.h"

namespace afa {
namespace {

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

void fill_scale(int64_t dims, float* scale) {
  const float deviation = static_cast<float>(std::sqrt(2.0 / 3.0) * static_cast<double>(dims + 1));
  for (int64_t i = 0; i < dims; ++i) {
    scale[i] = static_cast<float>(1.0 / std::sqrt(static_cast<double>((i + 2) * (i + 1))) * deviation);
  }
}

// Numbers keys in the order in which they are added.
class KeyTable {
 public:
  std::vector<uint64_t> keys;

  explicit KeyTable(int64_t expected) {
    size_t size = 1024;
    while (size < 2 * static_cast<size_t>(expected)) size *= 2;
    slots_.assign(size, {kEmpty, 0});
  }
  void clear() {
    keys.clear();
    std::fill(slots_.begin(), slots_.end(), Slot{kEmpty, 0});
  }
  int32_t add(uint64_t key) {
    size_t at = find_slot(key);
    if (slots_[at].key == key) return slots_[at].number;
    if (2 * (keys.size() + 1) > slots_.size()) {
      grow();
      at = find_slot(key);
    }
    slots_[at] = {key, static_cast<int32_t>(keys.size())};
    keys.push_back(key);
    return slots_[at].number;
  }
  int32_t find(uint64_t key, int32_t missing) const {
    const Slot& slot = slots_[find_slot(key)];
    return slot.key == key ? slot.number : missing;
  }
  // For a later add or find.
  void prefetch(uint64_t key) const { __builtin_prefetch(&slots_[key_hash(key) & (slots_.size() - 1)]); }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key;
    int32_t number;
  };
  std::vector<Slot> slots_;

  size_t find_slot(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t at = key_hash(key) & mask;
    while (slots_[at].key != key && slots_[at].key != kEmpty) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    std::vector<Slot> old(2 * slots_.size(), {kEmpty, 0});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key != kEmpty) slots_[find_slot(slot.key)] = slot;
    }
  }
};

// The vertices of a block, in the order of their first pixels, and the sums of their weights. A vertex of a
// flat region has thousands of pixels: one by one in float32, they would cost a relative error of 1e-6.
struct BlockVertices {
  std::vector<uint64_t> keys;
  std::vector<double> sums;
};

constexpr int64_t kKeyPixels = 256;   // whose keys are computed together
constexpr int64_t kKeysAhead = 16;    // prefetched
constexpr int64_t kBlockKeys = 4096;  // expected in a block

// False if a feature is not finite or too far from 0.
class LatticeBuilder {
 public:
  LatticeBuilder(const LatticeLayout& layout, const int32_t* order, const float* features, int32_t* words)
      : layout_(layout), corners_(layout.corners()), blocks_(blocks_of(layout.pixels)), words_(words) {
    words[0] = words[1] = 0;
    lattice_ = cpu_lattice_at(layout, words);
    simplex_.pixels = layout.pixels;
    simplex_.dims = layout.dims;
    simplex_.order = order;
    simplex_.features = features;
    simplex_.weight = own(lattice_.weight);
    fill_scale(layout.dims, simplex_.scale);
  }

  bool build() {
    if (!find_block_vertices()) return false;
    KeyTable table(lattice_.rows);
    number_vertices(table);
    list_rows();
    find_chains(table);
    filter_ones();
    return true;
  }

 private:
  const LatticeLayout layout_;
  const int64_t corners_, blocks_;
  int32_t* const words_;
  CpuLattice lattice_;
  SimplexParams simplex_;
  std::vector<BlockVertices> block_;

  // The lattice's parts are in the buffer that is being filled.
  template <typename T>
  static T* own(const T* part) {
    return const_cast<T*>(part);
  }

  bool find_block_vertices() {
    block_.resize(blocks_);
    std::atomic<bool> all_valid{true};
    uint16_t* const local = own(lattice_.local);
    parallel_rows(blocks_, kBlock * corners_ * 16, [&](int64_t begin, int64_t end) {
      bool valid = true;
      std::vector<uint64_t> keys(kKeyPixels * corners_);
      KeyTable table(kBlockKeys);
      for (int64_t b = begin; b < end && valid; ++b) {
        BlockVertices& block = block_[b];
        const int64_t last = std::min((b + 1) * kBlock, layout_.pixels);
        table.clear();
        std::vector<uint64_t> before(corners_, 0);
        std::vector<int32_t> number(corners_, -1);
        for (int64_t first = b * kBlock; first < last && valid; first += kKeyPixels) {
          const int64_t count = std::min(kKeyPixels, last - first);
          AFA_SIMD_CALL(lattice_simplices, simplex_, first, first + count, keys.data(), &valid);
          if (!valid) break;
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t e = 0; e < corners_; ++e) {
              const uint64_t key = keys[i * corners_ + e];
              if (key != before[e] || number[e] < 0) {
                before[e] = key;
                number[e] = table.add(key);
                if (block.sums.size() < table.keys.size()) block.sums.push_back(0);
              }
              const int64_t entry = (first + i) * corners_ + e;
              local[entry] = static_cast<uint16_t>(number[e]);
              block.sums[number[e]] += lattice_.weight[entry];
            }
          }
        }
        block.keys = table.keys;
      }
      if (!valid) all_valid = false;
    });
    int32_t rows = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      own(lattice_.block)[b] = rows;
      rows += static_cast<int32_t>(block_[b].keys.size());
    }
    own(lattice_.block)[blocks_] = rows;
    words_[1] = rows;
    lattice_.rows = rows;
    return all_valid;
  }

  // By their first block, so that those that are near in the image are near in memory.
  void number_vertices(KeyTable& table) {
    int32_t* vertex = own(lattice_.vertex);
    for (const BlockVertices& block : block_) {
      const int64_t count = block.keys.size();
      for (int64_t k = 0; k < count; ++k) {
        if (k + kKeysAhead < count) table.prefetch(block.keys[k + kKeysAhead]);
        *vertex++ = table.add(block.keys[k]);
      }
    }
    words_[0] = static_cast<int32_t>(table.keys.size());
    lattice_.vertices = words_[0];
  }

  // The rows of each vertex.
  void list_rows() {
    int32_t* const start = own(lattice_.start);
    std::fill(start, start + lattice_.vertices + 1, 0);
    for (int64_t r = 0; r < lattice_.rows; ++r) ++start[lattice_.vertex[r] + 1];
    for (int64_t v = 0; v < lattice_.vertices; ++v) start[v + 1] += start[v];
    std::vector<int32_t> next(start, start + lattice_.vertices);
    for (int64_t r = 0; r < lattice_.rows; ++r) {
      own(lattice_.row)[next[lattice_.vertex[r]]++] = static_cast<int32_t>(r);
    }
  }

  // The chains of neighbors along each axis, in the order of their first vertices.
  void find_chains(const KeyTable& table) {
    const int64_t vertices = lattice_.vertices, dims = layout_.dims;
    constexpr int32_t kNone = -1;
    std::vector<int32_t> above(corners_ * vertices);
    std::vector<uint8_t> follows(corners_ * vertices, 0);
    parallel_rows(vertices, 64 * corners_, [&](int64_t begin, int64_t end) {
      for (int64_t axis = 0; axis < corners_; ++axis) {
        for (int64_t v = begin; v < end; ++v) {
          if (v + kKeysAhead < end) table.prefetch(key_neighbor(table.keys[v + kKeysAhead], dims, axis));
          const int32_t other = table.find(key_neighbor(table.keys[v], dims, axis), kNone);
          above[axis * vertices + v] = other;
          if (other != kNone) follows[axis * vertices + other] = 1;
        }
      }
    });
    parallel_rows(corners_, vertices * 8, [&](int64_t begin, int64_t end) {
      for (int64_t axis = begin; axis < end; ++axis) {
        const int32_t* const next = above.data() + axis * vertices;
        int32_t* chain = own(lattice_.chain) + axis * vertices;
        for (int64_t v = 0; v < vertices; ++v) {
          if (follows[axis * vertices + v] != 0) continue;
          *chain++ = ~static_cast<int32_t>(v);
          for (int32_t w = next[v]; w != kNone; w = next[w]) *chain++ = w;
        }
      }
    });
  }

  // The norm: the filter of ones.
  void filter_ones() {
    const int64_t vertices = lattice_.vertices;
    std::vector<float> rows(lattice_.rows), table(vertices);
    for (int64_t b = 0; b < blocks_; ++b) {
      const std::vector<double>& sums = block_[b].sums;
      std::transform(sums.begin(), sums.end(), rows.begin() + lattice_.block[b],
                     [](double sum) { return static_cast<float>(sum); });
    }
    parallel_rows(vertices, 8, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        float sum = 0;
        for (int64_t r = lattice_.start[v]; r < lattice_.start[v + 1]; ++r) sum += rows[lattice_.row[r]];
        table[v] = sum;
      }
    });
    for (int64_t axis = 0; axis < corners_; ++axis) {
      const int32_t* const chain = lattice_.chain + axis * vertices;
      for (int64_t i = 0; i < vertices;) {
        float below = 0;
        int32_t v = ~chain[i];
        for (++i; i < vertices && chain[i] >= 0; ++i) {
          const float own = table[v];
          table[v] += 0.5f * (below + table[chain[i]]);
          below = own;
          v = chain[i];
        }
        table[v] += 0.5f * below;
      }
    }
    const float gain = lattice_gain(layout_.dims);
    parallel_rows(blocks_, 4 * corners_ * kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* vertex = lattice_.vertex + lattice_.block[b];
        for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, layout_.pixels); ++i) {
          float sum = 0;
          for (int64_t e = i * corners_; e < (i + 1) * corners_; ++e) {
            sum += lattice_.weight[e] * table[vertex[lattice_.local[e]]];
          }
          own(lattice_.norm)[i] = gain * sum;
        }
      }
    });
  }
};

}  // namespace

Tensor lattice_build_cpu(const Tensor& features) {
  const LatticeLayout layout = check_features(features);
  const int64_t batch = features.size(0);
  const Tensor lattice = empty_in_huge_pages(features, {batch, layout.words()}, ScalarType::Int);
  if (batch == 0) return lattice;
  const Tensor dense = torch::stable::contiguous(features);
  int32_t* words = static_cast<int32_t*>(lattice.mutable_data_ptr());
  const float* from = static_cast<const float*>(dense.const_data_ptr());
  const std::vector<int32_t> order = pixel_order(features.size(2), features.size(3));
  std::vector<uint8_t> valid(batch);
  const auto build = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      LatticeBuilder builder(layout, order.data(), from + b * layout.dims * layout.pixels,
                             words + b * layout.words());
      valid[b] = builder.build();
    }
  };
  // Parts of a build are sequential, so threads take whole images if there are enough.
  if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_rows(batch, layout.entries(), build);
  } else {
    build(0, batch);
  }
  for (int64_t b = 0; b < batch; ++b) {
    AFA_CHECK(valid[b], "features must be finite and within about ", key_limit(layout.dims),
              " standard deviations of 0, which those of image ", b, " are not");
  }
  return lattice;
}

Tensor lattice_build_cuda(const Tensor& features) {
  const LatticeLayout layout = check_features(features);
  const CudaScope scope(features);
  const int64_t batch = features.size(0), entries = layout.entries();
  // Zeros, because how much of the parts that depend on the number of vertices is written is not known here.
  const Tensor lattice = zeros(features, {batch, layout.words()}, ScalarType::Int);
  if (batch == 0 || entries == 0) return lattice;
  const Tensor dense = torch::stable::contiguous(features);
  const Tensor keys = empty(features, {2, entries}, ScalarType::Long);
  const Tensor numbers = empty(features, {2, entries}, ScalarType::Int);
  // For the counts of the sort, and then for the tables of the filter of ones.
  const int64_t counts = kDigits * (sort_tiles(entries) + 1);
  const Tensor scratch = empty(features, {std::max(counts, 2 * entries)}, ScalarType::Float);
  LatticeBuildParams p;
  p.layout = layout;
  fill_scale(layout.dims, p.scale);
  for (int n = 0; n < 2; ++n) {
    p.keys[n] = at<uint64_t>(keys.mutable_data_ptr(), n * entries);
    p.entries[n] = at<int32_t>(numbers.mutable_data_ptr(), n * entries);
  }
  p.counts = static_cast<int32_t*>(scratch.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    p.features = static_cast<const float*>(dense.const_data_ptr()) + b * layout.dims * layout.pixels;
    p.words = at<int32_t>(lattice.mutable_data_ptr(), b * layout.words());
    AFA_CUDA_LAUNCH("lattice_build", launch_lattice_build(p, scope.stream()));
    LatticeStepsParams ones;
    ones.count = 1;
    LatticeStepParams& step = ones.of[0];
    step.layout = layout;
    step.words = p.words;
    step.width = step.row = 1;
    step.gain = lattice_gain(layout.dims);
    step.out = p.words + layout.norm();
    float* const table = static_cast<float*>(scratch.mutable_data_ptr());
    splat_and_blur_on_cuda("lattice_build", ones, table, table + entries, false, scope.stream());
    AFA_CUDA_LAUNCH("lattice_build", launch_lattice_slice(ones, scope.stream()));
  }
  return lattice;
}

}  // namespace afa
