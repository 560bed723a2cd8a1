#pragma once

#include <c10/util/BFloat16.h>

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return c10::BFloat16(v.bits, c10::BFloat16::from_bits()); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {c10::BFloat16(v).x}; }
