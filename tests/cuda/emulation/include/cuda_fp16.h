#pragma once

#include <c10/util/Half.h>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half v) { return c10::Half(v.bits, c10::Half::from_bits()); }
inline __half __float2half_rn(float v) { return {c10::Half(v).x}; }
