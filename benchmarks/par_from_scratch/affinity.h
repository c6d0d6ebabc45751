// The affinity of versions 7 to 9: one vector of pixels at a time, with a polynomial instead of std::exp.
#pragma once

#include <cmath>
#include <cstdint>

#include "planes.h"
#include "tile.h"

// Sum of f(k) over the neighbors, in four sums that do not wait for each other.
template <typename F>
Vector sum_over(const F& f) {
  Vector a = {}, b = {}, c = {}, d = {};
  for (int k = 0; k < kNeighbors; k += 4) {
    a += f(k);
    b += f(k + 1);
    c += f(k + 2);
    d += f(k + 3);
  }
  return (a + b) + (c + d);
}

inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

inline Vector square_root(Vector x) {
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = std::sqrt(lane);
  return load(lanes);
}

// exp(x) for x <= 0, clamped below -87. x = n * ln 2 + r; a Taylor polynomial gives exp(r), and n is added to
// the exponent's bits. The relative error is below 2e-7.
inline Vector exp_nonpositive(Vector x) {
  typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
  constexpr float kRound =
      12582912.0f + 127;  // adding 1.5 * 2^23 rounds to an integer; 127 is the exponent's bias
  x = larger(x, Vector{} - 87.0f);
  const Vector shifted = x * 1.44269504f + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  Vector power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Row y of the weights [48, H, W].
inline void affinity_row(Planes& image, const Ring& ring, float* weights, int64_t y) {
  for (int64_t from = 0; from < image.width; from += kLanes) {
    const int64_t x = std::min(from, image.width - kLanes);
    Vector logit[kNeighbors] = {}, difference[kNeighbors];
    for (int64_t c = 0; c < image.count; ++c) {
      const Vector center = load(image.row(c, y) + x);
      const Vector mean = sum_over([&](int k) {
                            const float* row = image.row(c, clamp(y + ring.dy[k], image.height));
                            return difference[k] = load(row + x + ring.dx[k]) - center;
                          }) /
                          kNeighbors;
      const Vector squares = sum_over([&](int k) { return (difference[k] - mean) * (difference[k] - mean); });
      const Vector scale = 1.0f / ((square_root(squares / (kNeighbors - 1)) + 1e-8f) * kW1);
      for (int k = 0; k < kNeighbors; ++k) logit[k] -= (difference[k] * scale) * (difference[k] * scale);
    }
    Vector top = logit[0];
    for (int k = 1; k < kNeighbors; ++k) top = larger(top, logit[k]);
    const float share = 1.0f / static_cast<float>(image.count);
    const Vector sum = sum_over([&](int k) { return logit[k] = exp_nonpositive((logit[k] - top) * share); });
    const Vector inverse = 1.0f / sum;
    for (int k = 0; k < kNeighbors; ++k) {
      store(weights + (k * image.height + y) * image.width + x, logit[k] * inverse + ring.position[k]);
    }
  }
}
