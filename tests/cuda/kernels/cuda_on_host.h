// The part of CUDA that is needed to run the project's .cu files on the CPU. A C++ compiler compiles them
// against the toolkit's headers. The threads of a block are fibers on one host thread. They run in turn, each
// until it exits or waits at a barrier. Blocks run one after another or, in a cooperative launch, from one
// grid barrier to the next. The execution order can be chosen, which exposes results that depend on it.
// README.md lists the detected bugs; common/cuda.cuh includes this file.
//
// Shared memory is a static variable of the kernel, so AddressSanitizer puts red zones around each array.
// [[gnu::used]] prevents the compiler from replacing a variable that is never written by zeros. build.py puts
// these variables in a separate section, which is filled with NaN before each block. Dynamic shared memory is
// declared by AFA_DYNAMIC_SHARED; extern __shared__ does not compile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <vector_functions.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>

#include "runtime/api.h"
#include "runtime/limits.h"

// Remove the attributes that only nvcc knows.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __global__ static
#define __device__
#define __host__
#define __shared__ [[gnu::used]] static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline

namespace cuda_on_host {

// The indices of the running thread.
struct Position {
  dim3 grid, block;
  uint3 block_index, thread_index;
};
extern Position position;

// The grid size is limited more than on a GPU, so that small inputs already execute the grid-stride loops.
constexpr int64_t kMaxGridX = 3;
constexpr int64_t kMaxGridY = 2;

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
};

// Runs a kernel, which may access only these blocks of device memory. Returns an error message, or nullptr.
const char* run(const Launch& launch, const std::function<void()>& kernel, const stand_in_span* blocks,
                size_t block_count);

// Passes a kernel and a copy of its arguments to the stand-in runtime. The runtime checks the launch, and
// runs the kernel when the host waits for its stream. cudaGetLastError returns the launch error.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& launch, void* stream,
            const Arguments&... arguments) {
  struct State {
    void (*kernel)(Parameters...);
    Launch launch;
    std::tuple<std::remove_cv_t<Parameters>...> values;
  };
  auto state = std::make_unique<State>(State{kernel, launch, {static_cast<Parameters>(arguments)...}});
  stand_in_span parameters[sizeof...(Parameters)];
  std::apply(
      [&](const auto&... value) {
        size_t i = 0;
        ((parameters[i++] = {reinterpret_cast<const char*>(&value), sizeof(value)}), ...);
      },
      state->values);
  stand_in_launch given;
  given.name = launch.name;
  given.kernel = reinterpret_cast<const void*>(kernel);
  given.grid = launch.grid;
  given.block = launch.block;
  given.shared_bytes = launch.shared_bytes;
  given.cooperative = launch.cooperative;
  given.stream = static_cast<cudaStream_t>(stream);
  given.parameters = parameters;
  given.parameter_count = sizeof...(Parameters);
  given.run = [](void* at, const stand_in_span* blocks, size_t count) {
    const State& state = *static_cast<const State*>(at);
    return run(state.launch, [&] { std::apply(state.kernel, state.values); }, blocks, count);
  };
  given.destroy = [](void* at) { delete static_cast<State*>(at); };
  given.state = state.release();
  stand_in_launch_kernel(&given);
}

// CUDA's functions for kernels. A call site is the source location of such a call.
struct CallSite {
  const char* what;
  const char* file;
  int line;
};
void block_barrier(const CallSite& site);
int block_vote(const CallSite& site, bool predicate);  // number of threads whose predicate is true
void grid_barrier(const CallSite& site);
void warp_barrier(const CallSite& site, unsigned mask);
// Exchange values between the lanes of the mask. warp_read returns the value of lane `source`; warp_gather
// returns all values and the mask of participating lanes.
uint64_t warp_read(const CallSite& site, unsigned mask, uint64_t value, int source);
unsigned warp_gather(const CallSite& site, unsigned mask, uint64_t value, uint64_t (&values)[32]);
int lane();
void* dynamic_shared();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Asynchronous copies (common/async_copy.cuh). next_copy returns the copies of the running thread's committed
// groups, except the last `left` groups, one by one. Copies are dropped at the end of a launch and at a grid
// barrier.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
void copy_later(void* to, const void* from, int bytes);
void commit_copies();
bool next_copy(int left, Copy& copy);

template <typename T>
const T& aligned(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) {
    fail("misaligned address %p for an access of %zu bytes", static_cast<const void*>(pointer), sizeof(T));
  }
  return *pointer;
}

template <typename T>
T shuffle(const CallSite& site, unsigned mask, T value, int source, int width, bool inside) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) fail("shuffle of width %d", width);
  uint64_t bits = 0;
  std::memcpy(static_cast<void*>(&bits), &value, sizeof(T));
  bits = warp_read(site, mask, bits, inside ? source : lane());
  T result;
  std::memcpy(static_cast<void*>(&result), &bits, sizeof(T));
  return result;
}

template <typename T>
T shuffle_index(const CallSite& site, unsigned mask, T value, int source, int width = 32) {
  return shuffle(site, mask, value, lane() / width * width + (source & (width - 1)), width, true);
}

template <typename T>
T shuffle_up(const CallSite& site, unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = lane() - static_cast<int>(delta);
  return shuffle(site, mask, value, source, width, source >= lane() / width * width);
}

template <typename T>
T shuffle_down(const CallSite& site, unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = lane() + static_cast<int>(delta);
  return shuffle(site, mask, value, source, width, source < (lane() / width + 1) * width);
}

template <typename T>
T shuffle_xor(const CallSite& site, unsigned mask, T value, int flip, int width = 32) {
  const int source = lane() ^ flip;
  return shuffle(site, mask, value, source, width, source < (lane() / width + 1) * width);
}

inline unsigned ballot(const CallSite& site, unsigned mask, bool predicate) {
  uint64_t values[32];
  const unsigned given = warp_gather(site, mask, predicate, values);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= (given >> l & 1) != 0 && values[l] != 0 ? 1u << l : 0u;
  return result;
}

// The default argument is evaluated at the call site.
inline void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  grid_barrier({"grid_sync", file, line});
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::position.thread_index)
#define blockIdx (::cuda_on_host::position.block_index)
#define blockDim (::cuda_on_host::position.block)
#define gridDim (::cuda_on_host::position.grid)
#define AFA_CALL_SITE(what) (::cuda_on_host::CallSite{what, __FILE__, __LINE__})
#define __syncthreads() ::cuda_on_host::block_barrier(AFA_CALL_SITE("__syncthreads"))
#define __syncthreads_count(value) \
  ::cuda_on_host::block_vote(AFA_CALL_SITE("__syncthreads_count"), (value) != 0)
#define __syncthreads_or(value) int(__syncthreads_count(value) != 0)
#define __syncthreads_and(value) int(__syncthreads_count((value) == 0) == 0)
#define __shfl_sync(...) ::cuda_on_host::shuffle_index(AFA_CALL_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::cuda_on_host::shuffle_up(AFA_CALL_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) ::cuda_on_host::shuffle_down(AFA_CALL_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::cuda_on_host::shuffle_xor(AFA_CALL_SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __ballot_sync(mask, value) ::cuda_on_host::ballot(AFA_CALL_SITE("__ballot_sync"), mask, (value) != 0)
#define __any_sync(mask, value) int(__ballot_sync(mask, value) != 0)
#define __all_sync(mask, value) int(__ballot_sync(mask, (value) == 0) == 0)
#define __ldg(pointer) (::cuda_on_host::aligned(pointer))
#define __ldca(pointer) (::cuda_on_host::aligned(pointer))
#define __ldcg(pointer) (::cuda_on_host::aligned(pointer))
#define __ldcs(pointer) (::cuda_on_host::aligned(pointer))
#define __stcg(pointer, value) (::cuda_on_host::aligned(pointer), (void)(*(pointer) = (value)))
#define __stcs(pointer, value) __stcg(pointer, value)
#define __threadfence() ((void)0)
#define __threadfence_block() ((void)0)
constexpr int warpSize = 32;

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  ::cuda_on_host::warp_barrier({"__syncwarp", file, line}, mask);
}

// CUDA's global functions that <math.h> and the toolkit's headers do not declare.
template <typename T>
inline std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}
inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __powf(float x, float y) {
  return powf(x, y);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}

#define AFA_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cuda_on_host::dynamic_shared())
#define AFA_LAUNCH_ON_HOST(kernel, grid, block, shared_bytes, cooperative, stream, ...)                    \
  (::afa::allow_shared(kernel, shared_bytes),                                                              \
   ::cuda_on_host::launch(                                                                                 \
       kernel, {#kernel, dim3(grid), dim3(block), static_cast<size_t>(shared_bytes), cooperative}, stream, \
       __VA_ARGS__))
#define AFA_LAUNCH(kernel, grid, block, stream, ...) \
  AFA_LAUNCH_ON_HOST(kernel, grid, block, 0, false, stream, __VA_ARGS__)
#define AFA_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  AFA_LAUNCH_ON_HOST(kernel, grid, block, shared_bytes, false, stream, __VA_ARGS__)
#define AFA_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)           \
  ::afa::cooperative_granted(                                                            \
      (AFA_LAUNCH_ON_HOST(kernel, grid, block, shared_bytes, true, stream, __VA_ARGS__), \
       cudaPeekAtLastError()))
