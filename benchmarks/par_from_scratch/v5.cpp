// Version 5: the innermost loop runs over the pixels of a row, and rows have replicated columns on both
// sides. Weights, neighbors and sums are then contiguous, and the compiler vectorizes the loop. Rows are
// clamped once per neighbor, columns never. A row's weights are used for all classes before the next row's
// are read.
//
// One multiply-add takes three loads (weight, neighbor, sum) and a store (sum). The next version keeps the
// sums in registers.
#include "planes.h"

void par_affinity(const float* image, float* weights, int64_t channels, int64_t height, int64_t width,
                  int64_t /* threads */) {
  pixel_affinity(image, weights, channels, height, width);
}

void par_propagate(const float* weights, const float* masks, float* out, int64_t classes, int64_t height,
                   int64_t width, int64_t iterations, int64_t /* threads */) {
  const Ring ring;
  Planes now = planes_in_order(classes, height, width), next = now;
  now.read(masks);
  for (int64_t t = 0; t < iterations; ++t) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t c = 0; c < classes; ++c) {
        float* __restrict sum = next.row(c, y);
        std::fill_n(sum, width, 0.0f);
        for (int k = 0; k < kNeighbors; ++k) {
          const float* weight = weights + (k * height + y) * width;
          const float* neighbor = now.row(c, clamp(y + ring.dy[k], height)) + ring.dx[k];
          for (int64_t x = 0; x < width; ++x) sum[x] += weight[x] * neighbor[x];
        }
        next.replicate_border(c, y);
      }
    }
    std::swap(now, next);
  }
  now.write(out);
}
