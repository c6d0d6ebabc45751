// PAR's and PAMR's affinity on the CPU; compiled once per SIMD level.
//
// Processes one vector of pixels at a time. For each color channel the neighbors are read once, as
// differences from the center, into a local array (K * 64 bytes), which two more passes read from the L1
// cache: the variance (computed after the mean, as a plain sum of squares loses the small deviations that
// matter) and the logits, which are a local array, too, and the softmax's input. Each sum uses four
// independent accumulators. Reads the image, writes K weights per pixel.
#include "common/vec.h"
#include "par/par.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int kRing = 8;
constexpr int kMaxNeighbors = kRing * kMaxDilations;

// Sum of f(k) over the neighbors.
template <typename V, typename F>
inline V sum_over(int size, const F& f) {
  V a = {}, b = {}, c = {}, d = {};
  for (int k = 0; k < size; k += kRing) {
    a += f(k) + f(k + 4);
    b += f(k + 1) + f(k + 5);
    c += f(k + 2) + f(k + 6);
    d += f(k + 3) + f(k + 7);
  }
  return (a + b) + (c + d);
}

template <typename V>
inline V largest(int size, const V* values) {
  V a = values[0], b = values[1], c = values[2], d = values[3];
  for (int k = 4; k < size; k += 4) {
    a = larger(a, values[k]);
    b = larger(b, values[k + 1]);
    c = larger(c, values[k + 2]);
    d = larger(d, values[k + 3]);
  }
  return larger(larger(a, b), larger(c, d));
}

template <typename T, bool PAMR, bool PARTIAL>
inline void pixels(const ParAffinityParams& p, int64_t b, int64_t y, int64_t x, const int64_t* offset,
                   int64_t count) {
  using V = typename Vec<T>::type;
  const int size = p.stencil.size;
  const T centers = PAMR ? static_cast<T>(size / kRing) : T{0};  // count of the center in sigma
  const T count_of_sigma = static_cast<T>(size) + centers;
  const V one_over_count = V{} + T{1} / count_of_sigma;
  V logit[kMaxNeighbors], difference[kMaxNeighbors];
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* plane = static_cast<const T*>(p.images) + b * p.image_stride_b + c * p.image_stride_c + x;
    const V center = load<T>(plane + y * p.image_stride_y);
    const V mean = one_over_count * sum_over<V>(size, [&](int k) {
                     return difference[k] = load<T>(plane + offset[k]) - center;
                   });
    V squares = sum_over<V>(size, [&](int k) {
      const V deviation = difference[k] - mean;
      return deviation * deviation;
    });
    if (PAMR) squares += centers * (mean * mean);
    const V sigma = square_root(squares / (V{} + (count_of_sigma - 1)));
    const V scale = PAMR ? T{1} / (static_cast<T>(1e-8) + static_cast<T>(0.1) * sigma)
                         : T{1} / ((sigma + static_cast<T>(1e-8)) * static_cast<T>(p.w1));
    for (int k = 0; k < size; ++k) {
      const V step = difference[k] * scale;
      const V distance = PAMR ? larger(step, -step) : step * step;
      logit[k] = c == 0 ? -distance : logit[k] - distance;
    }
  }
  const V one_over_channels = V{} + T{1} / static_cast<T>(p.channels);
  const V top = largest(size, logit) * one_over_channels;
  const V sum = sum_over<V>(
      size, [&](int k) { return logit[k] = exp_nonpositive(logit[k] * one_over_channels - top); });
  const V inverse = T{1} / sum;
  T* out = static_cast<T*>(p.weights) + (b * size * p.height + y) * p.width + x;
  for (int k = 0; k < size; ++k, out += p.height * p.width) {
    const int i = k % kRing;
    const bool corner = i == 0 || i == 2 || i == 5 || i == 7;
    const V weight = logit[k] * inverse + static_cast<T>(corner ? p.corner[k / kRing] : p.edge[k / kRing]);
    if (PARTIAL) {
      store_first<T>(out, weight, count);
    } else {
      store<T>(out, weight);
    }
  }
}

template <typename T, bool PAMR>
void rows(const ParAffinityParams& p, int64_t begin, int64_t end) {
  int64_t offset[kMaxNeighbors];
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
      pixels<T, PAMR, true>(p, b, y, 0, offset, p.width);
      continue;
    }
    for (int64_t x = 0; x < p.width; x += kLanes<T>) {
      const int64_t last = p.width - kLanes<T>;
      pixels<T, PAMR, false>(p, b, y, x < last ? x : last, offset, 0);
    }
  }
}

}  // namespace

void par_affinity_rows(const ParAffinityParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    p.pamr ? rows<double, true>(p, begin, end) : rows<double, false>(p, begin, end);
  } else {
    p.pamr ? rows<float, true>(p, begin, end) : rows<float, false>(p, begin, end);
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
