// Numbers that a codebook names, in increasing order: the nearest, of two equally near the lower one.

#pragma once

#include "calls.h"

namespace {

constexpr int kEntries = 32;  // at most

template <class C>
struct Codebook {
  C entries[kEntries], middles[kEntries];
  int count;
};

template <class C>
Codebook<C> codebook_of(const Call& call) {
  Codebook<C> book;
  book.count = int(call.taps);
  for (int i = 0; i < book.count; i++) book.entries[i] = static_cast<const C*>(call.stored)[i];
  for (int i = 0; i + 1 < book.count; i++) book.middles[i] = (book.entries[i + 1] + book.entries[i]) / 2;
  return book;
}

// The entries nearest to some quotients, at most kBlock of them; NaN stays NaN.
template <class C>
inline void nearest(const C* v, C* entry, int64_t n, const Codebook<C>& book) {
  Bits<C> index[kBlock] = {};
  for (int k = 0; k + 1 < book.count; k++) {
    const C middle = book.middles[k];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) index[i] += v[i] > middle;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) entry[i] = v[i] == v[i] ? book.entries[index[i]] : v[i];
}

// The gradients of n values: what comes from behind, between the smallest and the largest entry; and the summands of the scale's.
template <class T, class C>
Sums codebook_gradient_piece(const T* g, const T* x, T* grad_x, int64_t n, C scale, const Codebook<C>& book) {
  const C low = book.entries[0], high = book.entries[book.count - 1];
  C v[kBlock], entry[kBlock];
  return of_blocks(n, [&](int64_t start, int64_t length) {
#pragma omp simd
    for (int64_t i = 0; i < length; i++) v[i] = wide(x[start + i]) / scale;
    nearest(v, entry, length, book);
    C of_scale = 0;
#pragma omp simd reduction(+ : of_scale)
    for (int64_t i = 0; i < length; i++) {
      const C upstream = wide(g[start + i]);
      const C moved = only_if((v[i] >= low) & (v[i] <= high), upstream);
      of_scale += upstream * entry[i] - moved * v[i];
      put(grad_x[start + i], moved);
    }
    return Sums{of_scale, 0, 0};
  });
}

template <class T>
void codebook_quantize(const Call& call) {
  using C = Wide<T>;
  const auto book = codebook_of<C>(call);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    const C scale = static_cast<const C*>(call.scale)[row % call.channels];
    C v[kBlock], entry[kBlock];
    for (int64_t start = at; start < at + n; start += kBlock) {
      const int64_t some = std::min(kBlock, at + n - start);
      const T* x = static_cast<const T*>(call.x) + start;
      T* y = static_cast<T*>(call.out) + start;
#pragma omp simd
      for (int64_t i = 0; i < some; i++) v[i] = wide(x[i]) / scale;
      nearest(v, entry, some, book);
#pragma omp simd
      for (int64_t i = 0; i < some; i++) put(y[i], entry[i] * scale);
    }
  });
}

}  // namespace
