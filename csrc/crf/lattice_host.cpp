#include "crf/lattice_host.h"

#include <cmath>

namespace afa {

Normalize normalize_of(const std::string& name) {
  if (name == "none") return Normalize::none;
  if (name == "symmetric") return Normalize::symmetric;
  if (name == "before") return Normalize::before;
  AFA_CHECK(name == "after", "normalize must be none, symmetric, before or after, got ", name);
  return Normalize::after;
}

void check_lattice(const Tensor& lattice, const char* name, const LatticeLayout& layout, const Tensor& values,
                   const char* values_name) {
  check_shape(lattice, name, "[B, words]", {-1, layout.words()});
  AFA_CHECK(lattice.size(0) == values.size(0) || lattice.size(0) == 1, name, " must have batch ",
            values.size(0), " or 1, got shape ", shape_string(lattice));
  AFA_CHECK(lattice.scalar_type() == ScalarType::Int, name, " must be int32, got ",
            type_name(lattice.scalar_type()));
  check_device(lattice, name, values, values_name);
}

const int32_t* image_lattice(const Tensor& lattice, int64_t image, const LatticeLayout& layout) {
  const int32_t* words = static_cast<const int32_t*>(lattice.const_data_ptr());
  return words + (lattice.size(0) == 1 ? 0 : image * layout.words());
}

// ---- CPU ----

namespace {

// Appends the pixels of a square of `size` x `size` tiles.
int32_t* add_tiles(int64_t y, int64_t x, int64_t size, int64_t height, int64_t width, int32_t* next) {
  if (y * kTileHeight >= height || x * kTileWidth >= width) return next;
  if (size > 1) {
    const int64_t half = size / 2;
    for (int n = 0; n < 4; ++n)
      next = add_tiles(y + n / 2 * half, x + n % 2 * half, half, height, width, next);
    return next;
  }
  for (int64_t row = y * kTileHeight; row < std::min((y + 1) * kTileHeight, height); ++row) {
    for (int64_t column = x * kTileWidth; column < std::min((x + 1) * kTileWidth, width); ++column) {
      *next++ = static_cast<int32_t>(row * width + column);
    }
  }
  return next;
}

}  // namespace

std::vector<int32_t> pixel_order(int64_t height, int64_t width) {
  std::vector<int32_t> order(height * width);
  int64_t size = 1;
  while (size * kTileHeight < height || size * kTileWidth < width) size *= 2;
  add_tiles(0, 0, size, height, width, order.data());
  return order;
}

std::vector<float> pixel_factors(const CpuLattice& lattice, Normalize normalize, bool before, float scale) {
  std::vector<float> factor(lattice.pixels);
  parallel_rows(lattice.pixels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float norm = lattice.norm[i] + 1e-20f;  // as pydensecrf
      float f = 1.0f;
      if (normalize == Normalize::symmetric) f = 1.0f / std::sqrt(norm);
      if (normalize == (before ? Normalize::before : Normalize::after)) f = 1.0f / norm;
      factor[i] = f * scale;
    }
  });
  return factor;
}

void merge_and_blur(Kind kind, const MergeParams& merge, bool reverse) {
  const int64_t corners = merge.lattice.dims + 1, work = merge.chunks * kChunk / 2;
  parallel_rows(merge.lattice.vertices, work,
                [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_merge, kind, merge, begin, end); });
  BlurParams blur;
  blur.lattice = merge.lattice;
  blur.chunks = merge.chunks;
  blur.stride = merge.stride;
  blur.table = merge.table;
  for (int64_t n = 0; n < corners; ++n) {
    blur.axis = reverse ? corners - 1 - n : n;
    parallel_rows(merge.lattice.vertices, work,
                  [&](int64_t begin, int64_t end) { AFA_SIMD_CALL(lattice_blur, kind, blur, begin, end); });
  }
}

// ---- CUDA ----

int64_t vector_for(Kind kind, int64_t channels) {
  if (kind == Kind::f64) return 1;
  for (const int64_t vector : {4, 2}) {
    if (7 * (padded(channels, vector) - channels) <= channels) return vector;
  }
  return 1;
}

CudaTables::CudaTables(const LatticeLayout& layout, int64_t row, const Tensor& like, ScalarType type)
    : first(empty(like, {layout.entries(), std::min(row, kTableWidth)}, type)),
      second(empty(like, {layout.entries(), std::min(row, kTableWidth)}, type)) {}

void splat_and_blur_on_cuda([[maybe_unused]] const char* op, LatticeStepsParams& steps, void* first,
                            void* second, bool reverse, [[maybe_unused]] void* stream) {
  const LatticeStepParams& last = steps.of[steps.count - 1];
  const int64_t row_bytes = last.width * (last.kind == Kind::f64 ? 8 : 4);
  steps.room = last.layout.entries();
  LatticeStepsParams step = steps;
  char* heads = static_cast<char*>(second);
  for (int64_t n = 0; n < steps.count; ++n) {
    step.of[n].out = first;
    step.of[n].heads = heads;
    heads += step.of[n].layout.runs() * row_bytes;
  }
  AFA_CUDA_LAUNCH(op, launch_lattice_splat(step, stream));
  if (steps.count == 2) {
    step.of[0].out = steps.of[0].out;
    step.spare = second;
    AFA_CUDA_LAUNCH(op, launch_lattice_overflow(step, stream));
  }
  const int64_t passes = last.layout.corners();
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t n = 0; n < steps.count; ++n) {
      const int64_t corners = step.of[n].layout.corners();
      step.of[n].axis = reverse ? corners - 1 - pass : pass;
      step.of[n].in = pass % 2 == 0 ? first : second;
      step.of[n].out = pass % 2 == 0 ? second : first;
      if (pass == corners) step.begin = n + 1;  // the first lattice has fewer axes
    }
    AFA_CUDA_LAUNCH(op, launch_lattice_blur(step, stream));
  }
  for (int64_t n = 0; n < steps.count; ++n) {
    steps.of[n].in = steps.of[n].layout.corners() % 2 == 0 ? first : second;
  }
}

}  // namespace afa
