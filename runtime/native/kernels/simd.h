// Vectors of VL floats for whichever instruction set this file is compiled for, with the compiler's vector extensions.
// VL is a power of two up to `native_lanes`; every load and store may be unaligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// The variant's name as a namespace: the same templates are compiled once for each instruction set, and the linker must
// never take one set's code for another's.
#define EDGE_BCS_JOIN_(a, b) a##b
#define EDGE_BCS_JOIN(a, b) EDGE_BCS_JOIN_(a, b)
#define EDGE_BCS_KERNEL_NAMESPACE EDGE_BCS_JOIN(kernels_, EDGE_BCS_VARIANT)

#define EDGE_BCS_INLINE inline __attribute__((always_inline))

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int native_lanes = 16;
inline constexpr int registers = 32;
#elif defined(__AVX2__)
inline constexpr int native_lanes = 8;
inline constexpr int registers = 16;
#else
inline constexpr int native_lanes = 4;
inline constexpr int registers = 32;
#endif

template <int VL>
struct Simd {
  typedef float Vector __attribute__((vector_size(VL * sizeof(float))));
  typedef std::int32_t Integers __attribute__((vector_size(VL * sizeof(float))));
  typedef std::uint8_t Bytes __attribute__((vector_size(VL)));
  typedef float Unaligned __attribute__((vector_size(VL * sizeof(float)), aligned(sizeof(float)), may_alias));
};
template <int VL>
using Vector = typename Simd<VL>::Vector;
template <int VL>
using Integers = typename Simd<VL>::Integers;

template <int VL>
EDGE_BCS_INLINE Vector<VL> load(const float* from) {
  return *reinterpret_cast<const typename Simd<VL>::Unaligned*>(from);
}

template <int VL>
EDGE_BCS_INLINE void store(float* to, Vector<VL> value) {
  *reinterpret_cast<typename Simd<VL>::Unaligned*>(to) = value;
}

// Minus a zero, not plus: that changes no value, so the compiler makes it a bare broadcast from memory.
template <int VL>
EDGE_BCS_INLINE Vector<VL> broadcast(float value) {
  return value - Vector<VL>{};
}

// a where m > 0, else 0.
template <int VL>
EDGE_BCS_INLINE Vector<VL> where_positive(Vector<VL> m, Vector<VL> a) {
  return reinterpret_cast<Vector<VL>>(reinterpret_cast<Integers<VL>>(a) & (m > Vector<VL>{}));
}

// max(a, 0); a NaN stays one, so that a run that has diverged is seen: where a number is none, the instruction returns its
// second operand.
template <int VL>
EDGE_BCS_INLINE Vector<VL> relu(Vector<VL> a) {
#if defined(__AVX512F__)
  if constexpr (VL == 16)
    return reinterpret_cast<Vector<VL>>(
        _mm512_maskz_max_ps(0xFFFF, _mm512_setzero_ps(), reinterpret_cast<__m512>(a)));
#endif
#if defined(__AVX2__)
  if constexpr (VL == 8)
    return reinterpret_cast<Vector<VL>>(_mm256_max_ps(_mm256_setzero_ps(), reinterpret_cast<__m256>(a)));
#endif
  return reinterpret_cast<Vector<VL>>(reinterpret_cast<Integers<VL>>(a) & ~(a < Vector<VL>{}));
}

// 1, 2, 4, …: one bit for each lane.
template <int VL>
EDGE_BCS_INLINE Integers<VL> lane_bits() {
  Integers<VL> bits;
  for (int i = 0; i < VL; ++i) bits[i] = 1 << i;
  return bits;
}

// Bit i: whether a[i] > 0.
template <int VL>
EDGE_BCS_INLINE unsigned positive_bits(Vector<VL> a) {
#if defined(__AVX512F__)
  if constexpr (VL == 16)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), _mm512_setzero_ps(), _CMP_GT_OQ);
#endif
#if defined(__AVX2__)
  if constexpr (VL == 8)
    return static_cast<unsigned>(
        _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), _mm256_setzero_ps(), _CMP_GT_OQ)));
  if constexpr (VL == 4)
    return static_cast<unsigned>(
        _mm_movemask_ps(_mm_cmpgt_ps(reinterpret_cast<__m128>(a), _mm_setzero_ps())));
#elif defined(__ARM_NEON)
  if constexpr (VL == 4)
    return vaddvq_u32(reinterpret_cast<uint32x4_t>((a > Vector<VL>{}) & lane_bits<VL>()));
#endif
  unsigned bits = 0;
  for (int i = 0; i < VL; ++i) bits |= static_cast<unsigned>(a[i] > 0) << i;
  return bits;
}

// a[i] where bit i is set, else 0.
template <int VL>
EDGE_BCS_INLINE Vector<VL> where_bits(unsigned bits, Vector<VL> a) {
#if defined(__AVX512F__)
  if constexpr (VL == 16)
    return reinterpret_cast<Vector<VL>>(
        _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(a)));
#endif
  const Integers<VL> set =
      ((Integers<VL>{} + static_cast<std::int32_t>(bits)) & lane_bits<VL>()) != Integers<VL>{};
  return reinterpret_cast<Vector<VL>>(reinterpret_cast<Integers<VL>>(a) & set);
}

// VL bits that start at bit `at`, a multiple of VL, of `row`.
template <int VL>
EDGE_BCS_INLINE unsigned load_bits(const std::uint8_t* row, std::int64_t at) {
  if constexpr (VL >= 8) {
    unsigned bits = 0;
    std::memcpy(&bits, row + at / 8, VL / 8);
    return bits;
  } else {
    return row[at / 8] >> (at % 8) & ((1u << VL) - 1);
  }
}

// The inverse. Bits are written from left to right: those of a byte's first bit clear the rest of the byte.
template <int VL>
EDGE_BCS_INLINE void store_bits(std::uint8_t* row, std::int64_t at, unsigned bits) {
  if constexpr (VL >= 8) {
    std::memcpy(row + at / 8, &bits, VL / 8);
  } else {
    std::uint8_t& byte = row[at / 8];
    byte = static_cast<std::uint8_t>(at % 8 == 0 ? bits : byte | bits << (at % 8));
  }
}

// Whether each number is positive, for N vectors beside each other, the first of which starts at a multiple of N · VL bits.
template <int VL, int N>
EDGE_BCS_INLINE void store_positive_bits(std::uint8_t* row, std::int64_t at, const Vector<VL> (&a)[N]) {
#if defined(__AVX512F__)
  if constexpr (VL == 16 && N % 4 == 0) {
#pragma GCC unroll 2
    for (int first = 0; first < N; first += 4) {
      __mmask16 bits[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) bits[i] = static_cast<__mmask16>(positive_bits<VL>(a[first + i]));
      // Rows of bits begin at any byte.
      typedef __mmask64 Unaligned __attribute__((aligned(1), may_alias));
      *reinterpret_cast<Unaligned*>(row + at / 8 + first * VL / 8) =
          _mm512_kunpackd(_mm512_kunpackw(bits[3], bits[2]), _mm512_kunpackw(bits[1], bits[0]));
    }
    return;
  }
#endif
  if constexpr (VL * N == 32 || VL * N == 16) {
    std::uint32_t bits = 0;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) bits |= positive_bits<VL>(a[i]) << (i * VL);
    std::memcpy(row + at / 8, &bits, VL * N / 8);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) store_bits<VL>(row, at + i * VL, positive_bits<VL>(a[i]));
  }
}

// Numbers in [0, 255] as bytes, and back. Where the compiler is left to convert, it goes lane by lane. (The forms with a
// mask, all of it set, are those that GCC 12 does not warn of.)
template <int VL>
EDGE_BCS_INLINE void store_bytes(std::uint8_t* to, Integers<VL> values) {
#if defined(__AVX512F__)
  if constexpr (VL == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(values)));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (VL == 8) {
    const auto all = reinterpret_cast<__m256i>(values);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
    return;
  }
#elif defined(__ARM_NEON)
  if constexpr (VL == 4) {
    const uint16x4_t words = vmovn_u32(reinterpret_cast<uint32x4_t>(values));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    std::memcpy(to, &bytes, VL);
    return;
  }
#endif
  const auto bytes = __builtin_convertvector(values, typename Simd<VL>::Bytes);
  std::memcpy(to, &bytes, VL);
}

template <int VL>
EDGE_BCS_INLINE Integers<VL> load_bytes(const std::uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (VL == 16)
    return reinterpret_cast<Integers<VL>>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
#if defined(__AVX2__)
  if constexpr (VL == 8)
    return reinterpret_cast<Integers<VL>>(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__ARM_NEON)
  if constexpr (VL == 4) {
    uint8x8_t bytes{};
    std::memcpy(&bytes, from, VL);
    return reinterpret_cast<Integers<VL>>(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
  }
#endif
  typename Simd<VL>::Bytes bytes;
  std::memcpy(&bytes, from, VL);
  return __builtin_convertvector(bytes, Integers<VL>);
}

// [a0+a1, a2+a3, …, b0+b1, b2+b3, …]
template <int VL>
EDGE_BCS_INLINE Vector<VL> add_pairs(Vector<VL> a, Vector<VL> b) {
  if constexpr (VL == 4)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

// sums[i] += the sum of vectors[i]'s lanes.
template <int VL, int N>
EDGE_BCS_INLINE void add_lane_sums(float* sums, const Vector<VL> (&vectors)[N]) {
  if constexpr (VL == 1) {
    for (int i = 0; i < N; ++i) sums[i] += vectors[i][0];
  } else if constexpr (VL == 16) {
    Vector<8> halves[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      halves[i] = __builtin_shufflevector(vectors[i], vectors[i], 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(vectors[i], vectors[i], 8, 9, 10, 11, 12, 13, 14, 15);
    add_lane_sums<8, N>(sums, halves);
  } else if constexpr (N == 8 && VL == 8) {
    const auto low = add_pairs<8>(add_pairs<8>(vectors[0], vectors[1]), add_pairs<8>(vectors[2], vectors[3]));
    const auto high =
        add_pairs<8>(add_pairs<8>(vectors[4], vectors[5]), add_pairs<8>(vectors[6], vectors[7]));
    store<8>(sums, load<8>(sums) + add_pairs<8>(low, high));
  } else if constexpr (VL == 8) {
    Vector<4> quarters[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      quarters[i] = __builtin_shufflevector(vectors[i], vectors[i], 0, 1, 2, 3) +
                    __builtin_shufflevector(vectors[i], vectors[i], 4, 5, 6, 7);
    add_lane_sums<4, N>(sums, quarters);
  } else if constexpr (N % 4 == 0) {
#pragma GCC unroll 2
    for (int i = 0; i < N; i += 4)
      store<4>(sums + i, load<4>(sums + i) + add_pairs<4>(add_pairs<4>(vectors[i], vectors[i + 1]),
                                                          add_pairs<4>(vectors[i + 2], vectors[i + 3])));
  } else {
    static_assert(N <= 2);
    const auto pairs = add_pairs<4>(vectors[0], vectors[N - 1]);
    const auto both = add_pairs<4>(pairs, pairs);
    for (int i = 0; i < N; ++i) sums[i] += both[i];
  }
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
