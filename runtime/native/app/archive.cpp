#include "app/archive.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <limits>
#include <string_view>

#include "ops/op.h"

namespace edge_bcs::app {

namespace {

constexpr std::uint32_t end_mark = 0x06054b50, member_mark = 0x02014b50, local_mark = 0x04034b50;
constexpr std::size_t end_bytes = 22, member_bytes = 46, local_bytes = 30, most_comment = 0xffff;
constexpr std::size_t most_directory = 16 << 20, most_header = 1 << 16, piece = 1 << 16;
constexpr unsigned stored = 0, deflated = 8;

template <class T>
T at(std::string_view bytes, std::size_t place) {
  T value;
  require(place + sizeof(T) <= bytes.size(), "it is no .npz file, or truncated");
  std::memcpy(&value, bytes.data() + place, sizeof(T));
  return value;
}

std::string read_text(const Source& source, std::uint64_t offset, std::size_t size) {
  std::string text(size, '\0');
  source.read(offset, std::as_writable_bytes(std::span(text)));
  return text;
}

// What stands behind 'name': in the header of an array, from there on.
std::string_view behind(std::string_view header, std::string_view name) {
  const std::size_t found = header.find("'" + std::string(name) + "':");
  require(found != std::string_view::npos, "it has an array without ", name);
  std::string_view rest = header.substr(found + name.size() + 3);
  while (rest.starts_with(' ')) rest.remove_prefix(1);
  return rest;
}

std::vector<std::uint64_t> shape_of(std::string_view text) {
  std::vector<std::uint64_t> shape;
  require(text.starts_with('('), "it has an array without a shape");
  text.remove_prefix(1);
  while (!text.starts_with(')')) {
    while (text.starts_with(' ') || text.starts_with(',')) text.remove_prefix(1);
    if (text.starts_with(')')) break;
    std::uint64_t extent = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), extent);
    require(error == std::errc() && extent < std::uint64_t{1} << 40,
            "it has an array of an impossible shape");
    shape.push_back(extent);
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  }
  return shape;
}

// What the header of a .npy says; `content` begins with it. Returns the header's size.
std::size_t read_header(std::string_view content, StoredArray& array) {
  require(content.size() > 12 && content.starts_with("\x93NUMPY"), "it has what is no numpy array");
  const bool first = content[6] == 1;
  const std::size_t begin = first ? 10 : 12,
                    size = first ? at<std::uint16_t>(content, 8) : at<std::uint32_t>(content, 8);
  require(size <= most_header && begin + size <= content.size(),
          "it has an array with a header that is cut off");
  const std::string_view header = content.substr(begin, size), type = behind(header, "descr");
  require(type.starts_with('\''), "it has an array that is not of numbers");
  array.type = type.substr(1, type.find('\'', 1) - 1);
  require(behind(header, "fortran_order").starts_with("False"), "it has an array that is not row-major");
  array.shape = shape_of(behind(header, "shape"));
  return begin + size;
}

std::uint64_t bytes_of(const StoredArray& array) {
  std::uint64_t bytes = array.type.size() == 3 ? static_cast<std::uint64_t>(array.type[2] - '0') : 0;
  require(bytes >= 1 && bytes <= 8, "it has an array of the type ", array.type.substr(0, 20));
  for (const std::uint64_t extent : array.shape) {
    require(extent == 0 || bytes <= (std::uint64_t{1} << 40) / extent, "it has an array that is too large");
    bytes *= extent;
  }
  return bytes;
}

}  // namespace

FileSource::FileSource(const std::string& path)
    : file_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  require(static_cast<bool>(file_), "it cannot be read: ", cause_of(errno));
  struct stat status{};
  require(fstat(file_.number(), &status) == 0 && S_ISREG(status.st_mode), "it is not a file");
  size_ = static_cast<std::uint64_t>(status.st_size);
}

void FileSource::read(std::uint64_t offset, std::span<std::byte> into) const {
  while (!into.empty()) {
    const ssize_t count = pread(file_.number(), into.data(), into.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    require(count >= 0, "it cannot be read: ", cause_of(errno));
    require(count > 0, "it ends early");
    offset += static_cast<std::uint64_t>(count);
    into = into.subspan(static_cast<std::size_t>(count));
  }
}

Arrays::Arrays(const Source& source) : source_(source) {
  const std::uint64_t size = source.size();
  const auto tail = static_cast<std::size_t>(std::min<std::uint64_t>(size, end_bytes + most_comment));
  const std::string end = read_text(source, size - tail, tail);
  std::size_t place = end.size() >= end_bytes ? end.size() - end_bytes + 1 : 0;
  while (place > 0 && at<std::uint32_t>(end, place - 1) != end_mark) --place;
  require(place > 0, "it is no .npz file, or truncated");
  --place;
  const std::size_t count = at<std::uint16_t>(end, place + 10), length = at<std::uint32_t>(end, place + 12);
  const std::uint64_t begin = at<std::uint32_t>(end, place + 16);
  require(length <= most_directory && begin + length <= size, "it is no .npz file, or truncated");
  const std::string directory = read_text(source, begin, length);
  for (std::size_t i = 0, entry = 0; i < count; ++i) {
    require(at<std::uint32_t>(directory, entry) == member_mark, "it is no .npz file, or damaged");
    const std::size_t name = at<std::uint16_t>(directory, entry + 28),
                      extra = at<std::uint16_t>(directory, entry + 30),
                      comment = at<std::uint16_t>(directory, entry + 32);
    Member member{{},
                  at<std::uint32_t>(directory, entry + 42),
                  at<std::uint32_t>(directory, entry + 20),
                  at<std::uint32_t>(directory, entry + 24),
                  at<std::uint32_t>(directory, entry + 16),
                  at<std::uint16_t>(directory, entry + 10)};
    require(entry + member_bytes + name <= directory.size(), "it is no .npz file, or damaged");
    require(member.size != 0xffffffff && member.place != 0xffffffff,
            "it is larger than 4 GiB, which is not read");
    member.name = directory.substr(entry + member_bytes, name);
    if (member.name.ends_with(".npy")) member.name.resize(member.name.size() - 4);
    members_.push_back(std::move(member));
    entry += member_bytes + name + extra + comment;
  }
}

const Arrays::Member* Arrays::find(const std::string& name) const {
  const auto found = std::ranges::find(members_, name, &Member::name);
  return found == members_.end() ? nullptr : &*found;
}

std::uint64_t Arrays::data_of(const Member& member) const {
  const std::string local = read_text(source_, member.place, local_bytes);
  require(at<std::uint32_t>(local, 0) == local_mark, "it is no .npz file, or damaged");
  const std::uint64_t offset =
      member.place + local_bytes + at<std::uint16_t>(local, 26) + at<std::uint16_t>(local, 28);
  require(offset <= source_.size() && member.packed <= source_.size() - offset, "it ends early");
  return offset;
}

std::string Arrays::unpacked(const Member& member) const {
  std::string packed = read_text(source_, data_of(member), static_cast<std::size_t>(member.packed));
  if (member.method == stored) return packed;
  require(member.method == deflated, "it is packed in a way that is not read");
  std::string content(static_cast<std::size_t>(member.size), '\0');
  z_stream stream{};
  require(inflateInit2(&stream, -MAX_WBITS) == Z_OK, "there is not enough memory to unpack it");
  stream.next_in = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = reinterpret_cast<Bytef*>(content.data());
  stream.avail_out = static_cast<uInt>(content.size());
  const int result = inflate(&stream, Z_FINISH);
  const bool whole = result == Z_STREAM_END && stream.avail_out == 0;
  inflateEnd(&stream);
  const uLong check =
      crc32(0, reinterpret_cast<const Bytef*>(content.data()), static_cast<uInt>(content.size()));
  require(whole && check == member.check, "it is damaged: the checksum of ", member.name, " differs");
  return content;
}

void Arrays::compare_checksum(const Member& member, std::uint64_t offset) const {
  std::array<std::byte, piece> buffer;
  uLong check = 0;
  for (std::uint64_t done = 0; done < member.size;) {
    const auto part = static_cast<std::size_t>(std::min<std::uint64_t>(piece, member.size - done));
    source_.read(offset + done, std::span(buffer).first(part));
    check = crc32(check, reinterpret_cast<const Bytef*>(buffer.data()), static_cast<uInt>(part));
    done += part;
  }
  require(check == member.check, "it is damaged: the checksum of ", member.name, " differs");
}

StoredArray Arrays::array(const std::string& name, std::uint64_t most) const {
  const Member* const member = find(name);
  require(member != nullptr, "it has no array ", name);
  StoredArray array;
  array.packed = member->method != stored;
  if (array.packed) {
    require(member->size <= most && member->packed <= most, "its array ", name,
            " is packed: save it by np.savez, so that images can be read one at a time");
    array.content = unpacked(*member);
    array.offset = read_header(array.content, array);
    require(array.offset + bytes_of(array) <= array.content.size(), "its array ", name, " is truncated");
  } else {
    const std::uint64_t offset = data_of(*member);
    compare_checksum(*member, offset);
    const std::string begin = read_text(
        source_, offset, static_cast<std::size_t>(std::min<std::uint64_t>(member->size, most_header)));
    const std::size_t header = read_header(begin, array);
    require(header + bytes_of(array) <= member->size, "its array ", name, " is truncated");
    array.offset = offset + header;
  }
  return array;
}

std::vector<std::int64_t> Arrays::whole_numbers(const std::string& name, std::uint64_t most) const {
  StoredArray array = this->array(name, most);
  require(array.shape.size() == 1 && (array.type[1] == 'u' || array.type[1] == 'i') && array.type[0] != '>' &&
              bytes_of(array) <= most,
          "its array ", name, " must be whole numbers of one dimension, not ", array.type);
  const auto size = static_cast<std::size_t>(bytes_of(array) / std::max<std::uint64_t>(array.count(), 1));
  std::string content = array.packed
                            ? array.content.substr(static_cast<std::size_t>(array.offset))
                            : read_text(source_, array.offset, static_cast<std::size_t>(bytes_of(array)));
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(array.count()));
  const bool is_signed = array.type[1] == 'i';
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    std::uint64_t value = 0;
    for (std::size_t byte = size; byte-- > 0;)
      value = value << 8 | static_cast<unsigned char>(content[i * size + byte]);
    if (is_signed && size < 8 && value >> (8 * size - 1) != 0) value |= ~std::uint64_t{0} << (8 * size);
    require(is_signed || value <= std::uint64_t{std::numeric_limits<std::int64_t>::max()}, "its array ", name,
            " has the label ", value);
    numbers[i] = static_cast<std::int64_t>(value);
  }
  return numbers;
}

}  // namespace edge_bcs::app
