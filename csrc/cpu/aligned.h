// Vectors that begin on a cache line, so that no register of their values lies across two. Free of torch headers.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace rkfast {
inline namespace CPU_CAPABILITY {  // what one instruction set compiles must not be linked for another

template <typename T>
struct OnLine {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  OnLine() = default;
  template <typename U>
  OnLine(const OnLine<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
  bool operator==(const OnLine&) const { return true; }
  bool operator!=(const OnLine&) const { return false; }
};

template <typename T>
using Aligned = std::vector<T, OnLine<T>>;

}  // namespace CPU_CAPABILITY
}  // namespace rkfast
