// Kernels and launch functions for the faults that test_faults.py plants in host code.
#include "common/cuda.cuh"

namespace {

__global__ void double_kernel(const float* in, float* out, int64_t count) {
  for (int64_t i = afa::first_item(); i < count; i += afa::item_stride()) out[i] = 2 * in[i];
}

__global__ void cooperative_kernel(const float* in, float* out, int64_t count) {
  for (int64_t i = afa::first_item(); i < count; i += afa::item_stride()) out[i] = in[i];
  afa::grid_sync();
  for (int64_t i = afa::first_item(); i < count; i += afa::item_stride()) out[i] *= 2;
}

}  // namespace

#define AFA_PLANTED extern "C" __attribute__((visibility("default")))

// Doubles the input. Returns nullptr, or the launch error.
AFA_PLANTED const char* planted_double(const float* in, float* out, int64_t count, void* stream) {
  AFA_LAUNCH(double_kernel, afa::grid_for(count, 1), afa::kThreads, stream, in, out, count);
  return afa::launch_error();
}

// The same with a block size that no GPU supports. `fetch`: fetch the launch error.
AFA_PLANTED const char* planted_too_many_threads(const float* in, float* out, int64_t count, void* stream,
                                                 bool fetch) {
  AFA_LAUNCH(double_kernel, 1, 2048, stream, in, out, count);
  return fetch ? afa::launch_error() : nullptr;
}

// The same with a cooperative launch or, if that is refused, a normal launch. `clear`: clear the error before
// that.
AFA_PLANTED const char* planted_fallback(const float* in, float* out, int64_t count, void* stream,
                                         bool clear) {
  AFA_LAUNCH_ON_HOST(cooperative_kernel, 1, afa::kThreads, 0, true, stream, in, out, count);
  if (cudaPeekAtLastError() == cudaSuccess) return afa::launch_error();
  if (clear) cudaGetLastError();
  AFA_LAUNCH(double_kernel, afa::grid_for(count, 1), afa::kThreads, stream, in, out, count);
  return afa::launch_error();
}
