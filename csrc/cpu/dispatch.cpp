#include "cpu/dispatch.h"

#include <atomic>
#include <map>
#include <string>

namespace rkfast {
namespace {

enum class Allowed { no, yes, by_name };
std::atomic<Allowed> allowed{Allowed::no};

std::map<std::string, Op*>& ops() {
  static std::map<std::string, Op*> all;
  return all;
}

bool has_kernel(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

}  // namespace

Op::Op(const char* name) { ops()[name] = this; }

bool Op::may(const Tensor& lead) const {
  // Symbolic sizes that are asked for become constants.
  return allowed != Allowed::no && lead.is_cpu() && !lead.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && lead.numel() > 0 &&
      has_kernel(lead.scalar_type());
}

void Op::note(const Tensor& lead) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++served_;
  is_last_ = true;
  explicit_ = allowed == Allowed::by_name;
  sizes_.assign(lead.sizes().begin(), lead.sizes().end());
  dtype_ = lead.scalar_type();
}

void define_dispatch(py::module_& m) {
  using py::arg;
  m.def(
      "allow",
      [](bool serves, bool by_name) { allowed = !serves ? Allowed::no : by_name ? Allowed::by_name : Allowed::yes; },
      arg("serves"), arg("by_name"));
  m.def("served", [] {
    std::map<std::string, int64_t> counts;
    for (const auto& [name, op] : ops()) {
      const std::lock_guard<std::mutex> lock(op->mutex_);
      counts[name] = op->served_;
    }
    return counts;
  });
  m.def(
      "last",
      [](const std::string& name) -> std::optional<std::tuple<std::vector<int64_t>, at::ScalarType, bool>> {
        const auto found = ops().find(name);
        if (found == ops().end()) return std::nullopt;
        Op& op = *found->second;
        const std::lock_guard<std::mutex> lock(op.mutex_);
        if (!op.is_last_) return std::nullopt;
        return std::tuple(op.sizes_, op.dtype_, op.explicit_);
      },
      arg("op"));
  m.def(
      "forget",
      [](const std::string& name) {
        const auto found = ops().find(name);
        if (found == ops().end()) return;
        const std::lock_guard<std::mutex> lock(found->second->mutex_);
        found->second->is_last_ = false;
      },
      arg("op"));
}

}  // namespace rkfast
