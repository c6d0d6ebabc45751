#include "common/plan.h"

#include <atomic>
#include <mutex>

#include "common/device.h"

namespace afa {
namespace {

constexpr int kMaxArchitectures = 32;
constexpr int8_t kUnset = -1;

struct Table {
  std::atomic<int8_t> variant[kKinds][kSizeClasses];

  Table() { clear(); }
  void clear() {
    for (auto& kind : variant) {
      for (auto& entry : kind) entry.store(kUnset, std::memory_order_relaxed);
    }
  }
};

const TunedKernel* last_declared = nullptr;
std::mutex writing;

}  // namespace

// A reader takes no lock: while another thread sets or resets plans, it finds the old one, the new one or
// none.
struct PlanTables {
  Table any;
  Table table[kMaxArchitectures];
  std::atomic<int> architecture[kMaxArchitectures] = {};  // written before `count` says that it is there
  std::atomic<int> count{0};
  std::atomic<int64_t> chosen{0}, items{0};
};

TunedKernel::TunedKernel(const char* name, const char* const* variants, int count, Rule rule)
    : name(name), variants(variants), count(count), rule(rule), tables(new PlanTables), next(last_declared) {
  last_declared = this;
}

const TunedKernel* first_tuned_kernel() {
  return last_declared;
}

int size_class(int64_t items) {
  int i = 0;
  while (i + 1 < kSizeClasses && items > kSizeClassLimits[i]) ++i;
  return i;
}

const char* kind_name(Kind kind) {
  constexpr const char* names[kKinds] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(kind)];
}

int plan_for(const TunedKernel& kernel, Kind kind, int64_t items, int architecture, bool* is_default) {
  const PlanTables& tables = *kernel.tables;
  const int k = static_cast<int>(kind), size = size_class(items);
  int variant = tables.any.variant[k][size].load(std::memory_order_relaxed);
  const int count = variant < 0 ? tables.count.load(std::memory_order_acquire) : 0;
  for (int i = 0, nearest = -1; i < count; ++i) {
    const int given = tables.table[i].variant[k][size].load(std::memory_order_relaxed);
    const int of = tables.architecture[i].load(std::memory_order_relaxed);
    if (given >= 0 && of <= architecture && of > nearest) {
      variant = given;
      nearest = of;
    }
  }
  if (is_default != nullptr) *is_default = variant < 0;
  return variant < 0 ? kernel.rule(kind, items) : variant;
}

int choose(const TunedKernel& kernel, Kind kind, int64_t items) {
  kernel.tables->chosen.fetch_add(1, std::memory_order_relaxed);
  kernel.tables->items.store(items, std::memory_order_relaxed);
  return plan_for(kernel, kind, items, current_architecture(), nullptr);
}

int64_t times_chosen(const TunedKernel& kernel) {
  return kernel.tables->chosen.load(std::memory_order_relaxed);
}

int64_t last_items(const TunedKernel& kernel) {
  return kernel.tables->items.load(std::memory_order_relaxed);
}

bool set_plan(const TunedKernel& kernel, int kind, int size_class, int architecture, int variant) {
  const std::lock_guard<std::mutex> lock(writing);
  PlanTables& tables = *kernel.tables;
  Table* table = &tables.any;
  if (architecture != kAny) {
    const int count = tables.count.load(std::memory_order_relaxed);
    int i = 0;
    while (i < count && tables.architecture[i].load(std::memory_order_relaxed) != architecture) ++i;
    if (i == kMaxArchitectures) return false;
    if (i == count) {
      tables.architecture[i].store(architecture, std::memory_order_relaxed);
      tables.count.store(count + 1, std::memory_order_release);
    }
    table = &tables.table[i];
  }
  for (int k = 0; k < kKinds; ++k) {
    for (int size = 0; size < kSizeClasses; ++size) {
      if ((kind == kAny || kind == k) && (size_class == kAny || size_class == size)) {
        table->variant[k][size].store(static_cast<int8_t>(variant), std::memory_order_relaxed);
      }
    }
  }
  return true;
}

void reset_plans() {
  const std::lock_guard<std::mutex> lock(writing);
  for (const TunedKernel* kernel = last_declared; kernel != nullptr; kernel = kernel->next) {
    kernel->tables->any.clear();
    kernel->tables->count.store(0, std::memory_order_release);
    for (Table& table : kernel->tables->table) table.clear();
  }
}

}  // namespace afa
