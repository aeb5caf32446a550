// Numbers that a codebook names, in increasing order: the nearest, of two equally near the lower one.

#pragma once

#include <utility>

#include "calls.h"

namespace {

constexpr int kEntries = 32;  // at most

template <class C>
struct Codebook {
  C entries[kEntries], middles[kEntries];
  int count;
};

// Behind the last entry nothing is beyond a middle.
template <class C>
Codebook<C> codebook_of(const Call& call) {
  Codebook<C> book;
  book.count = int(call.taps);
  const C* entries = static_cast<const C*>(call.stored);
  for (int i = 0; i < kEntries; i++) {
    book.entries[i] = entries[std::min(i, book.count - 1)];
    book.middles[i] = i + 1 < book.count ? (entries[i + 1] + entries[i]) / 2 : C(INFINITY);
  }
  return book;
}

// One comparison for each middle, written out, since compilers make no vectors of a loop in a loop here.
template <class C, size_t... k>
__attribute__((noinline)) void nearest_of(const C* __restrict v, C* __restrict entry, int64_t n, const Codebook<C>& of,
                       std::index_sequence<k...>) {
  const Codebook<C> book = of;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const C seen = v[i];
    C found = book.entries[0];
    ((found = seen > book.middles[k] ? book.entries[k + 1] : found), ...);
    entry[i] = seen == seen ? found : seen;
  }
}

// The entries nearest to some quotients, at most kBlock of them; NaN stays NaN.
template <class C>
inline void nearest(const C* v, C* entry, int64_t n, const Codebook<C>& book) {
  if (book.count <= 8) return nearest_of(v, entry, n, book, std::make_index_sequence<7>());
  if (book.count <= 16) return nearest_of(v, entry, n, book, std::make_index_sequence<15>());
  nearest_of(v, entry, n, book, std::make_index_sequence<kEntries - 1>());
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
    Terms<C> of_scale;
#pragma omp simd
    for (int64_t i = 0; i < length; i++) {
      const C upstream = wide(g[start + i]);
      const C moved = only_if((v[i] >= low) & (v[i] <= high), upstream);
      of_scale.of[i] = upstream * entry[i] - moved * v[i];
      put(grad_x[start + i], moved);
    }
    return Sums{of_scale.sum(length), 0, 0};
  });
}

template <class T>
void codebook_quantize(const Call& call) {
  using C = Wide<T>;
  const auto book = codebook_of<C>(call);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    const C scale = static_cast<const C*>(call.scale)[row < call.channels ? row : row % call.channels];
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

// The gradients of values and scale of codebook_quantize.
template <class T>
void codebook_gradients(const Call& call) {
  using C = Wide<T>;
  const auto book = codebook_of<C>(call);
  const T *g = static_cast<const T*>(call.g), *x = static_cast<const T*>(call.x);
  std::vector<Sums> sums(call.n / call.inner * pieces_of(call.inner));
  for_pieces(call.n, call.inner, call.threads, [&](int64_t piece, int64_t row, int64_t at, int64_t n) {
    const C scale = static_cast<const C*>(call.scale)[row < call.channels ? row : row % call.channels];
    sums[piece] = codebook_gradient_piece(g + at, x + at, static_cast<T*>(call.out) + at, n, scale, book);
  });
  const std::vector<Sums> totals = by_channel<C>(call, sums);
  for (int64_t c = 0; c < call.channels; c++) static_cast<C*>(call.grad_scale)[c] = C(totals[c].scale);
}

}  // namespace
