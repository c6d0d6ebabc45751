// Checks each memory access of the kernels. build.py compiles the .cu files with -fsanitize=thread, which
// inserts a call before each access, and -fsanitize=alignment,bounds. These calls are implemented in this
// file, not by the sanitizers' libraries.
//
// A race: two threads access the same byte without a barrier in between, and at least one of them writes.
// Races are detected in any execution order. Two writes of the same value are a race too, as in CUDA.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"

namespace cuda_on_host {
namespace {

constexpr uint32_t kSeveral = ~uint32_t{0};

// Accesses that no barrier has ordered yet: which threads, when, and from which instruction.
struct Access {
  uint32_t period = 0, block = 0, epoch = 0;
  uint32_t warp = 0, lanes = 0, clock = 0;
  uint32_t code = 0;  // address of the instruction, relative to the library
};

struct Cell {
  Access write, read;
};

// The cells of 4 KiB: one per 1, 2 or 4 bytes, depending on the smallest access in this period.
constexpr unsigned kPageBits = 12;
struct Page {
  uint64_t key = ~uint64_t{0};
  uint32_t period = 0;
  unsigned shift = 0;
  std::vector<Cell> cells;
};

std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
constexpr size_t kRemembered = 256;
Page* remembered[kRemembered];
constexpr size_t kMaxPages = 8192;  // half a GiB; accesses to further pages are not checked

const char* code_base() {
  static const char* base = [] {
    Dl_info info;
    return dladdr(&pages, &info) != 0 ? static_cast<const char*>(info.dli_fbase) : nullptr;
  }();
  return base;
}

// The source line, if addr2line can find it.
std::string source_of(uint32_t code) {
  Dl_info info;
  std::ostringstream text;
  text << "+0x" << std::hex << code;
  if (dladdr(&pages, &info) == 0) return text.str();
  std::ostringstream command;  // code - 1: the address of the call, not its return address
  command << "addr2line -e '" << info.dli_fname << "' 0x" << std::hex << code - 1 << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return text.str();
  char line[512] = "";
  const bool read = std::fgets(line, sizeof(line), pipe) != nullptr;
  pclose(pipe);
  if (!read || line[0] == '?') return text.str();
  line[std::strcspn(line, "\n (")] = '\0';
  return line;
}

// Whether all of these accesses happen before the running thread, or were made by it.
bool ordered(const Access& access, bool shared) {
  if (access.period != running.period) return true;
  if (!shared && access.block != running.block) return false;
  if (access.epoch != running.epoch) return true;
  if (access.warp != running.thread / 32) return false;
  const unsigned self = running.thread % 32;
  for (unsigned l = 0; l < 32; ++l) {
    if (l != self && (access.lanes >> l & 1) != 0 && running.warp->clocks[self][l] <= access.clock)
      return false;
  }
  return true;
}

Access now(uint32_t code) {
  const unsigned self = running.thread % 32;
  return {running.period,
          running.block,
          running.epoch,
          running.thread / 32,
          1u << self,
          running.warp->clocks[self][self],
          code};
}

void add(Access& reads, const Access& read, bool shared) {
  if (ordered(reads, shared)) {
    reads = read;
  } else if (!shared && reads.block != read.block) {
    reads.block = kSeveral;
  } else if (reads.warp != read.warp) {
    reads.warp = kSeveral;
  } else {
    reads.lanes |= read.lanes;
    if (read.clock > reads.clock) reads.clock = read.clock;
  }
}

std::string name_of(const Access& access) {
  if (access.block == kSeveral) return "threads of several blocks";
  if (access.warp == kSeveral) return "threads of several warps";
  for (unsigned l = 0; l < 32; ++l) {
    if (access.lanes == 1u << l) return thread_name(access.block, access.warp * 32 + l);
  }
  return "several threads, among them " +
         thread_name(access.block, access.warp * 32 + static_cast<unsigned>(__builtin_ctz(access.lanes)));
}

[[noreturn]] void report(const char* at, bool write, uint32_t code, const Access& other, bool other_write) {
  const Range fixed = static_shared();
  std::ostringstream text;
  text << "race: ";
  if (fixed.contains(at)) {
    text << "static shared memory at byte " << at - fixed.begin;
  } else if (dynamic_part.contains(at)) {
    text << "dynamic shared memory at byte " << at - dynamic_part.begin;
  } else {
    text << "global memory at " << static_cast<const void*>(at);
  }
  text << (other_write ? " written by " : " read by ") << name_of(other) << " (" << source_of(other.code)
       << ") and " << (write ? "written" : "read") << " (" << source_of(code)
       << ") with no barrier between them";
  fail("%s", text.str().c_str());
}

Page& page_of(uint64_t key) {
  Page*& cached = remembered[key % kRemembered];
  if (cached != nullptr && cached->key == key) return *cached;
  std::unique_ptr<Page>& page = pages[key];
  if (page == nullptr) {
    page = std::make_unique<Page>();
    page->key = key;
  }
  cached = page.get();
  return *cached;
}

// Splits the page's cells until they are small enough for the access.
void fit(Page& page, uintptr_t at, size_t size) {
  unsigned shift = ((at | size) & 1) != 0 ? 0 : ((at | size) & 3) != 0 ? 1 : 2;
  if (page.period == running.period && page.shift <= shift) return;
  std::vector<Cell> cells((size_t{1} << kPageBits) >> shift);
  if (page.period == running.period) {
    for (size_t n = 0; n < cells.size(); ++n) cells[n] = page.cells[n >> (page.shift - shift)];
  } else if (page.shift == shift && !page.cells.empty()) {
    page.period = running.period;
    return;  // the cells' contents are from an earlier period
  }
  page.cells = std::move(cells);
  page.shift = shift;
  page.period = running.period;
}

// `space`: 0 for global memory; for shared memory, different in each block that is alive.
void check_cells(const char* from, size_t size, bool write, uint32_t code, uint64_t space) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(from);
  const uint64_t key = (at >> kPageBits) + (space << 48);
  if (pages.size() >= kMaxPages && pages.find(key) == pages.end()) return;
  Page& page = page_of(key);
  fit(page, at, size);
  const uintptr_t mask = (uintptr_t{1} << kPageBits) - 1;
  const size_t end = ((at & mask) + size - 1) >> page.shift;
  for (size_t n = (at & mask) >> page.shift; n <= end; ++n) {
    Cell& cell = page.cells[n];
    if (!ordered(cell.write, space > 0)) report(from, write, code, cell.write, true);
    if (write) {
      if (!ordered(cell.read, space > 0)) report(from, write, code, cell.read, false);
      cell.write = now(code);
    } else {
      add(cell.read, now(code), space > 0);
    }
  }
}

// An access to device memory must be inside one of the blocks that the kernel's arguments point to.
void check_block(const char* at, size_t size, bool write, uint32_t code) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - stand_in::kDeviceMemory;
  if (offset >= stand_in::kDeviceRange * stand_in::kMaxDevices) return;
  const stand_in_span *const begin = allowed_blocks.first, *const end = begin + allowed_blocks.count;
  static const stand_in_span* last = nullptr;  // usually the same block as for the last access
  const auto contains = [&](const stand_in_span& block) {
    return at >= block.begin && at + size <= block.begin + block.size;
  };
  if (last >= begin && last < end && contains(*last)) return;
  for (const stand_in_span* block = begin; block != end; ++block) {
    if (!contains(*block)) continue;
    last = block;
    return;
  }
  for (const stand_in_span* block = begin; block != end; ++block) {
    if (at + size <= block->begin - 4096 || at >= block->begin + block->size + 4096) continue;
    fail("out of bounds: byte %td of a %zu-byte block of global memory was %s at %s", at - block->begin,
         block->size, write ? "written" : "read", source_of(code).c_str());
  }
  fail("out of bounds: global memory at %p, outside the blocks that the arguments point to, was %s at %s",
       static_cast<const void*>(at), write ? "written" : "read", source_of(code).c_str());
}

void check(const void* address, size_t size, bool write, const void* return_address) {
  if (!in_kernel) return;
  const char* at = static_cast<const char*>(address);
  if (at >= running.stack && at < running.stack_end) return;
  if (at >= running.host_stack && at < running.host_stack_end) return;  // the kernel's arguments
  if (at >= reinterpret_cast<const char*>(&position) && at < reinterpret_cast<const char*>(&position + 1))
    return;
  const uint32_t code = static_cast<uint32_t>(static_cast<const char*>(return_address) - code_base());
  uint64_t space = 0;
  if (dynamic_arena.contains(at)) {
    if (!dynamic_part.contains(at) || at + size > dynamic_part.end) {
      fail("out of bounds: byte %td of %td bytes of dynamic shared memory was %s at %s",
           at - dynamic_part.begin, dynamic_part.end - dynamic_part.begin, write ? "written" : "read",
           source_of(code).c_str());
    }
    space = 1 + running.slot;
  } else if (static_shared().contains(at)) {
    space = 1 + running.slot;
  } else {
    check_block(at, size, write, code);
  }
  while (size > 0) {  // page by page
    const size_t page = size_t{1} << kPageBits,
                 in_page = page - (reinterpret_cast<uintptr_t>(at) & (page - 1));
    const size_t part = size < in_page ? size : in_page;
    check_cells(at, part, write, code, space);
    at += part;
    size -= part;
  }
}

// An access whose type requires this alignment.
void check_aligned(const void* address, size_t size, bool write, const void* return_address) {
  if (in_kernel && reinterpret_cast<uintptr_t>(address) % size != 0) {
    const uint32_t code = static_cast<uint32_t>(static_cast<const char*>(return_address) - code_base());
    fail("misaligned address %p for an access of %zu bytes at %s", address, size, source_of(code).c_str());
  }
  check(address, size, write, return_address);
}

}  // namespace

void start_memory_check() {
  code_base();
  if (pages.size() < kMaxPages / 4) return;
  pages.clear();
  for (Page*& page : remembered) page = nullptr;
}

}  // namespace cuda_on_host

// ---- functions that the compiler calls ----

#define AFA_CALLED extern "C" __attribute__((visibility("hidden"))) void
#define AFA_CALLED_SIZED(size)                                                 \
  AFA_CALLED __tsan_read##size(void* at) {                                     \
    cuda_on_host::check_aligned(at, size, false, __builtin_return_address(0)); \
  }                                                                            \
  AFA_CALLED __tsan_write##size(void* at) {                                    \
    cuda_on_host::check_aligned(at, size, true, __builtin_return_address(0));  \
  }                                                                            \
  AFA_CALLED __tsan_unaligned_read##size(void* at) {                           \
    cuda_on_host::check(at, size, false, __builtin_return_address(0));         \
  }                                                                            \
  AFA_CALLED __tsan_unaligned_write##size(void* at) {                          \
    cuda_on_host::check(at, size, true, __builtin_return_address(0));          \
  }

AFA_CALLED_SIZED(1)
AFA_CALLED_SIZED(2)
AFA_CALLED_SIZED(4)
AFA_CALLED_SIZED(8)
AFA_CALLED_SIZED(16)
AFA_CALLED __tsan_read_range(void* at, size_t size) {
  cuda_on_host::check(at, size, false, __builtin_return_address(0));
}
AFA_CALLED __tsan_write_range(void* at, size_t size) {
  cuda_on_host::check(at, size, true, __builtin_return_address(0));
}
AFA_CALLED __tsan_vptr_update(void**, void*) {}
AFA_CALLED __tsan_init() {}
AFA_CALLED __tsan_func_entry(void*) {}
AFA_CALLED __tsan_func_exit() {}

namespace {

// The structures that GCC passes to the sanitizer runtime.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor& type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor &array, &index;
};

}  // namespace

#ifndef __SANITIZE_ADDRESS__
AFA_CALLED __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  cuda_on_host::fail("misaligned address %#zx for type %s, which requires %d bytes, at %s:%u",
                     size_t{pointer}, data->type.name, 1 << data->log_alignment, data->location.file,
                     data->location.line);
}
AFA_CALLED __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  cuda_on_host::fail("index %zd out of bounds for type %s at %s:%u", static_cast<ptrdiff_t>(index),
                     data->array.name, data->location.file, data->location.line);
}
#endif
