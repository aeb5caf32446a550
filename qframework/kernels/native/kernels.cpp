// Quantization and its gradients, each in one pass over memory; compiled by compilation.py, called by calls.py.
//
// A tensor of n elements lies in rows of `inner` elements; row r has the scale and zero point of index r % channels.
// Results don't depend on the number of threads: sums are those of fixed pieces, added in order, in double precision.
// No contraction, no reassociation but that of the sums: values are those of torch, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "codebooks.h"
#include "magnitudes.h"
#include "signs.h"
#include "watched.h"

namespace {

// How many elements equal each of two values.
struct Counts {
  int64_t first = 0, second = 0;
};

template <class T>
Counts copy_and_count(const T* g, const T* __restrict x, T* grad_x, int64_t n, Wide<T> first, Wide<T> second) {
  int32_t firsts = 0, seconds = 0;
  if (g != grad_x) std::memcpy(grad_x, g, n * sizeof(T));
#pragma omp simd reduction(+ : firsts, seconds)
  for (int64_t i = 0; i < n; i++) {
    const Wide<T> v = wide(x[i]);
    firsts += v == first;
    seconds += v == second;
  }
  return {firsts, seconds};
}

// g, and each share divided among the elements that equal the value at its index.
template <class T>
void spread(const T* g, const T* x, T* grad_x, int64_t n, const Wide<T>* values, const Wide<T>* shares, int ends,
            int threads) {
  std::vector<Counts> counts(pieces_of(n));
  for_pieces(n, n, threads, [&](int64_t piece, int64_t, int64_t at, int64_t size) {
    counts[piece] = copy_and_count(g + at, x + at, grad_x + at, size, values[0], values[ends - 1]);
  });
  for (int end = 0; end < ends; end++) {
    const Wide<T> value = values[end];
    const auto of_end = [&](int64_t piece) { return end == 0 ? counts[piece].first : counts[piece].second; };
    int64_t count = 0;
    for (int64_t piece = 0; piece < pieces_of(n); piece++) count += of_end(piece);
    const Wide<T> share = Wide<T>(double(shares[end]) / double(count));
    for (int64_t piece = 0; piece < pieces_of(n); piece++) {
      if (!of_end(piece)) continue;
      for (int64_t i = piece * kPiece; i < std::min(n, (piece + 1) * kPiece); i++)
        if (wide(x[i]) == value) put(grad_x[i], wide(grad_x[i]) + share);
    }
  }
}

// max(|magnitude|, smallest) / threshold
template <class C>
C scale_of(const Call& call, C magnitude) {
  magnitude = std::abs(magnitude);
  return (magnitude < C(call.smallest) ? C(call.smallest) : magnitude) / C(call.threshold);
}

template <class C>
void make_scale(const Call& call, const void* magnitudes) {
  for (int64_t c = 0; c < call.channels; c++)
    static_cast<C*>(call.scale)[c] = scale_of(call, static_cast<const C*>(magnitudes)[c]);
}

// The derivative of a scale by the largest magnitude. A rounded logarithm passes gradients on, and so does the bound.
template <class C>
double scale_slope(const Call& call, C top, C scale) {
  if (call.domain == 0) return (call.smallest > 0 || top > 0) / call.threshold;
  const double v = std::max(double(top), call.smallest);
  double size = double(scale) * call.threshold;
  if (size <= call.smallest && call.domain == 2) {
    const double exponent = std::log2(v);
    const double whole[] = {std::nearbyint(exponent), std::ceil(exponent), std::floor(exponent), std::trunc(exponent)};
    size = std::exp2(whole[call.exponent_rounding]);
  }
  return size / (call.threshold * v);
}

template <int R, class T>
void quantize(const Call& call) {
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.out);
  if (call.stored) make_scale<Wide<T>>(call, call.stored);
  const auto grid = grid_of<Wide<T>>(call);
  if (call.inner <= kPiece)
    return for_rows<kOften<R, T>>(call, [&](int64_t row, int64_t at, auto length) {
      quantize_piece<R>(x + at, y + at, length, grid_of(call, grid, row), call.relu);
    });
  for_pieces(call.n, call.inner, call.threads, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    quantize_piece<R>(x + at, y + at, n, grid_of(call, grid, row), call.relu);
  });
}

// The sums over the elements of each piece.
template <int R, class T>
std::vector<Sums> summed(const Call& call) {
  using C = Wide<T>;
  const T *g = static_cast<const T*>(call.g), *x = static_cast<const T*>(call.x);
  T* grad_x = static_cast<T*>(call.out);
  const C top = call.top && !call.where ? *static_cast<const C*>(call.top) : C(-1);
  const auto any = grid_of<C>(call);
  std::vector<Sums> sums(call.n / call.inner * pieces_of(call.inner));
  for_pieces(call.n, call.inner, call.threads, [&](int64_t piece, int64_t row, int64_t at, int64_t n) {
    const auto grid = grid_of(call, any, row);
    sums[piece] = gradient_piece<R>(g + at, x + at, grad_x ? grad_x + at : nullptr, n, grid, call.clamp_gradient,
                                    call.relu, top);
  });
  return sums;
}

// The gradients of the values of a row, and the sums over it.
template <int R, class T, class L>
INLINE Sums row_sums(const Call& call, const Grid<Wide<T>>& any, int64_t row, int64_t at, L length) {
  using C = Wide<T>;
  const T *g = static_cast<const T*>(call.g) + at, *x = static_cast<const T*>(call.x) + at;
  T* out = call.out ? static_cast<T*>(call.out) + at : nullptr;
  const Grid<C> grid = grid_of(call, any, row);
  Sums sums = gradient_piece<R>(g, x, out, length, grid, call.clamp_gradient, call.relu, C(-1));
  if (call.grad_of_scale) sums.scale += static_cast<const C*>(call.grad_of_scale)[row];
  return sums;
}

// The gradients of a channel's scale, or of what it was made of, and of its zero point.
template <class C>
void put_gradients(const Call& call, int64_t channel, const Sums& sums) {
  const C* stored = static_cast<const C*>(call.stored);
  double total = sums.scale;
  if (stored) total *= (stored[channel] >= 0 ? 1 : -1) / call.threshold;
  if (call.grad_scale) static_cast<C*>(call.grad_scale)[channel] = C(total);
  if (!call.grad_zero) return;
  static_cast<C*>(call.grad_zero)[channel] = C(sums.zero * double(static_cast<const C*>(call.scale)[channel]));
}

template <int R, class T>
void gradients(const Call& call) {
  using C = Wide<T>;
  if (call.channels * call.inner == call.n && call.inner <= kPiece) {
    const auto grid = grid_of<C>(call);
    for_rows<kOften<R, T>>(call, [&](int64_t row, int64_t at, auto length) {
      put_gradients<C>(call, row, row_sums<R, T>(call, grid, row, at, length));
    });
    return;
  }
  const std::vector<Sums> totals = by_channel<C>(call, summed<R, T>(call));
  for (int64_t c = 0; c < call.channels; c++) put_gradients<C>(call, c, totals[c]);
}

// Where the element of a magnitude is whose index is the first: a row of `inner` elements in channels-last format has `taps` groups of
// them, whose indices are `taps` apart.
template <class T, class L>
inline int64_t first_in_row(const Call& call, const T* x, L length, Bits<Wide<T>> magnitude) {
  if (call.taps == 1) return first_of(x, length, magnitude);
  const int64_t groups = call.inner / call.taps;
  int64_t place = 0, first = call.inner;
  for (int64_t i = 0; i < call.inner; i++) {
    const int64_t index = i % groups * call.taps + i / groups;
    if (magnitude_bits(wide(x[i])) == magnitude && index < first) first = index, place = i;
  }
  return place;
}

// The largest magnitude of the tensor, the scale that it makes, and all that is quantized by that.
template <int R, class T>
void absmax(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  std::vector<Bits<C>> tops(pieces_of(call.n));
  for_pieces(call.n, call.n, call.threads, [&](int64_t piece, int64_t, int64_t at, int64_t n) {
    tops[piece] = absmax_bits(x + at, n);
  });
  *static_cast<C*>(call.top) = as<C>(*std::max_element(tops.begin(), tops.end()));
  make_scale<C>(call, call.top);
  quantize<R, T>(call);
}

// The gradient of a tensor that is quantized by its largest magnitude: that of the result, and, through the scale, a share for
// the elements of that magnitude.
template <int R, class T>
void absmax_gradients(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  T* out = static_cast<T*>(call.out);
  const C top = *static_cast<const C*>(call.top);
  const std::vector<Sums> sums = summed<R, T>(call);
  const Sums total = by_channel<C>(call, sums)[0];
  if (!(top > 0)) return;
  const C share = C(total.scale * scale_slope<C>(call, top, *static_cast<const C*>(call.scale)) / total.count);
  for (int64_t piece = 0; piece < pieces_of(call.n); piece++) {
    if (sums[piece].count == 0) continue;
    for (int64_t i = piece * kPiece; i < std::min(call.n, (piece + 1) * kPiece); i++)
      if (std::abs(wide(x[i])) == top) put(out[i], wide(out[i]) + share * sign(wide(x[i])));
  }
}

// As absmax, for the scale of each row.
template <int R, class T>
void row_absmax(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  const auto grid = grid_of<C>(call);
  for_rows<kOften<R, T>>(call, [&](int64_t row, int64_t at, auto length) {
    static_cast<C*>(call.scale)[row] = scale_of(call, as<C>(absmax_bits(x + at, length)));
    quantize_piece<R>(x + at, static_cast<T*>(call.out) + at, length, grid_of(call, grid, row), false);
  });
}

// As absmax_gradients; of each row the first element of the largest magnitude gets the share.
template <int R, class T>
void row_absmax_gradients(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  T* out = static_cast<T*>(call.out);
  const auto grid = grid_of<C>(call);
  for_rows<kOften<R, T>>(call, [&](int64_t row, int64_t at, auto length) {
    const Bits<C> top = absmax_bits(x + at, length);
    const int64_t place = at + first_in_row(call, x + at, length, top);
    const double whole = row_sums<R, T>(call, grid, row, at, length).scale;
    const C scale = static_cast<const C*>(call.scale)[row], share = C(whole * scale_slope<C>(call, as<C>(top), scale));
    if (top > 0) put(out[place], wide(out[place]) + share * sign(wide(x[place])));
  });
}

// The summands that row_absmax_gradients has of each row, and where the element is that gets them, for gradients that are those of the
// values as they are; and the quantized values, where there is room for them.
template <int R, class T>
void row_absmax_sums(const Call& call) {
  using C = Wide<T>;
  const T *g = static_cast<const T*>(call.g), *x = static_cast<const T*>(call.x);
  const auto grid = grid_of<C>(call);
  for_rows<kOften<R, T>>(call, [&](int64_t row, int64_t at, auto length) {
    call.where[row] = first_of(x + at, length, absmax_bits(x + at, length));
    const Grid<C> of_row = grid_of(call, grid, row);
    T* y = call.out ? static_cast<T*>(call.out) + at : nullptr;
    const Sums sums = passing_piece<R, T>(g + at, x + at, nullptr, length, of_row, C(-1), y);
    static_cast<C*>(call.grad_scale)[row] = C(sums.scale);
  });
}

enum Function { kQuantize, kGradients, kAbsmax, kAbsmaxGradients, kRowAbsmax, kRowAbsmaxGradients, kRowAbsmaxSums };

template <int R, class T>
void run(int function, const Call& call) {
  switch (function) {
    case kQuantize: return quantize<R, T>(call);
    case kGradients: return gradients<R, T>(call);
    case kAbsmax: return absmax<R, T>(call);
    case kAbsmaxGradients: return absmax_gradients<R, T>(call);
    case kRowAbsmax: return row_absmax<R, T>(call);
    case kRowAbsmaxGradients: return row_absmax_gradients<R, T>(call);
    default: break;
  }
  if constexpr (R < kMinifloat) row_absmax_sums<R, T>(call);
}

template <class T>
void run_rounded(int function, const Call& call) {
  switch (call.rounding) {
    case kRound: return run<kRound, T>(function, call);
    case kMinifloat: return run<kMinifloat, T>(function, call);
    default: return run<kFloor, T>(function, call);
  }
}

// What a function of the library takes of each dtype, in the order of tensors.py.
template <class F>
void of_dtype(int dtype, F work) {
  switch (dtype) {
    case 0: return work(float());
    case 1: return work(double());
    case 2: return work(Brain());
    default: return work(Half());
  }
}

template <class T>
void spread_any(const void* g, const void* x, void* out, int64_t n, const void* values, const void* shares, int ends,
                int threads) {
  spread(static_cast<const T*>(g), static_cast<const T*>(x), static_cast<T*>(out), n,
         static_cast<const Wide<T>*>(values), static_cast<const Wide<T>*>(shares), ends, threads);
}

}  // namespace

extern "C" {

// A function for a scheme, whose call names no tensors, and for tensors.
void qframework_run(int function, int dtype, const Call* scheme, const void* x, const void* g, void* out, void* scale,
                    const void* zero, const void* stored, const void* grad_of_scale, void* grad_scale, void* grad_zero,
                    void* top, int64_t* where, int64_t n, int64_t channels, int64_t inner, int64_t taps, int threads) {
  Call call = *scheme;
  call.x = x, call.g = g, call.out = out, call.scale = scale, call.zero = zero, call.stored = stored;
  call.grad_of_scale = grad_of_scale, call.grad_scale = grad_scale, call.grad_zero = grad_zero;
  call.top = top, call.where = where;
  call.n = n, call.channels = channels, call.inner = inner, call.taps = taps, call.threads = threads;
  of_dtype(dtype, [&](auto t) { run_rounded<decltype(t)>(function, call); });
}

int qframework_can_watch() { return can_watch(); }

int qframework_is_same(const Watched* watched) { return is_same(*watched); }

// Let memory that is about to be written for the first time come in large pages: to bring it in small ones takes longer than to write it.
void qframework_in_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = 1 << 21;
  const uintptr_t start = (uintptr_t(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (uintptr_t(memory) + bytes) / kLarge * kLarge;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// The nearest entries of a codebook of `taps` entries that are `stored`.
void qframework_codebook(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) { codebook_quantize<decltype(t)>(*call); });
}

// The scale with the sign of each value, and the gradients.
void qframework_signs(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) { signs<decltype(t)>(*call); });
}

void qframework_signs_gradients(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) { signs_gradients<decltype(t)>(*call); });
}

// The gradients of values and scale of qframework_codebook.
void qframework_codebook_gradients(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) { codebook_gradients<decltype(t)>(*call); });
}

// The largest magnitude of each row, into `top`.
void qframework_row_tops(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) { row_tops<decltype(t)>(*call); });
}

// The gradient of the largest magnitude of the tensor, or of each row.
void qframework_absmax_share(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    call->top ? absmax_share<T>(*call) : row_absmax_share<T>(*call);
  });
}

// The gradient of an end of each row.
void qframework_row_end_share(int dtype, const Call* call) {
  of_dtype(dtype, [&](auto t) { row_end_share<decltype(t)>(*call); });
}

void qframework_spread(int dtype, const void* g, const void* x, void* out, int64_t n, const void* values,
                       const void* shares, int ends, int threads) {
  of_dtype(dtype, [&](auto t) { spread_any<decltype(t)>(g, x, out, n, values, shares, ends, threads); });
}
}
