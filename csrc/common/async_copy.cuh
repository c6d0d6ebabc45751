// Asynchronous copies from global to shared memory (cp.async, sm_80 and later). A thread's copies since its
// last commit form a group. After wait_async<N>() all of its groups except the last N are complete and
// visible to the thread itself; other threads see them after a barrier. On the CPU (AFA_CUDA_ON_HOST) a copy
// is performed as late as its wait allows, and its destination is NaN until then, which reveals a missing
// wait or barrier.
#pragma once

#include "common/cuda.cuh"

namespace afa {
namespace {

// `bytes` is 4 or 16, and both addresses are multiples of it. Copies of 16 bytes bypass L1.
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from) {
  static_assert(BYTES == 4 || BYTES == 16, "cp.async moves 4 or 16 bytes here");
#ifdef AFA_CUDA_ON_HOST
  ::cuda_on_host::copy_later(to, from, BYTES);
  for (int i = 0; i < BYTES / 4; ++i) static_cast<uint32_t*>(to)[i] = ~uint32_t{0};
#else
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(from) : "memory");
  }
#endif
}

__device__ inline void commit_async() {
#ifdef AFA_CUDA_ON_HOST
  ::cuda_on_host::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int GROUPS>
__device__ inline void wait_async() {
#ifdef AFA_CUDA_ON_HOST
  ::cuda_on_host::Copy copy;
  while (::cuda_on_host::next_copy(GROUPS, copy)) {
    for (int i = 0; i < copy.bytes / 4; ++i) {
      static_cast<uint32_t*>(copy.to)[i] = static_cast<const uint32_t*>(copy.from)[i];
    }
  }
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

}  // namespace
}  // namespace afa
