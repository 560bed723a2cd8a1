// Nodes of autograd for calls of plain tensors: what torch.autograd.Function does for all others, without Python's part of it.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "cpu/host.h"

namespace rkfast {

// OP_call is a whole call, from the arguments of the op's public function; OP_recorded one that Python has looked at. Both
// compute and make the node of the result.
void define_nodes(py::module_& m);

}  // namespace rkfast
