// Quantization and its gradients, each in one pass over memory; compiled and called by build.py.
//
// A tensor of n elements lies in rows of `inner` elements; row r has the scale and zero point of index r % channels.
// Results don't depend on the number of threads: sums are those of fixed pieces, added in order, in double precision.
// No contraction, no reassociation but that of the sums: values are those of torch, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kPiece = 1 << 14;  // elements that a thread takes at a time
constexpr int64_t kBlock = 1 << 9;   // elements that are summed in the precision of the tensor
constexpr int64_t kParallel = 1 << 15;

struct Brain {
  uint16_t bits;
};

inline float wide(float v) { return v; }
inline double wide(double v) { return v; }
inline float wide(Brain v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void put(float& place, float v) { place = v; }
inline void put(double& place, double v) { place = v; }
inline void put(Brain& place, float v) {  // half to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  place.bits = uint16_t(v != v ? 0x7fc0 : rounded);
}

template <class T>
using Wide = decltype(wide(T()));
template <class C>
using Bits = std::conditional_t<std::is_same_v<C, float>, int32_t, int64_t>;

// v, or 0: without a branch, which would keep a loop from becoming vectors.
template <class C>
inline C only_if(bool wanted, C v) {
  Bits<C> bits;
  std::memcpy(&bits, &v, sizeof v);
  bits &= -Bits<C>(wanted);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class C>
inline Bits<C> magnitude_bits(C v) {
  Bits<C> bits;
  v = std::abs(v);
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

template <class C>
inline C sign(C v) {
  return C((v > 0) - (v < 0));
}

template <class C>
inline C between(C v, C low, C high) {  // NaN stays NaN
  v = v < low ? low : v;
  return v > high ? high : v;
}

enum Rounding { kRound, kCeil, kFloor, kTruncate };

template <int R>
inline float rounded(float v) {
  if constexpr (R == kRound) return __builtin_rintf(v);
  if constexpr (R == kCeil) return __builtin_ceilf(v);
  if constexpr (R == kFloor) return __builtin_floorf(v);
  return __builtin_truncf(v);
}

template <int R>
inline double rounded(double v) {
  if constexpr (R == kRound) return __builtin_rint(v);
  if constexpr (R == kCeil) return __builtin_ceil(v);
  if constexpr (R == kFloor) return __builtin_floor(v);
  return __builtin_trunc(v);
}

// The numbers that a row is quantized by.
template <class C>
struct Grid {
  C scale, zero, low, high;
};

template <int R, class T, class C>
void quantize_piece(const T* __restrict x, T* __restrict y, int64_t n, Grid<C> grid, bool relu) {
  const C floor = relu ? C(0) : -INFINITY;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C v = wide(x[i]);
    v = v < floor ? floor : v;
    C q = between(rounded<R>(v / grid.scale + grid.zero), grid.low, grid.high);
    put(y[i], (q - grid.zero) * grid.scale);
  }
}

struct Sums {
  double scale = 0, zero = 0;
};

// The scale's summand is, inside of the range, q - x / scale, the difference itself, since the sum of each part is large;
// outside it is the clipped integer.
template <int R, class T, class C>
Sums clamped_piece(const T* __restrict g, const T* __restrict x, T* __restrict grad_x, int64_t n, Grid<C> grid,
                  bool relu) {
  Sums sums;
  const C floor = relu ? C(0) : -INFINITY;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    C of_scale = 0, of_zero = 0;
#pragma omp simd reduction(+ : of_scale, of_zero)
    for (int64_t i = start; i < end; i++) {
      C v = wide(x[i]), upstream = wide(g[i]);
      bool active = !(relu & (v <= 0));
      v = v < floor ? floor : v;
      C exact = v / grid.scale, place = rounded<R>(exact + grid.zero);
      bool inside = !((place < grid.low) | (place > grid.high));
      C q = between(place, grid.low, grid.high);
      of_scale += (q - grid.zero - only_if(inside, exact)) * upstream;
      of_zero -= only_if(!inside, upstream);
      put(grad_x[i], only_if(inside & active, upstream));
    }
    sums.scale += of_scale;
    sums.zero += of_zero;
  }
  return sums;
}

// The same where the gradient passes everywhere; with `grad_x` it is copied there, and elements of magnitude `top` counted.
template <int R, class T, class C>
Sums passing_piece(const T* __restrict g, const T* __restrict x, T* __restrict grad_x, int64_t n, Grid<C> grid, C top) {
  Sums sums;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    C of_scale = 0;
    int32_t count = 0;
    if (grad_x) std::memcpy(grad_x + start, g + start, (end - start) * sizeof(T));
#pragma omp simd reduction(+ : of_scale, count)
    for (int64_t i = start; i < end; i++) {
      C v = wide(x[i]), exact = v / grid.scale;
      C q = between(rounded<R>(exact + grid.zero), grid.low, grid.high);
      of_scale += (q - grid.zero - exact) * wide(g[i]);
      count += std::abs(v) == top;
    }
    sums.scale += of_scale;
    sums.zero += count;
  }
  return sums;
}

template <class T>
int64_t copy_and_count(const T* __restrict g, const T* __restrict x, T* __restrict grad_x, int64_t n, Wide<T> value) {
  int32_t count = 0;
  if (g) std::memcpy(grad_x, g, n * sizeof(T));
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; i++) count += wide(x[i]) == value;
  return count;
}

// The largest magnitude, as an integer.
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

// g, and each share divided among the elements that equal the value at its index.
template <class T>
void spread(const T* g, const T* x, T* grad_x, int64_t n, const Wide<T>* values, const Wide<T>* shares, int ends,
            int threads) {
  std::vector<int64_t> counts(pieces_of(n));
  for (int end = 0; end < ends; end++) {
    const Wide<T> value = values[end];
    for_pieces(n, n, threads, [&](int64_t piece, int64_t, int64_t at, int64_t size) {
      counts[piece] = copy_and_count(end == 0 ? g + at : nullptr, x + at, grad_x + at, size, value);
    });
    int64_t count = 0;
    for (int64_t c : counts) count += c;
    const Wide<T> share = Wide<T>(double(shares[end]) / double(count));
    for (int64_t piece = 0; piece < pieces_of(n); piece++) {
      if (!counts[piece]) continue;
      for (int64_t i = piece * kPiece; i < std::min(n, (piece + 1) * kPiece); i++)
        if (wide(x[i]) == value) put(grad_x[i], wide(grad_x[i]) + share);
    }
  }
}

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
  int32_t clamp_gradient, relu, threads;
};

template <class C>
Grid<C> grid_of(const Call& call, int64_t row) {
  const int64_t at = row % call.channels;
  const C* zero = static_cast<const C*>(call.zero);
  return {static_cast<const C*>(call.scale)[at], zero ? zero[at] : C(0), C(call.low), C(call.high)};
}

// scale = max(|magnitude|, smallest) / threshold
template <class C>
void make_scale(const Call& call, const void* magnitudes) {
  const C* from = static_cast<const C*>(magnitudes);
  C* scale = static_cast<C*>(call.scale);
  for (int64_t c = 0; c < call.channels; c++) {
    C magnitude = std::abs(from[c]);
    if (magnitude < C(call.smallest)) magnitude = C(call.smallest);
    scale[c] = magnitude / C(call.threshold);
  }
}

template <int R, class T>
void quantize(const Call& call) {
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.out);
  if (call.stored) make_scale<Wide<T>>(call, call.stored);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    quantize_piece<R>(x + at, y + at, n, grid_of<Wide<T>>(call, row), call.relu);
  });
}

// The sums over the elements of each piece.
template <int R, class T>
std::vector<Sums> summed(const Call& call) {
  using C = Wide<T>;
  const T *g = static_cast<const T*>(call.g), *x = static_cast<const T*>(call.x);
  T* grad_x = static_cast<T*>(call.out);
  const C top = call.top && !call.where ? *static_cast<const C*>(call.top) : C(-1);
  std::vector<Sums> sums(call.n / call.inner * pieces_of(call.inner));
  for_pieces(call.n, call.inner, call.threads, [&](int64_t piece, int64_t row, int64_t at, int64_t n) {
    const auto grid = grid_of<C>(call, row);
    if (!call.clamp_gradient)
      sums[piece] = passing_piece<R>(g + at, x + at, grad_x ? grad_x + at : nullptr, n, grid, top);
    else
      sums[piece] = clamped_piece<R>(g + at, x + at, grad_x + at, n, grid, call.relu);
  });
  return sums;
}

// The sums over the elements of each channel, and what comes in through the scale.
template <class C>
std::vector<Sums> by_channel(const Call& call, const std::vector<Sums>& sums) {
  std::vector<Sums> totals(call.channels);
  for (size_t piece = 0; piece < sums.size(); piece++) {
    Sums& total = totals[int64_t(piece) / pieces_of(call.inner) % call.channels];
    total.scale += sums[piece].scale;
    total.zero += sums[piece].zero;
  }
  if (call.grad_of_scale)
    for (int64_t c = 0; c < call.channels; c++) totals[c].scale += static_cast<const C*>(call.grad_of_scale)[c];
  return totals;
}

template <int R, class T>
void gradients(const Call& call) {
  using C = Wide<T>;
  const std::vector<Sums> totals = by_channel<C>(call, summed<R, T>(call));
  const C *stored = static_cast<const C*>(call.stored), *scale = static_cast<const C*>(call.scale);
  C *of_scale = static_cast<C*>(call.grad_scale), *of_zero = static_cast<C*>(call.grad_zero);
  for (int64_t c = 0; c < call.channels; c++) {
    double total = totals[c].scale;
    if (stored) total *= (stored[c] >= 0 ? 1 : -1) / call.threshold;
    if (of_scale) of_scale[c] = C(total);
    if (of_zero) of_zero[c] = C(totals[c].zero * double(scale[c]));
  }
}

// A row of `inner` elements in channels-last format has `taps` groups of them, whose indices are `taps` apart.
inline int64_t index_of(const Call& call, int64_t place) {
  const int64_t groups = call.inner / call.taps;
  return place % groups * call.taps + place / groups;
}

inline int64_t place_of(const Call& call, int64_t index) {
  return index % call.taps * (call.inner / call.taps) + index / call.taps;
}

// The largest magnitude of each channel, and its first index; magnitudes are compared as integers, so that NaN is the
// largest; the scale that they make, and all that is quantized by it.
template <int R, class T>
void absmax(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  const int64_t per_row = pieces_of(call.inner);
  std::vector<Bits<C>> tops(call.n / call.inner * per_row);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t piece, int64_t, int64_t at, int64_t n) {
    tops[piece] = absmax_bits(x + at, n);
  });
  for (int64_t c = 0; c < call.channels; c++) {
    const Bits<C> top = *std::max_element(&tops[c * per_row], &tops[c * per_row] + per_row);
    std::memcpy(static_cast<C*>(call.top) + c, &top, sizeof top);
    if (!call.where) continue;
    int64_t first = call.inner;
    for (int64_t at = 0; at < call.inner; at++)
      if (magnitude_bits(wide(x[c * call.inner + at])) == top) {
        first = std::min(first, index_of(call, at));
        if (call.taps == 1) break;
      }
    call.where[c] = first;
  }
  make_scale<C>(call, call.top);
  quantize<R, T>(call);
}

// The gradient of a weight that is quantized by its largest magnitudes: that of the result, and, through the scale, a
// share for the elements of that magnitude; for the one at `where`, if that is given.
template <int R, class T>
void absmax_gradients(const Call& call) {
  using C = Wide<T>;
  const T* x = static_cast<const T*>(call.x);
  T* out = static_cast<T*>(call.out);
  const C *top = static_cast<const C*>(call.top), *slope = static_cast<const C*>(call.slope);
  const std::vector<Sums> sums = summed<R, T>(call), totals = by_channel<C>(call, sums);
  for (int64_t c = 0; c < call.channels; c++) {
    double share = totals[c].scale;
    if (slope)
      share *= slope[c];
    else
      share *= (call.smallest > 0 || top[c] > 0) / call.threshold;
    if (call.where) {
      const int64_t at = c * call.inner + place_of(call, call.where[c]);
      put(out[at], wide(out[at]) + C(share) * sign(wide(x[at])));
    } else if (*top > 0) {
      share /= totals[0].zero;
      for (int64_t piece = 0; piece < pieces_of(call.n); piece++) {
        if (sums[piece].zero == 0) continue;
        for (int64_t i = piece * kPiece; i < std::min(call.n, (piece + 1) * kPiece); i++)
          if (std::abs(wide(x[i])) == *top) put(out[i], wide(out[i]) + C(share) * sign(wide(x[i])));
      }
    }
  }
}

enum Function { kQuantize, kGradients, kAbsmax, kAbsmaxGradients };

template <int R, class T>
void run(int function, const Call& call) {
  switch (function) {
    case kQuantize: return quantize<R, T>(call);
    case kGradients: return gradients<R, T>(call);
    case kAbsmax: return absmax<R, T>(call);
    default: return absmax_gradients<R, T>(call);
  }
}

template <class T>
void run_rounded(int function, int rounding, const Call& call) {
  switch (rounding) {
    case kRound: return run<kRound, T>(function, call);
    case kCeil: return run<kCeil, T>(function, call);
    case kFloor: return run<kFloor, T>(function, call);
    default: return run<kTruncate, T>(function, call);
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

void qframework_run(int function, int dtype, int rounding, const Call* call) {
  if (dtype == 0) return run_rounded<float>(function, rounding, *call);
  if (dtype == 1) return run_rounded<double>(function, rounding, *call);
  run_rounded<Brain>(function, rounding, *call);
}

// As kQuantize, for values and a result that `call` doesn't name.
void qframework_quantize(int dtype, int rounding, const Call* call, const void* x, void* out, int64_t n, int relu,
                         int threads) {
  Call of_these = *call;
  of_these.x = x;
  of_these.out = out;
  of_these.n = of_these.inner = n;
  of_these.channels = 1;
  of_these.relu = relu;
  of_these.threads = threads;
  qframework_run(kQuantize, dtype, rounding, &of_these);
}

void qframework_spread(int dtype, const void* g, const void* x, void* out, int64_t n, const void* values,
                       const void* shares, int ends, int threads) {
  auto* run = dtype == 0 ? spread_any<float> : dtype == 1 ? spread_any<double> : spread_any<Brain>;
  run(g, x, out, n, values, shares, ends, threads);
}
}
