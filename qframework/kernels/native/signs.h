// Two values: a scale with the sign of each number.

#pragma once

#include "calls.h"

namespace {

// The scale with the sign of each value.
template <class T>
void signs(const Call& call) {
  using C = Wide<T>;
  const auto any = grid_of<C>(call);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    const C scale = grid_of(call, any, row).scale;
    const T* __restrict x = static_cast<const T*>(call.x) + at;
    T* __restrict y = static_cast<T*>(call.out) + at;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const C v = wide(x[i]), signed_scale = v >= 0 ? scale : -scale;
      put(y[i], v == v ? signed_scale : v);
    }
  });
}

// The gradients of values and scale of the same. Behind a clamp to the scale that is differentiated, what is beyond an end moves with it.
template <class T>
void signs_gradients(const Call& call) {
  using C = Wide<T>;
  const auto any = grid_of<C>(call);
  std::vector<Sums> sums(call.n / call.inner * pieces_of(call.inner));
  for_pieces(call.n, call.inner, call.threads, [&](int64_t piece, int64_t row, int64_t at, int64_t n) {
    const C scale = grid_of(call, any, row).scale, end = call.clamp_gradient ? scale : C(INFINITY);
    sums[piece] = of_blocks(n, [&](int64_t start, int64_t length) {
      const T* g = static_cast<const T*>(call.g) + at + start;
      const T* x = static_cast<const T*>(call.x) + at + start;
      T* out = static_cast<T*>(call.out) + at + start;
      Terms<C> of_scale;
#pragma omp simd
      for (int64_t i = 0; i < length; i++) {
        const C v = wide(x[i]), upstream = wide(g[i]), moved = upstream * scale;
        const bool inside = !((v > end) | (v < -end));
        const C signed_one = v >= 0 ? C(1) : C(-1);
        of_scale.of[i] = (v == v ? signed_one : v) * (upstream + only_if(!inside, moved));
        put(out[i], only_if(inside, moved));
      }
      return Sums{of_scale.sum(length), 0, 0};
    });
  });
  const std::vector<Sums> totals = by_channel<C>(call, sums);
  for (int64_t c = 0; c < call.channels; c++) static_cast<C*>(call.grad_scale)[c] = C(totals[c].scale);
}

}  // namespace
