// Version 9: the rows of an iteration are distributed to threads. Rows only read the masks of the iteration
// before, so that one barrier per iteration is enough, and the order of every sum is the same for any number
// of threads.
#include "affinity.h"
#include "denormals.h"

void par_affinity(const float* image, float* weights, int64_t channels, int64_t height, int64_t width,
                  int64_t threads) {
  const Ring ring;
  Planes padded = planes_by_row(channels, height, width);
  padded.read(image);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const FlushDenormals scope;
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) affinity_row(padded, ring, weights, y);
  }
}

void par_propagate(const float* weights, const float* masks, float* out, int64_t classes, int64_t height,
                   int64_t width, int64_t iterations, int64_t threads) {
  const Ring ring;
  Planes now = planes_by_row(classes, height, width), next = now;
  now.read(masks);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const FlushDenormals scope;
      int64_t offset[kNeighbors];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < height; ++i) {
        const int64_t y = t % 2 == 0 ? i : height - 1 - i;
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
    }
    std::swap(now, next);
  }
  now.write(out);
}
