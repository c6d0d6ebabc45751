// Common definitions of all .cu files: the launch macro, types, grid sizes. No torch headers, so that these
// files compile fast and also run on a CPU with a small shim of the CUDA runtime (AFA_CUDA_ON_HOST).
#pragma once

#ifdef AFA_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Every kernel is launched through one of these; a template's name goes in parentheses: AFA_LAUNCH((f<float,
// 4>), ...). SHARED: with this many bytes of dynamic shared memory. COOPERATIVE: the same, with all blocks
// resident at once, so that they can synchronize at grid_sync(); at most resident_blocks blocks. Its value is
// true if the kernel was launched, and false if the driver refused the launch (see cooperative_granted).
#define AFA_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define AFA_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  ::afa::launch_shared(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define AFA_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::afa::launch_cooperative(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// In a kernel: a pointer to its dynamic shared memory, aligned to 16 bytes.
#define AFA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char afa_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(afa_dynamic_shared)
#endif

#include <tuple>
#include <type_traits>

#include "common/device.h"
#include "common/geometry.h"

namespace afa {
namespace {

constexpr int kThreads = 128;
#ifdef AFA_CUDA_ON_HOST
using ::cuda_on_host::kMaxGridX;
using ::cuda_on_host::kMaxGridY;
#else
constexpr int64_t kMaxGridX = int64_t{1} << 30;
constexpr int64_t kMaxGridY = 65535;
#endif

// Blocks in x and in y, limited to the maximum grid size: kernels loop over the rest with a grid stride.
inline dim3 block_grid(int64_t x, int64_t y = 1) {
  return dim3(static_cast<unsigned>(x < kMaxGridX ? x : kMaxGridX),
              static_cast<unsigned>(y < kMaxGridY ? y : kMaxGridY));
}

// One thread per item in x; y for images, planes or groups of them.
inline dim3 grid_for(int64_t items, int64_t groups) {
  return block_grid(ceil_div(items, kThreads), groups);
}

// A compile-time bool as a value, for generic lambdas.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

__device__ inline int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t item_stride() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// Accumulation type.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

// Minimum number of resident blocks per SM for __launch_bounds__: half as many if values need two registers.
// It limits the registers to what this allows; without it, the compiler aims for more warps and spills.
template <typename T>
constexpr int min_blocks(int blocks) {
  return sizeof(T) == 8 ? blocks / 2 : blocks;
}

template <typename Sum, typename T>
__device__ inline Sum to_sum(T value) {
  return static_cast<Sum>(value);
}
template <typename T, typename Sum>
__device__ inline T from_sum(Sum value) {
  return static_cast<T>(value);
}

// Calls f with a value of the C++ type of `kind`.
template <typename F>
void with_type(Kind kind, const F& f) {
  switch (kind) {
    case Kind::f32:
      f(float{});
      break;
    case Kind::f64:
      f(double{});
      break;
    case Kind::f16:
      f(__half{});
      break;
    case Kind::bf16:
      f(__nv_bfloat16{});
      break;
  }
}

template <typename... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  allow_shared_of(reinterpret_cast<const void*>(kernel), bytes);
}

template <typename... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  return resident_blocks_of(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

// A device that supports cooperative launches can still refuse one, under MPS or in a green context that
// gives a process only part of its SMs. This error is cleared and false is returned: the caller then launches
// once per step. All other errors are left for launch_error.
inline bool cooperative_granted(cudaError_t status) {
  const bool refused = status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorNotSupported ||
                       status == cudaErrorNotPermitted;
  if (refused) cudaGetLastError();
  return !refused;
}

#ifdef AFA_CUDA_ON_HOST
using ::cuda_on_host::grid_sync;
#else
// Synchronizes all threads of a cooperative launch: writes before it are visible to all threads after it.
__device__ inline void grid_sync() {
  cooperative_groups::this_grid().sync();
}

template <typename... Parameters, typename... Arguments>
void launch_shared(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  allow_shared(kernel, shared_bytes);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

template <typename... Parameters, typename... Arguments>
bool launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                        void* stream, const Arguments&... arguments) {
  allow_shared(kernel, shared_bytes);
  std::tuple<std::remove_cv_t<Parameters>...> values(arguments...);
  return cooperative_granted(std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                           shared_bytes, static_cast<cudaStream_t>(stream));
      },
      values));
}
#endif

inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace
}  // namespace afa
