// From tensors to kernels: checks, allocation, dtypes, device and stream. The functions take and return what their
// namesakes in rkfast/ops/*/reference.py do.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/layout.h"
#include "cuda/kernels.h"

namespace rkfast::cuda {
namespace host {  // the kernels' namesakes, of tensors
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::kFloat;
    case at::kDouble: return Dtype::kDouble;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    default: TORCH_CHECK_TYPE(false, "rkfast: no CUDA kernel for dtype ", x.scalar_type());
  }
}

// One call on tensors like x: below autograd and autocast, on x's device and stream; keeps what the kernels read alive.
class Call {
 public:
  Call(const Tensor& x, bool channels_last)
      : x_(x),
        channels_last_(channels_last),
        rows_(x, channels_last),
        device_(x.device()),
        wide_(moments_dtype(x.scalar_type())) {}

  const Rows& rows() const { return rows_; }
  bool is_empty() const { return rows_.numel() == 0; }
  Dtype dtype() const { return dtype_of(x_); }
  Shape shape() const { return {rows_.samples, rows_.channels, rows_.positions, rows_.channels_last}; }

  Operand input(const Tensor& t, const char* name) {
    check_like(t, name);
    Pitch pitch;
    kept_.push_back(conform(t, rows_, pitch));
    return {const_cast<void*>(kept_.back().const_data_ptr()), pitch.outer, pitch.inner};
  }

  Operand output(const Tensor& t) const {
    check_like(t, "out");
    Pitch pitch;
    TORCH_CHECK_VALUE(find_pitch(t, rows_, pitch), "out: strides ", t.strides(),
                      " are neither dense nor a channel slice");
    return {t.data_ptr(), pitch.outer, pitch.inner};
  }

  Tensor empty_like() const { return empty_rows(x_, channels_last_); }
  Tensor empty_mask() const { return rkfast::empty_mask(x_, rows_); }

  // [C] or [N, C] of what is computed in; zero where nothing will be launched.
  Tensor vector(bool per_sample = false) const {
    const auto options = x_.options().dtype(wide_);
    const std::vector<int64_t> size =
        per_sample ? std::vector<int64_t>{rows_.samples, rows_.channels} : std::vector<int64_t>{rows_.channels};
    return is_empty() ? at::zeros(size, options) : at::empty(size, options);
  }

  Vector factor(const Optional& v, const char* name) {
    if (!v) return {};
    check_device(*v, name);
    const bool per_sample = v->dim() == 2;
    TORCH_CHECK_VALUE(v->numel() == (per_sample ? rows_.samples : 1) * rows_.channels, name, ": shape ", v->sizes(),
                      " does not fit; expected one value per channel");
    kept_.push_back(v->to(wide_).contiguous());
    return {kept_.back().const_data_ptr(), per_sample};
  }

  const uint8_t* mask(const Optional& mask) {
    if (!mask) return nullptr;
    check_device(*mask, "mask");
    TORCH_CHECK_VALUE(
        mask->scalar_type() == at::kByte && mask->numel() == rows_.outer() * rows_.inner() * mask_bytes(rows_),
        "mask: expected uint8 [rows, ceil(length / 8)]");
    kept_.push_back(mask->contiguous());
    return kept_.back().const_data_ptr<uint8_t>();
  }

  Queue queue() {
    return {c10::cuda::getCurrentCUDAStream(x_.device().index()).stream(), [this](size_t bytes) {
              kept_.push_back(at::empty({int64_t(bytes)},
                                        x_.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous)));
              return kept_.back().data_ptr();
            }};
  }

 private:
  void check_like(const Tensor& t, const char* name) const {
    TORCH_CHECK_VALUE(t.sizes() == x_.sizes(), name, ": shape ", t.sizes(), " differs from ", x_.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == x_.scalar_type(), name, ": dtype ", t.scalar_type(), " differs from ",
                     x_.scalar_type());
    check_device(t, name);
  }
  void check_device(const Tensor& t, const char* name) const {
    TORCH_CHECK_VALUE(t.device() == x_.device(), name, ": device ", t.device(), " differs from ", x_.device());
  }

  const Tensor& x_;
  bool channels_last_;  // as the results lie
  Rows rows_;
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  c10::cuda::CUDAGuard device_;
  at::ScalarType wide_;
  Tensors kept_;
};

// Nothing is per channel: rows that follow one another are one, and so are the samples of dense tensors.
Shape flatten(Shape s, bool masked, const std::vector<Operand*>& operands) {
  const int64_t length = s.channels_last ? s.channels : s.positions, inner = s.channels_last ? s.positions : s.channels;
  if (masked && length % 8 != 0) return s;
  bool rows = true, samples = true;
  for (const Operand* x : operands) {
    rows = rows && x->inner == length;
    samples = samples && x->outer == inner * length;
  }
  if (!rows) return s;
  for (Operand* x : operands) {
    x->inner = 0;
    if (samples) x->outer = 0;
  }
  if (samples) return {1, 1, s.samples * inner * length, false};
  return {s.samples, 1, inner * length, false};
}

void check_terms(size_t terms, size_t coeffs, size_t least) {
  TORCH_CHECK_VALUE(terms >= least && terms <= size_t(kMaxTerms), "terms: expected ", least, " to ", kMaxTerms,
                    ", got ", terms);
  TORCH_CHECK_VALUE(terms == coeffs, "coeffs: ", coeffs, " for ", terms, " terms");
}

Moments moments_of(const Tensor& mean, const Tensor& var) { return {mean.data_ptr(), var.data_ptr()}; }

Tensors rk_sum(const Tensors& terms, const std::vector<double>& coeffs, const std::vector<Optional>& steps,
               const Optional& shift, bool channels_last, bool relu, bool moments, bool mask, const Optional& out) {
  check_terms(terms.size(), coeffs.size(), 1);
  TORCH_CHECK_VALUE(steps.size() == terms.size(), "steps: ", steps.size(), " for ", terms.size(), " terms");
  Call call(terms[0], channels_last);
  Tensors result = {out ? *out : call.empty_like()};
  WeightedSum sum;
  sum.relu = relu;
  if (mask) {
    result.push_back(call.empty_mask());
    sum.mask = result.back().data_ptr<uint8_t>();
  }
  Moments wanted;
  if (moments) {
    const Tensor mean = call.vector(), var = call.vector();
    result.insert(result.end(), {mean, var});
    wanted = moments_of(mean, var);
  }
  if (call.is_empty()) return result;
  bool plain = !shift && !moments;
  sum.terms = int(terms.size());
  sum.out = call.output(result[0]);
  std::vector<Operand*> operands = {&sum.out};
  for (int j = 0; j < sum.terms; ++j) {
    sum.term[j] = call.input(terms[j], "terms");
    sum.coeff[j] = coeffs[j];
    sum.step[j] = call.factor(steps[j], "steps");
    plain = plain && !steps[j];
    operands.push_back(&sum.term[j]);
  }
  sum.shift = call.factor(shift, "shift");
  const Shape shape = plain ? flatten(call.shape(), mask, operands) : call.shape();
  cuda::rk_sum(call.dtype(), shape, sum, wanted, call.queue());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensors rk_sum_backward(const Tensor& grad, const Optional& mask, const std::vector<double>& coeffs,
                        const std::vector<Optional>& steps, const Tensors& step_terms,
                        const std::vector<double>& step_coeffs, const std::vector<bool>& per_sample, bool shift,
                        bool channels_last) {
  check_terms(coeffs.size(), steps.size(), 0);
  check_terms(step_terms.size(), step_coeffs.size(), 0);
  TORCH_CHECK_VALUE(per_sample.size() == step_terms.size(), "per_sample: expected one entry per step term");
  Call call(grad, channels_last);
  Tensors result;
  for (size_t i = 0; i < coeffs.size(); ++i)
    result.push_back(call.empty_like());
  for (bool each : per_sample)
    result.push_back(call.vector(each));
  if (shift) result.push_back(call.vector());
  if (call.is_empty() || result.empty()) return result;
  WeightedSumBackward args;
  args.grad = call.input(grad, "grad");
  args.mask = call.mask(mask);
  args.grads = int(coeffs.size());
  std::vector<Operand*> operands = {&args.grad};
  bool plain = step_terms.empty() && !shift;
  for (int i = 0; i < args.grads; ++i) {
    args.out[i] = call.output(result[i]);
    args.coeff[i] = coeffs[i];
    args.step[i] = call.factor(steps[i], "steps");
    plain = plain && !steps[i];
    operands.push_back(&args.out[i]);
  }
  for (size_t j = 0; j < step_terms.size(); ++j)
    args.sum[args.sums++] = {call.input(step_terms[j], "step_terms"), step_coeffs[j], per_sample[j],
                             result[coeffs.size() + j].data_ptr()};
  if (shift) args.sum[args.sums++].out = result.back().data_ptr();
  const Shape shape = plain ? flatten(call.shape(), mask.has_value(), operands) : call.shape();
  cuda::rk_sum_backward(call.dtype(), shape, args, call.queue());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Norm norm_of(Call& call, const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean,
             const Tensor& var, const Optional& step, double eps) {
  return {call.input(x, "x"),
          call.factor(mean, "mean"),
          call.factor(var, "var"),
          call.factor(weight, "weight"),
          call.factor(bias, "bias"),
          call.factor(step, "step"),
          eps};
}

Tensors bn_rk_sum(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                  const Optional& var, const Tensors& terms, const std::vector<double>& coeffs, const Optional& step,
                  bool channels_last, bool relu, double eps, bool moments, bool mask, const Optional& out) {
  check_terms(terms.size(), coeffs.size(), 0);
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "mean, var: give both or neither");
  Call call(x, channels_last);
  Tensors result = {out ? *out : call.empty_like()};
  WeightedSum sum;
  sum.relu = relu;
  if (mask) {
    result.push_back(call.empty_mask());
    sum.mask = result.back().data_ptr<uint8_t>();
  }
  const Tensor own_mean = mean ? *mean : call.vector(), own_var = var ? *var : call.vector();
  if (!mean) result.insert(result.end(), {own_mean, own_var});
  Moments wanted;
  if (moments) {
    const Tensor out_mean = call.vector(), out_var = call.vector();
    result.insert(result.end(), {out_mean, out_var});
    wanted = moments_of(out_mean, out_var);
  }
  if (call.is_empty()) return result;
  sum.norm = norm_of(call, x, weight, bias, own_mean, own_var, step, eps);
  sum.terms = int(terms.size());
  for (int j = 0; j < sum.terms; ++j) {
    sum.term[j] = call.input(terms[j], "terms");
    sum.coeff[j] = coeffs[j];
  }
  sum.out = call.output(result[0]);
  const Queue queue = call.queue();
  if (!mean) cuda::channel_moments(call.dtype(), call.shape(), sum.norm.x, moments_of(own_mean, own_var), queue);
  cuda::bn_rk_sum(call.dtype(), call.shape(), sum, wanted, queue);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensors bn_rk_sum_backward(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& bias,
                           const Tensor& mean, const Tensor& var, const Optional& step, const Optional& mask,
                           const std::vector<double>& coeffs, bool channels_last, bool relu, bool batch_stats,
                           double eps, bool need_x, bool need_affine, bool need_step) {
  check_terms(coeffs.size(), coeffs.size(), 0);
  Call call(x, channels_last);
  NormBackward args;
  Tensors result, outputs;
  const auto vector = [&](bool per_sample) {
    result.push_back(call.vector(per_sample));
    return result.back().data_ptr();
  };
  const auto output = [&] {
    result.push_back(call.empty_like());
    return call.output(result.back());
  };
  if (need_x) args.dx = output();
  if (need_affine) {
    args.dweight = vector(false);
    args.dbias = vector(false);
  }
  if (need_step) args.dstep = vector(step && step->dim() == 2);
  for (double c : coeffs) {
    args.coeff[args.grads] = c;
    args.out[args.grads++] = output();
  }
  if (call.is_empty() || result.empty()) return result;
  args.grad = call.input(grad, "grad");
  args.mask = call.mask(mask);
  args.norm = norm_of(call, x, weight, bias, mean, var, step, eps);
  args.relu = relu;
  args.batch_stats = batch_stats;
  cuda::bn_rk_sum_backward(call.dtype(), call.shape(), args, call.queue());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

std::pair<Tensor, Tensor> channel_moments(const Tensor& x, bool channels_last) {
  Call call(x, channels_last);
  const Tensor mean = call.vector(), var = call.vector();
  if (!call.is_empty()) {
    cuda::channel_moments(call.dtype(), call.shape(), call.input(x, "x"), moments_of(mean, var), call.queue());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {mean, var};
}

void update_running_stats(const Tensor& mean, const Tensor& var, int64_t count, const Tensors& running_mean,
                          const Tensors& running_var, const Tensors& num_batches_tracked,
                          std::optional<double> momentum) {
  const size_t size = running_mean.size(), counters = num_batches_tracked.size();
  TORCH_CHECK_VALUE(running_var.size() == size, "running_var: expected ", size, " tensors, got ", running_var.size());
  TORCH_CHECK_VALUE(momentum || counters >= size, "num_batches_tracked: momentum=None needs a counter for each");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::cuda::CUDAGuard device(mean.device());
  const auto wide = moments_dtype(mean.scalar_type());
  const Tensor batch_mean = mean.to(wide).contiguous(), batch_var = var.to(wide).contiguous();
  RunningStatsUpdate update;
  update.mean = batch_mean.const_data_ptr();
  update.var = batch_var.const_data_ptr();
  update.is_double = wide == at::kDouble;
  update.unbias = double(count) / double(std::max<int64_t>(count - 1, 1));
  update.momentum = momentum.value_or(-1);
  const Queue queue = {c10::cuda::getCurrentCUDAStream(mean.device().index()).stream(), nullptr};
  for (size_t i = 0; i < std::max(size, counters); ++i) {
    RunningStats& stats = update.stats[update.size++];
    stats = {};
    if (i < counters) {
      const Tensor& counter = num_batches_tracked[i];
      TORCH_CHECK_TYPE(counter.scalar_type() == at::kLong, "num_batches_tracked: expected int64, got ",
                       counter.scalar_type());
      TORCH_CHECK_VALUE(counter.device() == mean.device(), "num_batches_tracked: device ", counter.device(),
                        " differs from ", mean.device());
      stats.batches = counter.data_ptr<int64_t>();
    }
    if (i < size && count > 0) {
      const Tensor &m = running_mean[i], &v = running_var[i];
      TORCH_CHECK_VALUE(m.dim() == 1 && m.sizes() == v.sizes() && m.numel() <= batch_mean.numel(),
                        "running_mean: shape ", m.sizes(), " does not fit ", batch_mean.sizes());
      TORCH_CHECK_VALUE(m.device() == mean.device() && v.device() == mean.device(), "running_mean: not on ",
                        mean.device());
      TORCH_CHECK_TYPE(m.scalar_type() == v.scalar_type(), "running_var: dtype ", v.scalar_type(), " differs from ",
                       m.scalar_type());
      stats.mean = m.data_ptr();
      stats.var = v.data_ptr();
      stats.channels = m.numel();
      stats.mean_stride = m.stride(0);
      stats.var_stride = v.stride(0);
      stats.dtype = dtype_of(m);
    }
    if (update.size == kRunningStats || i + 1 == std::max(size, counters)) {
      cuda::update_running_stats(update, queue);
      update.size = 0;
    }
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace host
}  // namespace rkfast::cuda

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  namespace host = rkfast::cuda::host;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("rk_sum", &host::rk_sum, py::arg("terms"), py::arg("coeffs"), py::arg("steps"), py::arg("shift"),
        py::arg("channels_last"), py::arg("relu"), py::arg("moments"), py::arg("mask"), py::arg("out") = py::none(),
        unlocked);
  m.def("rk_sum_backward", &host::rk_sum_backward, unlocked);
  m.def("bn_rk_sum", &host::bn_rk_sum, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("mean"),
        py::arg("var"), py::arg("terms"), py::arg("coeffs"), py::arg("step"), py::arg("channels_last"), py::arg("relu"),
        py::arg("eps"), py::arg("moments"), py::arg("mask"), py::arg("out") = py::none(), unlocked);
  m.def("bn_rk_sum_backward", &host::bn_rk_sum_backward, unlocked);
  m.def("channel_moments", &host::channel_moments, unlocked);
  m.def("update_running_stats", &host::update_running_stats, unlocked);
}
