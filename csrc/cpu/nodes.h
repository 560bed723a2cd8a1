// Nodes of autograd for calls of plain tensors: what torch.autograd.Function does for all others, without Python's part of it.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "cpu/host.h"

namespace rkfast {

// OP_recorded computes an op and makes the node of its result.
void define_nodes(py::module_& m);

}  // namespace rkfast
