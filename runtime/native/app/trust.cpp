#include "app/trust.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>

#include "app/archive.h"
#include "app/paths.h"
#include "app/saving.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr const char* environment = "EDGE_BCS_TRUST_KEY";
constexpr std::string_view begin_mark = "-----BEGIN PUBLIC KEY-----", end_mark = "-----END PUBLIC KEY-----";
constexpr std::uint64_t largest_key = 64 << 10, largest_memory = 16 << 20;
// What comes before the key in its DER form (RFC 8410), whose length is thereby told.
constexpr std::array<std::uint8_t, 12> prefix{0x30, 0x2a, 0x30, 0x05, 0x06, 0x03,
                                              0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};

// The bytes of base64, between which white space may stand; nothing if it is none.
std::optional<std::vector<std::uint8_t>> decoded(std::string_view text) {
  constexpr std::string_view letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<std::uint8_t> bytes;
  std::uint32_t bits = 0;
  std::size_t count = 0, filling = 0;
  for (const char letter : text) {
    if (std::string_view(" \t\r\n").find(letter) != std::string_view::npos) continue;
    const std::size_t value = letters.find(letter);
    if (letter == '=' ? ++filling > 2 : filling > 0 || value == std::string_view::npos) return {};
    bits = bits << 6 | static_cast<std::uint32_t>(letter == '=' ? 0 : value);
    if (++count % 4 != 0) continue;
    for (const int shift : {16, 8, 0}) bytes.push_back(static_cast<std::uint8_t>(bits >> shift));
  }
  if (count % 4 != 0) return {};
  bytes.resize(bytes.size() - filling);
  return bytes;
}

void add_key(std::vector<std::uint8_t>& keys, const std::string& file) {
  std::string content;
  try {
    content = read_all(FileSource(file), largest_key);
  } catch (const Error& error) {
    fail("the trusted key ", plain(file), " cannot be used: ", error.what(), ".");
  }
  require(content.find("PRIVATE KEY") == std::string::npos, "the trusted key ", plain(file),
          " is a private key, which belongs on no board; write its public half with `openssl pkey -in ",
          plain(file), " -pubout`.");
  const std::size_t begin = content.find(begin_mark), end = content.find(end_mark);
  std::optional<std::vector<std::uint8_t>> key;
  if (begin != std::string::npos && end != std::string::npos && begin < end)
    key =
        decoded(std::string_view(content).substr(begin + begin_mark.size(), end - begin - begin_mark.size()));
  require(key.has_value(), "the trusted key ", plain(file),
          " is not a public key in PEM form, such as `openssl pkey -pubout` writes.");
  require(key->size() == prefix.size() + key_bytes && std::equal(prefix.begin(), prefix.end(), key->begin()),
          "the trusted key ", plain(file),
          " is not an Ed25519 key: make one with `openssl genpkey -algorithm ed25519 -out key.pem`.");
  keys.insert(keys.end(), key->begin() + prefix.size(), key->end());
}

// The file that remembers the highest release that was accepted for a run folder.
std::string memory_of(const std::string& run) { return resolved_so_far(run) + ".release"; }

std::uint64_t accepted(const std::string& run) {
  const std::string file = memory_of(run);
  if (!exists(file)) return 0;
  const Value content = read_json(file, largest_memory);
  const Value* const release = content.is_object() ? content.find("accepted_release") : nullptr;
  require(release != nullptr && release->number() >= 1, plain(file),
          " should say which release was accepted last, but is damaged: find out how, then delete it.");
  return release->whole();
}

}  // namespace

std::vector<std::string> trusted_files(const Options& options) {
  std::vector<std::string> files = options.texts("--trust-key");
  const char* const given = std::getenv(environment);
  if (files.empty() && given != nullptr && *given != '\0') {
    std::string_view rest = given;
    for (std::size_t end = rest.find(':'); end != std::string_view::npos; end = rest.find(':')) {
      files.emplace_back(rest.substr(0, end));
      rest.remove_prefix(end + 1);
    }
    files.emplace_back(rest);
  }
  return files;
}

Trusted trusted_by(const Options& options) {
  const std::vector<std::string> files = trusted_files(options);
  Trusted trusted;
  trusted.min_release = options.whole("--min-release", 1).value_or(0);
  require(trusted.min_release == 0 || !files.empty(),
          "--min-release needs --trust-key: anybody can change a number that is not signed.");
  for (const std::string& file : files) add_key(trusted.keys, file);
  return trusted;
}

void check_release(const std::string& artifact, std::uint64_t release, const std::string& run) {
  const std::uint64_t newest = accepted(run);
  if (release >= newest) return;
  fail(plain(artifact), " is ", release == 0 ? "of no release" : "release " + std::to_string(release),
       ", and release ", newest, " was accepted here before: copy that or a newer one. Delete ",
       plain(memory_of(run)), " to go back on purpose.");
}

void remember_release(std::uint64_t release, const std::string& run) {
  if (release <= accepted(run)) return;
  Value memory;
  memory["accepted_release"] = release;
  write_json(memory_of(run), memory);
}

}  // namespace edge_bcs::app
