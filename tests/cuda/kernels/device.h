// State shared by the thread scheduler (cuda_on_host.cpp) and the memory checker (memory_check.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "cuda_on_host.h"

namespace cuda_on_host {

// Counts the barriers of a warp. clocks[a][b] is the last one that synchronized lane a with lane b, directly
// or through other lanes: a sees what b did before it.
struct Warp {
  std::array<std::array<uint32_t, 32>, 32> clocks{};
  uint32_t barriers = 0;
};

// The running thread, for the memory checker.
struct Running {
  const char *stack = nullptr, *stack_end = nullptr;            // of the fiber
  const char *host_stack = nullptr, *host_stack_end = nullptr;  // of the launching thread
  uint32_t block = 0, thread = 0;
  uint32_t slot = 0;    // index among the blocks that are alive at the same time
  uint32_t period = 0;  // incremented at each launch and each grid barrier
  uint32_t epoch = 0;   // incremented at each block barrier
  const Warp* warp = nullptr;
};
extern Running running;
// Whether this host thread is executing a kernel.
extern thread_local bool in_kernel __attribute__((tls_model("initial-exec")));

// Shared memory: the section of static variables, this launch's dynamic part, and the red zones around that.
struct Range {
  const char *begin, *end;
  bool contains(const char* at) const { return at >= begin && at < end; }
};
Range static_shared();
extern Range dynamic_part, dynamic_arena;

// The blocks of device memory that the running kernel's arguments point to.
struct Blocks {
  const stand_in_span* first = nullptr;
  size_t count = 0;
};
extern Blocks allowed_blocks;

std::string thread_name(uint32_t block, uint32_t thread);
void start_memory_check();  // at each launch

}  // namespace cuda_on_host
