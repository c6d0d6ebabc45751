// Version 4: C++ in the order of the equation. A sum stays in a register for all of its 48 neighbors, so each
// iteration writes each mask once.
//
// The innermost loop runs over the neighbors, whose weights and values are at 96 unrelated addresses. A
// vector of eight is gathered by eight loads, every value costs two clamps, and the products are added one by
// one, because the compiler must not change the order of a sum. The next version exchanges the loops.
#include <vector>

#include "par.h"

void par_affinity(const float* image, float* weights, int64_t channels, int64_t height, int64_t width,
                  int64_t /* threads */) {
  pixel_affinity(image, weights, channels, height, width);
}

void par_propagate(const float* weights, const float* masks, float* out, int64_t classes, int64_t height,
                   int64_t width, int64_t iterations, int64_t /* threads */) {
  const Ring ring;
  std::vector<float> now(masks, masks + classes * height * width), next(now.size());
  for (int64_t t = 0; t < iterations; ++t) {
    for (int64_t c = 0; c < classes; ++c) {
      const float* plane = now.data() + c * height * width;
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) {
          float sum = 0;
          for (int k = 0; k < kNeighbors; ++k) {
            sum += weights[(k * height + y) * width + x] *
                   plane[clamp(y + ring.dy[k], height) * width + clamp(x + ring.dx[k], width)];
          }
          next[(c * height + y) * width + x] = sum;
        }
      }
    }
    std::swap(now, next);
  }
  std::copy(now.begin(), now.end(), out);
}
