#include "cpu/accumulate.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T>
void run(const MomentsOf& a) {
  const Shape& s = a.shape;
  const int64_t padded = s.padded();
  for_each_unit(s, 2, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    if (s.channels_last) {
      ColumnMoments<T> columns(s, a.moments.mean + u * padded, a.moments.m2 + u * padded);
      const int64_t tile = tile_rows(s);
      for (int64_t i = begin; i < end; i += tile)
        columns.add(row<const T>(a.x, o, i), a.x.inner, std::min(tile, end - i));
      return columns.finish();
    }
    for (int64_t i = begin; i < end; ++i) {
      const auto m = row_moments(row<const T>(a.x, o, i), s.length);
      a.moments.mean[o * padded + i] = m.mean;
      a.moments.m2[o * padded + i] = m.m2;
    }
  });
}

void channel_moments(const MomentsOf& a) {
  with_type(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

const Enter<MomentsOf> entered(moments_of, kCapability, channel_moments);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
