// Shared by the files of the stand-in runtime. README.md describes the runtime; api.h is its interface to the
// other parts of the tests. All functions in this file require the caller to hold lock().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"

#define STAND_IN_API extern "C" __attribute__((visibility("default")))

namespace stand_in {

// One lock for all state. Recursive, because a kernel that runs while it is held may query its blocks.
std::unique_lock<std::recursive_mutex> lock();

// ---- errors.cpp ----
// Reports a CUDA error that a GPU would report, too; cudaGetLastError returns it next.
cudaError_t error(cudaError_t code);
// Reports a fault: an incorrect use of CUDA. The message is added to stand_in_faults(), and in this host
// thread cudaGetErrorString returns it for the code.
cudaError_t fault(cudaError_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Reports a fault that is not the error of a call.
void report(const std::string& text);
// Called before the next launch: an earlier launch error that was not fetched is a fault.
void check_that_launch_errors_were_fetched();
void remember_launch_error(const std::string& kernel);

// ---- devices.cpp ----
int device_count();
int processors();
int max_shared_bytes();  // per block
int current_device();

// ---- memory.cpp ----
struct Span {
  const char* begin = nullptr;
  size_t size = 0;
  bool contains(const void* at) const { return at >= begin && at < begin + size; }
};
struct Block {
  Span span;
  int device = 0;
  void* stream = nullptr;  // for blocks of the caching allocator: the stream they were allocated on
  unsigned long long capture_id = 0;  // ID of the capture during which it was allocated; 0: none
};
// The device whose address range contains this address, or -1.
int device_of(const void* at);
// The live block of cudaMalloc or of the caching allocator that contains this address, or nullptr.
const Block* live_block(const void* at);
// Why live_block returned nullptr: the block was freed, or never allocated.
std::string why_not_live(const void* at);
bool is_mapped_host_memory(const void* at);
bool is_pinned(const void* at);
// Fills the span with NaN (in any floating-point type) and, with AddressSanitizer, makes it inaccessible.
void poison(Span span);
void unpoison(Span span);

// ---- streams.cpp ----
struct Graph;
struct Stream;
struct Node;
using Work = std::function<void()>;

struct Item {
  enum Kind { work, launch, wait, record } kind = work;
  std::string name;
  Work run;                  // work, launch
  std::vector<Span> blocks;  // launch: the blocks that its arguments point to
  Stream* stream = nullptr;  // wait: runs this stream up to item `until`
  uint64_t until = 0;
  uint64_t number = 0;  // position in its stream
};

// Returns nullptr and reports a fault if the handle is not a stream. Each device has a default stream.
Stream* stream_of(cudaStream_t handle, int device = current_device());
int device_of(const Stream& stream);
Graph* captured_by(const Stream& stream);
// Enqueues an item or, in a capture, adds a node to the graph.
void enqueue(Stream& stream, Item item);
// Runs the work on a stream, including the work that it waits for.
void run(Stream& stream);
void run_device(int device);
void run_everything();
// The name of a queued launch that uses the block and that the block's stream does not wait for; "" if there
// is none.
std::string launch_that_still_uses(const Block& block);
// Returns an error or fault if the calling host thread must not synchronize, read device memory or allocate
// now.
cudaError_t check_that_host_may(const char* what, Stream* stream = nullptr);
// The failure of a kernel since the last call, reported as the error of the current call.
cudaError_t failure_of_kernels();

// ---- graphs.cpp ----
// During capture, instead of enqueuing: adds a node that depends on all work that the stream has captured or
// waited for.
void add_node(Stream& stream, Item item);
unsigned long long capture_id(const Stream& stream);
bool any_capture_forbids_unsafe_calls();

// ---- launches.cpp ----
void count(uint64_t stand_in_counts::* counter, uint64_t by = 1);
void record_allocation(size_t bytes);

}  // namespace stand_in
