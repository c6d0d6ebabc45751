// The mean field of a dense CRF ("Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
// Krahenbuhl and Koltun 2011).
#include <memory>
#include <new>

#include "crf/lattice_host.h"
#include "crf/mean_field_cpu.h"
#include "ops.h"

namespace afa {
namespace {

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

// The lattices of an image with their weights as one; see FieldParams.
struct JointLattice {
  int64_t kernels = 0, corners = 0, vertices = 0;  // vertices: rows of the table
  int64_t max_rows = 0;                            // of a block
  CpuLattice lattice[kMaxKernels];                 // their `row` is of the joint rows
  float scale[kMaxKernels] = {};                   // weight times gain
  int64_t first[kMaxKernels] = {};                 // row of the table
  std::vector<int32_t> block, vertex, row[kMaxKernels];
  std::vector<uint16_t> local;
  std::vector<float> share;

  void add(const CpuLattice& own, float weight) {
    lattice[kernels] = own;
    scale[kernels] = weight * lattice_gain(own.dims);
    first[kernels] = vertices;
    vertices += own.vertices;
    corners += own.dims + 1;
    ++kernels;
  }

  void join(int64_t pixels) {
    const int64_t blocks = blocks_of(pixels);
    block.assign(blocks + 1, 0);
    for (int64_t b = 0; b <= blocks; ++b) {
      for (int64_t n = 0; n < kernels; ++n) block[b] += lattice[n].block[b];
    }
    for (int64_t b = 0; b < blocks; ++b) max_rows = std::max<int64_t>(max_rows, block[b + 1] - block[b]);
    vertex.resize(block[blocks]);
    local.resize(pixels * corners);
    share.resize(pixels * corners);
    int64_t corner = 0;
    for (int64_t n = 0; n < kernels; ++n) {
      const CpuLattice& own = lattice[n];
      const std::vector<float> root = pixel_factors(own, Normalize::symmetric, true, 1);
      std::vector<int32_t> joint(own.rows);
      const int64_t own_corners = own.dims + 1;
      parallel_rows(blocks, kBlock * own_corners, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          int32_t before = 0;  // rows of the other lattices
          for (int64_t m = 0; m < n; ++m) before += lattice[m].block[b + 1] - lattice[m].block[b];
          for (int32_t r = own.block[b]; r < own.block[b + 1]; ++r) {
            joint[r] = block[b] + before + r - own.block[b];
            vertex[joint[r]] = static_cast<int32_t>(first[n]) + own.vertex[r];
          }
          for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, pixels); ++i) {
            for (int64_t e = 0; e < own_corners; ++e) {
              local[i * corners + corner + e] =
                  static_cast<uint16_t>(own.local[i * own_corners + e] + before);
              share[i * corners + corner + e] = own.weight[i * own_corners + e] * root[i];
            }
          }
        }
      });
      row[n].resize(own.rows);
      parallel_rows(own.rows, 4, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) row[n][r] = joint[own.row[r]];
      });
      lattice[n].row = row[n].data();
      corner += own_corners;
    }
  }
};

// (M + M^T) / 2 of the classes used, as pydensecrf makes it: [classes, row].
std::vector<float> symmetric_part(const float* matrix, int64_t channels, const std::vector<int32_t>& classes,
                                  int64_t row) {
  const int64_t count = classes.size();
  std::vector<float> mixing(count * row, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      mixing[i * row + j] =
          0.5f * (matrix[classes[i] * channels + classes[j]] + matrix[classes[j] * channels + classes[i]]);
    }
  }
  return mixing;
}

// Floats that begin at a cache line, so that no chunk of a row lies across two lines.
constexpr std::align_val_t kLine{64};
struct AlignedDelete {
  void operator()(float* values) const { ::operator delete(values, kLine); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;
AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(::operator new(count * sizeof(float), kLine)));
}

constexpr int kSoftmaxLanes = 8;  // of a pixel
constexpr int kMaxLanes = 16;     // of a pixel, if each has one vector

// The iterations on CUDA, of one image. Both lattices are filtered in the same launches. `steps` has the rows
// of `current` filtered and written to `filtered`, which are the same without compatibilities.
void iterate_on_cuda(LatticeStepsParams steps, SoftmaxParams softmax, int64_t iterations, float* current,
                     float* filtered, const CudaTables& tables, [[maybe_unused]] void* stream) {
  softmax.lanes = kSoftmaxLanes;
  softmax.out = iterations > 0 ? current : nullptr;
  AFA_CUDA_LAUNCH("mean_field", launch_field_softmax(softmax, stream));
  int lanes = 1;
  while (lanes * steps.of[0].vector < softmax.row) lanes *= 2;
  const bool joined = softmax.compatibility == nullptr && lanes <= kMaxLanes && softmax.row <= kTableWidth;
  if (joined) softmax.lanes = lanes;
  softmax.filtered = filtered;
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    softmax.out = iteration + 1 < iterations ? current : nullptr;
    for (int64_t first = 0; first < softmax.row; first += kTableWidth) {
      for (int64_t n = 0; n < steps.count; ++n) {
        steps.of[n].first = first;
        steps.of[n].width = std::min(kTableWidth, softmax.row - first);
        steps.of[n].in = current;
        steps.of[n].out = filtered;
      }
      splat_and_blur_on_cuda("mean_field", steps, tables.first.mutable_data_ptr(),
                             tables.second.mutable_data_ptr(), false, stream);
      if (joined) {
        AFA_CUDA_LAUNCH("mean_field", launch_field_slice(steps, softmax, stream));
      } else {
        AFA_CUDA_LAUNCH("mean_field", launch_lattice_slice(steps, stream));
      }
    }
    if (!joined) AFA_CUDA_LAUNCH("mean_field", launch_field_softmax(softmax, stream));
  }
}

}  // namespace

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
  const int64_t bytes = static_cast<int64_t>(scores.element_size());
  std::optional<Tensor> mask, matrix;
  if (class_mask) mask = torch::stable::contiguous(*class_mask);
  if (compatibility) matrix = torch::stable::contiguous(*compatibility);

  const std::vector<int32_t> order = pixel_order(scores.size(2), scores.size(3));
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int32_t> classes;
    for (int64_t c = 0; c < channels; ++c) {
      if (!mask || static_cast<const bool*>(mask->const_data_ptr())[b * channels + c]) {
        classes.push_back(static_cast<int32_t>(c));
      }
    }
    if (classes.empty()) continue;
    JointLattice joint;
    for (int n = 0; n < kMaxKernels && num_iter > 0; ++n) {
      if (weights[n] == 0) continue;
      joint.add(cpu_lattice_at(field.layout[n], image_lattice(lattices[n], b, field.layout[n])), weights[n]);
    }
    joint.join(pixels);

    GatherParams gather;
    gather.kind = kind_of(scores, "scores");
    gather.pixels = pixels;
    gather.channels = static_cast<int64_t>(classes.size());
    gather.chunks = chunks_for(gather.channels);
    gather.stride = gather.chunks * kChunk;
    gather.order = order.data();
    gather.planes = static_cast<const char*>(dense.const_data_ptr()) + b * channels * pixels * bytes;
    gather.index = classes.data();
    gather.log = probabilities;
    gather.negate = !probabilities;
    gather.padding = -1e30f;

    const int64_t chunks = gather.chunks, row = gather.stride;
    const Tensor logits = empty_in_huge_pages(scores, {pixels, row}, ScalarType::Float);
    const Tensor rows = empty_in_huge_pages(scores, {joint.block.back(), row}, ScalarType::Float);
    const Tensor table = empty_in_huge_pages(scores, {joint.vertices, row}, ScalarType::Float);

    FieldParams p;
    p.pixels = pixels;
    p.channels = gather.channels;
    p.row = row;
    p.corners = joint.corners;
    p.local = joint.local.data();
    p.share = joint.share.data();
    p.block = joint.block.data();
    p.vertex = joint.vertex.data();
    p.table = static_cast<const float*>(table.const_data_ptr());
    p.planes = at<float>(out.mutable_data_ptr(), b * channels * pixels);
    p.logits = static_cast<float*>(logits.mutable_data_ptr());
    p.order = order.data();
    p.index = classes.data();
    std::vector<float> mixing;
    if (matrix) {
      mixing = symmetric_part(static_cast<const float*>(matrix->const_data_ptr()), channels, classes, row);
    }
    const int64_t steps = joint.kernels == 0 ? 0 : num_iter;  // without kernels, the logits do not change
    for (int64_t step = 0; step <= steps; ++step) {
      p.gather = step == 0 ? &gather : nullptr;
      p.compatibility = matrix && step > 0 ? mixing.data() : nullptr;
      p.rows = step < steps ? static_cast<float*>(rows.mutable_data_ptr()) : nullptr;
      parallel_rows(blocks_of(pixels), kBlock * row, [&](int64_t begin, int64_t end) {
        const AlignedFloats scratch = aligned_floats((kPixelBlock + 1 + joint.max_rows) * row);
        AFA_SIMD_CALL(field_step, p, begin, end, scratch.get());
      });
      if (step == steps) break;
      for (int n = 0; n < joint.kernels; ++n) {
        for (int64_t tile = 0; tile < tiles_for(chunks); ++tile) {
          const int64_t chunk = tile_begin(tile, chunks);
          MergeParams merge;
          merge.lattice = joint.lattice[n];
          merge.chunks = tile_begin(tile + 1, chunks) - chunk;
          merge.stride = row;
          merge.rows = p.rows + chunk * kChunk;
          merge.table = at<float>(table.mutable_data_ptr(), joint.first[n] * row + chunk * kChunk);
          merge.scale = joint.scale[n];
          merge_and_blur(Kind::f32, merge, false);
        }
      }
    }
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
  const int64_t vector = vector_for(Kind::f32, channels), row = padded(channels, vector);
  const Tensor current = empty(scores, {pixels, row}, ScalarType::Float);
  // The compatibilities mix all channels of the filtered rows; else they replace the current ones.
  const Tensor filtered = matrix ? empty(scores, {pixels, row}, ScalarType::Float) : current;
  const CudaTables tables(field.layout[1], row, scores, ScalarType::Float);
  const int64_t bytes = channels * pixels * static_cast<int64_t>(scores.element_size());

  for (int64_t b = 0; b < batch; ++b) {
    // The result has the logits until the last iteration.
    float* const planes = at<float>(out.mutable_data_ptr(), b * channels * pixels);
    LogitsParams logits;
    logits.kind = kind_of(scores, "scores");
    logits.pixels = pixels;
    logits.channels = channels;
    logits.scores = static_cast<const char*>(dense.const_data_ptr()) + b * bytes;
    logits.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) + b * channels : nullptr;
    logits.probabilities = probabilities;
    logits.logits = planes;
    AFA_CUDA_LAUNCH("mean_field", launch_logits(logits, scope.stream()));
    SoftmaxParams softmax;
    softmax.pixels = pixels;
    softmax.channels = channels;
    softmax.row = row;
    softmax.planes = planes;
    softmax.compatibility = matrix ? static_cast<const float*>(matrix->const_data_ptr()) : nullptr;
    softmax.mask = logits.mask;
    LatticeStepsParams steps;
    for (int n = 0; n < kMaxKernels; ++n) {
      if (weights[n] == 0) continue;
      LatticeStepParams& step = steps.of[steps.count++];
      step.layout = field.layout[n];
      step.words = image_lattice(lattices[n], b, field.layout[n]);
      step.normalize = Normalize::symmetric;
      step.row = row;
      step.vector = vector;
      step.gain = lattice_gain(step.layout.dims) * weights[n];
    }
    iterate_on_cuda(steps, softmax, steps.count == 0 ? 0 : num_iter,
                    static_cast<float*>(current.mutable_data_ptr()),
                    static_cast<float*>(filtered.mutable_data_ptr()), tables, scope.stream());
  }
  return out;
}

}  // namespace afa
