// Vectors that begin on a cache line, so that no register of their values lies across two. Free of torch headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace rkfast {
inline namespace CPU_CAPABILITY {  // what one instruction set compiles must not be linked for another

template <typename T>
struct OnLine {
  using value_type = T;
  static constexpr std::size_t kLine = 64;

  OnLine() = default;
  template <typename U>
  OnLine(const OnLine<U>&) {}
  // Aligned here: what the C library aligns does not come from its cache of small blocks. The byte before the vector says
  // how far behind its block's begin it lies.
  T* allocate(std::size_t n) {
    char* block = static_cast<char*>(::operator new(n * sizeof(T) + kLine));
    const std::size_t behind = kLine - reinterpret_cast<std::uintptr_t>(block) % kLine;
    block[behind - 1] = static_cast<char>(behind);
    return reinterpret_cast<T*>(block + behind);
  }
  void deallocate(T* p, std::size_t) {
    char* at = reinterpret_cast<char*>(p);
    ::operator delete(at - at[-1]);
  }
  bool operator==(const OnLine&) const { return true; }
  bool operator!=(const OnLine&) const { return false; }
};

template <typename T>
using Aligned = std::vector<T, OnLine<T>>;

}  // namespace CPU_CAPABILITY
}  // namespace rkfast
