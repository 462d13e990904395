// Signatures of Ed25519 (RFC 8032), verified; nothing here signs, so nothing here is secret.
#pragma once

#include <array>
#include <cstddef>
#include <span>

namespace edge_bcs {

using PublicKey = std::array<std::byte, 32>;

// Whether the owner of `key` signed `message`: as OpenSSL decides it (no cofactor, s below the order of the group).
bool is_signed_by(const PublicKey& key, std::span<const std::byte> signature,
                  std::span<const std::byte> message);

}  // namespace edge_bcs
