// Numbers as torch stores them, and what is done to the bits of a number without a branch, so that loops become vectors.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

struct Brain {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float wide(float v) { return v; }
inline double wide(double v) { return v; }
inline float wide(Brain v) { return as<float>(uint32_t(v.bits) << 16); }
inline float wide(Half v) {
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t finite = as<uint32_t>(as<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return as<float>(bits | uint32_t(v.bits & 0x8000) << 16);
}

inline void put(float& place, float v) { place = v; }
inline void put(double& place, double v) { place = v; }
inline void put(Brain& place, float v) {  // half to even; NaN stays NaN
  const uint32_t bits = as<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  place.bits = uint16_t(v != v ? 0x7fc0 : rounded);
}
inline void put(Half& place, float v) {  // likewise; a sum with 1/2 rounds subnormal numbers
  const uint32_t magnitude = as<uint32_t>(v) & 0x7fffffff;
  const uint32_t small = as<uint32_t>(as<float>(magnitude) + 0.5f) - as<uint32_t>(0.5f);
  uint32_t rounded = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded;
  rounded = magnitude < 0x38800000 ? small : rounded;
  rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;
  place.bits = uint16_t(rounded | (as<uint32_t>(v) >> 16 & 0x8000));
}

template <class T>
using Wide = decltype(wide(T()));
template <class C>
using Bits = std::conditional_t<std::is_same_v<C, float>, int32_t, int64_t>;

// Bits of the significand without the leading one; the exponent's bits of 1.
template <class C>
constexpr int kFraction = std::is_same_v<C, float> ? 23 : 52;
template <class C>
constexpr Bits<C> kOne = std::is_same_v<C, float> ? Bits<C>(127) << 23 : Bits<C>(1023) << (kFraction<C> % 64);
// The exponent's bits of infinity.
template <class C>
constexpr Bits<C> kInfinity = std::is_same_v<C, float> ? Bits<C>(255) << 23 : Bits<C>(2047) << (kFraction<C> % 64);

// v, or 0: without a branch, which would keep a loop from becoming vectors.
template <class C>
inline C only_if(bool wanted, C v) {
  return as<C>(as<Bits<C>>(v) & -Bits<C>(wanted));
}

template <class C>
inline Bits<C> magnitude_bits(C v) {
  return as<Bits<C>>(std::abs(v));
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

}  // namespace
