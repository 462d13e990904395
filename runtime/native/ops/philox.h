// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same to the bit as
// edge_bcs/core/random.py.
//
// A number is a function of (seed, step, purpose, draw): the same whatever the number of threads. The normal
// distribution uses only operations that IEEE 754 rounds exactly, and the library is compiled with
// -ffp-contract=off.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/normal.h"
#include "kernels/normal_constants.h"

namespace edge_bcs {

// What numbers are for: each purpose has a stream of its own in every step.
enum class Purpose : std::uint32_t {
  sign = 1,
  noise = 2,
  birth = 3,
  pgd_start = 4,
  shuffle = 5,
  augment = 6,
  evaluation = 9,
  balance = 10
};

// The blocks of four random words of one (seed, step, purpose).
class Philox {
 public:
  using Words = std::array<std::uint32_t, 4>;

  Philox(std::uint64_t seed, std::uint64_t step, Purpose purpose)
      : key_{low(seed), high(seed)},
        step_low_(low(step)),
        tag_(static_cast<std::uint32_t>(purpose) | high(step) << 8) {}

  // The same stream, as the kernels take it.
  NormalStream stream() const { return {{key_[0], key_[1]}, step_low_, tag_}; }

  Words block(std::uint64_t number) const {
    Words c{low(number), high(number), step_low_, tag_};
    std::uint32_t k0 = key_[0], k1 = key_[1];
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t product0 = 0xD2511F53ull * c[0];
      const std::uint64_t product1 = 0xCD9E8D57ull * c[2];
      c = {high(product1) ^ c[1] ^ k0, low(product1), high(product0) ^ c[3] ^ k1, low(product0)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }

 private:
  static std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
  static std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

  std::array<std::uint32_t, 2> key_;
  std::uint32_t step_low_;
  std::uint32_t tag_;
};

// Integers uniform in [0, below), one after the other, from the words of a Philox in order. Lemire's method
// without bias: word w gives m = w·below; it is skipped if m mod 2^32 < 2^32 mod below; else m >> 32.
class IntegerStream {
 public:
  // below: in [1, 2^32).
  IntegerStream(const Philox& philox, std::uint32_t below)
      : philox_(philox), below_(below), threshold_((0u - below) % below) {}

  std::uint32_t next() {
    for (;;) {
      if (word_ % 4 == 0) words_ = philox_.block(word_ / 4);
      const std::uint64_t product = static_cast<std::uint64_t>(words_[word_++ % 4]) * below_;
      if (static_cast<std::uint32_t>(product) >= threshold_) return static_cast<std::uint32_t>(product >> 32);
    }
  }

 private:
  Philox philox_;
  std::uint32_t below_;
  std::uint32_t threshold_;
  std::uint64_t word_ = 0;
  Philox::Words words_{};
};

// γ of a position: the sign with which a new connection there is born.
inline float position_sign(std::uint64_t seed, std::uint32_t position) {
  return Philox(seed, 0, Purpose::sign).block(position)[0] >> 31 == 0 ? 1.0f : -1.0f;
}

namespace normal_detail {

template <int n>
inline double polynomial(const double (&coefficients)[n], double x) {
  double total = coefficients[n - 1];
  for (int i = n - 1; i-- > 0;) total = total * x + coefficients[i];
  return total;
}

// Natural logarithm of a normal positive number: x = m·2^e, s = (m − 1)/(m + 1), log m = 2 artanh s.
inline double logarithm(double x) {
  using namespace normal_constants;
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < sqrt_half) {
    m *= 2.0;
    --exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double e = exponent;
  return e * ln2_high + ((2.0 * s) * polynomial(series, s * s) + e * ln2_low);
}

}  // namespace normal_detail

// The standard normal quantile at u = (word + ½)·2^-32 (see normal_constants.h). kernels/normal.cpp gives the same
// bits, many at a time.
inline float normal_from_word(std::uint32_t word) {
  using namespace normal_constants;
  using normal_detail::polynomial;
  const double u = (static_cast<double>(word) + 0.5) * 0x1p-32;
  const double q = u - 0.5;
  if (std::fabs(q) <= centre) {
    const double r = centre_square - q * q;
    return static_cast<float>(q * (polynomial(centre_above, r) / polynomial(centre_below, r)));
  }
  const double depth = std::sqrt(-normal_detail::logarithm(q < 0.0 ? u : 1.0 - u));
  double size = 0;
  if (depth <= middle_depth) {
    const double r = depth - middle_shift;
    size = polynomial(middle_above, r) / polynomial(middle_below, r);
  } else {
    const double r = depth - middle_depth;
    size = polynomial(tail_above, r) / polynomial(tail_below, r);
  }
  return static_cast<float>(q < 0.0 ? -size : size);
}

}  // namespace edge_bcs
