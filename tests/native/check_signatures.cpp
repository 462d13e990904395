// Reads lines "key signature message" in hexadecimal, a message of no bytes as "-", and answers 1 or 0 to each.

#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "session/ed25519.h"

namespace {

std::vector<std::byte> bytes_of(const std::string& text) {
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; text != "-" && i + 1 < text.size(); i += 2)
    bytes.push_back(static_cast<std::byte>(std::stoi(text.substr(i, 2), nullptr, 16)));
  return bytes;
}

}  // namespace

int main() {
  for (std::string key, signature, message; std::cin >> key >> signature >> message;) {
    edge_bcs::PublicKey read;
    std::memcpy(read.data(), bytes_of(key).data(), read.size());
    std::cout << edge_bcs::is_signed_by(read, bytes_of(signature), bytes_of(message)) << '\n';
  }
}
