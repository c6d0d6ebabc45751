// The threads, blocks and orders of cuda_on_host.h.
#include "cuda_on_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
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

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Where the linker has put the shared memory of all kernels.
extern "C" __attribute__((visibility("hidden"))) char __start_afa_shared[], __stop_afa_shared[];

namespace cuda_on_host {

dim3 grid_size, block_size;
uint3 block_index, thread_index;

namespace {

// What AddressSanitizer must know of a fiber.
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
#else
void forget_frames(const char*, size_t) {}
void leave_stack(void**, const void*, size_t) {}
void enter_stack(void*, const void**, size_t*) {}
#endif

// All bits set: NaN in every floating type, -1 in the integers. Through the red zones too, unchecked.
__attribute__((no_sanitize("address", "undefined"))) void fill_shared_memory() {
  volatile char* at = __start_afa_shared;
  for (; at + 8 <= __stop_afa_shared; at += 8) *reinterpret_cast<volatile uint64_t*>(at) = ~uint64_t{0};
  for (; at < __stop_afa_shared; ++at) *at = '\xff';
}

// A stack, with a page below it that must not be touched.
struct Fiber {
  static constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;

  Fiber() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    stack = static_cast<char*>(memory) + kGuard;
  }
  Fiber(const Fiber&) = delete;

  char* stack;
  ucontext_t context;
  void* asan_frames = nullptr;
};

enum class Order { forward, backward, shuffled, any };

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

  cudaError_t take_error() { return std::exchange(error_, cudaSuccess); }

  void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool empty =
        grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
    const bool grid_fits = grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16;
    const bool block_fits =
        block.x <= 1024 && block.y <= 1024 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= 1024;
    if (empty || !grid_fits || !block_fits) {
      error_ = cudaErrorInvalidConfiguration;
      return;
    }
    grid_size = grid;
    block_size = block;
    kernel_ = &kernel;
    now_ = order_ == Order::any ? static_cast<Order>(random_() % 3) : order_;
    std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
    arrange(blocks);
    for (unsigned index : blocks) {
      block_index = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
      run_block();
    }
  }

  void barrier(const char* file, int line) {
    waiting_.push_back({running_, thread_, file, line});
    Fiber& fiber = *running_;
    leave_stack(&fiber.asan_frames, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    enter_stack(fiber.asan_frames, &scheduler_stack_, &scheduler_size_);
  }

 private:
  struct Waiting {
    Fiber* fiber;
    unsigned thread;
    const char* file;
    int line;
  };

  Device() {
    const char* order = std::getenv("AFA_CUDA_ON_HOST_ORDER");
    set_order(order == nullptr ? "" : order);
  }

  // Fills `indices` with 0, 1, 2, ... in the order of this launch.
  void arrange(std::vector<unsigned>& indices) {
    std::iota(indices.begin(), indices.end(), 0u);
    if (now_ == Order::backward) std::reverse(indices.begin(), indices.end());
    if (now_ == Order::shuffled) std::shuffle(indices.begin(), indices.end(), random_);
  }

  void become(unsigned thread) {
    thread_ = thread;
    thread_index = {thread % block_size.x, thread / block_size.x % block_size.y,
                    thread / (block_size.x * block_size.y)};
  }

  void run_block() {
    fill_shared_memory();
    threads_.resize(block_size.x * block_size.y * block_size.z);
    arrange(threads_);
    started_ = ended_ = 0;
    waiting_.clear();
    // As far as the first barrier: a fiber runs thread after thread, and stays with the one that waits.
    for (size_t used = 0; started_ < threads_.size(); ++used) {
      if (used == fibers_.size()) fibers_.emplace_back();
      Fiber& fiber = fibers_[used];
      forget_frames(fiber.stack, Fiber::kStack);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Device::enter, 0);
      resume(fiber);
    }
    while (!waiting_.empty()) {  // from barrier to barrier
      check_barrier();
      std::vector<Waiting> waiting(waiting_.size());
      for (const Waiting& w : waiting_) waiting[w.thread] = w;
      waiting_.clear();
      arrange(threads_);
      for (unsigned thread : threads_) {
        become(thread);
        resume(*waiting[thread].fiber);
      }
    }
  }

  void check_barrier() const {
    const Waiting& first = waiting_.front();
    std::ostringstream text;
    if (ended_ > 0) {
      text << "divergent barrier: " << ended_ << " of a block's " << threads_.size()
           << " threads have ended, the others wait at " << first.file << ":" << first.line;
      throw std::runtime_error(text.str());
    }
    for (const Waiting& w : waiting_) {
      if (w.line == first.line && std::string(w.file) == first.file) continue;
      text << "divergent barrier: threads of a block wait at " << first.file << ":" << first.line
           << " and at " << w.file << ":" << w.line;
      throw std::runtime_error(text.str());
    }
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    void* frames = nullptr;
    leave_stack(&frames, fiber.stack, Fiber::kStack);
    swapcontext(&scheduler_, &fiber.context);
    enter_stack(frames, nullptr, nullptr);
  }

  static void enter() { instance().run_threads(); }

  void run_threads() {
    enter_stack(nullptr, &scheduler_stack_, &scheduler_size_);
    while (started_ < threads_.size()) {
      become(threads_[started_++]);
      (*kernel_)();
      ++ended_;
    }
    leave_stack(nullptr, scheduler_stack_, scheduler_size_);
  }

  std::mutex mutex_;
  cudaError_t error_ = cudaSuccess;
  Order order_ = Order::any, now_ = Order::forward;
  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  std::deque<Fiber> fibers_;
  std::vector<unsigned> threads_;  // in the order they run
  size_t started_ = 0, ended_ = 0;
  unsigned thread_ = 0;
  std::vector<Waiting> waiting_;
  Fiber* running_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
};

}  // namespace

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  Device::instance().launch(grid, block, kernel);
}

void barrier(const char* file, int line) {
  Device::instance().barrier(file, line);
}

}  // namespace cuda_on_host

// The order of threads and blocks from now on: "forward", "backward", a number that seeds a shuffle, or "any"
// (one of these for each launch, always the same). At first what AFA_CUDA_ON_HOST_ORDER says.
extern "C" __attribute__((visibility("default"))) void cuda_on_host_order(const char* name) {
  cuda_on_host::Device::instance().set_order(name);
}

cudaError_t cudaGetLastError() {
  return cuda_on_host::Device::instance().take_error();
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}
