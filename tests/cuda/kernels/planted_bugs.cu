// Small kernels, each with a correct version and a version with one bug. test_harness.py uses them to show
// which bugs the CPU runs detect.
//
//     planted_bugs <kernel> <right|wrong> <order>...    prints the kernel's output, one line per order
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda.cuh"

extern "C" void cuda_on_host_order(const char* name);

namespace {

using afa::grid_sync;

constexpr int kSize = 64;   // threads per block, and values per block
constexpr int kBlocks = 4;  // an output has kBlocks * kSize values
constexpr int kHalf = kSize / 2;

__device__ int item() {
  return static_cast<int>(blockIdx.x * kSize + threadIdx.x);
}

// Reverses a block's values. Wrong: no barrier between writing and reading.
template <bool RIGHT>
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncthreads();
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// Adds to each value the one before it. Wrong: no barrier. The output is wrong only if a thread runs before
// the previous one, so never in the order 0, 1, 2, ...
template <bool RIGHT>
__global__ void race_in_one_order(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncthreads();
  out[item()] = tile[threadIdx.x] + (threadIdx.x > 0 ? tile[threadIdx.x - 1] : 0);
}

// Shifts the block's values twice. Wrong: the second pass overwrites values that other threads still have to
// read. All values that are read have been written, so there is no NaN.
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

// The first thread sums the block's values. Wrong: the sum includes one element that was not written.
template <bool RIGHT>
__global__ void unwritten_shared(const float* in, float* out) {
  __shared__ float tile[kSize + 1];
  tile[threadIdx.x] = in[item()];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < (RIGHT ? kSize : kSize + 1); ++i) sum += tile[i];
  out[item()] = threadIdx.x == 0 ? sum : 0;
}

// The block's first thread sets a constant. Wrong: only in the first block.
template <bool RIGHT>
__global__ void shared_of_another_block(const float* in, float* out) {
  __shared__ float scale;
  if (threadIdx.x == 0 && (RIGHT || blockIdx.x == 0)) scale = 2;
  __syncthreads();
  out[item()] = scale * in[item()];
}

// The same with an array that is never written.
template <bool RIGHT>
__global__ void never_written_shared(const float* in, float* out) {
  __shared__ float scale[2];
  if (RIGHT && threadIdx.x < 2) scale[threadIdx.x] = 2;
  __syncthreads();
  out[item()] = scale[threadIdx.x % 2] * in[item()];
}

// Hides an index from the compiler, which would otherwise detect the overflow.
template <typename T>
__attribute__((noinline)) T* element(T* first, unsigned index) {
  return first + index;
}

// Copies each value to shared memory and back. Wrong: the last one is past the end of the array.
template <bool RIGHT>
__global__ void shared_overflow(const float* in, float* out) {
  __shared__ float tile[kSize], next[kSize];
  next[threadIdx.x] = 0;
  float* own = element(tile, threadIdx.x + (RIGHT ? 0 : 1));
  *own = in[item()];
  __syncthreads();
  out[item()] = *own + next[threadIdx.x];
}

// The same within rows of one array, where the memory after a row belongs to the next row.
template <bool RIGHT>
__global__ void shared_row_overflow(const float* in, float* out) {
  __shared__ float tile[2][kHalf];
  const int row = static_cast<int>(threadIdx.x) / kHalf;
  const int column = static_cast<int>(threadIdx.x) % kHalf + (RIGHT || row == 1 ? 0 : 1);
  tile[row][column] = in[item()];
  __syncthreads();
  out[item()] = tile[row][column];
}

// Copies the input. Wrong: reads one value past its end.
template <bool RIGHT>
__global__ void global_read_overflow(const float* in, float* out) {
  out[item()] = in[item() + (RIGHT ? 0 : 1)];
}

// Copies the input. Wrong: writes one value before the output.
template <bool RIGHT>
__global__ void global_write_underflow(const float* in, float* out) {
  out[item() - (RIGHT ? 0 : 1)] = in[item()];
}

// Reverses half of the block's values. Wrong: the other threads exit before the barrier.
template <bool RIGHT>
__global__ void early_return(const float* in, float* out) {
  __shared__ float tile[kHalf];
  if (!RIGHT && threadIdx.x >= kHalf) return;
  if (threadIdx.x < kHalf) tile[threadIdx.x] = in[item()];
  __syncthreads();
  if (threadIdx.x < kHalf) out[item()] = tile[kHalf - 1 - threadIdx.x];
}

// Reverses the values. Wrong: the threads wait at two different barriers, one in each branch.
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

// The largest value of all. Wrong: the value written last.
template <bool RIGHT>
__global__ void last_writer(const float* in, float* out) {
  if (!RIGHT || (blockIdx.x == kBlocks - 1 && threadIdx.x == kSize - 1)) out[0] = in[item()];
}

// Each block reads the input. Wrong: it reads the output of the previous block, which may not have run yet.
template <bool RIGHT>
__global__ void race_between_blocks(const float* in, float* out) {
  const float before = blockIdx.x == 0 ? 0 : (RIGHT ? in : out)[item() - kSize];
  out[item()] = RIGHT ? before : (blockIdx.x == 0 ? in[item()] : before);
}

// Copies with the grid that grid_for returns. Wrong: values beyond the grid are skipped.
template <bool RIGHT>
__global__ void beyond_the_grid(const float* in, float* out, int64_t count) {
  for (int64_t i = afa::first_item(); i < count; i += afa::item_stride()) {
    out[i] = in[i];
    if (!RIGHT) return;
  }
}

// Copies four values at once. Wrong: from an address that is not a multiple of 16.
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

// Reverses the values in dynamic shared memory. Wrong: the last value is past its end.
template <bool RIGHT>
__global__ void dynamic_overflow(const float* in, float* out) {
  AFA_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + (RIGHT ? 0 : 1)] = in[item()];
  __syncthreads();
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// Reads a constant from dynamic shared memory. Wrong: it is never set.
template <bool RIGHT>
__global__ void unwritten_dynamic(const float* in, float* out) {
  AFA_DYNAMIC_SHARED(float, scale);
  if (RIGHT && threadIdx.x == 0) scale[kSize - 1] = 2;
  __syncthreads();
  out[item()] = scale[kSize - 1] * in[item()];
}

// Reverses the values in dynamic shared memory. Wrong: no barrier.
template <bool RIGHT>
__global__ void missing_barrier_dynamic(const float* in, float* out) {
  AFA_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncthreads();
  out[item()] = tile[kSize - 1 - threadIdx.x];
}

// Reverses the values within warps. Wrong: no __syncwarp.
template <bool RIGHT>
__global__ void missing_syncwarp(const float* in, float* out) {
  __shared__ float tile[kSize];
  tile[threadIdx.x] = in[item()];
  if (RIGHT) __syncwarp();
  out[item()] = tile[threadIdx.x ^ 31];
}

// Sums a warp's values in each of its lanes. Wrong: the mask contains only half of the warp.
template <bool RIGHT>
__global__ void lane_not_in_mask(const float* in, float* out) {
  float sum = in[item()];
  for (int flip = 16; flip > 0; flip /= 2)
    sum += __shfl_xor_sync(RIGHT ? 0xffffffffu : 0x0000ffffu, sum, flip);
  out[item()] = sum;
}

// Broadcasts the value of a warp's first lane. Wrong: that lane does not participate.
template <bool RIGHT>
__global__ void absent_lane(const float* in, float* out) {
  float value = in[item()];
  if (RIGHT || threadIdx.x % 32 != 0) value = __shfl_sync(RIGHT ? 0xffffffffu : 0xfffffffeu, value, 0);
  out[item()] = value;
}

// Sums each half of the warp. Wrong: only one half calls the shuffle, but the mask contains both.
template <bool RIGHT>
__global__ void half_a_warp(const float* in, float* out) {
  float sum = in[item()];
  if (RIGHT || threadIdx.x % 32 < 16) {
    sum += __shfl_down_sync(0xffffffffu, sum, 8, 16);
  }
  __syncthreads();
  out[item()] = sum;
}

// All blocks write, then each reads the value of another block, in two rounds. Wrong: no grid barrier.
template <bool RIGHT>
__global__ void missing_grid_sync(const float* in, float* out) {
  out[item()] = in[item()];
  if (RIGHT) grid_sync();
  __shared__ float kept;  // each block has its own copy, also while the others run
  if (threadIdx.x == 0) kept = out[(blockIdx.x + 1) % kBlocks * kSize];
  grid_sync();
  out[item()] = kept;
}

// All blocks synchronize. Wrong: one block has exited.
template <bool RIGHT>
__global__ void grid_sync_without_a_block(const float* in, float* out) {
  if (!RIGHT && blockIdx.x == 1) return;
  grid_sync();
  out[item()] = in[item()];
}

// Callers of the project's kernels launch once per step if a cooperative launch is refused; here this is an
// error.
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
    const int64_t max_blocks = afa::resident_blocks(grid_sync_without_a_block<true>, kSize, 0);
    if (max_blocks < kBlocks) throw std::logic_error("the correct kernel's grid must fit");
    const dim3 grid(static_cast<unsigned>(RIGHT ? kBlocks : max_blocks + 1));
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
    throw std::invalid_argument("unknown kernel " + name);
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
