#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/dispatch.h"
#include "cpu/host.h"
#include "cpu/nodes.h"

namespace rkfast {

namespace {

// Who would miss a call that goes past the dispatcher.
const c10::DispatchKeySet kWatched({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Batched,
                                    c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchBatched,
                                    c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                    c10::DispatchKey::Tracer});
// Memory that does not hold the values.
const c10::DispatchKeySet kLazy({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                 c10::DispatchKey::ZeroTensor});

// No tangent can be at work. Forward-mode AD has one level, number 0.
bool without_duals() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr; }

// Looks at the tensors of a call, x first.
class Surveyor {
 public:
  explicit Surveyor(const Tensor& x) : x_(x) {}

  bool usable(const Tensor& t) {
    if (t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t.is_nested() || t.layout() != at::kStrided) return false;
    grad_ |= grad_mode_ && t.requires_grad();
    inference_ |= t.is_inference();
    keys_ = keys_ | t.key_set();
    return t.device() == x_.device();
  }
  bool alike(const Tensor& t, at::IntArrayRef sizes) { return usable(t) && t.scalar_type() == x_.scalar_type() && t.sizes() == sizes; }
  // None, or a vector per channel.
  bool fits(const Optional& v, int64_t channels, bool gate = false) {
    if (!v) return true;
    const int64_t d = v->dim();
    return usable(*v) && at::isFloatingType(v->scalar_type()) && (d == 1 || (gate && d == 2)) && v->size(d - 1) == channels &&
        (d == 1 || v->size(0) == x_.size(0));
  }
  bool writable(const Optional& v) const { return !v || !((grad_mode_ && v->requires_grad()) || (v->stride(0) == 0 && v->numel() > 1)); }
  bool counts(const Optional& counter) {
    return !counter || (usable(*counter) && at::isIntegralType(counter->scalar_type(), false) && counter->numel() == 1);
  }

  // Weight, bias, running mean and variance, and counter of a BatchNorm.
  bool norm(const Optional* v, int64_t channels) {
    for (int k = 0; k < 4; ++k)
      if (!fits(v[k], channels) || (k > 1 && !writable(v[k]))) return false;
    return v[2].has_value() == v[3].has_value() && counts(v[4]);
  }

  int64_t found() const {
    if (keys_.has_any(kLazy) || (grad_ && inference_)) return 0;
    const bool plain = (x_.is_cpu() || x_.is_cuda()) && !keys_.has_any(kWatched) &&
        !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::hasCallbacks() && without_duals();
    const bool channels_last = !x_.is_contiguous() && x_.dim() > 2 && x_.stride(1) == 1 && x_.size(1) > 1;
    return kUniform | (channels_last ? kChannelsLast : 0) | (grad_ ? kNeedsGrad : 0) | (plain ? kPlain : 0);
  }

 private:
  const Tensor& x_;
  const bool grad_mode_ = c10::GradMode::is_enabled();
  bool grad_ = false;
  bool inference_ = false;  // what cannot be kept for a backward
  c10::DispatchKeySet keys_ = c10::impl::tls_local_dispatch_key_set().included_;
};

}  // namespace

int64_t survey(const std::vector<Optional>& tensors, const std::vector<Optional>& vectors,
               const std::vector<Optional>& gates, int64_t running, const Optional& counter) {
  if (tensors.empty() || !tensors[0] || tensors.size() > kMaxTerms) return 0;
  const Tensor& x = *tensors[0];
  if (x.is_nested() || x.dim() < 2 || x.dim() > 5 || !at::isFloatingType(x.scalar_type())) return 0;
  Surveyor s(x);
  if (!s.usable(x)) return 0;  // before its sizes are asked for, which would make symbolic ones constants
  for (const Optional& t : tensors)
    if (!t || !s.alike(*t, x.sizes())) return 0;
  const auto first_running = static_cast<int64_t>(vectors.size()) - running;
  for (int64_t i = 0; i < static_cast<int64_t>(vectors.size()); ++i)
    if (!s.fits(vectors[i], x.size(1)) || (i >= first_running && !s.writable(vectors[i]))) return 0;
  for (const Optional& v : gates)
    if (!s.fits(v, x.size(1), true)) return 0;
  return s.counts(counter) ? s.found() : 0;
}

int64_t survey_block(const Tensor& x, const Optional& shortcut, const std::vector<Tensor>& convs, const std::vector<Optional>& norms,
                     const Optional& step, const std::vector<int64_t>& strides) {
  if (x.is_nested() || x.dim() != 4 || !at::isFloatingType(x.scalar_type())) return 0;
  if (!(x.is_cpu() || x.is_cuda()) || at::autocast::is_autocast_enabled(x.device().type())) return 0;
  const size_t count = strides.size();
  if (count == 0 || norms.size() != 5 * convs.size() || convs.size() < count || convs.size() > count + 1) return 0;
  const bool projects = convs.size() > count;
  Surveyor s(x);
  if (!s.usable(x)) return 0;
  int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  for (size_t i = 0; i < convs.size(); ++i) {
    const Tensor& w = convs[i];
    if (w.dim() != 4 || !s.alike(w, w.sizes()) || w.size(2) != w.size(3) || w.size(2) % 2 == 0) return 0;
    if (i < count) {
      if (w.size(1) != channels || strides[i] < 1) return 0;
      channels = w.size(0);
      height = reduced(height, strides[i]);
      width = reduced(width, strides[i]);
      if (x.size(0) * height * width < 2) return 0;
    } else if (w.size(0) != channels || w.size(1) != x.size(1) || w.size(2) != 1) {
      return 0;
    }
    if (!s.norm(&norms[5 * i], w.size(0))) return 0;
  }
  if (shortcut && (projects || !s.alike(*shortcut, {x.size(0), channels, height, width}))) return 0;
  if (!shortcut && !projects && x.sizes() != at::IntArrayRef({x.size(0), channels, height, width})) return 0;
  return s.fits(step, channels) ? s.found() : 0;
}

int64_t survey_growths(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                       const std::vector<int64_t>& widths, const std::vector<Optional>& norms, const Optional& mean, const Optional& var) {
  const size_t count = conv1.size(), each = conv2.empty() ? 5 : 10;
  if (x.is_nested() || x.dim() != 4 || !at::isFloatingType(x.scalar_type()) || x.size(0) * x.size(2) * x.size(3) < 2) return 0;
  if (!(x.is_cpu() || x.is_cuda()) || at::autocast::is_autocast_enabled(x.device().type())) return 0;
  if (widths.size() != count || (!conv2.empty() && conv2.size() != count) || norms.size() != each * count) return 0;
  Surveyor s(x);
  if (!s.usable(x)) return 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& w = conv1[i];
    if (w.dim() != 4 || !s.alike(w, w.sizes()) || w.size(1) != widths[i] || !s.norm(&norms[each * i], widths[i])) return 0;
    if (conv2.empty()) continue;
    const Tensor& second = conv2[i];
    if (w.size(2) != 1 || second.dim() != 4 || !s.alike(second, second.sizes()) || second.size(1) != w.size(0)) return 0;
    if (!s.norm(&norms[each * i + 5], w.size(0))) return 0;
  }
  return s.fits(mean, x.size(1)) && s.fits(var, x.size(1)) ? s.found() : 0;
}

}  // namespace rkfast

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  m.doc() = "C++ kernels for CPU tensors; rkfast/_C.pyi types them.";
  m.def("survey", &rkfast::survey, arg("tensors"), arg("vectors"), arg("gates"),
        arg("running"), arg("counter"));
  m.def("survey_block", &rkfast::survey_block, arg("x"), arg("shortcut"), arg("convs"), arg("norms"), arg("step"),
        arg("strides"));
  m.def("survey_growths", &rkfast::survey_growths, arg("x"), arg("conv1"), arg("conv2"), arg("widths"), arg("norms"),
        arg("mean"), arg("var"));
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
  m.def("bn_relu_pool", &rkfast::bn_relu_pool, release(), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"),
        arg("channels_last"), arg("eps"));
  m.def("bn_relu_pool_backward", &rkfast::bn_relu_pool_backward, release(), arg("grad"), arg("x"), arg("weight"), arg("bias"),
        arg("mean"), arg("var"), arg("channels_last"), arg("batch_stats"), arg("eps"), arg("need_x"), arg("need_affine"));
  m.def("conv", &rkfast::conv, release(), arg("x"), arg("weight"), arg("bias"), arg("other"), arg("channels_last"),
        arg("relu"), arg("moments"));
  m.def("conv_backward",
        py::overload_cast<const at::Tensor&, const at::Tensor&, const at::Tensor&, const rkfast::Optional&, bool, bool, bool>(
            &rkfast::conv_backward),
        release(), arg("grad"), arg("x"), arg("weight"), arg("other"),
        arg("channels_last"), arg("need_x"), arg("need_weight"));
  m.def("residual_block", &rkfast::residual_block, release(), arg("x"), arg("shortcut"), arg("convs"), arg("norms"),
        arg("step"), arg("strides"), arg("eps"), arg("channels_last"), arg("keep"));
  m.def("residual_block_backward", &rkfast::residual_block_backward, release(), arg("grad"), arg("x"), arg("outs"),
        arg("mask"), arg("convs"), arg("norms"), arg("step"), arg("strides"), arg("eps"), arg("batch"), arg("channels_last"),
        arg("own"), arg("need_x"), arg("need_shortcut"), arg("need_convs"), arg("need_step"));
  rkfast::define_dispatch(m);
  rkfast::define_nodes(m);
}
