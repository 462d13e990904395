#include "session/state.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <optional>

#include "ops/fixed.h"
#include "ops/op.h"
#include "session/json.h"

namespace edge_bcs {

namespace {

constexpr std::uint64_t largest_header = std::uint64_t{16} << 20;
constexpr std::size_t number_bytes = 4;  // of every tensor's numbers
constexpr std::string_view format = "edge-bcs-state", version = "1", checksum = "sha256";

bool is_index(std::size_t tensor) { return tensor == coo_index; }
std::string_view kind_of(std::size_t tensor) { return is_index(tensor) ? "I32" : "F32"; }

template <class T>
T at(std::span<const std::byte> bytes, std::size_t place) {
  T value;
  std::memcpy(&value, bytes.data() + place * sizeof(T), sizeof(T));
  return value;
}

std::size_t count_of(std::span<const std::byte> bytes) { return bytes.size() / number_bytes; }

// Nothing if the metadata have no such number, or one above `most`.
std::optional<std::uint64_t> counter(const StateHeader& header, std::string_view name, std::uint64_t most) {
  const std::string* const text = header.find(name);
  std::uint64_t value = 0;
  if (text == nullptr || text->empty() || text->find_first_not_of("0123456789") != std::string::npos)
    return {};
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || value > most) return {};
  return value;
}

std::uint64_t needed_counter(const StateHeader& header, std::string_view name, std::uint64_t most) {
  const auto value = counter(header, name, most);
  require(value.has_value(), "its metadata has no valid ", name);
  return *value;
}

void add_escaped(Text& to, std::string_view text) {
  constexpr std::string_view digits = "0123456789abcdef";
  const auto unit = [&](char32_t code) {
    const std::array<char, 6> escape{'\\',
                                     'u',
                                     digits[code >> 12 & 15],
                                     digits[code >> 8 & 15],
                                     digits[code >> 4 & 15],
                                     digits[code & 15]};
    to.add(std::string_view(escape.data(), escape.size()));
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    constexpr std::string_view special = "\"\\\b\f\n\r\t", letters = "\"\\bfnrt";
    if (const std::size_t found = special.find(text[i]); found != std::string_view::npos) {
      to.add("\\");
      to.add(letters.substr(found, 1));
    } else if (byte >= 0x20 && byte < 0x7f) {
      to.add(text.substr(i, 1));
    } else if (byte < 0x80) {
      unit(byte);
    } else {  // UTF-8, which was checked when it was read
      const std::size_t more = byte >= 0xf0 ? 3 : byte >= 0xe0 ? 2 : 1;
      char32_t code = byte & (0x3f >> more);
      for (std::size_t k = 0; k < more && i + 1 < text.size(); ++k)
        code = code << 6 | (static_cast<unsigned char>(text[++i]) & 0x3f);
      if (code >= 0x10000) {
        unit(0xd800 + ((code - 0x10000) >> 10));
        unit(0xdc00 + ((code - 0x10000) & 0x3ff));
      } else {
        unit(code);
      }
    }
  }
}

// json.dumps of the metadata, with these separators.
template <class Each>
void add_object(Text& to, const Each& each, std::string_view comma, std::string_view colon) {
  to.add("{");
  bool first = true;
  each([&](std::string_view name, std::string_view value) {
    if (!first) to.add(comma);
    first = false;
    to.add_quoted(name);
    to.add(colon);
    to.add_quoted(value);
  });
  to.add("}");
}

void add_tensors(Sha256& digest, const StateBytes& state) {
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor) {
    std::array<char, 96> text;
    char* end = std::copy_n(state_names[tensor], std::strlen(state_names[tensor]), text.data());
    const std::string_view type = is_index(tensor) ? " int32 (" : " float32 (";
    end = std::copy(type.begin(), type.end(), end);
    end = std::to_chars(end, text.data() + text.size() - 2, count_of(state[tensor])).ptr;
    *end++ = ',', *end++ = ')';
    digest.add(std::string_view(text.data(), static_cast<std::size_t>(end - text.data())));
    digest.add(state[tensor]);
  }
}

// Which of the numbers that are trained, the `place`-th, is which of all.
std::size_t whole_place(const std::vector<Segment>& segments, std::size_t place,
                        std::span<const std::byte> index) {
  const auto is_trained = [&](std::size_t number) {
    return std::ranges::any_of(segments, [&](const Segment& segment) {
      return segment.trained && number >= segment.offset && number < segment.end();
    });
  };
  if (index.empty()) {
    for (const Segment& segment : segments) {
      if (!segment.trained) continue;
      if (place < segment.size) return segment.offset + place;
      place -= segment.size;
    }
    return 0;
  }
  for (std::size_t i = 0; i < count_of(index); ++i)
    if (is_trained(static_cast<std::size_t>(at<std::int32_t>(index, i))) && place-- == 0) return i;
  return 0;
}

[[noreturn]] void refuse(const Manifest& manifest, const StateBytes& state, std::size_t tensor,
                         std::size_t place, const char* what) {
  const auto which = static_cast<StateTensor>(tensor);
  fail(state_names[tensor], " of ", owner(manifest, which, place, state), " holds ",
       at<float>(state[tensor], place), ", ", what);
}

}  // namespace

std::array<std::size_t, state_tensors> state_counts(const Manifest& manifest) {
  return {manifest.kappa,
          manifest.kappa,
          manifest.trained_kappa,
          manifest.dense_size,
          manifest.trained_dense_size,
          manifest.statistics_size,
          manifest.statistics_size};
}

const std::string* StateHeader::find(std::string_view name) const {
  const auto found = std::ranges::find(metadata, name, &Metadata::value_type::first);
  return found == metadata.end() ? nullptr : &found->second;
}

StateHeader StateHeader::read(const Source& source, const Manifest& manifest) {
  std::array<std::byte, 8> first{};
  source.read(0, first);
  std::uint64_t length = 0;
  for (std::size_t i = first.size(); i-- > 0;) length = length << 8 | static_cast<std::uint64_t>(first[i]);
  require(length <= largest_header && length <= source.size() - first.size(), "its header would have ",
          length, " bytes");
  std::string text(static_cast<std::size_t>(length), '\0');
  source.read(first.size(), std::as_writable_bytes(std::span(text)));
  const Json content = Json::parse(text);
  require(content.kind() == Json::Kind::object && text.starts_with('{'), "its header is not a JSON object");

  StateHeader header;
  if (const Json* const facts = content.find("__metadata__"); facts != nullptr) {
    require(facts->kind() == Json::Kind::object, "its metadata is not made of strings");
    for (std::size_t i = 0; i < facts->names().size(); ++i) {
      require(facts->items()[i].kind() == Json::Kind::text, "its metadata is not made of strings");
      if (facts->names()[i] == checksum)
        header.sha256 = facts->items()[i].text();
      else
        header.metadata.emplace_back(facts->names()[i], facts->items()[i].text());
    }
    std::ranges::sort(header.metadata);
  }
  const std::string* const kind = header.find("format");
  const std::string* const number = header.find("version");
  require(kind != nullptr && *kind == format && number != nullptr && *number == version, "it is not an ",
          format, " of version ", version);
  header.step = needed_counter(header, "step", (std::uint64_t{1} << 56) - 1);
  header.seed = needed_counter(header, "seed", ~std::uint64_t{0});
  header.images = counter(header, "images", (std::uint64_t{1} << 53) - 1);

  require(content.items().size() == state_tensors + 1, "its tensors differ from the network's");
  const auto counts = state_counts(manifest);
  const std::uint64_t begin = first.size() + length;
  std::array<std::pair<std::uint64_t, std::uint64_t>, state_tensors> places;
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor) {
    const Json* const entry = content.find(state_names[tensor]);
    require(entry != nullptr, "its tensors differ from the network's: it has no ", state_names[tensor]);
    const Json* const type = entry->find("dtype");
    const Json* const shape = entry->find("shape");
    const Json* const offsets = entry->find("data_offsets");
    const std::uint64_t bytes = counts[tensor] * number_bytes;
    require(type != nullptr && type->kind() == Json::Kind::text && type->text() == kind_of(tensor) &&
                shape != nullptr && shape->items().size() == 1 &&
                shape->items()[0].whole() == std::optional<std::uint64_t>(counts[tensor]),
            state_names[tensor], " is not ", kind_of(tensor), "[", counts[tensor], "]");
    require(offsets != nullptr && offsets->items().size() == 2, "its header does not say where ",
            state_names[tensor], " lies");
    const auto from = offsets->items()[0].whole(), to = offsets->items()[1].whole();
    require(from && to && *from <= source.size() && *to == *from + bytes, state_names[tensor],
            " does not lie where its header says");
    header.offsets[tensor] = begin + *from;
    places[tensor] = {*from, *to};
  }
  std::ranges::sort(places);
  std::uint64_t end = 0;
  for (const auto& [from, to] : places) {
    require(from == end, "its tensors have a gap or overlap at byte ", end);
    end = to;
  }
  require(begin + end == source.size(), "its tensors end at byte ", begin + end, " of ", source.size());
  return header;
}

void check_sum(const StateHeader& header, const StateBytes& state) {
  std::size_t length = most_header;
  for (const auto& [name, value] : header.metadata) length += 6 * (name.size() + value.size()) + 16;
  Text text(length);
  const auto all = [&](const auto& visit) {
    for (const auto& [name, value] : header.metadata) visit(name, value);
  };
  add_object(text, all, ", ", ": ");
  Sha256 digest;
  digest.add(text.view());
  add_tensors(digest, state);
  require(view(digest.finish()) == header.sha256, "its checksum does not match (torn or altered)");
}

void check_state(const StateBytes& state, const Manifest& manifest) {
  const std::span<const std::byte> index = state[coo_index];
  const std::size_t count = count_of(index);
  std::int64_t before = -1;
  std::size_t trained = 0;
  auto kernel = manifest.kernels.begin();
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t position = at<std::int32_t>(index, i);
    require(position > before && position < static_cast<std::int64_t>(manifest.size),
            "coo.index is not strictly ascending within the network's ", manifest.size, " positions");
    before = position;
    while (static_cast<std::size_t>(position) >= kernel->end()) ++kernel;
    trained += kernel->trained ? 1 : 0;
  }
  require(manifest.trains_all() || trained == manifest.trained_kappa, "coo.index has ", trained,
          " connections in the layers that are trained, which have ", manifest.trained_kappa);
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor) {
    if (is_index(tensor)) continue;
    for (std::size_t i = 0; i < count_of(state[tensor]); ++i)
      if (!std::isfinite(at<float>(state[tensor], i)))
        refuse(manifest, state, tensor, i, "which is not finite");
  }
  for (std::size_t i = 0; i < count; ++i)
    if (at<float>(state[coo_value], i) == 0)
      refuse(manifest, state, coo_value, i, "a connection of weight zero");
  for (std::size_t i = 0; i < count_of(state[batchnorm_variance]); ++i)
    if (at<float>(state[batchnorm_variance], i) < 0)
      refuse(manifest, state, batchnorm_variance, i, "which is negative");
}

std::string owner(const Manifest& manifest, StateTensor tensor, std::size_t place, const StateBytes& state) {
  const bool coo = tensor == coo_value || tensor == coo_index || tensor == coo_momentum;
  const bool dense = tensor == dense_value || tensor == dense_momentum;
  const std::vector<Segment>& table = coo ? manifest.kernels : dense ? manifest.dense : manifest.statistics;
  if (!manifest.trains_all() && (tensor == coo_momentum || tensor == dense_momentum))
    place = whole_place(table, place, coo ? state[coo_index] : std::span<const std::byte>());
  if (coo) place = static_cast<std::size_t>(at<std::int32_t>(state[coo_index], place));
  for (const Segment& segment : table)
    if (place < segment.end()) return coo ? segment.name + ".weight" : segment.name;
  return "the network";
}

void Text::add(std::string_view part) {
  require(part.size() <= content_.capacity() - content_.size(), "there is more text than was foreseen");
  content_.append(part);
}

void Text::add(std::uint64_t number) {
  std::array<char, 24> digits;
  char* const end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
  add(std::string_view(digits.data(), static_cast<std::size_t>(end - digits.data())));
}

void Text::add(double number) {
  // The shortest digits that read as the number, then laid out as Python does.
  std::array<char, 32> digits;
  char* const end =
      std::to_chars(digits.data(), digits.data() + digits.size(), number, std::chars_format::scientific).ptr;
  const std::string_view text(digits.data(), static_cast<std::size_t>(end - digits.data()));
  const std::size_t e = text.find('e');
  int exponent = 0;
  std::from_chars(text.data() + e + (text[e + 1] == '+' ? 2 : 1), end, exponent);
  if (exponent < -4 || exponent >= 16) return add(text);
  char* const fixed =
      std::to_chars(digits.data(), digits.data() + digits.size(), number, std::chars_format::fixed).ptr;
  const std::string_view plain(digits.data(), static_cast<std::size_t>(fixed - digits.data()));
  add(plain);
  if (plain.find('.') == std::string_view::npos) add(".0");
}

void Text::add_quoted(std::string_view part) {
  add("\"");
  add_escaped(*this, part);
  add("\"");
}

Metadata notes_of(const StateHeader& header) {
  constexpr std::array<std::string_view, 6> own{"format", "version", "step", "seed", "images", "progress"};
  Metadata notes;
  for (const auto& entry : header.metadata)
    if (std::ranges::find(own, entry.first) == own.end()) notes.push_back(entry);
  return notes;
}

std::size_t most_header_of(const Metadata& notes) {
  std::size_t bytes = most_header;
  for (const auto& [name, text] : notes) bytes += 6 * (name.size() + text.size()) + 16;  // "\u00e9"
  return bytes;
}

void write_header(Text& header, const Facts& facts, const StateBytes& state) {
  std::array<char, 24> step, seed, images;
  const auto written = [](std::array<char, 24>& digits, std::uint64_t number) {
    char* const end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
    return std::string_view(digits.data(), static_cast<std::size_t>(end - digits.data()));
  };
  using Entry = std::pair<std::string_view, std::string_view>;
  const auto entries = [&](std::string_view sum) {  // sorted by name
    Fixed<Entry, 7> made;
    for (const Entry& entry : {
             Entry{"format", format},
             Entry{"images", written(images, facts.images)},
             Entry{"progress", facts.progress},
             Entry{"seed", written(seed, facts.seed)},
             Entry{checksum, sum},
             Entry{"step", written(step, facts.step)},
             Entry{"version", version},
         })
      if (!entry.second.empty()) made.push_back(entry);
    return made;
  };
  const auto all = [&](std::string_view sum) {
    return [&facts, own = entries(sum)](const auto& visit) {
      auto note = facts.notes.begin();
      for (const auto& [name, value] : own) {
        for (; note != facts.notes.end() && note->first < name; ++note) visit(note->first, note->second);
        visit(name, value);
      }
      for (; note != facts.notes.end(); ++note) visit(note->first, note->second);
    };
  };
  header.clear();
  add_object(header, all({}), ", ", ": ");
  Sha256 digest;
  digest.add(header.view());
  add_tensors(digest, state);
  const Sha256::Text sum = digest.finish();

  header.clear();
  header.add("{\"__metadata__\":");
  add_object(header, all(edge_bcs::view(sum)), ",", ":");
  std::uint64_t end = 0;
  std::array<std::uint64_t, state_tensors> begins{};
  for (const StateTensor tensor : file_order) {
    begins[tensor] = end;
    end += state[tensor].size();
  }
  // By name, which is another order than that of the numbers.
  for (const StateTensor tensor : {batchnorm_mean, batchnorm_variance, coo_index, coo_momentum, coo_value,
                                   dense_momentum, dense_value}) {
    header.add(",");
    header.add_quoted(state_names[tensor]);
    header.add(":{\"data_offsets\":[");
    header.add(begins[tensor]);
    header.add(",");
    header.add(begins[tensor] + state[tensor].size());
    header.add("],\"dtype\":\"");
    header.add(kind_of(tensor));
    header.add("\",\"shape\":[");
    header.add(std::uint64_t{count_of(state[tensor])});
    header.add("]}");
  }
  header.add("}");
  while (header.view().size() % 8 != 0) header.add(" ");
}

std::array<std::byte, 8> length_of(std::string_view header) {
  std::array<std::byte, 8> length;
  for (std::size_t i = 0; i < length.size(); ++i)
    length[i] = static_cast<std::byte>(std::uint64_t{header.size()} >> 8 * i);
  return length;
}

std::size_t write_state(std::string_view header, const StateBytes& state, std::span<std::byte> memory) {
  std::size_t end = 0;
  write_parts(header, state, [&](std::span<const std::byte> bytes) {
    require(bytes.size() <= memory.size() - end, "the memory has ", memory.size(),
            " bytes, too few for the state");
    if (!bytes.empty()) std::memcpy(memory.data() + end, bytes.data(), bytes.size());
    end += bytes.size();
  });
  return end;
}

}  // namespace edge_bcs
