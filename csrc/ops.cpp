// Registers all operators: schemas, and the functions for each dispatch key.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "operators.h"

#define AFA_DEFINE(name, schema) m.def(#name schema);
#define AFA_ON_CPU(name, schema) m.impl(#name, TORCH_BOX(&afa::name##_cpu));
#define AFA_ON_CUDA(name, schema) m.impl(#name, TORCH_BOX(&afa::name##_cuda));

// clang-format off
STABLE_TORCH_LIBRARY(afa_ext, m) { AFA_OPERATORS(AFA_DEFINE) }
STABLE_TORCH_LIBRARY_IMPL(afa_ext, CPU, m) { AFA_OPERATORS(AFA_ON_CPU) }
STABLE_TORCH_LIBRARY_IMPL(afa_ext, CUDA, m) { AFA_OPERATORS(AFA_ON_CUDA) }
// clang-format on
