#include "session/ed25519.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace edge_bcs {

namespace {

// ---- SHA-512 (FIPS 180-4) ----

constexpr std::array<std::uint64_t, 80> rounds{
    0x428a2f98d728ae22, 0x7137449123ef65cd, 0xb5c0fbcfec4d3b2f, 0xe9b5dba58189dbbc, 0x3956c25bf348b538,
    0x59f111f1b605d019, 0x923f82a4af194f9b, 0xab1c5ed5da6d8118, 0xd807aa98a3030242, 0x12835b0145706fbe,
    0x243185be4ee4b28c, 0x550c7dc3d5ffb4e2, 0x72be5d74f27b896f, 0x80deb1fe3b1696b1, 0x9bdc06a725c71235,
    0xc19bf174cf692694, 0xe49b69c19ef14ad2, 0xefbe4786384f25e3, 0x0fc19dc68b8cd5b5, 0x240ca1cc77ac9c65,
    0x2de92c6f592b0275, 0x4a7484aa6ea6e483, 0x5cb0a9dcbd41fbd4, 0x76f988da831153b5, 0x983e5152ee66dfab,
    0xa831c66d2db43210, 0xb00327c898fb213f, 0xbf597fc7beef0ee4, 0xc6e00bf33da88fc2, 0xd5a79147930aa725,
    0x06ca6351e003826f, 0x142929670a0e6e70, 0x27b70a8546d22ffc, 0x2e1b21385c26c926, 0x4d2c6dfc5ac42aed,
    0x53380d139d95b3df, 0x650a73548baf63de, 0x766a0abb3c77b2a8, 0x81c2c92e47edaee6, 0x92722c851482353b,
    0xa2bfe8a14cf10364, 0xa81a664bbc423001, 0xc24b8b70d0f89791, 0xc76c51a30654be30, 0xd192e819d6ef5218,
    0xd69906245565a910, 0xf40e35855771202a, 0x106aa07032bbd1b8, 0x19a4c116b8d2d0c8, 0x1e376c085141ab53,
    0x2748774cdf8eeb99, 0x34b0bcb5e19b48a8, 0x391c0cb3c5c95a63, 0x4ed8aa4ae3418acb, 0x5b9cca4f7763e373,
    0x682e6ff3d6b2b8a3, 0x748f82ee5defb2fc, 0x78a5636f43172f60, 0x84c87814a1f0ab72, 0x8cc702081a6439ec,
    0x90befffa23631e28, 0xa4506cebde82bde9, 0xbef9a3f7b2c67915, 0xc67178f2e372532b, 0xca273eceea26619c,
    0xd186b8c721c0c207, 0xeada7dd6cde0eb1e, 0xf57d4f7fee6ed178, 0x06f067aa72176fba, 0x0a637dc5a2c898a6,
    0x113f9804bef90dae, 0x1b710b35131c471b, 0x28db77f523047d84, 0x32caab7b40c72493, 0x3c9ebe0a15c9bebc,
    0x431d67c49c100d4c, 0x4cc5d4becb3e42b6, 0x597f299cfc657e2a, 0x5fcb6fab3ad6faec, 0x6c44198c4a475817};

class Sha512 {
 public:
  void add(std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes) {
      block_[static_cast<std::size_t>(count_++ % block_.size())] = byte;
      if (count_ % block_.size() == 0) take_block();
    }
  }

  std::array<std::byte, 64> finish() {
    const std::uint64_t bits = 8 * count_;
    constexpr std::size_t length = 16;  // bytes of the number of bits
    add(std::array{std::byte{0x80}});
    while (count_ % block_.size() != block_.size() - length) add(std::array{std::byte{0}});
    std::array<std::byte, length> end{};
    put(bits, std::span(end).last<8>());
    add(end);
    std::array<std::byte, 64> digest;
    for (std::size_t i = 0; i < state_.size(); ++i)
      put(state_[i], std::span(digest).subspan(8 * i).first<8>());
    return digest;
  }

 private:
  static void put(std::uint64_t word, std::span<std::byte, 8> into) {
    for (std::size_t i = 0; i < 8; ++i) into[i] = static_cast<std::byte>(word >> (56 - 8 * i));
  }

  void take_block() {
    std::array<std::uint64_t, 16> words;
    for (std::size_t i = 0; i < words.size(); ++i) {
      words[i] = 0;
      for (std::size_t byte = 0; byte < 8; ++byte)
        words[i] = words[i] << 8 | std::to_integer<std::uint64_t>(block_[8 * i + byte]);
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (std::size_t i = 0; i < rounds.size(); ++i) {
      if (i >= words.size()) {
        const std::uint64_t early = words[(i + 1) % 16], late = words[(i + 14) % 16];
        words[i % 16] += (std::rotr(early, 1) ^ std::rotr(early, 8) ^ early >> 7) + words[(i + 9) % 16] +
                         (std::rotr(late, 19) ^ std::rotr(late, 61) ^ late >> 6);
      }
      const std::uint64_t one = h + (std::rotr(e, 14) ^ std::rotr(e, 18) ^ std::rotr(e, 41)) +
                                ((e & f) ^ (~e & g)) + rounds[i] + words[i % 16];
      const std::uint64_t other =
          (std::rotr(a, 28) ^ std::rotr(a, 34) ^ std::rotr(a, 39)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + other;
    }
    const std::array<std::uint64_t, 8> more{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < state_.size(); ++i) state_[i] += more[i];
  }

  std::array<std::uint64_t, 8> state_{0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                      0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                      0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
  std::array<std::byte, 128> block_{};
  std::uint64_t count_ = 0;
};

// ---- Numbers modulo p = 2^255 - 19: sixteen limbs of 16 bits, which may overflow until they are carried ----

struct Field {
  std::array<std::int64_t, 16> limbs{};
};

constexpr Field zero{}, one{{1}};
// -121665/121666, twice that, and a root of -1.
constexpr Field d{{0x78a3, 0x1359, 0x4dca, 0x75eb, 0xd8ab, 0x4141, 0xa4d, 0x70, 0xe898, 0x7779, 0x4079,
                   0x8cc7, 0xfe73, 0x2b6f, 0x6cee, 0x5203}};
constexpr Field d2{{0xf159, 0x26b2, 0x9b94, 0xebd6, 0xb156, 0x8283, 0x149a, 0xe0, 0xd130, 0xeef3, 0x80f2,
                    0x198e, 0xfce7, 0x56df, 0xd9dc, 0x2406}};
constexpr Field root{{0xa0b0, 0x4a0e, 0x1b27, 0xc4ee, 0xe478, 0xad2f, 0x1806, 0x2f43, 0xd7a7, 0x3dfb, 0x99,
                      0x2b4d, 0xdf0b, 0x4fc1, 0x2480, 0x2b83}};

void carry(Field& a) {
  for (std::size_t i = 0; i < 16; ++i) {
    const std::int64_t over = a.limbs[i] >> 16;
    a.limbs[i] -= over * 65536;
    a.limbs[(i + 1) % 16] += i < 15 ? over : 38 * over;  // 2^256 is 38
  }
}

Field operator+(const Field& a, const Field& b) {
  Field sum;
  for (std::size_t i = 0; i < 16; ++i) sum.limbs[i] = a.limbs[i] + b.limbs[i];
  return sum;
}

Field operator-(const Field& a, const Field& b) {
  Field difference;
  for (std::size_t i = 0; i < 16; ++i) difference.limbs[i] = a.limbs[i] - b.limbs[i];
  return difference;
}

Field operator*(const Field& a, const Field& b) {
  std::array<std::int64_t, 31> sums{};
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t j = 0; j < 16; ++j) sums[i + j] += a.limbs[i] * b.limbs[j];
  Field product;
  for (std::size_t i = 0; i < 16; ++i) product.limbs[i] = sums[i] + (i < 15 ? 38 * sums[i + 16] : 0);
  carry(product);
  carry(product);
  return product;
}

// a to the power of 2^bits - 1 - cleared.
Field power(const Field& a, int bits, unsigned cleared) {
  Field result = one;
  for (int bit = bits - 1; bit >= 0; --bit) {
    result = result * result;
    if (bit >= 8 || (cleared >> bit & 1u) == 0) result = result * a;
  }
  return result;
}

Field inverse(const Field& a) { return power(a, 255, 20); }    // p - 2 = 2^255 - 21
Field root_power(const Field& a) { return power(a, 252, 2); }  // (p - 5) / 8 = 2^252 - 3

using Packed = std::array<std::byte, 32>;

// Of the number between 0 and p.
Packed packed(Field a) {
  for (int i = 0; i < 3; ++i) carry(a);
  for (int i = 0; i < 2; ++i) {
    Field less = a;
    less.limbs[0] -= 0xffed;
    for (std::size_t limb = 1; limb < 16; ++limb) {
      less.limbs[limb] -= limb < 15 ? 0xffff : 0x7fff;
      less.limbs[limb] += less.limbs[limb - 1] >> 16;  // what was borrowed
      less.limbs[limb - 1] &= 0xffff;
    }
    if (less.limbs[15] >= 0) a = less;
  }
  Packed bytes;
  for (std::size_t i = 0; i < 16; ++i) {
    bytes[2 * i] = static_cast<std::byte>(a.limbs[i] & 0xff);
    bytes[2 * i + 1] = static_cast<std::byte>(a.limbs[i] >> 8);
  }
  return bytes;
}

Field unpacked(std::span<const std::byte, 32> bytes) {
  Field a;
  for (std::size_t i = 0; i < 16; ++i)
    a.limbs[i] = std::to_integer<std::int64_t>(bytes[2 * i]) | std::to_integer<std::int64_t>(bytes[2 * i + 1])
                                                                   << 8;
  a.limbs[15] &= 0x7fff;
  return a;
}

bool is_odd(const Field& a) { return (packed(a)[0] & std::byte{1}) != std::byte{0}; }

// ---- Points of the curve: x = X/Z, y = Y/Z, xy = T/Z ----

struct Point {
  Field x, y, z, t;
};

constexpr Point neutral{zero, one, one, zero};
constexpr Field base_x{{0xd51a, 0x8f25, 0x2d60, 0xc956, 0xa7b2, 0x9525, 0xc760, 0x692c, 0xdc5c, 0xfdd6,
                        0xe231, 0xc0a4, 0x53fe, 0xcd6e, 0x36d3, 0x2169}};
constexpr Field base_y{{0x6658, 0x6666, 0x6666, 0x6666, 0x6666, 0x6666, 0x6666, 0x6666, 0x6666, 0x6666,
                        0x6666, 0x6666, 0x6666, 0x6666, 0x6666, 0x6666}};

Point operator+(const Point& p, const Point& q) {
  const Field a = (p.y - p.x) * (q.y - q.x), b = (p.y + p.x) * (q.y + q.x), c = p.t * q.t * d2,
              zz = p.z * q.z, twice = zz + zz, e = b - a, f = twice - c, g = twice + c, h = b + a;
  return {e * f, h * g, g * f, e * h};
}

// The negative of the point that is stored; false if there is none.
bool read_negative(std::span<const std::byte, 32> bytes, Point& point) {
  const Field y = unpacked(bytes), square = y * y, above = square - one, below = square * d + one,
              below2 = below * below, below3 = below2 * below, below7 = below2 * below2 * below3;
  Field x = root_power(below7 * above) * above * below3;
  if (packed(x * x * below) != packed(above)) x = x * root;
  if (packed(x * x * below) != packed(above)) return false;
  if (is_odd(x) == ((bytes[31] & std::byte{0x80}) != std::byte{0})) x = zero - x;
  point = {x, y, one, x * y};
  return true;
}

Packed packed(const Point& point) {
  const Field back = inverse(point.z);
  Packed bytes = packed(point.y * back);
  if (is_odd(point.x * back)) bytes[31] ^= std::byte{0x80};
  return bytes;
}

// ---- Whole numbers modulo the order of the group; little-endian ----

constexpr std::array<std::uint8_t, 32> order{0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7,
                                             0xa2, 0xde, 0xf9, 0xde, 0x14, 0x0,  0x0,  0x0,  0x0,  0x0,  0x0,
                                             0x0,  0x0,  0x0,  0x0,  0x0,  0x0,  0x0,  0x0,  0x0,  0x10};

bool is_below_order(std::span<const std::byte, 32> number) {
  for (std::size_t i = 32; i-- > 0;)
    if (const auto byte = std::to_integer<std::uint8_t>(number[i]); byte != order[i]) return byte < order[i];
  return false;
}

Packed modulo_order(std::span<const std::byte, 64> number) {
  Packed rest{};
  for (std::size_t bit = 512; bit-- > 0;) {
    // The rest stays below the order, which has 253 bits: twice that fits.
    unsigned low = std::to_integer<unsigned>(number[bit / 8] >> (bit % 8)) & 1u;
    for (std::byte& byte : rest) {
      const unsigned next = std::to_integer<unsigned>(byte) << 1 | low;
      byte = static_cast<std::byte>(next & 0xff);
      low = next >> 8;
    }
    if (is_below_order(rest)) continue;
    int borrowed = 0;
    for (std::size_t i = 0; i < rest.size(); ++i) {
      const int difference = std::to_integer<int>(rest[i]) - order[i] - borrowed;
      borrowed = difference < 0 ? 1 : 0;
      rest[i] = static_cast<std::byte>(difference + 256 * borrowed);
    }
  }
  return rest;
}

bool bit_of(std::span<const std::byte, 32> number, std::size_t bit) {
  return (number[bit / 8] >> (bit % 8) & std::byte{1}) != std::byte{0};
}

}  // namespace

bool is_signed_by(const PublicKey& key, std::span<const std::byte> signature,
                  std::span<const std::byte> message) {
  if (signature.size() != 64) return false;
  const std::span<const std::byte, 32> commitment = signature.first<32>(), s = signature.last<32>();
  Point negative;
  if (!is_below_order(s) || !read_negative(key, negative)) return false;
  Sha512 digest;
  digest.add(commitment);
  digest.add(key);
  digest.add(message);
  const Packed challenge = modulo_order(digest.finish());
  // s·B - challenge·A. Everything is public: time may depend on it.
  const Point base{base_x, base_y, one, base_x * base_y};
  Point sum = neutral;
  for (std::size_t bit = 256; bit-- > 0;) {
    sum = sum + sum;
    if (bit_of(s, bit)) sum = sum + base;
    if (bit_of(challenge, bit)) sum = sum + negative;
  }
  return std::ranges::equal(packed(sum), commitment);
}

}  // namespace edge_bcs
