// SIMD for the row kernels through the compiler's vector types (GCC and Clang, any instruction set): 64 bytes wide,
// which the compiler splits where the machine is narrower. Everything here has internal linkage (see core/defs.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace mallowspo {
namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int width = 16;
  typedef float Vec __attribute__((vector_size(64)));
  typedef int32_t Int __attribute__((vector_size(64)));
  // Below this e^x is taken as 0: against a sum of at least 1 it is far below half an ulp.
  static constexpr float underflow = -87.0f;
};

template <>
struct Simd<double> {
  static constexpr int width = 8;
  typedef double Vec __attribute__((vector_size(64)));
  typedef int64_t Int __attribute__((vector_size(64)));
  static constexpr double underflow = -708.0;
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// A NaN in b is kept, one in a is lost: the sums notice it, the maximum need not.
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// e^x for x <= 0 (and a little above), below one ulp of error; 0 under Simd<T>::underflow, NaN for NaN.
// x = n log 2 + f, |f| <= log(2) / 2, with log 2 in two parts; the polynomials are the Taylor sums, long enough that
// the first term left out is below a quarter of an ulp.
inline Vec<float> exp_of(Vec<float> x) {
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec<float> p = 1.0f / 5040 * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = f + f * f * p;
  Simd<float>::Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vec<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const Vec<float> e = scale + scale * p;
  return x < Simd<float>::underflow ? Vec<float>{} : e;
}

inline Vec<double> exp_of(Vec<double> x) {
  const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Vec<double> n = shifted - 6755399441055744.0;
  const Vec<double> f = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10;
  Vec<double> p = 1.0 / 87178291200 * f + 1.0 / 6227020800;
  p = p * f + 1.0 / 479001600;
  p = p * f + 1.0 / 39916800;
  p = p * f + 1.0 / 3628800;
  p = p * f + 1.0 / 362880;
  p = p * f + 1.0 / 40320;
  p = p * f + 1.0 / 5040;
  p = p * f + 1.0 / 720;
  p = p * f + 1.0 / 120;
  p = p * f + 1.0 / 24;
  p = p * f + 1.0 / 6;
  p = p * f + 0.5;
  p = f + f * f * p;
  Simd<double>::Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  Vec<double> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const Vec<double> e = scale + scale * p;
  return x < Simd<double>::underflow ? Vec<double>{} : e;
}

template <class T>
inline T exp_of(T x) {
  Vec<T> v = Vec<T>{} + x;
  return exp_of(v)[0];
}

template <class T>
inline T sum_of(Vec<T> v) {
  for (int half = Simd<T>::width / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  return v[0];
}

template <class T>
inline T max_of(Vec<T> v) {
  T m = v[0];
  for (int k = 1; k < Simd<T>::width; ++k) m = v[k] > m ? v[k] : m;
  return m;
}

// Storage types of the logits. bfloat16 is the upper half of a float; float16 needs the machine's conversion.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float widen(Float16 x) {
  _Float16 h;
  std::memcpy(&h, &x, sizeof h);
  return static_cast<float>(h);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline void narrow(float f, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(f != f ? 0x7fc0 : rounded);
}

inline void narrow(float f, Float16* out) {
  const _Float16 h = static_cast<_Float16>(f);
  std::memcpy(out, &h, sizeof h);
}

inline void narrow(float f, float* out) { *out = f; }
inline void narrow(double f, double* out) { *out = f; }

}  // namespace
}  // namespace mallowspo
