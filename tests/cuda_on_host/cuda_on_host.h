// Enough of the CUDA runtime to run the project's .cu files on the CPU, compiled by an ordinary C++ compiler
// against the toolkit's own headers for the half types. A block's threads are fibers on one thread, run in
// turn, each until it ends or reaches a barrier; the blocks run one after another. Both in an order that can
// be chosen, so that what depends on it shows. See common/cuda.cuh, which includes this file.
//
// Shared memory is a static variable of the kernel, so that AddressSanitizer puts red zones around each
// array;
// [[gnu::used]] keeps the compiler from taking one that is never written for zeros. build.py gathers them in
// a section of their own, which is filled with NaN before each block. extern __shared__ does not compile:
// nothing launches with dynamic shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <cstdint>
#include <functional>

// The headers above leave attributes that only nvcc knows.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ static
#define __device__
#define __host__
#define __shared__ [[gnu::used]] static
#define __launch_bounds__(...)
#define __grid_constant__

namespace cuda_on_host {

extern dim3 grid_size, block_size;
extern uint3 block_index, thread_index;

// In place of the limits of a GPU, so that small inputs already take every kernel's loop over what the grid
// can't hold.
constexpr int64_t kMaxGridX = 3;
constexpr int64_t kMaxGridY = 2;

// Throws if the threads of a block don't all meet at the same barriers.
void launch(dim3 grid, dim3 block, const std::function<void()>& kernel);
void barrier(const char* file, int line);

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::thread_index)
#define blockIdx (::cuda_on_host::block_index)
#define blockDim (::cuda_on_host::block_size)
#define gridDim (::cuda_on_host::grid_size)
#define __syncthreads() ::cuda_on_host::barrier(__FILE__, __LINE__)

#define AFA_LAUNCH(kernel, grid, block, stream, ...) \
  ::cuda_on_host::launch(grid, dim3(block), [&] { (void)(stream), kernel(__VA_ARGS__); })
