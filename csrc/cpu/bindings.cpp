#include <torch/csrc/utils/pybind.h>

#include "cpu/host.h"

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "C++ kernels for CPU tensors; rkfast/_C.pyi types them.";
  m.def("rk_sum", &rkfast::rk_sum, release());
  m.def("rk_sum_backward", &rkfast::rk_sum_backward, release());
  m.def("bn_rk_sum", &rkfast::bn_rk_sum, release());
  m.def("bn_rk_sum_backward", &rkfast::bn_rk_sum_backward, release());
  m.def("channel_moments", &rkfast::channel_moments, release());
  m.def("update_running_stats", &rkfast::update_running_stats, release());
}
