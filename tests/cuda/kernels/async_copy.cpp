// Asynchronous copies that threads have started and not waited for yet.
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "device.h"

namespace cuda_on_host {
namespace {

struct Copies {
  uint32_t period = 0;
  std::deque<std::vector<Copy>> groups{{}};  // oldest first; the last group is not committed
  size_t taken = 0;                          // copies of the first group that were performed
};

Copies& copies_of_this_thread() {
  static std::map<std::pair<uint32_t, uint32_t>, Copies> copies;
  Copies& own = copies[{running.block, running.thread}];
  if (own.period != running.period) own = {running.period, {{}}, 0};
  return own;
}

}  // namespace

void copy_later(void* to, const void* from, int bytes) {
  const auto misaligned = [&](const void* at) { return reinterpret_cast<uintptr_t>(at) % bytes != 0; };
  if (misaligned(to) || misaligned(from))
    fail("misaligned asynchronous copy of %d bytes, %p to %p", bytes, from, to);
  copies_of_this_thread().groups.back().push_back({to, from, bytes});
}

void commit_copies() {
  copies_of_this_thread().groups.emplace_back();
}

bool next_copy(int left, Copy& copy) {
  Copies& own = copies_of_this_thread();
  while (static_cast<int>(own.groups.size()) > left + 1) {
    if (own.taken < own.groups.front().size()) {
      copy = own.groups.front()[own.taken++];
      return true;
    }
    own.groups.pop_front();
    own.taken = 0;
  }
  return false;
}

}  // namespace cuda_on_host
