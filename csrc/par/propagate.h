// PAR's iterations on CUDA tensors: called by par.cpp and labels.cpp after their arguments are checked.
#pragma once

#include "stencil/propagate.h"

namespace afa {

// stencil_propagate_cuda for the ring of these neighbors: with the kernel for PAR's default dilations if they
// match, otherwise with the general kernel.
Tensor par_iterations_cuda(const char* op, const Stencil& ring, const Tensor& weights, const Tensor& masks,
                           int64_t num_iter, const std::optional<Tensor>& class_mask,
                           const std::optional<Tensor>& extent = std::nullopt, bool zero_masked = true);

}  // namespace afa
