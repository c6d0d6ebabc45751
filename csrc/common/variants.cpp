#include "common/variants.h"

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace afa {
namespace {

const KernelVariants*& list() {
  static const KernelVariants* first = nullptr;
  return first;
}

// Forces the variants in AFA_EXT_VARIANTS.
void read_environment() {
  const char* text = std::getenv("AFA_EXT_VARIANTS");
  std::istringstream entries(text == nullptr ? "" : text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    const size_t equals = entry.find('=');
    const KernelVariants* kernel = KernelVariants::of(entry.substr(0, equals).c_str());
    const int variant = kernel == nullptr || equals == std::string::npos
                            ? -1
                            : kernel->find(entry.substr(equals + 1).c_str());
    if (variant >= 0) {
      kernel->force(variant);
      continue;
    }
    std::string known;
    for (const KernelVariants* k = KernelVariants::first(); k != nullptr; k = k->next) {
      known += std::string(known.empty() ? "" : "; ") + k->kernel + "=";
      for (int i = 0; i < k->count; ++i) known += std::string(i > 0 ? "|" : "") + k->names[i];
    }
    throw std::runtime_error("AFA_EXT_VARIANTS: expected kernel=variant entries separated by commas (" +
                             known + "), got '" + entry + "'");
  }
}

}  // namespace

KernelVariants::KernelVariants(const char* kernel, const char* const* names, int count)
    : kernel(kernel), names(names), count(count), next(list()) {
  list() = this;
}

const KernelVariants* KernelVariants::first() {
  return list();
}

const KernelVariants* KernelVariants::of(const char* kernel) {
  const KernelVariants* found = first();
  while (found != nullptr && std::strcmp(found->kernel, kernel) != 0) found = found->next;
  return found;
}

int KernelVariants::find(const char* variant) const {
  int i = count - 1;
  while (i >= 0 && std::strcmp(names[i], variant) != 0) --i;
  return i;
}

int KernelVariants::pick(int by_rule) const {
  // An invalid setting throws at every call: a static whose initialization throws stays uninitialized.
  [[maybe_unused]] static const bool read = (read_environment(), true);
  const int forced = forced_.load(std::memory_order_relaxed);
  const int variant = forced >= 0 ? forced : by_rule;
  last_.store(variant, std::memory_order_relaxed);
  times_.fetch_add(1, std::memory_order_relaxed);
  return variant;
}

}  // namespace afa
