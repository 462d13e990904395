// PNG by libpng, which calls back and jumps: every function that it may jump back to keeps nothing that needs a destructor.

#include <png.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstring>
#include <vector>

#include "decode/exif.h"
#include "decode/rows.h"

namespace edge_bcs {

namespace {

// What lies beside the pixels and is not looked at: libpng then does not unpack it.
constexpr png_byte passed_over[] =
    "bKGD\0cHRM\0gAMA\0hIST\0iCCP\0iTXt\0oFFs\0pCAL\0pHYs\0sBIT\0sCAL\0sPLT\0sRGB\0tEXt\0tIME\0zTXt";

constexpr std::uint64_t signature_bytes = 8, checksum_bytes = 4, most_looked_at = 1 << 14;
constexpr char xmp_name[] = "XML:com.adobe.xmp\0";  // and the mark of text that is not packed

struct State {
  Bytes* bytes;
  Workspace* workspace;
  bool ended = false, no_memory = false;
  std::array<char, 120> said{};
};

State& state_of(png_structp png) { return *static_cast<State*>(png_get_error_ptr(png)); }

[[noreturn]] void jump_back(png_structp png, png_const_charp said) {
  State& state = state_of(png);
  std::size_t length = 0;
  while (length + 1 < state.said.size() && said[length] != '\0') ++length;
  std::copy_n(said, length, state.said.begin());
  state.said[length] = '\0';
  png_longjmp(png, 1);
}

void read_bytes(png_structp png, png_bytep into, std::size_t size) {
  State& state = state_of(png);
  if (state.bytes->fill(std::as_writable_bytes(std::span(into, size)))) return;
  state.ended = true;
  png_error(png, "ended");
}

png_voidp take(png_structp png, png_alloc_size_t size) {
  State& state = *static_cast<State*>(png_get_mem_ptr(png));
  void* const block = state.workspace->take(size);
  state.no_memory |= block == nullptr;
  return block;
}

// EXIF's number of how the image is turned, from the chunks that `bytes` has, which it may be behind; 1 where none says.
int orientation_of(Bytes& bytes) {
  int in_xmp = 0;
  bytes.skip(signature_bytes);
  for (std::array<std::byte, 8> head{}; bytes.fill(head);) {
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < 4; ++i) length = length << 8 | std::to_integer<std::uint64_t>(head[i]);
    const auto is = [&](const char* name) { return std::memcmp(head.data() + 4, name, 4) == 0; };
    std::vector<std::byte> block;
    if (is("eXIf") || is("iTXt")) block.resize(static_cast<std::size_t>(std::min(length, most_looked_at)));
    if (!bytes.fill(block) || !bytes.skip(length - block.size() + checksum_bytes)) break;
    if (is("eXIf"))
      if (const int found = exif_orientation(block); found != 0) return found;
    if (is("iTXt") && block.size() > sizeof xmp_name &&
        std::memcmp(block.data(), xmp_name, sizeof xmp_name) == 0)
      in_xmp = xmp_orientation(block);
  }
  return std::max(in_xmp, 1);
}

class PngRows final : public ImageRows {
 public:
  PngRows(Bytes& bytes, Bytes& ahead, Workspace& workspace) : state_{&bytes, &workspace} {
    picture_.orientation = orientation_of(ahead);
    png_ = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, &state_, jump_back,
                                    [](png_structp, png_const_charp) {}, &state_, take,
                                    [](png_structp png, png_voidp block) {
      static_cast<State*>(png_get_mem_ptr(png))->workspace->give_back(block);
    });
    if (png_ != nullptr) info_ = png_create_info_struct(png_);
    if (info_ == nullptr) fail_as_said();
  }

  ~PngRows() override { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngRows(const PngRows&) = delete;
  PngRows& operator=(const PngRows&) = delete;

  Picture begin(int) override {
    if (!read_header()) fail_as_said();
    const png_uint_32 width = png_get_image_width(png_, info_), height = png_get_image_height(png_, info_);
    check_pixels(width, height);
    picture_.width = picture_.decoded_width = static_cast<int>(width);
    picture_.height = picture_.decoded_height = static_cast<int>(height);
    picture_.extent_width = width, picture_.extent_height = height;
    find_key();
    if (!start()) fail_as_said();
    choose_pixels();
    if (png_get_interlace_type(png_, info_) != PNG_INTERLACE_NONE) gather();
    return picture_;
  }

  void next(std::uint8_t* row) override {
    if (!rows_.empty())
      std::copy_n(rows_[place_++], stored_row(), row);
    else if (!read(row))
      fail_as_said();
    if (keyed_) add_alpha(row);
  }

  void finish() override {
    if (!end()) fail_as_said();
  }

 private:
  bool read_header() {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_set_read_fn(png_, nullptr, read_bytes);
    png_set_user_limits(png_, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, 0);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, passed_over, sizeof passed_over / 5);
    png_read_info(png_, info_);
    return true;
  }
  bool start() {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    const int depth = png_get_bit_depth(png_, info_), type = png_get_color_type(png_, info_);
    if (type == PNG_COLOR_TYPE_PALETTE) {
      png_set_palette_to_rgb(png_);
      if (png_get_valid(png_, info_, PNG_INFO_tRNS) != 0) png_set_tRNS_to_alpha(png_);
    } else if (depth < 8) {
      png_set_expand_gray_1_2_4_to_8(png_);
    } else if (depth == 16) {
      png_set_strip_16(png_);
    }
    if (type == PNG_COLOR_TYPE_GRAY_ALPHA) png_set_gray_to_rgb(png_);
    png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    return true;
  }
  bool read(std::uint8_t* row) {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_read_row(png_, row, nullptr);
    return true;
  }
  bool read_all() {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_read_image(png_, rows_.data());
    return true;
  }
  bool end() {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_read_end(png_, info_);
    return true;
  }

  // The colour that counts as transparent, which libpng compares before it takes the upper 8 of 16 bits, and Pillow after.
  void find_key() {
    const int type = png_get_color_type(png_, info_);
    png_color_16p key = nullptr;
    if ((type != PNG_COLOR_TYPE_RGB && type != PNG_COLOR_TYPE_GRAY) ||
        png_get_tRNS(png_, info_, nullptr, nullptr, &key) == 0 || key == nullptr)
      return;
    if (type == PNG_COLOR_TYPE_GRAY && png_get_bit_depth(png_, info_) == 16) return;
    keyed_ = true;
    if (type == PNG_COLOR_TYPE_RGB)
      key_ = {low(key->red), low(key->green), low(key->blue)};
    else
      key_ = {low(key->gray), low(key->gray), low(key->gray)};
  }

  static std::uint8_t low(png_uint_16 value) { return static_cast<std::uint8_t>(value & 0xff); }

  void choose_pixels() {
    stored_channels_ = png_get_channels(png_, info_);
    switch (keyed_ ? 4 : stored_channels_) {
      case 1:
        picture_.pixels = Pixels::grey;
        return;
      case 3:
        picture_.pixels = Pixels::rgb;
        return;
      case 4:
        picture_.pixels = Pixels::rgba;
        return;
      default:
        throw BadImage("is a PNG of a kind that is not read");
    }
  }

  std::size_t stored_row() const {
    return static_cast<std::size_t>(picture_.width) * static_cast<std::size_t>(stored_channels_);
  }

  // The rows of an interlaced image come in passes over all of it.
  void gather() {
    const std::size_t count = static_cast<std::size_t>(picture_.height), needed = stored_row() * count;
    auto* const image = static_cast<png_bytep>(state_.workspace->take(needed));
    if (image == nullptr)
      fail_for_memory(picture_, "an interlaced PNG", needed, state_.workspace->left(),
                      "make it smaller, or save it without interlacing");
    for (std::size_t i = 0; i < count; ++i) rows_.push_back(image + i * stored_row());
    if (!read_all()) fail_as_said();
  }

  // Makes RGBA of a row of grey or RGB, from its end on, for it grows.
  void add_alpha(std::uint8_t* row) const {
    for (std::size_t i = static_cast<std::size_t>(picture_.width); i-- > 0;) {
      const std::uint8_t* const from = row + i * static_cast<std::size_t>(stored_channels_);
      std::array<std::uint8_t, 3> colour{};
      for (std::size_t channel = 0; channel < 3; ++channel)
        colour[channel] = from[stored_channels_ == 1 ? 0 : channel];
      std::ranges::copy(colour, row + 4 * i);
      row[4 * i + 3] = colour == key_ ? 0 : 255;
    }
  }

  // Throws what libpng jumped back for.
  [[noreturn]] void fail_as_said() {
    if (state_.ended && state_.bytes->failed()) throw BadImage("cannot be read");
    if (state_.ended) throw BadImage("is truncated: the end of the PNG is missing");
    if (state_.no_memory) throw BadImage("takes more memory to decode than there is: make it smaller");
    throw BadImage("is damaged or truncated (" + std::string(state_.said.data()) + ")");
  }

  State state_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  Picture picture_;
  int stored_channels_ = 0;
  bool keyed_ = false;
  std::array<std::uint8_t, 3> key_{};
  std::vector<png_bytep> rows_;
  std::size_t place_ = 0;
};

}  // namespace

std::unique_ptr<ImageRows> png_rows(Bytes& bytes, Bytes& ahead, Workspace& workspace) {
  return std::make_unique<PngRows>(bytes, ahead, workspace);
}

}  // namespace edge_bcs
