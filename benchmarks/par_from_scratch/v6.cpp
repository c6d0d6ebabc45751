// Version 6: the sums of a tile of six classes and two vectors of pixels (four with AVX-512) stay in
// registers for all 48 neighbors; see tile.h. A weight is loaded once for six classes, and a multiply-add
// takes 1 + 1/6 loads and no store.
//
// The iterations are now fast enough for the affinity to matter, which is computed pixel by pixel. The next
// version computes it for vectors of pixels.
#include "planes.h"
#include "tile.h"

void par_affinity(const float* image, float* weights, int64_t channels, int64_t height, int64_t width,
                  int64_t /* threads */) {
  pixel_affinity(image, weights, channels, height, width);
}

void par_propagate(const float* weights, const float* masks, float* out, int64_t classes, int64_t height,
                   int64_t width, int64_t iterations, int64_t /* threads */) {
  const Ring ring;
  Planes now = planes_in_order(classes, height, width), next = now;
  now.read(masks);
  int64_t offset[kNeighbors];
  for (int64_t t = 0; t < iterations; ++t) {
    for (int64_t y = 0; y < height; ++y) {
      for (int k = 0; k < kNeighbors; ++k) {
        offset[k] = clamp(y + ring.dy[k], height) * now.row_stride + ring.dx[k];
      }
      for (int64_t c = 0; c < classes; c += kClasses) {
        const Tile row = {weights + y * width, height * width, now.row(c, 0),    offset,
                          now.plane_stride,    next.row(c, y), next.plane_stride};
        sum_row(row, std::min<int64_t>(kClasses, classes - c), width);
      }
      for (int64_t c = 0; c < classes; ++c) next.replicate_border(c, y);
    }
    std::swap(now, next);
  }
  now.write(out);
}
