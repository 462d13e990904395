// See normal.h. Compiled with -ffp-contract=off: only operations that IEEE 754 rounds exactly, in one order, so that the
// bits do not depend on the vectors' length. A vector holds one word of so many blocks, as u64 or double.
#include "kernels/normal.h"

#include <cmath>

#include "kernels/normal_constants.h"
#include "kernels/simd.h"
#include "kernels/table.h"

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace {

using namespace normal_constants;

inline constexpr int width = longest >= 2 ? longest / 2 : 1;
typedef std::uint64_t Words __attribute__((vector_size(width * 8)));
typedef double Doubles __attribute__((vector_size(width * 8)));
typedef float Floats __attribute__((vector_size(width * 4)));

template <class To, class From>
EDGE_BCS_INLINE To bits_as(From from) {
  return reinterpret_cast<To>(from);
}

// The products of the low halves.
EDGE_BCS_INLINE Words multiply(Words a, Words b) {
#if defined(__AVX512F__)
  // The masked forms, because GCC 12 warns of the plain ones.
  if constexpr (width == 8)
    return bits_as<Words>(_mm512_maskz_mul_epu32(0xFF, bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  if constexpr (width == 4) return bits_as<Words>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#endif
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
}

EDGE_BCS_INLINE Doubles square_root(Doubles a) {
#if defined(__AVX512F__)
  if constexpr (width == 8) return bits_as<Doubles>(_mm512_maskz_sqrt_pd(0xFF, bits_as<__m512d>(a)));
#elif defined(__AVX2__)
  if constexpr (width == 4) return bits_as<Doubles>(_mm256_sqrt_pd(bits_as<__m256d>(a)));
#endif
  Doubles roots;
  for (int i = 0; i < width; ++i) roots[i] = std::sqrt(a[i]);
  return roots;
}

// Integers below 2^52, exactly: the mantissa of a number with the exponent of 2^52.
EDGE_BCS_INLINE Doubles as_double(Words integers) {
  constexpr double two_52 = 0x1p52;
  return bits_as<Doubles>(integers | 0x4330000000000000u) - two_52;
}

template <int n>
EDGE_BCS_INLINE Doubles polynomial(const double (&coefficients)[n], Doubles x) {
  Doubles total = Doubles{} + coefficients[n - 1];
  for (int i = n - 1; i-- > 0;) total = total * x + coefficients[i];
  return total;
}

EDGE_BCS_INLINE Doubles logarithm(Doubles x) {
  const Words bits = bits_as<Words>(x);
  // x = m · 2^e with m in [½, 1), then [√½, √2).
  Doubles m = bits_as<Doubles>((bits & 0x000FFFFFFFFFFFFFu) | 0x3FE0000000000000u);
  Doubles e = as_double(bits >> 52) - 1022.0;
  const auto low = m < sqrt_half;
  m = low ? m * 2.0 : m;
  e = low ? e - 1.0 : e;
  const Doubles s = (m - 1.0) / (m + 1.0);
  return e * ln2_high + ((2.0 * s) * polynomial(series, s * s) + e * ln2_low);
}

EDGE_BCS_INLINE Doubles probability(Words words) { return (as_double(words) + 0.5) * 0x1p-32; }

EDGE_BCS_INLINE Floats centre_quantile(Doubles q) {
  const Doubles r = centre_square - q * q;
  return __builtin_convertvector(q * (polynomial(centre_above, r) / polynomial(centre_below, r)), Floats);
}

// Away from the centre. No word is so close to 0 or 2^32 that the depth would exceed 5 (½ · 2^-32 has 4.79).
EDGE_BCS_INLINE Floats outer_quantile(Words words) {
  const Doubles u = probability(words), q = u - 0.5;
  const auto negative = q < 0.0;
  const Doubles r = square_root(-logarithm(negative ? u : 1.0 - u)) - middle_shift;
  const Doubles size = polynomial(middle_above, r) / polynomial(middle_below, r);
  return __builtin_convertvector(negative ? -size : size, Floats);
}

// Draws away from the centre, to be done together.
struct Outer {
  static constexpr int most = 2 * 4 * width + 1;  // and one that is noted but not counted
  std::uint64_t word[most];
  float* place[most];
  int count = 0;

  void flush() {
    while (count > 0) {
      Words words{};
      const int from = count > width ? count - width : 0;
      for (int i = from; i < count; ++i) words[i - from] = word[i];
      const Floats numbers = outer_quantile(words);
      for (int i = from; i < count; ++i) *place[i] = numbers[i - from];
      count = from;
    }
  }
};

// The four words of each of blocks `first` …, as in philox.h; the upper halves of a vector's numbers are not clean until
// the end.
EDGE_BCS_INLINE void philox(const NormalStream& stream, std::uint64_t first, Words (&c)[4]) {
  Words number;
  for (int i = 0; i < width; ++i) number[i] = first + static_cast<std::uint64_t>(i);
  c[0] = number;
  c[1] = number >> 32;
  c[2] = Words{} + stream.step_low;
  c[3] = Words{} + stream.tag;
  std::uint32_t k0 = stream.key[0], k1 = stream.key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words product0 = multiply(c[0], Words{} + 0xD2511F53u),
                product1 = multiply(c[2], Words{} + 0xCD9E8D57u);
    c[0] = (product1 >> 32) ^ c[1] ^ k0;
    c[1] = product1;
    c[2] = (product0 >> 32) ^ c[3] ^ k1;
    c[3] = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (Words& word : c) word &= 0xFFFFFFFFu;
}

void normals(const NormalStream& stream, std::uint64_t first, int blocks, float* numbers) {
  Outer outer;
  for (int block = 0; block < blocks; block += width) {
    Words c[4];
    philox(stream, first + static_cast<std::uint64_t>(block), c);
    const int count = blocks - block < width ? blocks - block : width;
    float* const to = numbers + 4 * block;
    for (int j = 0; j < 4; ++j) {
      const Doubles q = probability(c[j]) - 0.5;
      const Floats found = centre_quantile(q);
      const auto far = (q > centre) | (q < -centre);
      for (int i = 0; i < count; ++i) {
        to[4 * i + j] = found[i];
        // Always noted, counted where it is far: no branch that would be guessed wrong once in seven times.
        outer.word[outer.count] = c[j][i];
        outer.place[outer.count] = to + 4 * i + j;
        outer.count -= static_cast<int>(far[i]);
      }
    }
    if (outer.count > 4 * width) outer.flush();
  }
  outer.flush();
}

}  // namespace
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const NormalKernels EDGE_BCS_JOIN(normal_kernels_, EDGE_BCS_VARIANT) = {EDGE_BCS_KERNEL_NAMESPACE::normals};

}  // namespace edge_bcs
