// Largest magnitudes, ends of rows, and their gradients.

#pragma once

#include "calls.h"

namespace {

// The largest magnitude of each row.
template <class T>
void row_tops(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  for_rows(call, [&](int64_t row, int64_t at, auto length) {
    static_cast<C*>(call.top)[row] = as<C>(absmax_bits(x + at, length));
  });
}

// The gradient of the largest magnitude of the tensor, `top`: `grad_of_scale` divided among the elements of that magnitude.
template <class T>
void absmax_share(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  T* out = static_cast<T*>(call.out);
  const C top = *static_cast<const C*>(call.top);
  std::vector<int64_t> counts(pieces_of(call.n));
  for_pieces(call.n, call.n, call.threads, [&](int64_t piece, int64_t, int64_t at, int64_t n) {
    std::memset(out + at, 0, n * sizeof(T));
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += std::abs(wide(x[at + i])) == top;
    counts[piece] = count;
  });
  int64_t count = 0;
  for (int64_t c : counts) count += c;
  const C share = *static_cast<const C*>(call.grad_of_scale) / C(count);
  for (int64_t piece = 0; piece < pieces_of(call.n); piece++) {
    if (!counts[piece]) continue;
    for (int64_t i = piece * kPiece; i < std::min(call.n, (piece + 1) * kPiece); i++)
      if (std::abs(wide(x[i])) == top) put(out[i], share * sign(wide(x[i])));
  }
}

// What one element of each row gets; the others get 0. `give` writes it, given where the row begins, its index and length.
template <class T, class Give>
void one_of_each_row(const Call& call, Give give) {
  T* out = static_cast<T*>(call.out);
  for_rows(call, [&](int64_t row, int64_t at, auto length) {
    std::memset(out + at, 0, length * sizeof(T));
    give(static_cast<const T*>(call.x) + at, out + at, row, length);
  });
}

// The gradient of the largest magnitude of each row, which its first element of that magnitude gets.
template <class T>
void row_absmax_share(const Call& call) {
  using C = Wide<T>;
  one_of_each_row<T>(call, [&](const T* x, T* out, int64_t row, auto length) {
    const int64_t place = first_of(x, length, absmax_bits(x, length));
    const C v = wide(x[place]);
    put(out[place], static_cast<const C*>(call.grad_of_scale)[row] * (v == v ? sign(v) : v));
  });
}

// The place of the first element of a value, which is there. Bits are compared, which makes vectors; both zeros have those of one.
template <class T, class L>
inline int64_t place_of(const T* x, L n, Wide<T> value) {
  using C = Wide<T>;
  if (value != value) return first_where(x, n, [](C v) { return magnitude_bits(v) > kInfinity<C>; });
  const Bits<C> bits = as<Bits<C>>(value + C(0));
  return first_where(x, n, [bits](C v) { return as<Bits<C>>(v + C(0)) == bits; });
}

// The gradient of an end of each row, `top`, which its first element of that value gets.
template <class T>
void row_end_share(const Call& call) {
  one_of_each_row<T>(call, [&](const T* x, T* out, int64_t row, auto length) {
    const Wide<T> end = wide(static_cast<const T*>(call.top)[row]);
    out[place_of(x, length, end)] = static_cast<const T*>(call.grad_of_scale)[row];
  });
}

}  // namespace
