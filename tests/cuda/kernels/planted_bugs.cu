// Small kernels, each right and with one bug, by which test_harness.py shows what running on the CPU catches.
//
//     planted_bugs <kernel> <right|wrong> <order>...    prints the kernel's output, a line an order
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda.cuh"

extern "C" void cuda_on_host_order(const char* name);

namespace {

using afa::grid_sync;

constexpr int kSize = 64;   // threads of a block, and values it handles
constexpr int kBlocks = 4;  // so that an output has kBlocks * kSize values
constexpr int kHalf = kSize / 2;

__device__ int item() {
  return static_cast<int>(blockIdx.x * kSize + threadIdx.x);
}

// A block's values in reverse. Wrong: no barrier between writing and reading.
template <bool RIGHT>
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncthreads();
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// Each value plus the one before it. Wrong: no barrier, which shows only where a thread runs before the
// previous one; never in the order 0, 1, 2, ...
template <bool RIGHT>
__global__ void race_in_one_order(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncthreads();
  out[item()] = tile[threadIdx.x] + (threadIdx.x > 0 ? tile[threadIdx.x - 1] : 0);
}

// The block's values shifted twice. Wrong: the second pass overwrites what others have yet to read; every
// value read has been written, so that none is NaN.
template <bool RIGHT>
__global__ void missing_second_barrier(const float* in, float* out) {
  __shared__ float tile[kSize];
  float value = in[item()];
  for (int pass = 0; pass < 2; ++pass) {
    tile[threadIdx.x] = value;
    __syncthreads();
    value = tile[(threadIdx.x + 1) % kSize];
    if (RIGHT) __syncthreads();
  }
  out[item()] = value;
}

// The sum of a block's values, by its first thread. Wrong: one slot more is summed than was written.
template <bool RIGHT>
__global__ void unwritten_shared(const float* in, float* out) {
  __shared__ float tile[kSize + 1];
  tile[threadIdx.x] = in[item()];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < (RIGHT ? kSize : kSize + 1); ++i) sum += tile[i];
  out[item()] = threadIdx.x == 0 ? sum : 0;
}

// A constant that the block's first thread sets. Wrong: only that of the first block.
template <bool RIGHT>
__global__ void shared_of_another_block(const float* in, float* out) {
  __shared__ float scale;
  if (threadIdx.x == 0 && (RIGHT || blockIdx.x == 0)) scale = 2;
  __syncthreads();
  out[item()] = scale * in[item()];
}

// The same from an array that nobody writes.
template <bool RIGHT>
__global__ void never_written_shared(const float* in, float* out) {
  __shared__ float scale[2];
  if (RIGHT && threadIdx.x < 2) scale[threadIdx.x] = 2;
  __syncthreads();
  out[item()] = scale[threadIdx.x % 2] * in[item()];
}

// Not seen through by the compiler, which would find the end of an array by itself.
template <typename T>
__attribute__((noinline)) T* element(T* first, unsigned index) {
  return first + index;
}

// Each value goes into a tile and back. Wrong: the last one past its end.
template <bool RIGHT>
__global__ void shared_overflow(const float* in, float* out) {
  __shared__ float tile[kSize], next[kSize];
  next[threadIdx.x] = 0;
  float* own = element(tile, threadIdx.x + (RIGHT ? 0 : 1));
  *own = in[item()];
  __syncthreads();
  out[item()] = *own + next[threadIdx.x];
}

// The same within rows of one array, where the next row is no stranger's memory.
template <bool RIGHT>
__global__ void shared_row_overflow(const float* in, float* out) {
  __shared__ float tile[2][kHalf];
  const int row = static_cast<int>(threadIdx.x) / kHalf;
  const int column = static_cast<int>(threadIdx.x) % kHalf + (RIGHT || row == 1 ? 0 : 1);
  tile[row][column] = in[item()];
  __syncthreads();
  out[item()] = tile[row][column];
}

// A copy. Wrong: reads one value past the input.
template <bool RIGHT>
__global__ void global_read_overflow(const float* in, float* out) {
  out[item()] = in[item() + (RIGHT ? 0 : 1)];
}

// A copy. Wrong: writes one value before the output.
template <bool RIGHT>
__global__ void global_write_underflow(const float* in, float* out) {
  out[item() - (RIGHT ? 0 : 1)] = in[item()];
}

// A reverse over half the block. Wrong: the other half ends before the barrier.
template <bool RIGHT>
__global__ void early_return(const float* in, float* out) {
  __shared__ float tile[kHalf];
  if (!RIGHT && threadIdx.x >= kHalf) return;
  if (threadIdx.x < kHalf) tile[threadIdx.x] = in[item()];
  __syncthreads();
  if (threadIdx.x < kHalf) out[item()] = tile[kHalf - 1 - threadIdx.x];
}

// A reverse. Wrong: the threads wait at two barriers, one in each branch.
template <bool RIGHT>
__global__ void barrier_in_a_branch(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) {
    __syncthreads();
  } else if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// The largest value of all. Wrong: the last one written.
template <bool RIGHT>
__global__ void last_writer(const float* in, float* out) {
  if (!RIGHT || (blockIdx.x == kBlocks - 1 && threadIdx.x == kSize - 1)) out[0] = in[item()];
}

// Each block takes from the input. Wrong: from what the block before it wrote, as if that had run already.
template <bool RIGHT>
__global__ void race_between_blocks(const float* in, float* out) {
  const float before = blockIdx.x == 0 ? 0 : (RIGHT ? in : out)[item() - kSize];
  out[item()] = RIGHT ? before : (blockIdx.x == 0 ? in[item()] : before);
}

// A copy by blocks of the grid that grid_for gives. Wrong: values beyond the grid are left out.
template <bool RIGHT>
__global__ void beyond_the_grid(const float* in, float* out, int64_t count) {
  for (int64_t i = afa::first_item(); i < count; i += afa::item_stride()) {
    out[i] = in[i];
    if (!RIGHT) return;
  }
}

// Four values at once. Wrong: from an address that is not a multiple of 16.
template <bool RIGHT>
__global__ void misaligned_vector(const float* in, float* out) {
  if (threadIdx.x >= kSize / 4) return;
  const float4* from = reinterpret_cast<const float4*>(element(in, blockIdx.x * kSize + (RIGHT ? 0 : 1)));
  const float4 value = from[threadIdx.x % (kSize / 4 - 1)];
  reinterpret_cast<float4*>(out + blockIdx.x * kSize)[threadIdx.x] = value;
}

// The same through the read-only cache.
template <bool RIGHT>
__global__ void misaligned_ldg(const float* in, float* out) {
  if (threadIdx.x >= kSize / 4) return;
  const float4* from = reinterpret_cast<const float4*>(element(in, blockIdx.x * kSize + (RIGHT ? 0 : 2)));
  const float4 value = __ldg(from + threadIdx.x % (kSize / 4 - 1));
  out[item()] = value.x + value.w;
}

// A reverse in dynamic shared memory. Wrong: the last value past its end.
template <bool RIGHT>
__global__ void dynamic_overflow(const float* in, float* out) {
  AFA_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + (RIGHT ? 0 : 1)] = in[item()];
  __syncthreads();
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// A constant in dynamic shared memory. Wrong: never set.
template <bool RIGHT>
__global__ void unwritten_dynamic(const float* in, float* out) {
  AFA_DYNAMIC_SHARED(float, scale);
  if (RIGHT && threadIdx.x == 0) scale[kSize - 1] = 2;
  __syncthreads();
  out[item()] = scale[kSize - 1] * in[item()];
}

// A reverse in dynamic shared memory. Wrong: no barrier.
template <bool RIGHT>
__global__ void missing_barrier_dynamic(const float* in, float* out) {
  AFA_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncthreads();
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// A reverse within warps. Wrong: the lanes don't wait for each other.
template <bool RIGHT>
__global__ void missing_syncwarp(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncwarp();
  out[item()] = tile[threadIdx.x ^ 31];
}

// The sum of a warp's values, in each of its lanes. Wrong: by a mask of half the warp.
template <bool RIGHT>
__global__ void lane_not_in_mask(const float* in, float* out) {
  float sum = in[item()];
  for (int flip = 16; flip > 0; flip /= 2)
    sum += __shfl_xor_sync(RIGHT ? 0xffffffffu : 0x0000ffffu, sum, flip);
  out[item()] = sum;
}

// The value of a warp's first lane. Wrong: that lane takes no part.
template <bool RIGHT>
__global__ void absent_lane(const float* in, float* out) {
  float value = in[item()];
  if (RIGHT || threadIdx.x % 32 != 0) value = __shfl_sync(RIGHT ? 0xffffffffu : 0xfffffffeu, value, 0);
  out[item()] = value;
}

// The sum by halves of the warp. Wrong: only one half comes, but the mask names both.
template <bool RIGHT>
__global__ void half_a_warp(const float* in, float* out) {
  float sum = in[item()];
  if (RIGHT || threadIdx.x % 32 < 16) {
    sum += __shfl_down_sync(0xffffffffu, sum, 8, 16);
  }
  __syncthreads();
  out[item()] = sum;
}

// All blocks write, then each takes what another wrote, twice over. Wrong: they don't wait for each other.
template <bool RIGHT>
__global__ void missing_grid_sync(const float* in, float* out) {
  out[item()] = in[item()];
  if (RIGHT) grid_sync();
  __shared__ float kept;  // a block's own, also while the others run
  if (threadIdx.x == 0) kept = out[(blockIdx.x + 1) % kBlocks * kSize];
  grid_sync();
  out[item()] = kept;
}

// Wrong: one block has gone.
template <bool RIGHT>
__global__ void grid_sync_without_a_block(const float* in, float* out) {
  if (!RIGHT && blockIdx.x == 1) return;
  grid_sync();
  out[item()] = in[item()];
}

// The kernels' callers would launch once per step; here a refusal is the bug to be seen.
void granted(bool is_granted) {
  if (!is_granted) throw std::runtime_error(cudaGetErrorString(cudaErrorCooperativeLaunchTooLarge));
}

template <bool RIGHT>
void run(const std::string& name, const float* in, float* out) {
#define LAUNCH_IF(kernel)                                          \
  if (name == #kernel) {                                           \
    AFA_LAUNCH((kernel<RIGHT>), kBlocks, kSize, nullptr, in, out); \
    return;                                                        \
  }
  LAUNCH_IF(missing_barrier)
  LAUNCH_IF(race_in_one_order)
  LAUNCH_IF(missing_second_barrier)
  LAUNCH_IF(unwritten_shared)
  LAUNCH_IF(shared_of_another_block)
  LAUNCH_IF(never_written_shared)
  LAUNCH_IF(shared_overflow)
  LAUNCH_IF(shared_row_overflow)
  LAUNCH_IF(global_read_overflow)
  LAUNCH_IF(global_write_underflow)
  LAUNCH_IF(early_return)
  LAUNCH_IF(barrier_in_a_branch)
  LAUNCH_IF(last_writer)
  LAUNCH_IF(race_between_blocks)
  LAUNCH_IF(misaligned_vector)
  LAUNCH_IF(misaligned_ldg)
  LAUNCH_IF(missing_syncwarp)
  LAUNCH_IF(lane_not_in_mask)
  LAUNCH_IF(absent_lane)
  LAUNCH_IF(half_a_warp)
#define LAUNCH_SHARED_IF(kernel)                                                                 \
  if (name == #kernel) {                                                                         \
    AFA_LAUNCH_SHARED((kernel<RIGHT>), kBlocks, kSize, kSize * sizeof(float), nullptr, in, out); \
    return;                                                                                      \
  }
  LAUNCH_SHARED_IF(dynamic_overflow)
  LAUNCH_SHARED_IF(unwritten_dynamic)
  LAUNCH_SHARED_IF(missing_barrier_dynamic)
#define LAUNCH_COOPERATIVE_IF(kernel)                                                      \
  if (name == #kernel) {                                                                   \
    granted(AFA_LAUNCH_COOPERATIVE((kernel<RIGHT>), kBlocks, kSize, 0, nullptr, in, out)); \
    return;                                                                                \
  }
  LAUNCH_COOPERATIVE_IF(missing_grid_sync)
  LAUNCH_COOPERATIVE_IF(grid_sync_without_a_block)
  if (name == "grid_sync_of_a_plain_launch") {
    if (RIGHT) {
      granted(AFA_LAUNCH_COOPERATIVE((grid_sync_without_a_block<true>), kBlocks, kSize, 0, nullptr, in, out));
    } else {
      AFA_LAUNCH((grid_sync_without_a_block<true>), kBlocks, kSize, nullptr, in, out);
    }
  } else if (name == "more_blocks_than_resident") {
    const int64_t most = afa::resident_blocks(grid_sync_without_a_block<true>, kSize, 0);
    if (most < kBlocks) throw std::logic_error("the grid of the right kernel must fit");
    const dim3 grid(static_cast<unsigned>(RIGHT ? kBlocks : most + 1));
    granted(AFA_LAUNCH_COOPERATIVE((grid_sync_without_a_block<true>), grid, kSize, 0, nullptr, in, out));
  } else if (name == "too_much_shared_memory") {
    const size_t bytes = static_cast<size_t>(afa::current_gpu().shared_of_block) + (RIGHT ? 0 : 1);
    AFA_LAUNCH_SHARED((dynamic_overflow<true>), kBlocks, kSize, bytes, nullptr, in, out);
  } else if (name == "beyond_the_grid") {
    const int64_t count = 3 * kBlocks * kSize;
    AFA_LAUNCH((beyond_the_grid<RIGHT>), afa::grid_for(count, 1), afa::kThreads, nullptr, in, out, count);
  } else if (name == "too_many_threads") {
    AFA_LAUNCH((global_read_overflow<true>), 1, RIGHT ? kSize : 1056, nullptr, in, out);
  } else if (name == "empty_grid") {
    AFA_LAUNCH((global_read_overflow<true>), RIGHT ? 1 : 0, kSize, nullptr, in, out);
  } else {
    throw std::invalid_argument("there is no kernel " + name);
  }
}

}  // namespace

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

int main(int arguments, char** argument) {
  const std::string name = argument[1];
  const bool right = std::string(argument[2]) == "right";
  const size_t count = (name == "beyond_the_grid" ? 3 : 1) * kBlocks * kSize, bytes = count * sizeof(float);
  std::vector<float> values(count), zeros(count), result(count);
  std::iota(values.begin(), values.end(), 1.0f);
  void *in = nullptr, *out = nullptr;
  check(cudaMalloc(&in, bytes));
  check(cudaMalloc(&out, bytes));
  bool failed = false;
  for (int order = 3; order < arguments; ++order) {
    cuda_on_host_order(argument[order]);
    check(cudaMemcpy(in, values.data(), bytes, cudaMemcpyHostToDevice));
    check(cudaMemcpy(out, zeros.data(), bytes, cudaMemcpyHostToDevice));
    try {
      float *const from = static_cast<float*>(in), *const to = static_cast<float*>(out);
      right ? run<true>(name, from, to) : run<false>(name, from, to);
      check(cudaGetLastError());
      check(cudaDeviceSynchronize());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      failed = true;
    }
    check(cudaMemcpy(result.data(), out, bytes, cudaMemcpyDeviceToHost));
    for (float value : result) std::printf("%g ", value);
    std::printf("\n");
  }
  return failed ? 1 : 0;
}
