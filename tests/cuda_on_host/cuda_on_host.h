// Enough of the CUDA runtime to run the project's .cu files on the CPU, compiled by an ordinary C++ compiler
// against the toolkit's own headers for the half types. A block's threads are fibers on one thread, run in
// turn, each until it ends or reaches a barrier; the blocks run one after another. See common/cuda.cuh, which
// includes this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <ucontext.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

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
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__

namespace cuda_on_host {

inline thread_local dim3 grid_size, block_size;
inline thread_local uint3 block_index, thread_index;

// The threads of one block.
class Block {
 public:
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    const unsigned count = block_size.x * block_size.y * block_size.z;
    while (stacks_.size() < count) stacks_.emplace_back(new char[kStack]);
    std::vector<ucontext_t> fibers(count);
    std::vector<char> done(count, 0);
    fibers_ = fibers.data();
    done_ = done.data();
    for (unsigned i = 0; i < count; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks_[i].get();
      fibers[i].uc_stack.ss_size = kStack;
      fibers[i].uc_link = &scheduler_;
      makecontext(&fibers[i], reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    for (bool alive = true; alive;) {  // one round: every thread as far as its next barrier
      alive = false;
      for (unsigned i = 0; i < count; ++i) {
        if (done[i]) continue;
        current_ = i;
        thread_index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        swapcontext(&scheduler_, &fibers[i]);
        alive = alive || !done[i];
      }
    }
  }

  void barrier() { swapcontext(&fibers_[current_], &scheduler_); }

  static Block& instance() {
    static thread_local Block block;
    return block;
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  static void enter() {
    Block& block = instance();
    (*block.kernel_)();
    block.done_[block.current_] = 1;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<char[]>> stacks_;
  ucontext_t scheduler_;
  ucontext_t* fibers_ = nullptr;
  char* done_ = nullptr;
  unsigned current_ = 0;
};

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  grid_size = grid;
  block_size = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        Block::instance().run(kernel);
      }
    }
  }
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::thread_index)
#define blockIdx (::cuda_on_host::block_index)
#define blockDim (::cuda_on_host::block_size)
#define gridDim (::cuda_on_host::grid_size)

inline void __syncthreads() {
  cuda_on_host::Block::instance().barrier();
}

#define AFA_LAUNCH(kernel, grid, block, stream, ...) \
  ::cuda_on_host::launch(grid, dim3(block), [&] { (void)(stream), kernel(__VA_ARGS__); })

// Launches on the CPU don't fail.
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
