// What functions are called with, and how their work is shared out among threads.

#pragma once

#include <limits>
#include <vector>

#include "grids.h"

namespace {

constexpr int64_t kPiece = 1 << 14;  // elements that a thread takes at a time
constexpr int64_t kParallel = 1 << 15;

// The operands of all functions, as build.py lays them out; null where a function takes none.
struct Call {
  const void *g, *x;  // the gradient of the result, the values
  void* out;          // the result, or the gradient of the values
  void* scale;        // a number for each channel; written where it is made of `stored` or `top`
  const void *zero, *stored, *slope, *grad_of_scale;
  void *grad_scale, *grad_zero, *top;
  int64_t* where;
  int64_t n, channels, inner, taps;
  double low, high, smallest, threshold;
  double least_normal, overflow;  // of minifloats; an overflow of 0 says that they saturate
  int32_t mantissa_bits, clamp_gradient, relu, threads;  // a clamp_gradient of 2 says that integers are clipped first
  int32_t domain, exponent_rounding;  // of scales: any number, or powers of two, of which the exponent is rounded
  int32_t rounding;
};

template <class C>
Grid<C> grid_of(const Call& call) {
  Grid<C> grid;
  grid.scale = 1, grid.zero = 0;
  grid.low = C(call.low), grid.high = C(call.high);
  const bool saturates = call.overflow == 0;
  grid.over = saturates ? grid.high : C(call.overflow);
  grid.under = saturates || grid.low == 0 ? grid.low : -grid.over;
  grid.from = call.clamp_gradient || !(saturates || grid.low == 0) ? grid.low : C(-INFINITY);
  grid.to = call.clamp_gradient || !saturates ? grid.high : C(INFINITY);
  grid.infinite = saturates ? C(NAN) : C(1);
  grid.normal = magnitude_bits(C(call.least_normal));
  grid.shift = Bits<C>(call.mantissa_bits) << kFraction<C>;
  grid.clips_first = call.clamp_gradient == 2;
  constexpr Bits<C> sign = std::numeric_limits<Bits<C>>::min();
  grid.turns = call.rounding == kCeil ? sign : 0;
  grid.turns_negative = call.rounding == kTruncate ? sign : 0;
  return grid;
}

// The same with the scale and the zero point of a row.
template <class C>
Grid<C> grid_of(const Call& call, Grid<C> grid, int64_t row) {
  const int64_t at = row < call.channels ? row : row % call.channels;
  if (call.scale) grid.scale = static_cast<const C*>(call.scale)[at];
  if (call.zero) grid.zero = static_cast<const C*>(call.zero)[at];
  return grid;
}

inline int64_t pieces_of(int64_t row) { return (row + kPiece - 1) / kPiece; }

template <class F>
void for_pieces(int64_t n, int64_t inner, int threads, F work) {
  const int64_t per_row = pieces_of(inner), pieces = n / inner * per_row;
#pragma omp parallel for schedule(static) num_threads(threads) if (n >= kParallel && threads > 1)
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t row = piece / per_row, start = piece % per_row * kPiece;
    work(piece, row, row * inner + start, std::min(kPiece, inner - start));
  }
}

// Rows that have a scale each, while they are in the cache; `work` is given the number of a row, where it starts, and its length.
template <bool often = true, class F>
void for_rows(const Call& call, F work) {
  of_length<often>(call.inner, [&](auto length) {
    const int64_t rows = call.n / length, some = std::max<int64_t>(1, kPiece / length);
    const int64_t pieces = (rows + some - 1) / some;
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.n >= kParallel && call.threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++)
      for (int64_t row = piece * some; row < std::min(rows, (piece + 1) * some); row++) work(row, row * length, length);
  });
}

// The sums over the elements of each channel, and what comes in through the scale.
template <class C>
std::vector<Sums> by_channel(const Call& call, const std::vector<Sums>& sums) {
  std::vector<Sums> totals(call.channels);
  for (size_t piece = 0; piece < sums.size(); piece++) {
    totals[int64_t(piece) / pieces_of(call.inner) % call.channels] += sums[piece];
  }
  if (call.grad_of_scale)
    for (int64_t c = 0; c < call.channels; c++) totals[c].scale += static_cast<const C*>(call.grad_of_scale)[c];
  return totals;
}

}  // namespace
