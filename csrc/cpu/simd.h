// SIMD for the row kernels through the compiler's vector types (GCC and Clang, any instruction set), as wide as the
// machine's registers. Everything here has internal linkage (see core/defs.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mallowspo {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int width = vector_bytes / 4;
  typedef float Vec __attribute__((vector_size(vector_bytes)));
  typedef int32_t Int __attribute__((vector_size(vector_bytes)));
  // Below this e^x may be taken as 0: against a sum of at least 1 it is far below half an ulp.
  static constexpr float underflow = -87.0f;
};

template <>
struct Simd<double> {
  static constexpr int width = vector_bytes / 8;
  typedef double Vec __attribute__((vector_size(vector_bytes)));
  typedef int64_t Int __attribute__((vector_size(vector_bytes)));
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

template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class Mask>
inline bool any_of(Mask mask) {
  Mask folded = mask;
  for (int half = static_cast<int>(sizeof(Mask) / sizeof(mask[0])) / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) folded[k] |= folded[k + half];
  return folded[0] != 0;
}

// scale e^x for x from 2 `underflow` to -`underflow`, e^x with an error of about an ulp, exactly 1 at 0, and 0 where it
// underflows; NaN for NaN. x = n log 2 + f with a whole n; the polynomials are the Taylor sums, long enough that the
// first term left out is below a quarter of an ulp, but where another is named. The scale is the same all along a row.
// `coarse` will do in a sum with terms near 1, and where half precision follows.
#if defined(__AVX512F__)
inline Vec<float> larger(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}

inline bool any_of(Simd<float>::Int mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

// Here n is a multiple of 1/32, and a table has the 32 powers of two between. A cubic is exact to far below an ulp.
// `coarse` is a quadratic whose linear term takes up three quarters of the cubic one, off by at most half an ulp, as much
// up as down; and log 2 without its last digits, which is off by n times 2e-9 of e^-n.
template <bool coarse = false>
inline Vec<float> exp_of(Vec<float> x, float scale = 1) {
  constexpr Vec<float> low = {1.0f,        1.02189715f, 1.04427378f, 1.06714040f, 1.09050773f, 1.11438674f,
                              1.13878863f, 1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f,
                              1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f};
  constexpr Vec<float> high = {1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f,
                               1.61049033f, 1.64575548f, 1.68179283f, 1.71861930f, 1.75625216f, 1.79470908f,
                               1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
  const Vec<float> shifted = x * 1.44269504f + 393216.0f;  // 1.5 * 2^18: rounds to 1/32 in the low bits
  const Vec<float> n = shifted - 393216.0f;
  Vec<float> f = x - n * 0.693147182f;  // fused: the product is not rounded
  Vec<float> p;
  if (coarse) {
    p = (0.5f * f + 1.0000147f) * f;  // 1 + h^2 / 8 for |f| <= h = log 2 / 64
  } else {
    f += n * 1.90465421e-9f;  // log 2 to twice the digits
    p = ((1.0f / 6 * f + 0.5f) * f + 1.0f) * f;
  }
  const Vec<float> power =
      (Vec<float>)_mm512_permutex2var_ps((__m512)(low * scale), (__m512i)shifted, (__m512)(high * scale));
  return (Vec<float>)_mm512_scalef_ps((__m512)(power * p + power), (__m512)n);  // times 2^floor(n)
}
#elif defined(__AVX2__)
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }

inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }

inline bool any_of(Simd<float>::Int mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }

// The same with multiples of 1/8. The quadratic term takes up of the quartic one what it can: 2.5e-8 of e^x is left. The
// table holds the bits of 2^(j/8) less j 2^20: with n 2^23 = (8 floor(n) + j) 2^20 added they are those of 2^n, and negative
// where its exponent is below the smallest.
template <bool coarse = false>
inline Vec<float> exp_of(Vec<float> x, float scale = 1) {
  constexpr Simd<float>::Int powers = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                       0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  const Vec<float> shifted = x * 1.44269504f + 1572864.0f;  // 1.5 * 2^20: rounds to 1/8 in the low bits
  const Vec<float> n = shifted - 1572864.0f;
  Vec<float> f = x - n * 0.693147182f;
  if (!coarse) f += n * 1.90465421e-9f;
  const Vec<float> p = (1.0f / 6 * f + 0.50006478f) * (f * f) + f;
  const Simd<float>::Int eighths = (Simd<float>::Int)shifted;
  const __m256i bits = _mm256_add_epi32(_mm256_permutevar8x32_epi32((__m256i)powers, (__m256i)eighths),
                                        _mm256_slli_epi32((__m256i)eighths, 20));
  const Vec<float> power = (Vec<float>)_mm256_max_epi32(bits, _mm256_setzero_si256());
  return scale * (power * p + power);
}
#else
template <bool coarse = false>
inline Vec<float> exp_of(Vec<float> x, float scale = 1) {
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> f = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // log 2 in two parts
  Vec<float> p = 1.0f / 5040 * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  Simd<float>::Int n_bits, bits;
  std::memcpy(&n_bits, &shifted, sizeof bits);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n_bits << 23;
  Vec<float> e;
  std::memcpy(&e, &bits, sizeof e);
  return scale * (x < Simd<float>::underflow ? Vec<float>{} : e);
}
#endif

template <bool coarse = false>
inline Vec<double> exp_of(Vec<double> x, double scale = 1) {
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
  Vec<double> power;
  std::memcpy(&power, &bits, sizeof power);
  const Vec<double> e = power + power * p;
  return scale * (x < Simd<double>::underflow ? Vec<double>{} : e);
}

// e^x for a sum in which a wrong maximum may be tried: for any x > 0 more than 1, if nothing better.
template <class T>
inline Vec<T> term_of(Vec<T> x) {
#if defined(__AVX512F__)
  if (std::is_same_v<T, float>) return exp_of<true>(x);
#endif
  constexpr T least = 2 * Simd<T>::underflow, most = -Simd<T>::underflow;
  return exp_of<true>(smaller(Vec<T>{} + most, larger(Vec<T>{} + least, x)));
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
#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 has no _Float16 there
#else
using Half = _Float16;
#endif

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float widen(Float16 x) {
  Half h;
  std::memcpy(&h, &x, sizeof h);
  return static_cast<float>(h);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// bfloat16 of a float's bits, in the upper half: to nearest, ties to even. A NaN stays one unless the low bits of its
// payload are set, which no arithmetic does.
template <class Bits>
inline Bits rounded_to_upper_half(Bits bits) {
  return bits + 0x7fff + ((bits >> 16) & 1);
}

typedef uint32_t Words __attribute__((vector_size(vector_bytes)));

#if defined(__AVX512F__)
inline Words rounded_to_upper_half(Words bits) {  // one instruction fewer
  const __m512i most = (__m512i)(bits + 0x7fff);
  const __mmask16 is_odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  return (Words)_mm512_mask_add_epi32(most, is_odd, most, _mm512_set1_epi32(1));
}
#endif

inline void narrow(float f, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  out->bits = f != f ? 0x7fc0 : static_cast<uint16_t>(rounded_to_upper_half(bits) >> 16);
}

inline void narrow(float f, Float16* out) {
  const Half h = static_cast<Half>(f);
  std::memcpy(out, &h, sizeof h);
}

inline void narrow(float f, float* out) { *out = f; }
inline void narrow(double f, double* out) { *out = f; }

// One vector's bytes of storage as vectors of the accumulator and back. bfloat16 gives its even entries, then its odd ones: no
// kernel here asks for their order.
template <class T>
struct Packed {
  static constexpr int count = 1;
  Vec<T> v[1];
};
template <>
struct Packed<BFloat16> {
  static constexpr int count = 2;
  Vec<float> v[2];
};

template <class T>
inline Packed<T> unpack(const T* p) {
  return {{load(p)}};
}

inline Packed<BFloat16> unpack(const BFloat16* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  const Words even = words << 16, odd = words & 0xffff0000u;
  Packed<BFloat16> out;
  std::memcpy(&out.v[0], &even, sizeof even);
  std::memcpy(&out.v[1], &odd, sizeof odd);
  return out;
}

template <class T>
inline void pack(const Packed<T>& packed, T* p) {
  store(p, packed.v[0]);
}

inline void pack(const Packed<BFloat16>& packed, BFloat16* p) {
  Words even, odd;
  std::memcpy(&even, &packed.v[0], sizeof even);
  std::memcpy(&odd, &packed.v[1], sizeof odd);
  const Words words = (rounded_to_upper_half(even) >> 16) | (rounded_to_upper_half(odd) & 0xffff0000u);
  std::memcpy(p, &words, sizeof words);
}

}  // namespace
}  // namespace mallowspo
