// What the scheduler of threads (cuda_on_host.cpp) and the check of memory accesses (memory_check.cpp) share.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "cuda_on_host.h"

namespace cuda_on_host {

// Numbers the meetings of a warp. clocks[a][b]: the last one at which lane a met lane b, directly or through
// others; what b did before that one, a sees.
struct Warp {
  std::array<std::array<uint32_t, 32>, 32> clocks{};
  uint32_t meetings = 0;
};

// The running thread, for the check of its accesses.
struct Running {
  const char *stack = nullptr, *stack_end = nullptr;            // its own
  const char *host_stack = nullptr, *host_stack_end = nullptr;  // of the launching thread
  uint32_t block = 0, thread = 0;
  uint32_t place = 0;   // of the block, among those alive at once
  uint32_t period = 0;  // a number for each launch and each time between two meetings of a grid
  uint32_t epoch = 0;   // one for each time between two barriers of a block
  const Warp* warp = nullptr;
};
extern Running running;
// Whether this host thread is inside a kernel.
extern thread_local bool in_kernel __attribute__((tls_model("initial-exec")));

// Shared memory: the section of static variables, the dynamic part of this launch, and what surrounds it.
struct Range {
  const char *begin, *end;
  bool holds(const char* at) const { return at >= begin && at < end; }
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
