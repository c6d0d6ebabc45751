// The only place operators are registered: schemas, and for each dispatch key the functions that serve them.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "operators.h"

#define AFA_DEFINE(name, schema) m.def(#name schema);
#define AFA_ON_CPU(name, schema) m.impl(#name, TORCH_BOX(&afa::name##_cpu));
#define AFA_ON_CUDA(name, schema) m.impl(#name, TORCH_BOX(&afa::name##_cuda));

// clang-format off
#ifdef AFA_CUDA_ON_HOST_LIBRARY
// The CUDA kernels, compiled for the CPU by the tests, under a name of their own.
STABLE_TORCH_LIBRARY(afa_ext_cuda_on_host, m) { AFA_OPERATORS(AFA_DEFINE) }
STABLE_TORCH_LIBRARY_IMPL(afa_ext_cuda_on_host, CPU, m) { AFA_OPERATORS(AFA_ON_CUDA) }
#else
STABLE_TORCH_LIBRARY(afa_ext, m) { AFA_OPERATORS(AFA_DEFINE) }
#ifdef AFA_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(afa_ext, CPU, m) { AFA_OPERATORS(AFA_ON_CUDA) }
#else
STABLE_TORCH_LIBRARY_IMPL(afa_ext, CPU, m) { AFA_OPERATORS(AFA_ON_CPU) }
#endif
STABLE_TORCH_LIBRARY_IMPL(afa_ext, CUDA, m) { AFA_OPERATORS(AFA_ON_CUDA) }
#endif
// clang-format on
