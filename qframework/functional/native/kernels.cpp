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
void quantize_piece(const T* __restrict x, T* __restrict y, int64_t n, Grid<C> grid, bool rectify) {
  const C floor = rectify ? C(0) : -INFINITY;
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
Sums gradient_piece(const T* __restrict g, const T* __restrict x, T* __restrict grad_x, int64_t n, Grid<C> grid,
                    bool masked, bool rectify) {
  Sums sums;
  const C floor = rectify ? C(0) : -INFINITY;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    C of_scale = 0, of_zero = 0;
    if (masked) {
#pragma omp simd reduction(+ : of_scale, of_zero)
      for (int64_t i = start; i < end; i++) {
        C v = wide(x[i]), upstream = wide(g[i]);
        bool active = !(rectify & (v <= 0));
        v = v < floor ? floor : v;
        C exact = v / grid.scale, place = rounded<R>(exact + grid.zero);
        bool inside = !((place < grid.low) | (place > grid.high));
        C q = between(place, grid.low, grid.high);
        of_scale += (q - grid.zero - only_if(inside, exact)) * upstream;
        of_zero -= only_if(!inside, upstream);
        put(grad_x[i], only_if(inside & active, upstream));
      }
    } else {
#pragma omp simd reduction(+ : of_scale)
      for (int64_t i = start; i < end; i++) {
        C exact = wide(x[i]) / grid.scale;
        C q = between(rounded<R>(exact + grid.zero), grid.low, grid.high);
        of_scale += (q - grid.zero - exact) * wide(g[i]);
      }
    }
    sums.scale += of_scale;
    sums.zero += of_zero;
  }
  return sums;
}

template <class T>
double spread_count(const T* __restrict g, const T* __restrict x, T* __restrict grad_x, int64_t n, Wide<T> value,
                    bool magnitude, bool first) {
  using C = Wide<T>;
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; i++) {
    C v = wide(x[i]);
    count += (magnitude ? std::abs(v) : v) == value;
  }
  if (first) std::memcpy(grad_x, g, n * sizeof(T));
  return double(count);
}

template <class F>
void for_pieces(int64_t n, int64_t inner, int threads, F work) {
  const int64_t per_row = (inner + kPiece - 1) / kPiece, pieces = n / inner * per_row;
#pragma omp parallel for schedule(static) num_threads(threads) if (n >= kParallel && threads > 1)
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t row = piece / per_row, start = piece % per_row * kPiece;
    work(piece, row, row * inner + start, std::min(kPiece, inner - start));
  }
}

// Everything that the functions below share, as build.py lays it out.
struct Call {
  const void *g, *x;
  void* out;
  const void *scale, *zero;
  void *grad_scale, *grad_zero;
  int64_t n, channels, inner;
  double low, high;
  int32_t masked, rectify, threads;
};

template <class C>
Grid<C> grid_of(const Call& call, int64_t row) {
  const int64_t at = row % call.channels;
  const C* zero = static_cast<const C*>(call.zero);
  return {static_cast<const C*>(call.scale)[at], zero ? zero[at] : C(0), C(call.low), C(call.high)};
}

template <int R, class T>
void quantize(const Call& call) {
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.out);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t, int64_t row, int64_t at, int64_t n) {
    quantize_piece<R>(x + at, y + at, n, grid_of<Wide<T>>(call, row), call.rectify);
  });
}

template <int R, class T>
void gradients(const Call& call) {
  using C = Wide<T>;
  const T *g = static_cast<const T*>(call.g), *x = static_cast<const T*>(call.x);
  T* grad_x = static_cast<T*>(call.out);
  const int64_t per_row = (call.inner + kPiece - 1) / kPiece, rows = call.n / call.inner;
  std::vector<Sums> sums(rows * per_row), totals(call.channels);
  for_pieces(call.n, call.inner, call.threads, [&](int64_t piece, int64_t row, int64_t at, int64_t n) {
    T* place = grad_x ? grad_x + at : nullptr;
    sums[piece] = gradient_piece<R>(g + at, x + at, place, n, grid_of<C>(call, row), call.masked, call.rectify);
  });
  for (int64_t piece = 0; piece < rows * per_row; piece++) {
    Sums& total = totals[piece / per_row % call.channels];
    total.scale += sums[piece].scale;
    total.zero += sums[piece].zero;
  }
  C *of_scale = static_cast<C*>(call.grad_scale), *of_zero = static_cast<C*>(call.grad_zero);
  for (int64_t c = 0; c < call.channels; c++) {
    if (of_scale) of_scale[c] = C(totals[c].scale);
    if (of_zero) of_zero[c] = C(totals[c].zero * double(static_cast<const C*>(call.scale)[c]));
  }
}

template <class T>
void spread(const T* g, const T* x, T* grad_x, int64_t n, const Wide<T>* values, const Wide<T>* shares, int ends,
            bool magnitude, int threads) {
  using C = Wide<T>;
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  std::vector<double> counts(pieces);
  for (int end = 0; end < ends; end++) {
    for_pieces(n, n, threads, [&](int64_t piece, int64_t, int64_t at, int64_t size) {
      counts[piece] = spread_count(g + at, x + at, grad_x + at, size, values[end], magnitude, end == 0);
    });
    double count = 0;
    for (double c : counts) count += c;
    const C share = C(double(shares[end]) / count);
    for (int64_t piece = 0; piece < pieces; piece++) {
      if (counts[piece] == 0) continue;
      for (int64_t i = piece * kPiece; i < std::min(n, (piece + 1) * kPiece); i++) {
        C v = wide(x[i]);
        if ((magnitude ? std::abs(v) : v) != values[end]) continue;
        C sign = !magnitude ? C(1) : C((v > 0) - (v < 0));
        put(grad_x[i], wide(grad_x[i]) + share * sign);
      }
    }
  }
}

template <class T>
void rounded_by(bool gradient, int rounding, const Call& call) {
  switch (rounding) {
    case kRound: return gradient ? gradients<kRound, T>(call) : quantize<kRound, T>(call);
    case kCeil: return gradient ? gradients<kCeil, T>(call) : quantize<kCeil, T>(call);
    case kFloor: return gradient ? gradients<kFloor, T>(call) : quantize<kFloor, T>(call);
    default: return gradient ? gradients<kTruncate, T>(call) : quantize<kTruncate, T>(call);
  }
}

void dispatch(bool gradient, int dtype, int rounding, const Call& call) {
  if (dtype == 0) return rounded_by<float>(gradient, rounding, call);
  if (dtype == 1) return rounded_by<double>(gradient, rounding, call);
  rounded_by<Brain>(gradient, rounding, call);
}

template <class T>
void spread_any(const void* g, const void* x, void* out, int64_t n, const void* values, const void* shares, int ends,
                bool magnitude, int threads) {
  spread(static_cast<const T*>(g), static_cast<const T*>(x), static_cast<T*>(out), n,
         static_cast<const Wide<T>*>(values), static_cast<const Wide<T>*>(shares), ends, magnitude, threads);
}

}  // namespace

extern "C" {

// out = (q - zero) * scale,  q = clamp(round(x / scale + zero), low, high); of max(x, 0) where rectify.
void qframework_quantize(int dtype, int rounding, const Call* call) { dispatch(false, dtype, rounding, *call); }

// The gradients of x (into out, where masked), scale and zero point for that of the result, g.
void qframework_gradients(int dtype, int rounding, const Call* call) { dispatch(true, dtype, rounding, *call); }

// out = g, and each share divided among the elements of x, or of |x|, that equal the value at the same index.
void qframework_spread(int dtype, const void* g, const void* x, void* out, int64_t n, const void* values,
                       const void* shares, int ends, int magnitude, int threads) {
  auto* run = dtype == 0 ? spread_any<float> : dtype == 1 ? spread_any<double> : spread_any<Brain>;
  run(g, x, out, n, values, shares, ends, magnitude, threads);
}
}
