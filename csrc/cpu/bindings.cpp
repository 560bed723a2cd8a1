#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/host.h"

namespace rkfast {

namespace {

// Who would miss a call that goes past the dispatcher.
const c10::DispatchKeySet kWatched({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                                    c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchBatched,
                                    c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                    c10::DispatchKey::Tracer});
// Memory that does not hold the values.
const c10::DispatchKeySet kLazy({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                 c10::DispatchKey::ZeroTensor});

// No tangent can be at work. Forward-mode AD has one level, number 0.
bool without_duals() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr; }

}  // namespace

int64_t survey(const std::vector<Optional>& tensors, const std::vector<Optional>& vectors,
               const std::vector<Optional>& gates, int64_t running, const Optional& counter) {
  if (tensors.empty() || !tensors[0] || tensors.size() > kMaxTerms) return 0;
  const Tensor& first = *tensors[0];
  if (first.dim() < 2 || first.dim() > 5 || !at::isFloatingType(first.scalar_type())) return 0;
  const bool grad_mode = c10::GradMode::is_enabled();
  bool grad = false;
  c10::DispatchKeySet keys = c10::impl::tls_local_dispatch_key_set().included_;
  auto usable = [&](const Tensor& t) {
    if (t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t.layout() != at::kStrided) return false;
    grad |= grad_mode && t.requires_grad();
    keys = keys | t.key_set();
    return t.device() == first.device();
  };
  for (const Optional& t : tensors)
    if (!t || !usable(*t) || t->scalar_type() != first.scalar_type() || t->sizes() != first.sizes()) return 0;
  auto fits = [&](const Optional& v, bool gate) {
    if (!v) return true;
    const int64_t d = v->dim();
    return usable(*v) && at::isFloatingType(v->scalar_type()) && (d == 1 || (gate && d == 2)) &&
        v->size(d - 1) == first.size(1) && (d == 1 || v->size(0) == first.size(0));
  };
  const auto first_running = static_cast<int64_t>(vectors.size()) - running;
  for (int64_t i = 0; i < static_cast<int64_t>(vectors.size()); ++i) {
    const Optional& v = vectors[i];
    if (!fits(v, false)) return 0;
    if (v && i >= first_running && ((grad_mode && v->requires_grad()) || (v->stride(0) == 0 && v->numel() > 1))) return 0;
  }
  for (const Optional& v : gates)
    if (!fits(v, true)) return 0;
  if (counter && (!usable(*counter) || !at::isIntegralType(counter->scalar_type(), false) || counter->numel() != 1))
    return 0;
  if (keys.has_any(kLazy)) return 0;
  const bool plain = (first.is_cpu() || first.is_cuda()) && !keys.has_any(kWatched) &&
      !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::hasCallbacks() && without_duals();
  const bool channels_last = !first.is_contiguous() &&
      ((first.dim() == 4 && first.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
       (first.dim() > 2 && first.stride(1) == 1 && first.size(1) > 1));
  return kUniform | (channels_last ? kChannelsLast : 0) | (grad ? kNeedsGrad : 0) | (plain ? kPlain : 0);
}

}  // namespace rkfast

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  m.doc() = "C++ kernels for CPU tensors; rkfast/_C.pyi types them.";
  m.def("survey", &rkfast::survey, arg("tensors"), arg("vectors"), arg("gates"),
        arg("running"), arg("counter"));
  m.def("rk_sum", &rkfast::rk_sum, release(), arg("terms"), arg("coeffs"), arg("steps"), arg("shift"),
        arg("channels_last"), arg("relu"), arg("moments"), arg("mask"), arg("out") = py::none());
  m.def("rk_sum_backward", &rkfast::rk_sum_backward, release(), arg("grad"), arg("mask"), arg("coeffs"), arg("steps"),
        arg("step_terms"), arg("step_coeffs"), arg("per_sample"), arg("shift"), arg("channels_last"));
  m.def("bn_rk_sum", &rkfast::bn_rk_sum, release(), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"),
        arg("terms"), arg("coeffs"), arg("step"), arg("channels_last"), arg("relu"), arg("eps"), arg("moments"),
        arg("mask"), arg("out") = py::none());
  m.def("bn_rk_sum_backward", &rkfast::bn_rk_sum_backward, release(), arg("grad"), arg("x"), arg("weight"), arg("bias"),
        arg("mean"), arg("var"), arg("step"), arg("mask"), arg("coeffs"), arg("channels_last"), arg("relu"),
        arg("batch_stats"), arg("eps"), arg("need_x"), arg("need_affine"), arg("need_step"));
  m.def("channel_moments", &rkfast::channel_moments, release(), arg("x"), arg("channels_last"));
  m.def("update_running_stats", &rkfast::update_running_stats, release(), arg("mean"), arg("var"), arg("count"),
        arg("running_mean"), arg("running_var"), arg("num_batches_tracked"), arg("momentum"));
  m.def("dense_block", &rkfast::dense_block, release(), arg("x"), arg("conv1"), arg("conv2"), arg("norms"),
        arg("keeps"), arg("keep_scale"), arg("reads"), arg("writes"), arg("eps"), arg("channels"), arg("summed"),
        arg("mean"), arg("var"), arg("keep"), arg("total_moments"));
  m.def("dense_block_backward", &rkfast::dense_block_backward, release(), arg("grad"), arg("buffer"), arg("mean"),
        arg("var"), arg("mid_moments"), arg("mids"), arg("conv1"), arg("conv2"), arg("norms"), arg("keeps"),
        arg("keep_scale"), arg("reads"), arg("writes"), arg("eps"), arg("inputs"), arg("summed"));
  m.def("bn_relu_conv", &rkfast::bn_relu_conv, release(), arg("x"), arg("conv"), arg("weight"), arg("bias"), arg("mean"),
        arg("var"), arg("channels_last"), arg("eps"), arg("moments"));
  m.def("bn_relu_conv_backward",
        py::overload_cast<const at::Tensor&, const at::Tensor&, const at::Tensor&, const rkfast::Optional&, const rkfast::Optional&,
                          const at::Tensor&, const at::Tensor&, bool, bool, double, bool, bool, bool>(&rkfast::bn_relu_conv_backward),
        release(), arg("grad"), arg("x"), arg("conv"),
        arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("channels_last"), arg("batch_stats"), arg("eps"),
        arg("need_x"), arg("need_conv"), arg("need_affine"));
  m.def("conv", &rkfast::conv, release(), arg("x"), arg("weight"), arg("bias"), arg("other"), arg("channels_last"),
        arg("relu"), arg("moments"));
  m.def("conv_backward", &rkfast::conv_backward, release(), arg("grad"), arg("x"), arg("weight"), arg("other"),
        arg("channels_last"), arg("need_x"), arg("need_weight"));
  m.def("residual_block", &rkfast::residual_block, release(), arg("x"), arg("shortcut"), arg("convs"), arg("norms"),
        arg("step"), arg("eps"), arg("channels_last"), arg("keep"));
  m.def("residual_block_backward", &rkfast::residual_block_backward, release(), arg("grad"), arg("x"), arg("outs"),
        arg("mask"), arg("convs"), arg("norms"), arg("step"), arg("eps"), arg("batch"), arg("channels_last"), arg("own"),
        arg("need_x"), arg("need_shortcut"), arg("need_convs"), arg("need_step"));
}
