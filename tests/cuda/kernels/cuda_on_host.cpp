// The threads, blocks and orders of cuda_on_host.h.
#include "cuda_on_host.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The section in which the linker places the static shared memory of all kernels.
extern "C" __attribute__((visibility("hidden"), weak)) char __start_afa_shared[], __stop_afa_shared[];

namespace cuda_on_host {

Position position;
Running running;
thread_local bool in_kernel = false;
Range dynamic_part, dynamic_arena;
Blocks allowed_blocks;

Range static_shared() {
  return {__start_afa_shared, __stop_afa_shared};
}

std::string thread_name(uint32_t block, uint32_t thread) {
  const dim3 b = position.block, g = position.grid;
  std::ostringstream text;
  text << "thread (" << thread % b.x << ", " << thread / b.x % b.y << ", " << thread / (b.x * b.y)
       << ") of block (" << block % g.x << ", " << block / g.x % g.y << ", " << block / (g.x * g.y) << ")";
  return text.str();
}

namespace {

// Tells AddressSanitizer about fiber switches and dynamic shared memory.
#ifdef __SANITIZE_ADDRESS__
void forget_frames(const char* stack, size_t size) {
  __asan_unpoison_memory_region(stack, size);
}
void leave_stack(void** keep, const void* to, size_t size) {
  __sanitizer_start_switch_fiber(keep, to, size);
}
void enter_stack(void* kept, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(kept, from, size);
}
void allow_access(Range all, Range part) {
  __asan_poison_memory_region(all.begin, all.end - all.begin);
  __asan_unpoison_memory_region(part.begin, part.end - part.begin);
}
#else
void forget_frames(const char*, size_t) {}
void leave_stack(void**, const void*, size_t) {}
void enter_stack(void*, const void**, size_t*) {}
void allow_access(Range, Range) {}
#endif

// Copies red zones too, without checks. AddressSanitizer replaces memcpy, so it can't be used here.
__attribute__((no_sanitize("address", "undefined"))) void copy(const char* from, char* to, size_t size) {
  size_t n = 0;
  for (; n + 8 <= size; n += 8) {
    *reinterpret_cast<volatile uint64_t*>(to + n) = *reinterpret_cast<const volatile uint64_t*>(from + n);
  }
  for (; n < size; ++n) *static_cast<volatile char*>(to + n) = from[n];
}
// Sets all bits: NaN in every floating-point type, -1 in integers.
__attribute__((no_sanitize("address", "undefined"))) void fill(Range range) {
  char* at = const_cast<char*>(range.begin);
  for (; at + 8 <= range.end; at += 8) *reinterpret_cast<volatile uint64_t*>(at) = ~uint64_t{0};
  for (; at < range.end; ++at) *static_cast<volatile char*>(at) = '\xff';
}

char* map_memory(size_t size) {
  void* memory =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// A stack with a guard page below it.
struct Fiber {
  static constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;

  Fiber() : stack(map_memory(kGuard + kStack) + kGuard) {
    if (mprotect(stack - kGuard, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  }
  Fiber(const Fiber&) = delete;

  char* stack;
  ucontext_t context;
  jmp_buf at;  // where to resume; unlike swapcontext, setjmp needs no system call
  bool started = false;
  void* asan_frames = nullptr;
};

enum class Order { forward, backward, shuffled, any };
enum class State { fresh, ready, at_barrier, at_warp, at_grid, ended };

struct Thread {
  State state = State::fresh;
  Fiber* fiber = nullptr;
  CallSite site{};
  unsigned mask = 0;    // of the warp-level barrier
  bool orders = false;  // whether it also orders memory accesses, as __syncwarp does
  uint64_t value = 0;   // the lane's value in a shuffle or vote
};

struct Block {
  unsigned number = 0;
  uint32_t epoch = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> order;  // execution order of the threads
  size_t started = 0, ended = 0;
  int votes = 0, last_votes = 0;
  std::vector<char> shared;  // saved shared memory while other blocks of a cooperative launch run
};

class Device {
 public:
  static Device& instance() {
    static Device* device = new Device;  // never destroyed: a test may end inside a kernel
    return *device;
  }

  void set_order(const std::string& name) {
    random_.seed(1);
    if (name.empty() || name == "any") {
      order_ = Order::any;
    } else if (name == "forward" || name == "backward") {
      order_ = name == "forward" ? Order::forward : Order::backward;
    } else {
      order_ = Order::shuffled;
      random_.seed(std::stoull(name));
    }
  }

  // Throws an exception if the kernel does something wrong.
  void run(const Launch& launch, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    position.grid = launch.grid;
    position.block = launch.block;
    kernel_ = &kernel;
    name_ = launch.name;
    cooperative_ = launch.cooperative;
    now_ = order_ == Order::any ? static_cast<Order>(random_() % 3) : order_;
    // Aligned to exactly 16 bytes, as documented, so that code that relies on more fails.
    dynamic_part.begin = dynamic_arena.begin + kZone + 16;
    dynamic_part.end = dynamic_part.begin + launch.shared_bytes;
    allow_access(dynamic_arena, dynamic_part);
    ++running.period;
    std::vector<unsigned> order(size_t{launch.grid.x} * launch.grid.y * launch.grid.z);
    start_memory_check();
    arrange(order);
    in_kernel = true;
    const char* const here = static_cast<const char*>(__builtin_frame_address(0));
    running.host_stack = here - kNear;
    running.host_stack_end = here + kNear;
    try {
      cooperative_ ? run_together(order) : run_in_turn(order);
    } catch (...) {
      in_kernel = false;
      release_fibers();
      throw;
    }
    in_kernel = false;
  }

  void block_barrier(const CallSite& site) { wait(State::at_barrier, site); }

  int block_vote(const CallSite& site, bool predicate) {
    block_->votes += predicate;
    Block* const block = block_;
    wait(State::at_barrier, site);
    return block->last_votes;
  }

  void grid_barrier(const CallSite& site) {
    if (!cooperative_) fail("grid_sync in a kernel not launched by AFA_LAUNCH_COOPERATIVE");
    wait(State::at_grid, site);
  }

  void warp_barrier(const CallSite& site, unsigned mask, bool orders) {
    const unsigned self = thread_ % 32;
    if ((mask >> self & 1) == 0) {
      fail("%s called by lane %u, which is not in mask %#x, at %s:%d", site.what, self, mask, site.file,
           site.line);
    }
    own().mask = mask;
    own().orders = orders;
    own().state = State::at_warp;
    own().site = site;
    if (!meet(thread_)) suspend();
  }

  // Returns the mask of participating lanes.
  unsigned warp_gather(const CallSite& site, unsigned mask, uint64_t value, uint64_t (&values)[32]) {
    const unsigned first = thread_ / 32 * 32;
    own().value = value;
    warp_barrier(site, mask, false);
    unsigned given = 0;
    for (unsigned l = 0; l < lanes(first); ++l) {
      const Thread& thread = block_->threads[first + l];
      if ((mask >> l & 1) == 0 || thread.state == State::ended) continue;
      given |= 1u << l;
      values[l] = thread.value;
    }
    warp_barrier(site, mask, false);  // a lane must not overwrite its value before all lanes have read it
    return given;
  }

  uint64_t warp_read(const CallSite& site, unsigned mask, uint64_t value, int source) {
    uint64_t values[32];
    const unsigned given = warp_gather(site, mask, value, values);
    if (source < 0 || source > 31 || (given >> source & 1) == 0) {
      fail("%s reads from lane %d, which does not participate (mask %#x), at %s:%d", site.what, source, mask,
           site.file, site.line);
    }
    return values[source];
  }

  [[noreturn]] void fail_with(const std::string& text) {
    const std::string whole = std::string("kernel ") + name_ + ": " + text +
                              (running_ == nullptr ? "" : "; " + thread_name(running.block, running.thread));
    if (running_ == nullptr) throw std::runtime_error(whole);
    failure_ = whole;
    leave_stack(nullptr, scheduler_stack_, scheduler_size_);
    switch_to_scheduler();
  }

  int lane() const { return static_cast<int>(thread_ % 32); }

 private:
  static constexpr size_t kZone = 4 << 10, kNear = 64 << 10;

  Device() {
    const char* order = std::getenv("AFA_CUDA_ON_HOST_ORDER");
    set_order(order == nullptr ? "" : order);
    const size_t size = stand_in::kMaxSharedBytes + 2 * kZone;
    dynamic_arena.begin = map_memory(size);
    dynamic_arena.end = dynamic_arena.begin + size;
  }

  // Fills `indices` with 0, 1, 2, ... in the launch's execution order.
  void arrange(std::vector<unsigned>& indices) {
    std::iota(indices.begin(), indices.end(), 0u);
    if (now_ == Order::backward) std::reverse(indices.begin(), indices.end());
    if (now_ == Order::shuffled) std::shuffle(indices.begin(), indices.end(), random_);
  }

  Thread& own() { return block_->threads[thread_]; }

  void become(unsigned thread) {
    const dim3 block = position.block;
    thread_ = thread;
    position.thread_index = {thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
    running.thread = thread;
    running.warp = &block_->warps[thread / 32];
  }

  void start(Block& block, unsigned number) {
    const unsigned size = position.block.x * position.block.y * position.block.z;
    block.number = number;
    block.epoch = ++epochs_;
    block.threads.assign(size, Thread{});
    block.warps.assign((size + 31) / 32, Warp{});
    block.order.resize(size);
    arrange(block.order);
    block.started = block.ended = 0;
    block.votes = 0;
    fill(static_shared());
    fill(dynamic_part);
  }

  void enter(Block& block) {
    const dim3 grid = position.grid;
    block_ = &block;
    position.block_index = {block.number % grid.x, block.number / grid.x % grid.y,
                            block.number / (grid.x * grid.y)};
    running.block = block.number;
    running.slot = cooperative_ ? block.number : 0;
    running.epoch = block.epoch;
  }

  void run_in_turn(const std::vector<unsigned>& order) {
    Block block;
    for (unsigned number : order) {
      start(block, number);
      enter(block);
      run(block);
    }
  }

  // Runs all blocks from one grid barrier to the next. Each block has its own copy of shared memory.
  void run_together(std::vector<unsigned>& order) {
    std::deque<Block> blocks(order.size());
    const Range fixed = static_shared();
    const size_t fixed_size = static_cast<size_t>(fixed.end - fixed.begin);
    const size_t dynamic_size = static_cast<size_t>(dynamic_part.end - dynamic_part.begin);
    for (bool first = true;; first = false) {
      size_t ended = 0;
      for (unsigned number : order) {
        Block& block = blocks[number];
        if (first) {
          start(block, number);
          block.shared.resize(fixed_size + dynamic_size);
        } else {
          copy(block.shared.data(), const_cast<char*>(fixed.begin), fixed_size);
          copy(block.shared.data() + fixed_size, const_cast<char*>(dynamic_part.begin), dynamic_size);
        }
        enter(block);
        run(block);
        copy(fixed.begin, block.shared.data(), fixed_size);
        copy(dynamic_part.begin, block.shared.data() + fixed_size, dynamic_size);
        ended += block.ended > 0;
      }
      if (ended == blocks.size()) return;
      const auto waiting =
          std::find_if(blocks.begin(), blocks.end(), [](const Block& block) { return block.ended == 0; });
      const Thread& site = waiting->threads[0];
      if (ended > 0) {
        std::ostringstream text;
        text << ended << " of " << blocks.size() << " blocks have exited; the others wait";
        stuck(text.str(), site);
      }
      for (const Block& block : blocks) {
        if (same_site(block.threads[0], site)) continue;
        stuck("blocks wait at " + site_name(block.threads[0]) + " and", site);
      }
      ++running.period;
      arrange(order);
      for (Block& block : blocks) release(block);
    }
  }

  // Runs a block until its threads exit or wait at a grid barrier.
  void run(Block& block) {
    for (;;) {
      for (bool progress = true; progress;) {
        progress = false;
        for (unsigned thread : block.order) {
          const State state = block.threads[thread].state;
          if (state != State::fresh && state != State::ready) continue;
          progress = true;
          state == State::fresh ? run_fresh() : run_further(thread);
        }
      }
      if (block.ended == block.threads.size()) return;
      const Thread& first = *std::find_if(block.threads.begin(), block.threads.end(),
                                          [](const Thread& thread) { return thread.state != State::ended; });
      if (block.ended > 0) {
        std::ostringstream text;
        text << block.ended << " of the block's " << block.threads.size()
             << " threads have exited; the others wait";
        stuck(text.str(), first);
      }
      for (const Thread& thread : block.threads) {
        if (!same_site(thread, first))
          stuck("threads of a block wait at " + site_name(thread) + " and", first);
      }
      if (first.state == State::at_grid) return;
      if (first.state == State::at_warp) stuck("not all lanes of the mask have arrived", first);
      block.last_votes = std::exchange(block.votes, 0);
      release(block);
      running.epoch = block.epoch;
    }
  }

  // Releases a block from a barrier that all of its threads have reached.
  void release(Block& block) {
    block.epoch = ++epochs_;
    for (Thread& thread : block.threads) thread.state = State::ready;
    arrange(block.order);
  }

  static bool same_site(const Thread& a, const Thread& b) {
    return a.state == b.state && a.site.line == b.site.line && std::string(a.site.file) == b.site.file;
  }

  static std::string site_name(const Thread& thread) {
    return std::string(thread.site.file) + ":" + std::to_string(thread.site.line);
  }

  [[noreturn]] void stuck(const std::string& what, const Thread& waiting) const {
    throw std::runtime_error(std::string("kernel ") + name_ + ": divergent barrier: " + what + " at " +
                             site_name(waiting) + " (" + waiting.site.what + ")");
  }

  unsigned lanes(unsigned first) const {
    return std::min<unsigned>(32, static_cast<unsigned>(block_->threads.size()) - first);
  }

  // Makes the lanes in this thread's mask ready if all of them have arrived or exited.
  bool meet(unsigned waiting) {
    Block& block = *block_;
    const unsigned first = waiting / 32 * 32;
    const Thread self = block.threads[waiting];
    std::array<uint32_t, 32> known{};
    Warp& warp = block.warps[waiting / 32];
    for (unsigned l = 0; l < lanes(first); ++l) {
      const Thread& thread = block.threads[first + l];
      if ((self.mask >> l & 1) == 0 || thread.state == State::ended) continue;
      if (!same_site(thread, self) || thread.mask != self.mask) return false;
      for (unsigned n = 0; n < 32; ++n) known[n] = std::max(known[n], warp.clocks[l][n]);
    }
    if (self.orders) {
      ++warp.barriers;
      for (unsigned l = 0; l < 32; ++l) {
        if ((self.mask >> l & 1) != 0) known[l] = warp.barriers;
      }
    }
    for (unsigned l = 0; l < lanes(first); ++l) {
      Thread& thread = block.threads[first + l];
      if ((self.mask >> l & 1) == 0 || thread.state == State::ended) continue;
      thread.state = State::ready;
      if (self.orders) warp.clocks[l] = known;
    }
    return true;
  }

  // The current thread has exited: releases the lanes of its warp that waited only for it.
  void leave_warp() {
    const unsigned first = thread_ / 32 * 32;
    for (unsigned l = 0; l < lanes(first); ++l) {
      if (block_->threads[first + l].state == State::at_warp) meet(first + l);
    }
  }

  void wait(State state, const CallSite& site) {
    Thread& thread = own();
    thread.state = state;
    thread.site = site;
    suspend();
  }

  // ---- fibers ----

  // Runs threads that have not started, in order, until one of them waits. That thread keeps the fiber.
  void run_fresh() {
    if (free_fibers_.empty()) free_fibers_.push_back(&fibers_.emplace_back());
    Fiber& fiber = *free_fibers_.back();
    free_fibers_.pop_back();
    forget_frames(fiber.stack, Fiber::kStack);
    fiber.started = false;
    resume(fiber);
  }

  void run_further(unsigned thread) {
    become(thread);
    resume(*own().fiber);
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    running.stack = fiber.stack;
    running.stack_end = fiber.stack + Fiber::kStack;
    void* frames = nullptr;
    leave_stack(&frames, fiber.stack, Fiber::kStack);
    switch_to(fiber);
    enter_stack(frames, nullptr, nullptr);
    running_ = nullptr;
    if (!failure_.empty()) throw std::runtime_error(std::exchange(failure_, std::string()));
  }

  void suspend() {
    Fiber& fiber = *running_;
    own().fiber = &fiber;
    leave_stack(&fiber.asan_frames, scheduler_stack_, scheduler_size_);
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&fiber.context, &scheduler_);
#else
    if (_setjmp(fiber.at) == 0) _longjmp(scheduler_at_, 1);
#endif
    enter_stack(fiber.asan_frames, &scheduler_stack_, &scheduler_size_);
  }

  void switch_to(Fiber& fiber) {
    const bool started = std::exchange(fiber.started, true);
    if (!started) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Device::begin, 0);
    }
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&scheduler_, &fiber.context);
#else
    if (_setjmp(scheduler_at_) != 0) return;
    if (started) _longjmp(fiber.at, 1);
    setcontext(&fiber.context);
#endif
  }

  [[noreturn]] void switch_to_scheduler() {
#ifdef __SANITIZE_ADDRESS__
    setcontext(&scheduler_);
#else
    _longjmp(scheduler_at_, 1);
#endif
    std::abort();
  }

  static void begin() { instance().run_threads(); }

  void run_threads() {
    enter_stack(nullptr, &scheduler_stack_, &scheduler_size_);
    Fiber* const fiber = running_;
    while (block_->started < block_->threads.size()) {
      become(block_->order[block_->started++]);
      own().fiber = fiber;
      (*kernel_)();
      own().state = State::ended;
      ++block_->ended;
      leave_warp();
    }
    free_fibers_.push_back(fiber);
    leave_stack(nullptr, scheduler_stack_, scheduler_size_);
    switch_to_scheduler();
  }

  void release_fibers() {
    free_fibers_.clear();
    for (Fiber& fiber : fibers_) free_fibers_.push_back(&fiber);
    running_ = nullptr;
  }

  std::mutex mutex_;
  Order order_ = Order::any, now_ = Order::forward;
  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  const char* name_ = "";
  bool cooperative_ = false;
  uint32_t epochs_ = 0;
  Block* block_ = nullptr;
  unsigned thread_ = 0;
  std::deque<Fiber> fibers_;
  std::vector<Fiber*> free_fibers_;
  Fiber* running_ = nullptr;
  std::string failure_;
  jmp_buf scheduler_at_;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
};

}  // namespace

const char* run(const Launch& launch, const std::function<void()>& kernel, const stand_in_span* blocks,
                size_t block_count) {
  static std::string failure;  // protected by the runtime's lock
  allowed_blocks = {blocks, block_count};
  try {
    Device::instance().run(launch, kernel);
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}
void block_barrier(const CallSite& site) {
  Device::instance().block_barrier(site);
}
int block_vote(const CallSite& site, bool predicate) {
  return Device::instance().block_vote(site, predicate);
}
void grid_barrier(const CallSite& site) {
  Device::instance().grid_barrier(site);
}
void warp_barrier(const CallSite& site, unsigned mask) {
  Device::instance().warp_barrier(site, mask, true);
}
unsigned warp_gather(const CallSite& site, unsigned mask, uint64_t value, uint64_t (&values)[32]) {
  return Device::instance().warp_gather(site, mask, value, values);
}
uint64_t warp_read(const CallSite& site, unsigned mask, uint64_t value, int source) {
  return Device::instance().warp_read(site, mask, value, source);
}
int lane() {
  return Device::instance().lane();
}
void* dynamic_shared() {
  return const_cast<char*>(dynamic_part.begin);
}
void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  Device::instance().fail_with(text);
}

}  // namespace cuda_on_host

// Sets the execution order of threads and blocks: "forward", "backward", a number that seeds a shuffle, or
// "any" (one of these per launch, in a reproducible sequence). The initial value is that of
// AFA_CUDA_ON_HOST_ORDER.
extern "C" __attribute__((visibility("default"))) void cuda_on_host_order(const char* name) {
  cuda_on_host::Device::instance().set_order(name);
}
