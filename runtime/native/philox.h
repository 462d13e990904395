// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same to the bit as
// edge_bcs/random.py.
//
// A number is a function of (seed, step, purpose, draw): the same whatever the number of threads. The normal
// distribution uses only operations that IEEE 754 rounds exactly, and the library is compiled with
// -ffp-contract=off.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace edge_bcs {

// What numbers are for: each purpose has a stream of its own in every step.
enum class Purpose : std::uint32_t { sign = 1, noise = 2, birth = 3 };

// The blocks of four random words of one (seed, step, purpose).
class Philox {
 public:
  using Words = std::array<std::uint32_t, 4>;

  Philox(std::uint64_t seed, std::uint64_t step, Purpose purpose)
      : key_{low(seed), high(seed)},
        step_low_(low(step)),
        tag_(static_cast<std::uint32_t>(purpose) | high(step) << 8) {}

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

template <std::size_t n>
inline double polynomial(const std::array<double, n>& coefficients, double x) {
  double total = coefficients[n - 1];
  for (std::size_t i = n - 1; i-- > 0;) total = total * x + coefficients[i];
  return total;
}

// Natural logarithm of a normal positive number: x = m·2^e, s = (m − 1)/(m + 1), log m = 2 artanh s.
inline double logarithm(double x) {
  static constexpr std::array<double, 12> series{1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,
                                                 1.0 / 9.0,  1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0,
                                                 1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0};
  constexpr double ln2_high = 6.93147180369123816490e-01;
  constexpr double ln2_low = 1.90821492927058770002e-10;
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752440) {
    m *= 2.0;
    --exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double e = exponent;
  return e * ln2_high + ((2.0 * s) * polynomial(series, s * s) + e * ln2_low);
}

}  // namespace normal_detail

// The standard normal quantile at u = (word + ½)·2^-32: Wichura, Algorithm AS 241 (PPND16), Applied
// Statistics 37 (1988).
inline float normal_from_word(std::uint32_t word) {
  using normal_detail::polynomial;
  using Coefficients = std::array<double, 8>;
  static constexpr Coefficients centre_above{
      3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
      4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
  static constexpr Coefficients centre_below{1.0,
                                             4.2313330701600911252e1,
                                             6.8718700749205790830e2,
                                             5.3941960214247511077e3,
                                             2.1213794301586595867e4,
                                             3.9307895800092710610e4,
                                             2.8729085735721942674e4,
                                             5.2264952788528545610e3};
  static constexpr Coefficients middle_above{1.42343711074968357734e0,  4.63033784615654529590e0,
                                             5.76949722146069140550e0,  3.64784832476320460504e0,
                                             1.27045825245236838258e0,  2.41780725177450611770e-1,
                                             2.27238449892691845833e-2, 7.74545014278341407640e-4};
  static constexpr Coefficients middle_below{1.0,
                                             2.05319162663775882187e0,
                                             1.67638483018380384940e0,
                                             6.89767334985100004550e-1,
                                             1.48103976427480074590e-1,
                                             1.51986665636164571966e-2,
                                             5.47593808499534494600e-4,
                                             1.05075007164441684324e-9};
  static constexpr Coefficients tail_above{6.65790464350110377720e0,  5.46378491116411436990e0,
                                           1.78482653991729133580e0,  2.96560571828504891230e-1,
                                           2.65321895265761230930e-2, 1.24266094738807843860e-3,
                                           2.71155556874348757815e-5, 2.01033439929228813265e-7};
  static constexpr Coefficients tail_below{1.0,
                                           5.99832206555887937690e-1,
                                           1.36929880922735805310e-1,
                                           1.48753612908506148525e-2,
                                           7.86869131145613259100e-4,
                                           1.84631831751005468180e-5,
                                           1.42151175831644588870e-7,
                                           2.04426310338993978564e-15};
  const double u = (static_cast<double>(word) + 0.5) * 0x1p-32;
  const double q = u - 0.5;
  if (std::fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return static_cast<float>(q * (polynomial(centre_above, r) / polynomial(centre_below, r)));
  }
  const double depth = std::sqrt(-normal_detail::logarithm(q < 0.0 ? u : 1.0 - u));
  double size = 0;
  if (depth <= 5.0) {
    const double r = depth - 1.6;
    size = polynomial(middle_above, r) / polynomial(middle_below, r);
  } else {
    const double r = depth - 5.0;
    size = polynomial(tail_above, r) / polynomial(tail_below, r);
  }
  return static_cast<float>(q < 0.0 ? -size : size);
}

}  // namespace edge_bcs
