#include "cpu/nodes.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "cpu/dispatch.h"

namespace rkfast {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Needed = std::vector<bool>;
// Running statistics: what update_running_stats takes behind the moments.
using Moved = std::tuple<int64_t, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::optional<double>>;

Tensor tensor(const Optional& t) { return t ? *t : Tensor(); }
Optional optional(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
// The gradient of v, in its dtype.
Tensor like(const Tensor& d, const Tensor& v) { return d.to(v.scalar_type()); }

// As errors of Python's own nodes pass through the engine.
[[noreturn]] void raise(py::error_already_set& error) {
  error.restore();
  python_error kept;
  kept.persist();
  throw std::move(kept);
}

// Names as in rkfast.dispatch. Never destroyed: at exit a thread may still be in a backward.
Op &rk_sum_op = *new Op("rk_sum"), &rk_sum_backward_op = *new Op("rk_sum_backward");
Op &bn_rk_sum_op = *new Op("bn_rk_sum"), &bn_rk_sum_backward_op = *new Op("bn_rk_sum_backward");
Op &update_op = *new Op("update_running_stats"), &residual_block_backward_op = *new Op("residual_block_backward");

// What Python's node of the op would know of the call.
template <typename... Args>
py::object python_call(const char* op, const Args&... args) {
  return py::module_::import((std::string("rkfast.ops.") + op).c_str()).attr("_Call")(args...);
}

class Node : public torch::autograd::Node {
 public:
  Node(const variable_list& inputs, const variable_list& kept)
      : torch::autograd::Node(torch::autograd::collect_next_edges(inputs)) {
    kept_.reserve(kept.size());
    for (const Tensor& t : kept) kept_.emplace_back(t, false);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& kept : kept_) kept.reset_data();
  }

  // Compiled autograd: what tells this node's computation from others', and a run of it on tensors that are traced.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(kept_, /*is_output=*/false);
    py::gil_scoped_acquire gil;
    args.collect(py::repr(call()).cast<std::string>());
  }
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(kept_);
    variable_list result = apply(variable_list(grads));
    saved.after(kept_);
    return result;
  }

 protected:
  // The op of the backward, and of the call what call().gradients(grad, kept, needed) reads: those that PyTorch or another
  // backend computes.
  virtual Op& op() const = 0;
  virtual py::object call() const = 0;
  // Of the inputs, where nobody watches.
  virtual variable_list gradients(const Tensor& grad, const variable_list& kept, const Needed& needed) const = 0;
  // Whether they are more than the incoming gradient itself.
  virtual bool computes(const variable_list& kept, const Needed& needed) const { return true; }

 private:
  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return variable_list(num_outputs());
    variable_list kept;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const SavedVariable& each : kept_) kept.push_back(each.unpack());
      for (Tensor& t : kept)  // of a hook
        if (t.defined()) t = resolved(t);
    }
    Needed needed(num_outputs());
    for (size_t i = 0; i < needed.size(); ++i) needed[i] = task_should_compute_output(i);
    const bool plain = !c10::GradMode::is_enabled() && (survey({grad}, {}, {}, 0, {}) & kPlain);
    const bool counts = computes(kept, needed);
    if (!plain || (counts && !op().may(grad))) return asked(grad, kept, needed);
    variable_list result = gradients(grad, kept, needed);
    if (counts) op().note(grad);
    return result;
  }

  variable_list asked(const Tensor& grad, const variable_list& kept, const Needed& needed) const {
    py::gil_scoped_acquire gil;
    try {
      std::vector<Optional> given(kept.size());
      std::transform(kept.begin(), kept.end(), given.begin(), optional);
      variable_list result;
      for (const Optional& d : call().attr("gradients")(grad, given, needed).cast<std::vector<Optional>>())
        result.push_back(tensor(d));
      return result;
    } catch (py::error_already_set& error) {
      raise(error);
    }
  }

  std::vector<SavedVariable> kept_;
};

using Pointer = decltype(torch::autograd::Edge::function);  // shared before torch 2.13, intrusive since

template <typename Of, typename... Args>
void attach(const Tensor& out, Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // Torch's deleter does not recurse along a deep graph.
    torch::autograd::set_history(out, Pointer(new Of(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); }));
  } else {
    torch::autograd::set_history(out, Pointer(c10::make_intrusive<Of>(std::forward<Args>(args)...)));
  }
}

template <typename... Lists>
variable_list joined(const Lists&... lists) {
  variable_list all;
  (all.insert(all.end(), lists.begin(), lists.end()), ...);
  return all;
}

// Products of the incoming gradient, each by what it is multiplied by, made once for all that ask for it.
class Products {
 public:
  int add(double coeff, int step) {
    for (size_t i = 0; i < coeffs.size(); ++i)
      if (coeffs[i] == coeff && steps[i] == step) return static_cast<int>(i);
    coeffs.push_back(coeff);
    steps.push_back(step);
    return static_cast<int>(coeffs.size()) - 1;
  }
  std::vector<double> coeffs;
  std::vector<int> steps;
};

class RkSumNode : public Node {
 public:
  RkSumNode(const std::vector<Tensor>& terms, const variable_list& steps, const Tensor& shift, const variable_list& kept,
            std::vector<double> coeffs, std::vector<int64_t> step_at, bool channels_last)
      : Node(joined(terms, steps, variable_list{shift}), kept), coeffs_(std::move(coeffs)), step_at_(std::move(step_at)),
        has_shift_(shift.defined()), channels_last_(channels_last) {}
  std::string name() const override { return "RkSumBackward"; }

 private:
  Op& op() const override { return rk_sum_backward_op; }
  // ReLU and moments are the forward's.
  py::object call() const override {
    return python_call("rk_sum", coeffs_, coeffs_, step_at_, has_shift_, channels_last_, false, false, true);
  }
  // Kept: mask, steps, and the terms of those that need a gradient; nothing without a mask and steps.
  bool computes(const variable_list& kept, const Needed& needed) const override {
    const bool mask = !kept.empty() && kept[0].defined();
    auto scaled = [&](size_t i) { return coeffs_[i] != 1 || std::find(step_at_.begin(), step_at_.end(), i) != step_at_.end(); };
    for (size_t i = 0; i < needed.size(); ++i)
      if (needed[i] && (mask || i >= coeffs_.size() || scaled(i))) return true;
    return false;
  }
  variable_list gradients(const Tensor& grad, const variable_list& kept, const Needed& needed) const override {
    const size_t n = coeffs_.size(), s = step_at_.size();
    const Optional mask = kept.empty() ? std::nullopt : optional(kept[0]);
    std::vector<int> step_of(n, -1), at(n, -1);
    for (size_t k = 0; k < s; ++k) step_of[step_at_[k]] = static_cast<int>(k);
    Products products;
    for (size_t i = 0; i < n; ++i)
      if (needed[i] && (mask || coeffs_[i] != 1 || step_of[i] >= 0)) at[i] = products.add(coeffs_[i], step_of[i]);
    std::vector<Optional> steps;
    for (int k : products.steps) steps.push_back(k < 0 ? std::nullopt : optional(kept[1 + k]));
    std::vector<Tensor> step_terms;
    std::vector<double> step_coeffs;
    std::vector<bool> per_sample;
    std::vector<size_t> reduced;
    for (size_t k = 0; k < s; ++k) {
      if (!needed[n + k]) continue;
      reduced.push_back(k);
      step_terms.push_back(kept[1 + s + k]);
      step_coeffs.push_back(coeffs_[step_at_[k]]);
      per_sample.push_back(kept[1 + k].dim() == 2);
    }
    const bool shift = needed.back();
    std::vector<Tensor> made;
    if (!products.coeffs.empty() || !reduced.empty() || shift)
      made = rk_sum_backward(grad, mask, products.coeffs, steps, step_terms, step_coeffs, per_sample, shift, channels_last_);
    variable_list result(needed.size());
    for (size_t i = 0; i < n; ++i)
      if (needed[i]) result[i] = at[i] < 0 ? grad : made[at[i]];
    for (size_t j = 0; j < reduced.size(); ++j)
      result[n + reduced[j]] = like(made[products.coeffs.size() + j], kept[1 + reduced[j]]);
    if (shift) result.back() = made.back();
    return result;
  }

  const std::vector<double> coeffs_;
  const std::vector<int64_t> step_at_;
  const bool has_shift_, channels_last_;
};

class BnRkSumNode : public Node {
 public:
  BnRkSumNode(const variable_list& inputs, const variable_list& kept, std::vector<double> coeffs, bool channels_last,
              bool relu, bool batch_stats, double eps)
      : Node(inputs, kept), coeffs_(std::move(coeffs)), channels_last_(channels_last), relu_(relu),
        batch_stats_(batch_stats), eps_(eps) {}
  std::string name() const override { return "BnRkSumBackward"; }

 private:
  Op& op() const override { return bn_rk_sum_backward_op; }
  py::object call() const override {
    return python_call("bn_rk_sum", coeffs_, channels_last_, relu_, batch_stats_, eps_, false, "", true);
  }
  // Inputs: x, weight, bias, step, terms. Kept: x, weight, bias, mean, var, step, mask.
  bool computes(const variable_list& kept, const Needed& needed) const override {
    for (size_t i = 0; i < needed.size(); ++i)
      if (needed[i] && (i < 4 || kept[6].defined() || coeffs_[i - 4] != 1)) return true;
    return false;
  }
  variable_list gradients(const Tensor& grad, const variable_list& kept, const Needed& needed) const override {
    const Tensor &x = kept[0], &weight = kept[1], &bias = kept[2], &step = kept[5];
    const Optional mask = optional(kept[6]);
    Products products;
    std::vector<int> at(coeffs_.size(), -1);
    for (size_t i = 0; i < coeffs_.size(); ++i)
      if (needed[4 + i] && (mask || coeffs_[i] != 1)) at[i] = products.add(coeffs_[i], -1);
    const bool need_x = needed[0], need_affine = needed[1] || needed[2], need_step = needed[3];
    std::vector<Tensor> made;
    if (need_x || need_affine || need_step || !products.coeffs.empty())
      made = bn_rk_sum_backward(grad, x, optional(weight), optional(bias), kept[3], kept[4], optional(step), mask, products.coeffs,
                                channels_last_, relu_, batch_stats_, eps_, need_x, need_affine, need_step);
    variable_list result(needed.size());
    auto next = made.begin();
    if (need_x) result[0] = *next++;
    if (need_affine) {
      if (needed[1]) result[1] = like(next[0], weight);
      if (needed[2]) result[2] = like(next[1], bias);
      next += 2;
    }
    if (need_step) result[3] = like(*next++, step);
    for (size_t i = 0; i < at.size(); ++i)
      if (needed[4 + i]) result[4 + i] = at[i] < 0 ? grad : next[at[i]];
    return result;
  }

  const std::vector<double> coeffs_;
  const bool channels_last_, relu_, batch_stats_;
  const double eps_;
};

class ResidualBlockNode : public Node {
 public:
  ResidualBlockNode(const variable_list& inputs, const variable_list& kept, std::vector<int64_t> strides,
                    std::vector<double> eps, bool channels_last)
      : Node(inputs, kept), strides_(std::move(strides)), eps_(std::move(eps)), channels_last_(channels_last),
        own_(!inputs[1].defined() && eps_.size() == strides_.size()) {}
  std::string name() const override { return "ResidualBlockBackward"; }

 private:
  Op& op() const override { return residual_block_backward_op; }
  py::object call() const override { return python_call("residual_block", strides_, eps_, channels_last_, own_, false, true); }
  // Inputs: x, shortcut, step, and of each convolution the weight, and weight and bias of its norm. Kept: x, step, mask; the
  // results of the convolutions; of each weight, and weight, bias, mean and var of its norm; the moments that were not given.
  variable_list gradients(const Tensor& grad, const variable_list& kept, const Needed& needed) const override {
    const size_t count = eps_.size();
    auto next = kept.begin() + 3;
    const std::vector<Tensor> outs(next, next + count);
    next += count;
    auto moments = next + 5 * count;
    std::vector<Tensor> convs;
    std::vector<Optional> norms;
    std::vector<bool> batch;
    bool need_convs = false;
    for (size_t i = 0; i < count; ++i, next += 5) {
      convs.push_back(next[0]);
      batch.push_back(!next[3].defined());
      need_convs = need_convs || needed[3 + 3 * i];
      for (int k = 1; k < 3; ++k) norms.push_back(optional(next[k]));
      for (int k = 3; k < 5; ++k) norms.push_back(batch.back() ? *moments++ : next[k]);
    }
    const bool need_x = needed[0], need_shortcut = needed[1], need_step = needed[2];
    const std::vector<Tensor> made =
        residual_block_backward(grad, kept[0], outs, kept[2], convs, norms, optional(kept[1]), strides_, eps_, batch, channels_last_,
                                own_, need_x, need_shortcut, need_convs, need_step);
    variable_list result(needed.size());
    auto found = made.begin();
    if (need_x) result[0] = *found++;
    if (need_shortcut) result[1] = *found++;
    if (need_step) result[2] = like(*found++, kept[1]);
    for (size_t i = 0; i < count; ++i) {
      if (need_convs) {
        if (needed[3 + 3 * i]) result[3 + 3 * i] = *found;
        ++found;
      }
      for (size_t k = 1; k < 3; ++k, ++found)
        if (needed[3 + 3 * i + k]) result[3 + 3 * i + k] = like(*found, *norms[4 * i + k - 1]);
    }
    return result;
  }

  const std::vector<int64_t> strides_;
  const std::vector<double> eps_;
  const bool channels_last_, own_;
};

variable_list tensors(const std::vector<Optional>& from) {
  variable_list to(from.size());
  std::transform(from.begin(), from.end(), to.begin(), tensor);
  return to;
}

// The items of a list or tuple; other sequences, and tensors, are for Python to look at.
template <typename T, typename Read>
std::optional<std::vector<T>> items(const py::object& given, Read&& read) {
  if (!PyList_CheckExact(given.ptr()) && !PyTuple_CheckExact(given.ptr())) return std::nullopt;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(given.ptr());
  std::vector<T> result(n);
  for (Py_ssize_t i = 0; i < n; ++i)
    if (!read(PySequence_Fast_GET_ITEM(given.ptr(), i), result[i])) return std::nullopt;
  return result;
}
bool read_tensor(PyObject* o, Tensor& t) {
  if (!THPVariable_Check(o)) return false;
  t = THPVariable_Unpack(o);
  return true;
}
bool read_optional(PyObject* o, Optional& t) {
  if (o == Py_None) return true;
  return THPVariable_Check(o) && read_tensor(o, t.emplace());
}
bool read_number(PyObject* o, double& d) {
  if (!PyFloat_Check(o) && !PyLong_CheckExact(o)) return false;
  d = PyFloat_AsDouble(o);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // too large an integer
  return false;
}
bool read_flag(PyObject* o, bool& flag) {
  flag = o == Py_True;
  return flag || o == Py_False;
}

// What an op's public function returns but for the type of the moments: [out, mean, var] with them.
py::object returned(const std::vector<Tensor>& made, bool moments) {
  if (!moments) return py::cast(made[0]);
  return py::cast(std::vector<Tensor>{made[0], *(made.end() - 2), made.back()});
}

// Arguments are read here and not by the binding: a TypeError of it could not be told from one that a hook of saved tensors
// raises when all is done. None where a call is Python's to serve: other tensors than plain ones on a CPU, bad input, another
// backend.
py::object rk_sum_call(const py::object& given, const py::object& given_coeffs, const py::object& given_steps,
                       const py::object& given_shift, const py::object& given_relu, const py::object& return_moments, bool deferred) {
  Optional shift;
  bool relu, moments;
  if (!read_optional(given_shift.ptr(), shift) || !read_flag(given_relu.ptr(), relu) || !read_flag(return_moments.ptr(), moments))
    return py::none();
  const auto listed = items<Tensor>(given, read_tensor);
  auto coeffs = items<double>(given_coeffs, read_number);
  if (!listed || !coeffs || listed->empty() || listed->size() >= kMaxTerms || coeffs->size() != listed->size())
    return py::none();
  const std::vector<Tensor>& terms = *listed;
  auto steps = given_steps.is_none() ? std::vector<Optional>(terms.size()) : items<Optional>(given_steps, read_optional);
  if (!steps || steps->size() != terms.size()) return py::none();
  if (!rk_sum_op.may(terms[0])) return py::none();
  const int64_t seen = survey({terms.begin(), terms.end()}, {shift}, *steps, 0, {});
  if (!(seen & kPlain)) return py::none();
  const bool needs_grad = seen & kNeedsGrad, channels_last = seen & kChannelsLast;

  std::vector<Tensor> made;
  {
    py::gil_scoped_release release;
    made = rk_sum(terms, *coeffs, *steps, shift, channels_last, relu, moments, relu && needs_grad, {});
  }
  rk_sum_op.note(terms[0]);
  if (!needs_grad) return returned(made, moments);
  variable_list factors, kept;
  std::vector<int64_t> step_at;
  for (size_t i = 0; i < steps->size(); ++i) {
    if (!(*steps)[i]) continue;
    factors.push_back(*(*steps)[i]);
    step_at.push_back(static_cast<int64_t>(i));
  }
  if (relu || !factors.empty()) {
    kept.push_back(relu ? made[1] : Tensor());
    kept.insert(kept.end(), factors.begin(), factors.end());
    for (int64_t i : step_at) kept.push_back((*steps)[i]->requires_grad() ? terms[i] : Tensor());
  }
  if (deferred) std::fill(coeffs->begin(), coeffs->end(), 1.0);
  attach<RkSumNode>(made[0], terms, factors, tensor(shift), kept, std::move(*coeffs), std::move(step_at), channels_last);
  return returned(made, moments);
}

py::object bn_rk_sum_call(const py::object& given_x, const py::object& given_weight, const py::object& given_bias,
                          const py::object& given_mean, const py::object& given_var, const py::object& given,
                          const py::object& given_coeffs, const py::object& given_step, const py::object& given_relu,
                          const py::object& given_training, const py::object& given_momentum, const py::object& given_eps,
                          const py::object& num_batches_tracked, const py::object& moments, const py::object& given_return) {
  Tensor x;
  Optional weight, bias, running_mean, running_var, step, counter;
  bool relu, training, return_moments;
  double eps;
  std::optional<double> momentum;
  const std::pair<const py::object&, Optional&> optionals[] = {{given_weight, weight},    {given_bias, bias}, {given_mean, running_mean},
                                                               {given_var, running_var},  {given_step, step},
                                                               {num_batches_tracked, counter}};
  for (const auto& [from, to] : optionals)
    if (!read_optional(from.ptr(), to)) return py::none();
  if (!read_tensor(given_x.ptr(), x) || !read_flag(given_relu.ptr(), relu) || !read_flag(given_training.ptr(), training) ||
      !read_flag(given_return.ptr(), return_moments) || !read_number(given_eps.ptr(), eps) ||
      !(given_momentum.is_none() || read_number(given_momentum.ptr(), momentum.emplace())))
    return py::none();
  const auto listed = items<Tensor>(given, read_tensor);
  const auto coeffs = items<double>(given_coeffs, read_number);
  if (!listed || !coeffs || listed->size() >= kMaxTerms || coeffs->size() != listed->size()) return py::none();
  const std::vector<Tensor>& terms = *listed;
  const bool tracked = training && running_mean, known = training && !moments.is_none();
  if (!(eps > 0) || running_mean.has_value() != running_var.has_value() || (!training && !running_mean)) return py::none();
  if (tracked && !momentum && !counter) return py::none();

  std::vector<Optional> tensors{x}, vectors;
  tensors.insert(tensors.end(), terms.begin(), terms.end());
  Optional mean, var;
  py::object known_count;
  if (known) {
    if (!PyTuple_Check(moments.ptr()) || PyTuple_GET_SIZE(moments.ptr()) != 3) return py::none();
    PyObject* const* const three = PySequence_Fast_ITEMS(moments.ptr());
    if (!read_optional(three[0], mean) || !read_optional(three[1], var) || !mean || !var) return py::none();
    known_count = py::reinterpret_borrow<py::object>(three[2]);
    vectors = {mean, var};
  }
  vectors.insert(vectors.end(), {weight, bias, running_mean, running_var});
  if (!bn_rk_sum_op.may(x)) return py::none();
  const int64_t seen = survey(tensors, vectors, {step}, 2, counter);
  if (!(seen & kPlain)) return py::none();
  const int64_t count = x.numel() / x.size(1);
  if (training && count == 1) return py::none();
  if (known && !(PyLong_CheckExact(known_count.ptr()) && known_count.equal(py::int_(count)))) return py::none();
  const bool needs_grad = seen & kNeedsGrad, channels_last = seen & kChannelsLast;
  if (!training) mean = running_mean, var = running_var;

  const bool mask = needs_grad && relu && !terms.empty();
  std::vector<Tensor> made;
  Tensor used_mean = tensor(mean), used_var = tensor(var);
  {
    py::gil_scoped_release release;
    made = bn_rk_sum(x, weight, bias, mean, var, terms, *coeffs, step, channels_last, relu, eps, return_moments, mask, {});
    if (!mean) used_mean = made[1 + mask], used_var = made[2 + mask];
    if (tracked) {  // before the node is made, as in residual_block_recorded
      const std::vector<Tensor> counters = counter ? std::vector<Tensor>{*counter} : std::vector<Tensor>{};
      update_running_stats(used_mean, used_var, count, {*running_mean}, {*running_var}, counters, momentum);
    }
  }
  bn_rk_sum_op.note(x);
  if (tracked) update_op.note(used_mean);
  if (!needs_grad) return returned(made, return_moments);
  const variable_list kept{x, tensor(weight), tensor(bias), used_mean, used_var, tensor(step), mask ? made[1] : Tensor()};
  attach<BnRkSumNode>(made[0], joined(variable_list{x, tensor(weight), tensor(bias), tensor(step)}, terms), kept, *coeffs,
                      channels_last, relu, training, eps);
  return returned(made, return_moments);
}

void move(const std::optional<Moved>& moved, const Tensor& mean, const Tensor& var) {
  if (moved) std::apply([&](const auto&... each) { update_running_stats(mean, var, each...); }, *moved);
}

Tensor residual_block_recorded(const Tensor& x, const Optional& shortcut, const std::vector<Tensor>& convs,
                               const std::vector<Optional>& norms, const Optional& step, std::vector<int64_t> strides,
                               std::vector<double> eps, bool channels_last, const std::vector<std::optional<Moved>>& moved) {
  const size_t count = convs.size();
  std::vector<Tensor> made;
  {
    py::gil_scoped_release release;
    made = residual_block(x, shortcut, convs, norms, step, strides, eps, channels_last, true);
    // Before the node is made: activation checkpointing stops what it computes again at the last tensor that is kept.
    auto own = made.begin() + 2 + count;
    for (size_t i = 0; i < count; ++i) {
      move(moved[i], norms[4 * i + 2] ? *norms[4 * i + 2] : own[0], norms[4 * i + 2] ? *norms[4 * i + 3] : own[1]);
      if (!norms[4 * i + 2]) own += 2;
    }
  }
  variable_list inputs{x, tensor(shortcut), tensor(step)}, kept{x, tensor(step)};
  kept.insert(kept.end(), made.begin() + 1, made.begin() + 2 + count);
  for (size_t i = 0; i < count; ++i) {
    const variable_list norm = tensors({norms.begin() + 4 * i, norms.begin() + 4 * i + 4});
    inputs.insert(inputs.end(), {convs[i], norm[0], norm[1]});
    kept.push_back(convs[i]);
    kept.insert(kept.end(), norm.begin(), norm.end());
  }
  kept.insert(kept.end(), made.begin() + 2 + count, made.end());
  attach<ResidualBlockNode>(made[0], inputs, kept, std::move(strides), std::move(eps), channels_last);
  return made[0];
}

}  // namespace

void define_nodes(py::module_& m) {
  using py::arg;
  m.def("rk_sum_call", &rk_sum_call, arg("terms"), arg("coeffs"), arg("steps"), arg("shift"), arg("relu"), arg("return_moments"),
        arg("deferred"));
  m.def("bn_rk_sum_call", &bn_rk_sum_call, arg("x"), arg("weight"), arg("bias"), arg("running_mean"), arg("running_var"),
        arg("terms"), arg("coeffs"), arg("step"), arg("relu"), arg("training"), arg("momentum"), arg("eps"),
        arg("num_batches_tracked"), arg("moments"), arg("return_moments"));
  m.def("residual_block_recorded", &residual_block_recorded, arg("x"), arg("shortcut"), arg("convs"), arg("norms"),
        arg("step"), arg("strides"), arg("eps"), arg("channels_last"), arg("moved"));
}

}  // namespace rkfast
