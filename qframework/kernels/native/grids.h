// What values are rounded to: integers of a range, or the numbers of a floating-point format of few bits.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

// How an integer, or the significand of a minifloat, is rounded; with kMinifloat the grid is one of minifloats.
enum Rounding { kRound, kCeil, kFloor, kTruncate, kMinifloat };

template <int R>
inline float rounded(float v) {
  if constexpr (R % kMinifloat == kRound) return __builtin_rintf(v);
  if constexpr (R % kMinifloat == kCeil) return __builtin_ceilf(v);
  if constexpr (R % kMinifloat == kFloor) return __builtin_floorf(v);
  return __builtin_truncf(v);
}

template <int R>
inline double rounded(double v) {
  if constexpr (R % kMinifloat == kRound) return __builtin_rint(v);
  if constexpr (R % kMinifloat == kCeil) return __builtin_ceil(v);
  if constexpr (R % kMinifloat == kFloor) return __builtin_floor(v);
  return __builtin_trunc(v);
}

// The numbers that a row is quantized by. Integers lie between low and high. Numbers of a format beyond them become `under` and
// `over`, and their gradient passes between `from` and `to`; `normal` are the bits of the smallest normal one, `shift` the mantissa's
// width at the place of the exponent, and `infinite` what an infinity becomes before it is bounded.
template <class C>
struct Grid {
  C scale, zero, low, high, under, over, from, to, infinite;
  Bits<C> normal, shift;
};

// A value on its grid, before it is bounded; how far it moves with the value, which is 1 but for normal minifloats; whether it is one,
// and whether it was an infinity.
template <class C>
struct Placed {
  C q, slope;
  bool normal, infinite;
};

// The step of a normal number is a power of two that stands in its exponent's bits: nothing here but the rounding itself rounds.
template <int R, class C>
inline Placed<C> placed(C v, const Grid<C>& grid) {
  if constexpr (R < kMinifloat) {
    return {rounded<R>(v + grid.zero), C(1), false, false};
  } else {
    const Bits<C> magnitude = magnitude_bits(v), power = magnitude & kInfinity<C>;
    const Bits<C> least = power < grid.normal ? grid.normal : power, step = least - grid.shift;
    const C steps = v * as<C>(2 * kOne<C> - step), whole = rounded<R>(steps), q = whole * as<C>(step);
    const bool infinite = magnitude == kInfinity<C>, normal = (power >= grid.normal) & (magnitude <= kInfinity<C>);
    return {infinite ? v * grid.infinite : q, normal ? whole / steps : C(1), normal, infinite};
  }
}

template <int R, class C>
inline C bounded(C q, const Grid<C>& grid) {  // NaN stays NaN
  if constexpr (R < kMinifloat) return between(q, grid.low, grid.high);
  const C below = q < grid.low ? grid.under : q;
  return q > grid.high ? grid.over : below;
}

template <int R, class T, class C>
void quantize_piece(const T* __restrict x, T* __restrict y, int64_t n, Grid<C> grid, bool relu) {
  const C floor = relu ? C(0) : -INFINITY;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C v = wide(x[i]);
    v = v < floor ? floor : v;
    const C q = bounded<R>(placed<R>(v / grid.scale, grid).q, grid);
    put(y[i], (q - grid.zero) * grid.scale);
  }
}

constexpr int64_t kBlock = 1 << 9;  // elements that are summed in the precision of the tensor

struct Sums {
  double scale = 0, zero = 0;
  int64_t count = 0;  // of elements of a magnitude
};

// The gradient of each value, and the summands of those of scale and zero point. The scale's is, inside of the range, q - x / scale,
// the difference itself, since the sum of each part is large; outside it is the clipped integer. A normal minifloat moves with its
// value, y / x times as far, and the scale with neither. `grad_x` may be `g`.
template <int R, class T, class C>
Sums clamped_piece(const T* g, const T* __restrict x, T* grad_x, int64_t n, Grid<C> grid, bool relu, C top) {
  Sums sums;
  const C floor = relu ? C(0) : -INFINITY;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    C of_scale = 0, of_zero = 0;
    int32_t count = 0;
#pragma omp simd reduction(+ : of_scale, of_zero, count)
    for (int64_t i = start; i < end; i++) {
      C v = wide(x[i]), upstream = wide(g[i]);
      count += std::abs(v) == top;
      const bool active = !(relu & (v <= 0));
      v = v < floor ? floor : v;
      const C exact = v / grid.scale;
      const Placed<C> place = placed<R>(exact, grid);
      const C q = bounded<R>(place.q, grid);
      if constexpr (R < kMinifloat) {
        const bool inside = !((place.q < grid.low) | (place.q > grid.high));
        of_scale += (q - grid.zero - only_if(inside, exact)) * upstream;
        of_zero -= only_if(!inside, upstream);
        put(grad_x[i], only_if(inside & active, upstream));
      } else {
        const bool inside = !((place.q < grid.from) | (place.q > grid.to)) | place.infinite;
        of_scale += (q - only_if(inside, place.normal ? place.q : exact)) * upstream;
        put(grad_x[i], only_if(inside, upstream * place.slope));
      }
    }
    sums.scale += of_scale;
    sums.zero += of_zero;
    sums.count += count;
  }
  return sums;
}

// The same for integers where the clamp passes gradients on; they are copied to `grad_x`, unless that is `g` or null.
template <int R, class T, class C>
Sums passing_piece(const T* g, const T* __restrict x, T* grad_x, int64_t n, Grid<C> grid, C top) {
  Sums sums;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    C of_scale = 0;
    int32_t count = 0;
    if (grad_x && grad_x != g) std::memcpy(grad_x + start, g + start, (end - start) * sizeof(T));
#pragma omp simd reduction(+ : of_scale, count)
    for (int64_t i = start; i < end; i++) {
      const C v = wide(x[i]), exact = v / grid.scale;
      const C q = bounded<R>(placed<R>(exact, grid).q, grid);
      of_scale += (q - grid.zero - exact) * wide(g[i]);
      count += std::abs(v) == top;
    }
    sums.scale += of_scale;
    sums.count += count;
  }
  return sums;
}

// Either, as a call wants it.
template <int R, class T, class C>
Sums gradient_piece(const T* g, const T* x, T* grad_x, int64_t n, Grid<C> grid, bool clamp_gradient, bool relu, C top) {
  if constexpr (R < kMinifloat)
    if (!clamp_gradient) return passing_piece<R>(g, x, grad_x, n, grid, top);
  return clamped_piece<R>(g, x, grad_x, n, grid, relu, top);
}

// The largest magnitude, as an integer, so that NaN is the largest.
template <class T>
Bits<Wide<T>> absmax_bits(const T* x, int64_t n) {
  Bits<Wide<T>> top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) {
    const Bits<Wide<T>> magnitude = magnitude_bits(wide(x[i]));
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

}  // namespace
