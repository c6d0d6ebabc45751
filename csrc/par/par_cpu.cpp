// PAR's affinity on the CPU; compiled once per SIMD level.
//
// One vector of pixels at a time: three passes over the neighbours for each colour channel (mean, variance,
// logits; the mean first, as a sum of squares alone loses the small deviations that matter), then the softmax
// over the neighbours with the logits in a local array (K * 64 bytes). Reads 3 channels, writes K weights a
// pixel.
#include "common/vec.h"
#include "par/par.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int kMaxNeighbours = 8 * kMaxDilations;

template <typename T, bool PARTIAL>
inline void pixels(const ParAffinityParams& p, int64_t b, int64_t y, int64_t x, const int64_t* offset,
                   int64_t count) {
  using V = typename Vec<T>::type;
  const int size = p.stencil.size;
  V logit[kMaxNeighbours];
  for (int k = 0; k < size; ++k) logit[k] = V{};
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* plane = static_cast<const T*>(p.images) + b * p.image_stride_b + c * p.image_stride_c + x;
    V mean = {};
    for (int k = 0; k < size; ++k) mean += load<T>(plane + offset[k]);
    mean /= V{} + static_cast<T>(size);
    V squares = {};
    for (int k = 0; k < size; ++k) {
      const V deviation = load<T>(plane + offset[k]) - mean;
      squares += deviation * deviation;
    }
    const V sigma = square_root(squares / (V{} + static_cast<T>(size - 1)));
    const V scale = T{1} / ((sigma + static_cast<T>(1e-8)) * static_cast<T>(p.w1));
    const V centre = load<T>(plane + y * p.image_stride_y);
    for (int k = 0; k < size; ++k) {
      const V step = (load<T>(plane + offset[k]) - centre) * scale;
      logit[k] -= step * step;
    }
  }
  const V channels = V{} + static_cast<T>(p.channels);
  V top = logit[0];
  for (int k = 1; k < size; ++k) top = larger(top, logit[k]);
  V sum = {};
  for (int k = 0; k < size; ++k) {
    logit[k] = exp_nonpositive((logit[k] - top) / channels);
    sum += logit[k];
  }
  const V inverse = T{1} / sum;
  T* out = static_cast<T*>(p.weights) + (b * size * p.height + y) * p.width + x;
  for (int k = 0; k < size; ++k, out += p.height * p.width) {
    const bool corner = k % 8 == 0 || k % 8 == 2 || k % 8 == 5 || k % 8 == 7;
    const V weight = logit[k] * inverse + static_cast<T>(corner ? p.corner[k / 8] : p.edge[k / 8]);
    if (PARTIAL) {
      store_first<T>(out, weight, count);
    } else {
      store<T>(out, weight);
    }
  }
}

template <typename T>
void rows(const ParAffinityParams& p, int64_t begin, int64_t end) {
  int64_t offset[kMaxNeighbours];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    int k = 0;
    for (int r = 0; r < p.stencil.runs; ++r) {
      const Run& run = p.stencil.run[r];
      const int64_t row = clamp_index(y + run.dy, p.height) * p.image_stride_y;
      for (int j = 0; j < run.count; ++j) {
        offset[k++] = row + clip_offset(run.dx + int64_t{j} * run.step, p.image_pad);
      }
    }
    if (p.width < kLanes<T>) {
      pixels<T, true>(p, b, y, 0, offset, p.width);
      continue;
    }
    for (int64_t x = 0; x < p.width; x += kLanes<T>) {
      const int64_t last = p.width - kLanes<T>;
      pixels<T, false>(p, b, y, x < last ? x : last, offset, 0);
    }
  }
}

}  // namespace

void par_affinity_rows(const ParAffinityParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    rows<double>(p, begin, end);
  } else {
    rows<float>(p, begin, end);
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
