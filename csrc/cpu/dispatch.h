// rkfast/dispatch.py for calls that C++ serves without it: whether it may, and what it served.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <mutex>
#include <vector>

#include "cpu/host.h"

namespace rkfast {

// One of rkfast.dispatch.OPS.
class Op {
 public:
  explicit Op(const char* name);
  Op(const Op&) = delete;

  // Whether the C++ kernel may serve a call that this tensor leads.
  bool may(const Tensor& lead) const;
  // It did.
  void note(const Tensor& lead);

 private:
  friend void define_dispatch(py::module_& m);

  std::mutex mutex_;
  int64_t served_ = 0;
  bool is_last_ = false;  // whether what follows is of the op's last call
  bool explicit_ = false;
  std::vector<int64_t> sizes_;
  at::ScalarType dtype_ = at::kFloat;
};

// What dispatch asks and says:
//   allow(serves, explicit): whether a CPU tensor goes to the C++ kernels, and whether they were asked for by name;
//   served(): calls by op; last(op): sizes, dtype and whether asked for by name, or None; forget(op): another was the last.
void define_dispatch(py::module_& m);

}  // namespace rkfast
