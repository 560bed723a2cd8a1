// Vectors of storage type T as registers of the type it is computed in. Included by *_kernel.cpp files only, which are
// compiled once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/aligned.h"
#include "cpu/kernels.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kCapability = 2;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kCapability = 1;
#else
constexpr int kCapability = 0;
#endif

using at::vec::Vectorized;

// v where the bit is set, else 0. The empty asm keeps the compiler from making a masked load of it, which would have to wait
// for the mask where a plain one runs ahead.
inline Vectorized<float> keep(const Vectorized<float>& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 loaded = v;
  asm("" : "+v"(loaded));
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), loaded);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(set));
#else
  Vectorized<float> result = v;
  for (int i = 0; i < Vectorized<float>::size(); ++i)
    if (!(bits >> i & 1)) result[i] = 0;
  return result;
#endif
}

inline Vectorized<double> keep(const Vectorized<double>& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512d loaded = v;
  asm("" : "+v"(loaded));
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), loaded);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(bits)), lane), lane);
  return _mm256_and_pd(v, _mm256_castsi256_pd(set));
#else
  Vectorized<double> result = v;
  for (int i = 0; i < Vectorized<double>::size(); ++i)
    if (!(bits >> i & 1)) result[i] = 0;
  return result;
#endif
}

#if defined(CPU_CAPABILITY_AVX512)
inline void stream_lines(const void* from, void* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i),
                        _mm512_load_si512(static_cast<const char*>(from) + i));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline void stream_lines(const void* from, void* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
}
#endif

inline void fence_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Whether a row may be streamed to: its registers fill whole lines from the first on.
inline bool on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <typename T>
struct Pack {
  static constexpr bool kReduced = !std::is_floating_point_v<T>;
  using Acc = std::conditional_t<kReduced, float, T>;
  using Vec = Vectorized<Acc>;
  static constexpr int kVecs = std::is_same_v<T, float> ? 1 : 2;
  static constexpr int kWidth = Vec::size();
  static constexpr int kLanes = kVecs * kWidth;  // a multiple of 8, so that mask bits come in whole bytes
  static constexpr uint32_t kAll = kLanes == 32 ? ~0u : (1u << kLanes) - 1;

  Vec v[kVecs];

  static Pack load(const T* p) {
    if constexpr (kReduced) {
      auto [low, high] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(p));
      return {low, high};
    } else if constexpr (kVecs == 1) {
      return {Vec::loadu(p)};
    } else {
      return {Vec::loadu(p), Vec::loadu(p + kWidth)};
    }
  }

  // The first n; the rest is 0.
  static Pack load(const T* p, int n) {
    if constexpr (kReduced) {
      auto [low, high] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(p, n));
      return {low, high};
    } else if constexpr (kVecs == 1) {
      return {Vec::loadu(p, n)};
    } else {
      return {Vec::loadu(p, std::min(n, kWidth)), Vec::loadu(p + kWidth, std::max(n - kWidth, 0))};
    }
  }

  void store(T* p) const {
    if constexpr (kReduced) {
      at::vec::convert_from_float<T>(v[0], v[1]).store(p);
    } else {
      for (int k = 0; k < kVecs; ++k) v[k].store(p + k * kWidth);
    }
  }

  void store(T* p, int n) const {
    if constexpr (kReduced) {
      at::vec::convert_from_float<T>(v[0], v[1]).store(p, n);
    } else {
      for (int k = 0; k < kVecs; ++k)
        if (n > k * kWidth) v[k].store(p + k * kWidth, std::min(n - k * kWidth, kWidth));
    }
  }

  // Past the caches, where p is aligned to whole cache lines. fence_streams() comes before anyone else reads.
  void stream(T* p) const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    alignas(64) T lanes[kLanes];
    store(lanes);
    stream_lines(lanes, p, sizeof(lanes));
#else
    store(p);
#endif
  }

  // The value as it is read back after a store.
  Pack rounded() const {
    if constexpr (!kReduced) return *this;
    if constexpr (kReduced) {
      auto [low, high] = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(v[0], v[1]));
      return {low, high};
    }
  }

  Pack masked(uint32_t bits) const {
    Pack result = *this;
    for (int k = 0; k < kVecs; ++k) result.v[k] = keep(v[k], bits >> (k * kWidth));
    return result;
  }

  // After a ReLU: a bit per element that passed it. NaN passes.
  uint32_t passed() const {
    uint32_t zero = 0;
    for (int k = 0; k < kVecs; ++k) zero |= static_cast<uint32_t>(v[k].zero_mask()) << (k * kWidth);
    return ~zero & kAll;
  }

  Pack relu() const {
    Pack result;
    for (int k = 0; k < kVecs; ++k) result.v[k] = at::vec::clamp_min(v[k], Vec(Acc(0)));
    return result;
  }
};

// How many elements a step of a row takes: all lanes, known when compiling, or what is left at its end.
template <typename P>
using Full = std::integral_constant<int, P::kLanes>;

template <typename N>
constexpr bool kIsFull = !std::is_same_v<N, int>;

template <typename P, typename T, typename N>
inline P load(const T* p, N n) {
  if constexpr (kIsFull<N>) {
    return P::load(p);
  } else {
    return P::load(p, n);
  }
}

template <typename P, typename T, typename N>
inline void store(const P& x, T* p, N n) {
  if constexpr (kIsFull<N>) {
    x.store(p);
  } else {
    x.store(p, n);
  }
}

template <typename P, typename T, typename N>
inline void store(const P& x, T* p, N n, bool stream) {
  if constexpr (kIsFull<N>) {
    stream ? x.stream(p) : x.store(p);
  } else {
    x.store(p, n);
  }
}

template <typename N>
inline uint32_t load_bits(const uint8_t* p, N n) {
  uint32_t bits = 0;
  if constexpr (kIsFull<N>) {
    std::memcpy(&bits, p, N::value / 8);
  } else {
    for (int i = 0; i < n; i += 8) bits |= static_cast<uint32_t>(p[i / 8]) << i;
  }
  return bits;
}

// Of U registers.
template <typename U, typename N>
inline void store_bits(uint8_t* p, uint64_t bits, U, N n) {
  if constexpr (kIsFull<N>) {
    std::memcpy(p, &bits, U::value * N::value / 8);
  } else {
    bits &= (1u << n) - 1;
    for (int i = 0; i < n; i += 8) p[i / 8] = static_cast<uint8_t>(bits >> i);
  }
}

template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kDouble: return f(double{});
    case DType::kBFloat16: return f(c10::BFloat16{});
    case DType::kHalf: return f(c10::Half{});
  }
}

template <typename T>
T* row(const Operand& x, int64_t o, int64_t i) {
  return static_cast<T*>(const_cast<void*>(x.data)) + o * x.outer + i * x.inner;
}

// A factor for one row: a vector along it (channels_last), or one number.
template <typename Acc>
struct RowFactor {
  const Acc* vector = nullptr;
  Acc scalar = 0;

  RowFactor() = default;
  RowFactor(const Factor& f, const Shape& s, int64_t o, int64_t i) : scalar(static_cast<Acc>(f.scalar)) {
    if (f.vector == nullptr) return;
    const Acc* sample = static_cast<const Acc*>(f.vector) + o * f.outer;
    if (s.channels_last) {
      vector = sample;
    } else {
      scalar = sample[i];
    }
  }
};

// body(p, U, n) over a row: U registers of n elements each, then one at a time, then one of what is left.
template <typename P, int U, typename Body>
inline void along(int64_t length, Body&& body) {
  int64_t p = 0;
  for (; p + U * P::kLanes <= length; p += U * P::kLanes) body(p, std::integral_constant<int, U>(), Full<P>());
  for (; p + P::kLanes <= length; p += P::kLanes) body(p, std::integral_constant<int, 1>(), Full<P>());
  if (p < length) body(p, std::integral_constant<int, 1>(), static_cast<int>(length - p));
}

}  // namespace CPU_CAPABILITY
}  // namespace rkfast
