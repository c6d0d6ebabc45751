// Filters values on permutohedral lattices.
#include "crf/lattice_host.h"
#include "ops.h"

namespace afa {
namespace {

LatticeLayout check_filter(const Tensor& values, const Tensor& lattice, int64_t dims) {
  check_shape(values, "values", "[B, C, H, W]", {-1, -1, -1, -1});
  kind_of(values, "values");
  AFA_CHECK(dims >= 1 && dims <= kMaxFeatures, "dims must be 1 to ", kMaxFeatures, ", got ", dims);
  const LatticeLayout layout{values.size(2) * values.size(3), dims};
  check_lattice(lattice, "lattice", layout, values, "values");
  return layout;
}

}  // namespace

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
  const int64_t chunks = chunks_for(channels), tiles = tiles_for(chunks), blocks = blocks_of(pixels);
  const int64_t widest = std::min(chunks, kMaxChunks) * kChunk;
  const std::vector<int32_t> order = pixel_order(values.size(2), values.size(3));
  for (int64_t b = 0; b < batch; ++b) {
    const CpuLattice own = cpu_lattice_at(layout, image_lattice(words, b, layout));
    std::vector<float> before;
    if (mode == Normalize::symmetric || mode == Normalize::before) before = pixel_factors(own, mode, true, 1);
    const std::vector<float> after = pixel_factors(own, mode, false, lattice_gain(dims));
    const Tensor rows = empty_in_huge_pages(values, {own.rows, widest}, sum_type(values));
    const Tensor table = empty_in_huge_pages(values, {own.vertices, widest}, sum_type(values));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t chunk = tile_begin(tile, chunks), width = tile_begin(tile + 1, chunks) - chunk;
      const int64_t stride = width * kChunk, plane = (b * channels + chunk * kChunk) * pixels * bytes;
      SplatParams splat;
      splat.gather.kind = kind;
      splat.gather.pixels = pixels;
      splat.gather.stride = stride;
      splat.gather.channels = std::min(stride, channels - chunk * kChunk);
      splat.gather.chunks = width;
      splat.gather.order = order.data();
      splat.gather.planes = static_cast<const char*>(dense.const_data_ptr()) + plane;
      splat.lattice = own;
      splat.factor = before.empty() ? nullptr : before.data();
      splat.rows = rows.mutable_data_ptr();
      const int64_t work = kBlock * own.dims * width;
      parallel_rows(blocks, work,
                    [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_splat, splat, begin, end); });
      MergeParams merge;
      merge.lattice = own;
      merge.chunks = width;
      merge.stride = stride;
      merge.rows = splat.rows;
      merge.table = table.mutable_data_ptr();
      merge_and_blur(sums, merge, reverse);
      SliceParams slice;
      slice.kind = kind;
      slice.lattice = own;
      slice.channels = splat.gather.channels;
      slice.chunks = width;
      slice.order = order.data();
      slice.table = table.const_data_ptr();
      slice.factor = after.data();
      slice.planes = static_cast<char*>(out.mutable_data_ptr()) + plane;
      parallel_rows(blocks, work,
                    [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_slice, slice, begin, end); });
    }
  }
  return out;
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
  const int64_t vector = vector_for(kind, channels), row = padded(channels, vector);
  const Tensor rows = empty(values, {pixels, row}, sum_type(values));
  const CudaTables tables(layout, row, values, sum_type(values));
  LatticeStepsParams steps;
  steps.count = 1;
  LatticeStepParams& step = steps.of[0];
  step.layout = layout;
  step.kind = kind == Kind::f64 ? Kind::f64 : Kind::f32;
  step.normalize = mode;
  step.row = row;
  step.vector = vector;
  step.gain = lattice_gain(dims);
  step.out = rows.mutable_data_ptr();
  RowsParams planes;
  planes.kind = kind;
  planes.pixels = pixels;
  planes.channels = channels;
  planes.row = row;
  planes.vector = vector;
  const int64_t bytes = channels * pixels * static_cast<int64_t>(values.element_size());
  for (int64_t b = 0; b < batch; ++b) {
    planes.from = static_cast<const char*>(dense.const_data_ptr()) + b * bytes;
    planes.to = rows.mutable_data_ptr();
    AFA_CUDA_LAUNCH("lattice_filter", launch_rows_from_planes(planes, scope.stream()));
    step.words = image_lattice(words, b, layout);
    for (step.first = 0; step.first < row; step.first += step.width) {
      step.width = std::min(kTableWidth, row - step.first);
      step.in = rows.const_data_ptr();
      splat_and_blur_on_cuda("lattice_filter", steps, tables.first.mutable_data_ptr(),
                             tables.second.mutable_data_ptr(), reverse, scope.stream());
      AFA_CUDA_LAUNCH("lattice_filter", launch_lattice_slice(steps, scope.stream()));
    }
    planes.from = rows.const_data_ptr();
    planes.to = static_cast<char*>(out.mutable_data_ptr()) + b * bytes;
    AFA_CUDA_LAUNCH("lattice_filter", launch_planes_from_rows(planes, scope.stream()));
  }
  return out;
}

}  // namespace afa
