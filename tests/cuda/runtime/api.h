// The stand-in runtime's interface to the host-compiled kernels (tests/cuda/kernels), to the bridge to torch
// (tests/cuda/bridge) and, through ctypes, to Python (tests/cuda/device.py).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

extern "C" {

// ---- launches of host-compiled kernels ----

struct stand_in_span {
  const char* begin;
  size_t size;
};
struct stand_in_launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  cudaStream_t stream;
  const stand_in_span* parameters;  // the bytes of each argument
  size_t parameter_count;
  void* state;  // passed to `run` later, at each replay if captured in a graph; finally passed to `destroy`
  // Runs the kernel, which may access only these blocks. Returns nullptr, or an error message.
  const char* (*run)(void* state, const stand_in_span* blocks, size_t block_count);
  void (*destroy)(void* state);
};
cudaError_t stand_in_launch_kernel(const stand_in_launch* launch);

// ---- reports of the bridge ----

enum stand_in_event { stand_in_allocated, stand_in_freed, stand_in_segment };
void stand_in_trace(stand_in_event event, int device, void* at, size_t size, cudaStream_t stream);
void stand_in_set_current_stream(cudaStream_t (*current_stream)(int device));
// Enqueues work of a torch operator on a stream. `destroy` is called after the last run.
void stand_in_enqueue(cudaStream_t stream, const char* name, void (*run)(void*), void (*destroy)(void*),
                      void* state);
// Runs the work on the stream, including the work it waits for. Doesn't count as a synchronization. Returns
// nullptr, or the error message of a kernel.
const char* stand_in_run_stream(cudaStream_t stream);
bool stand_in_is_capturing(cudaStream_t stream);
// To be called before a torch operator that waits for the device, such as equal. Returns nullptr, or an error
// message.
const char* stand_in_synchronizing(const char* what);

// ---- functions for tests ----

struct stand_in_counts {
  uint64_t launches, torch_operations, synchronizations, device_allocations, allocations, allocated_bytes;
};
void stand_in_get_counts(stand_in_counts* counts);
// Starts or stops recording launches; stand_in_launches returns them as JSON.
void stand_in_record_launches(bool on);
const char* stand_in_launches();
// The faults since the last call, one per line. The string is valid until the next call in this thread.
const char* stand_in_faults();
// While waiting is forbidden, a synchronization, a device-to-host read or a cudaMalloc is a fault.
void stand_in_forbid_waiting(bool on);
// Sets the order of streams: "latest" (the stream enqueued to last runs first), or a number that seeds a
// random order.
void stand_in_set_order(const char* name);
// While set, kernels are checked and counted, but not run.
void stand_in_skip_kernels(bool on);
// How cooperative launches are refused: 0: never; 1: the device attribute is 0; 2: launches fail with
// cudaErrorCooperativeLaunchTooLarge.
void stand_in_refuse_cooperative(int how);
size_t stand_in_live_bytes(int device);

}  // extern "C"
