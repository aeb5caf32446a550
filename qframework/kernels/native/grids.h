// What values are rounded to: integers of a range, or the numbers of a floating-point format of few bits.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

// How an integer, or the significand of a minifloat, is rounded; with kMinifloat the grid is one of minifloats. To templates kFloor stands
// for kCeil and kTruncate, too.
enum Rounding { kRound, kCeil, kFloor, kTruncate, kMinifloat };

inline float nearest_integer(float v) { return __builtin_rintf(v); }
inline double nearest_integer(double v) { return __builtin_rint(v); }
inline float floored(float v) { return __builtin_floorf(v); }
inline double floored(double v) { return __builtin_floor(v); }

// The numbers that a row is quantized by. Integers lie between low and high. Numbers of a format beyond them become `under` and
// `over`, and their gradient passes between `from` and `to`; `normal` are the bits of the smallest normal one, `shift` the mantissa's
// width at the place of the exponent, and `infinite` what an infinity becomes before it is bounded. With `clips_first`, which
// goes with kRound, no gradient of integers passes where a number is at an end before it is rounded. What is floored has its sign turned
// before and after: all numbers where `turns` is the sign's bit, those below 0 where `turns_negative` is.
template <class C>
struct Grid {
  C scale, zero, low, high, under, over, from, to, infinite;
  Bits<C> normal, shift, turns, turns_negative;
  bool clips_first;
};

template <int R, class C>
inline C rounded(C v, const Grid<C>& grid) {
  if constexpr (R != kFloor) return nearest_integer(v);
  const Bits<C> turned = grid.turns ^ (as<Bits<C>>(v) & grid.turns_negative);
  return as<C>(as<Bits<C>>(floored(as<C>(as<Bits<C>>(v) ^ turned))) ^ turned);
}

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
    return {rounded<R>(v + grid.zero, grid), C(1), false, false};
  } else {
    const Bits<C> magnitude = magnitude_bits(v), power = magnitude & kInfinity<C>;
    const Bits<C> least = power < grid.normal ? grid.normal : power, step = least - grid.shift;
    const C steps = v * as<C>(2 * kOne<C> - step), whole = rounded<R>(steps, grid), q = whole * as<C>(step);
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

// Work on n elements; n is a constant for short rows, as groups are, so that they take no more than their vectors, and what all rows
// have in common stays where it is.
template <bool often, class F>
inline void of_length(int64_t n, F work) {
  if constexpr (often) {
    if (n == 32) return work(std::integral_constant<int64_t, 32>());
    if (n == 16) return work(std::integral_constant<int64_t, 16>());
  }
  work(n);
}

// Whether rows are short often enough to be worth the time to compile that.
template <int R, class T>
constexpr bool kOften = R != kFloor && !std::is_same_v<T, double>;

template <class L>
constexpr bool kConstant = !std::is_same_v<L, int64_t>;

template <int R, class T, class C, class L>
inline void quantize_piece(const T* __restrict x, T* __restrict y, L n, const Grid<C>& on, bool relu) {
  const Grid<C> grid = on;
  const C floor = relu ? C(0) : -INFINITY;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C v = wide(x[i]);
    v = v < floor ? floor : v;
    const C q = bounded<R>(placed<R>(v / grid.scale, grid).q, grid);
    put(y[i], (q - grid.zero) * grid.scale);
  }
}

// For what loops over rows call: numbers of the grid stay in registers where all is one function.
#define INLINE inline __attribute__((always_inline))

constexpr int64_t kBlock = 1 << 7;  // elements that are summed in the precision of the tensor
constexpr int64_t kLanes = 16;

// Numbers that are added as one vector, whatever the width of the machine's are.
template <class C, int64_t count>
struct Lanes {
  typedef C Vector __attribute__((vector_size(count * sizeof(C))));

  static Vector at(const C* place) {
    Vector made;
    std::memcpy(&made, place, sizeof made);
    return made;
  }

  static C sum(const Vector& lanes) {
    if constexpr (count == 2) {
      return lanes[0] + lanes[1];
    } else {
      using Half = Lanes<C, count / 2>;
      C each[count];
      std::memcpy(each, &lanes, sizeof each);
      return Half::sum(Half::at(each) + Half::at(each + count / 2));
    }
  }
};

// The summands of at most kBlock elements. A compiler would add the lanes of its vectors one after the other, each waiting for the last:
// here they are added by halves.
template <class C>
struct Terms {
  alignas(64) C of[kBlock];

  template <class L>
  C sum(L n) {
    using All = Lanes<C, kLanes>;
    for (int64_t i = n; i % kLanes; i++) of[i] = 0;
    auto lanes = All::at(of);
    for (int64_t i = kLanes; i < n; i += kLanes) lanes += All::at(of + i);
    return All::sum(lanes);
  }
};

struct Sums {
  double scale = 0, zero = 0;
  int64_t count = 0;  // of elements of a magnitude

  void operator+=(const Sums& other) {
    scale += other.scale;
    zero += other.zero;
    count += other.count;
  }
};

// The sum over blocks of n elements, of what work gives for where one starts and its length.
template <class L, class F>
INLINE Sums of_blocks(L n, F work) {
  if constexpr (kConstant<L>) {
    return work(0, n);
  } else {
    Sums sums;
    for (int64_t start = 0; start < n; start += kBlock) sums += work(start, std::min(kBlock, n - start));
    return sums;
  }
}

// The gradient of each value, and the summands of those of scale and zero point. The scale's is, inside of the range, q - x / scale,
// the difference itself, since the sum of each part is large; outside it is the clipped integer. A normal minifloat moves with its
// value, y / x times as far, and the scale with neither. `grad_x` may be `g`.
template <int R, bool clips_first, class T, class C, class L>
INLINE Sums clamped_piece(const T* gs, const T* xs, T* grads, L n, const Grid<C>& on, bool relu, C top) {
  return of_blocks(n, [=](int64_t start, auto length) __attribute__((always_inline)) {
    const T *g = gs + start, *__restrict x = xs + start;
    T* grad_x = grads + start;
    const Grid<C> grid = on;
    const C floor = relu ? C(0) : -INFINITY;
    Terms<C> of_scale, of_zero;
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < length; i++) {
      C v = wide(x[i]), upstream = wide(g[i]);
      count += std::abs(v) == top;
      const bool active = !(relu & (v <= 0));
      v = v < floor ? floor : v;
      const C exact = v / grid.scale;
      const Placed<C> place = placed<R>(exact, grid);
      const C q = bounded<R>(place.q, grid);
      if constexpr (R < kMinifloat) {
        const C seen = exact + grid.zero;
        const bool inside = clips_first ? !((seen <= grid.low) | (seen >= grid.high))
                                        : !((place.q < grid.low) | (place.q > grid.high));
        of_scale.of[i] = (q - grid.zero - only_if(inside, exact)) * upstream;
        of_zero.of[i] = only_if(!inside, upstream);
        put(grad_x[i], only_if(inside & active, upstream));
      } else {
        const bool inside = !((place.q < grid.from) | (place.q > grid.to)) | place.infinite;
        of_scale.of[i] = (q - only_if(inside, place.normal ? place.q : exact)) * upstream;
        put(grad_x[i], only_if(inside, upstream * place.slope));
      }
    }
    const C zeros = R < kMinifloat ? -of_zero.sum(length) : C(0);
    return Sums{of_scale.sum(length), zeros, count};
  });
}

// The same for integers where the clamp passes gradients on; they are copied to `grad_x`, unless that is `g` or null. The quantized
// values are written too, unless `ys` is null.
template <int R, class T, class C, class L>
INLINE Sums passing_piece(const T* gs, const T* xs, T* grads, L n, const Grid<C>& on, C top, T* ys = nullptr) {
  if (grads && grads != gs) std::memcpy(grads, gs, n * sizeof(T));
  const auto sum = [=](auto writes) {
    return of_blocks(n, [=](int64_t start, auto length) {
      const T *__restrict g = gs + start, *__restrict x = xs + start;
      T* __restrict y = ys + (writes ? start : 0);
      const Grid<C> grid = on;
      Terms<C> of_scale;
      int32_t count = 0;
#pragma omp simd reduction(+ : count)
      for (int64_t i = 0; i < length; i++) {
        const C v = wide(x[i]), exact = v / grid.scale;
        const C q = bounded<R>(placed<R>(exact, grid).q, grid) - grid.zero;
        of_scale.of[i] = (q - exact) * wide(g[i]);
        count += std::abs(v) == top;
        if constexpr (writes) put(y[i], q * grid.scale);
      }
      return Sums{of_scale.sum(length), 0, count};
    });
  };
  return ys ? sum(std::true_type()) : sum(std::false_type());
}

// Either, as a call wants it.
template <int R, class T, class C, class L>
INLINE Sums gradient_piece(const T* g, const T* x, T* grad_x, L n, const Grid<C>& grid, bool clamp_gradient, bool relu,
                    C top) {
  if constexpr (R < kMinifloat)
    if (!clamp_gradient) return passing_piece<R>(g, x, grad_x, n, grid, top);
  if constexpr (R == kRound)
    if (grid.clips_first) return clamped_piece<R, true>(g, x, grad_x, n, grid, relu, top);
  return clamped_piece<R, false>(g, x, grad_x, n, grid, relu, top);
}

// The largest magnitude, as an integer, so that NaN is the largest.
template <class T, class L>
inline Bits<Wide<T>> absmax_bits(const T* x, L n) {
  Bits<Wide<T>> top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) {
    const Bits<Wide<T>> magnitude = magnitude_bits(wide(x[i]));
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

// The place of the first element for which something holds; 0 where there is none.
template <class T, class L, class F>
inline int64_t first_where(const T* xs, L n, F holds) {
  constexpr int32_t kSome = 128;
  const auto first_of_some = [=](const T* x, auto some) {
    int32_t first = kSome;
#pragma omp simd reduction(min : first)
    for (int32_t i = 0; i < int32_t(some); i++) {
      const int32_t at = holds(wide(x[i])) ? i : kSome;
      first = at < first ? at : first;
    }
    return first;
  };
  if constexpr (kConstant<L>) {
    return first_of_some(xs, n) % kSome;
  } else {
    for (int64_t start = 0; start < n; start += kSome) {
      const int32_t found = first_of_some(xs + start, std::min<int64_t>(kSome, n - start));
      if (found < kSome) return start + found;
    }
    return 0;
  }
}

// The place of the first element of a magnitude, which is there.
template <class T, class L>
inline int64_t first_of(const T* x, L n, Bits<Wide<T>> magnitude) {
  return first_where(x, n, [magnitude](Wide<T> v) { return magnitude_bits(v) == magnitude; });
}

}  // namespace
