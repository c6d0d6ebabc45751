// Enough of CUDA to run the project's .cu files on the CPU, compiled by an ordinary C++ compiler against the
// toolkit's own headers. A block's threads are fibers on one thread, run in turn, each until it ends or waits
// for others; the blocks run one after another, or, in a cooperative launch, from one meeting of the grid to
// the next. All in an order that can be chosen, so that what depends on it shows. See README.md for what this
// catches, and common/cuda.cuh, which includes this file.
//
// Shared memory is a static variable of the kernel, so that AddressSanitizer puts red zones around each
// array; [[gnu::used]] keeps the compiler from taking one that is never written for zeros. build.py gathers
// them in a section of their own, which is filled with NaN before each block. Dynamic shared memory is
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

// The headers above leave attributes that only nvcc knows.
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

// Where the running thread is.
struct Position {
  dim3 grid, block;
  uint3 block_index, thread_index;
};
extern Position position;

// In place of the limits of a GPU, so that small inputs already take every kernel's loop over what the grid
// can't hold.
constexpr int64_t kMaxGridX = 3;
constexpr int64_t kMaxGridY = 2;

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
};

// Runs a kernel, which may touch only these blocks of device memory. Returns what it does wrong, or nullptr.
const char* run(const Launch& launch, const std::function<void()>& kernel, const stand_in_span* blocks,
                size_t block_count);

// Hands a kernel and a copy of its arguments to the stand-in runtime, which checks the launch and runs it
// when the host waits for its stream. cudaGetLastError returns what is wrong with the launch.
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

// The calls of a kernel. A place is where in the source it waits.
struct Place {
  const char* what;
  const char* file;
  int line;
};
void block_barrier(const Place& place);
int block_vote(const Place& place, bool predicate);  // how many threads said true
void grid_barrier(const Place& place);
void warp_barrier(const Place& place, unsigned mask);
// Gives a value to the lanes of the mask and takes that of the lane `source`; or of each, and which gave one.
uint64_t warp_take(const Place& place, unsigned mask, uint64_t value, int source);
unsigned warp_give(const Place& place, unsigned mask, uint64_t value, uint64_t (&values)[32]);
int lane();
void* dynamic_shared();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Asynchronous copies (common/async_copy.cuh). next_copy gives those of the running thread's committed
// groups, but for the last `left`, one after the other; they don't outlive a launch or a meeting of its grid.
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
T shuffle(const Place& place, unsigned mask, T value, int source, int width, bool inside) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) fail("shuffle of width %d", width);
  uint64_t bits = 0;
  std::memcpy(static_cast<void*>(&bits), &value, sizeof(T));
  bits = warp_take(place, mask, bits, inside ? source : lane());
  T result;
  std::memcpy(static_cast<void*>(&result), &bits, sizeof(T));
  return result;
}

template <typename T>
T shuffle_index(const Place& place, unsigned mask, T value, int source, int width = 32) {
  return shuffle(place, mask, value, lane() / width * width + (source & (width - 1)), width, true);
}

template <typename T>
T shuffle_up(const Place& place, unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = lane() - static_cast<int>(delta);
  return shuffle(place, mask, value, source, width, source >= lane() / width * width);
}

template <typename T>
T shuffle_down(const Place& place, unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = lane() + static_cast<int>(delta);
  return shuffle(place, mask, value, source, width, source < (lane() / width + 1) * width);
}

template <typename T>
T shuffle_xor(const Place& place, unsigned mask, T value, int flip, int width = 32) {
  const int source = lane() ^ flip;
  return shuffle(place, mask, value, source, width, source < (lane() / width + 1) * width);
}

inline unsigned ballot(const Place& place, unsigned mask, bool predicate) {
  uint64_t values[32];
  const unsigned given = warp_give(place, mask, predicate, values);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= (given >> l & 1) != 0 && values[l] != 0 ? 1u << l : 0u;
  return result;
}

// A default argument is evaluated where the function is called.
inline void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  grid_barrier({"grid_sync", file, line});
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::position.thread_index)
#define blockIdx (::cuda_on_host::position.block_index)
#define blockDim (::cuda_on_host::position.block)
#define gridDim (::cuda_on_host::position.grid)
#define AFA_PLACE(what) (::cuda_on_host::Place{what, __FILE__, __LINE__})
#define __syncthreads() ::cuda_on_host::block_barrier(AFA_PLACE("__syncthreads"))
#define __syncthreads_count(value) ::cuda_on_host::block_vote(AFA_PLACE("__syncthreads_count"), (value) != 0)
#define __syncthreads_or(value) int(__syncthreads_count(value) != 0)
#define __syncthreads_and(value) int(__syncthreads_count((value) == 0) == 0)
#define __shfl_sync(...) ::cuda_on_host::shuffle_index(AFA_PLACE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::cuda_on_host::shuffle_up(AFA_PLACE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) ::cuda_on_host::shuffle_down(AFA_PLACE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::cuda_on_host::shuffle_xor(AFA_PLACE("__shfl_xor_sync"), __VA_ARGS__)
#define __ballot_sync(mask, value) ::cuda_on_host::ballot(AFA_PLACE("__ballot_sync"), mask, (value) != 0)
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

// Of CUDA's global functions, those that <math.h> and the toolkit's headers leave out.
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
