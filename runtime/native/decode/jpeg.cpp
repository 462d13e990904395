// JPEG by libjpeg, which calls back and jumps: every function that it may jump back to keeps nothing that needs a destructor.

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "decode/exif.h"
#include "decode/libjpeg.h"
#include "decode/rows.h"

namespace edge_bcs {

namespace {

constexpr int exif_marker = JPEG_APP0 + 1;
constexpr char exif_name[] = "Exif\0", xmp_name[] = "http://ns.adobe.com/xap/1.0/";
constexpr int scales[] = {8, 4, 2, 1};

struct Errors : jpeg_error_mgr {
  std::jmp_buf jump;
};

struct Input : jpeg_source_mgr {
  Bytes* bytes;
  bool ended;
};

[[noreturn]] void jump_back(j_common_ptr info) { std::longjmp(static_cast<Errors*>(info->err)->jump, 1); }

::boolean fill(j_decompress_ptr info) {
  auto* const input = static_cast<Input*>(info->src);
  const std::span<const std::byte> more = input->bytes->more();
  if (more.empty()) {
    input->ended = true;
    jump_back(reinterpret_cast<j_common_ptr>(info));
  }
  input->next_input_byte = reinterpret_cast<const JOCTET*>(more.data());
  input->bytes_in_buffer = more.size();
  return TRUE;
}

void skip(j_decompress_ptr info, long count) {
  if (count <= 0) return;
  auto left = static_cast<std::size_t>(count);
  while (left > info->src->bytes_in_buffer) {
    left -= info->src->bytes_in_buffer;
    fill(info);
  }
  info->src->next_input_byte += left;
  info->src->bytes_in_buffer -= left;
}

class JpegRows final : public ImageRows {
 public:
  JpegRows(Bytes& bytes, Workspace& workspace) : workspace_(workspace) {
    info_.err = jpeg_std_error(&errors_);
    errors_.error_exit = jump_back;
    errors_.output_message = [](j_common_ptr) {};
    info_.client_data = &workspace;
    if (!create()) fail_as_said();
    input_.init_source = [](j_decompress_ptr) {};
    input_.fill_input_buffer = fill;
    input_.skip_input_data = skip;
    input_.resync_to_restart = jpeg_resync_to_restart;
    input_.term_source = [](j_decompress_ptr) {};
    input_.bytes = &bytes;
    info_.src = &input_;
    info_.mem->max_memory_to_use = static_cast<long>(workspace.size());
  }

  ~JpegRows() override { jpeg_destroy_decompress(&info_); }
  JpegRows(const JpegRows&) = delete;
  JpegRows& operator=(const JpegRows&) = delete;

  Picture begin(int least_side) override {
    if (!read_header()) fail_as_said();
    picture_.width = static_cast<int>(info_.image_width);
    picture_.height = static_cast<int>(info_.image_height);
    check_pixels(picture_.width, picture_.height);
    choose_pixels();
    const int times = std::min(picture_.width / least_side, picture_.height / least_side);
    int scale = 1;
    for (const int candidate : scales) {
      scale = candidate;
      if (times >= candidate) break;
    }
    info_.scale_num = 1;
    info_.scale_denom = static_cast<unsigned>(scale);
    picture_.extent_width = static_cast<double>(picture_.width) / scale;
    picture_.extent_height = static_cast<double>(picture_.height) / scale;
    find_orientation();
    check_memory();
    if (!start()) fail_as_said();
    picture_.decoded_width = static_cast<int>(info_.output_width);
    picture_.decoded_height = static_cast<int>(info_.output_height);
    return picture_;
  }

  void next(std::uint8_t* row) override {
    if (!read(row)) fail_as_said();
    if (picture_.pixels == Pixels::cmyk)  // as every program writes it that writes it at all: inverted
      for (std::size_t i = 0; i < picture_.row_bytes(); ++i) row[i] = static_cast<std::uint8_t>(255 - row[i]);
  }

  void finish() override {
    if (!end()) fail_as_said();
  }

 private:
  bool create() {
    if (setjmp(errors_.jump) != 0) return false;
    jpeg_create_decompress(&info_);
    return true;
  }
  bool read_header() {
    if (setjmp(errors_.jump) != 0) return false;
    jpeg_save_markers(&info_, exif_marker, 0xffff);
    jpeg_read_header(&info_, TRUE);
    return true;
  }
  bool start() {
    if (setjmp(errors_.jump) != 0) return false;
    jpeg_start_decompress(&info_);
    return true;
  }
  bool read(std::uint8_t* row) {
    if (setjmp(errors_.jump) != 0) return false;
    JSAMPROW rows[] = {row};
    while (jpeg_read_scanlines(&info_, rows, 1) == 0) {
    }
    return true;
  }
  bool end() {
    if (setjmp(errors_.jump) != 0) return false;
    jpeg_finish_decompress(&info_);
    return true;
  }

  void choose_pixels() {
    if (info_.data_precision != 8) throw BadImage("is a JPEG of more than 8 bits, which is not read");
    switch (info_.num_components) {
      case 1:
        picture_.pixels = Pixels::grey;
        info_.out_color_space = JCS_GRAYSCALE;
        return;
      case 3:
        picture_.pixels = Pixels::rgb;
        info_.out_color_space = JCS_RGB;
        return;
      case 4:
        picture_.pixels = Pixels::cmyk;
        info_.out_color_space = JCS_CMYK;
        return;
      default:
        fail_with_count();
    }
  }

  [[noreturn]] void fail_with_count() const {
    throw BadImage("is a JPEG of " + std::to_string(info_.num_components) + " channels, which is not read");
  }

  void find_orientation() {
    int in_exif = 0, in_xmp = 0;
    for (jpeg_saved_marker_ptr marker = info_.marker_list; marker != nullptr; marker = marker->next) {
      const std::span data(reinterpret_cast<const std::byte*>(marker->data), marker->data_length);
      if (in_exif == 0 && begins(data, exif_name, sizeof exif_name))
        in_exif = exif_orientation(data.subspan(sizeof exif_name));
      if (in_xmp == 0 && begins(data, xmp_name, sizeof xmp_name)) in_xmp = xmp_orientation(data);
    }
    picture_.orientation = in_exif != 0 ? in_exif : std::max(in_xmp, 1);
  }

  static bool begins(std::span<const std::byte> data, const char* name, std::size_t size) {
    return data.size() >= size && std::memcmp(data.data(), name, size) == 0;
  }

  // What comes in several passes over the image is gathered first.
  void check_memory() const {
    if (jpeg_has_multiple_scans(const_cast<jpeg_decompress_struct*>(&info_)) == FALSE) return;
    std::uint64_t needed = 0;
    for (int i = 0; i < info_.num_components; ++i) {
      const jpeg_component_info& component = info_.comp_info[i];
      const auto wide =
          std::uint64_t{component.width_in_blocks} + static_cast<std::uint64_t>(component.h_samp_factor);
      const auto tall =
          std::uint64_t{component.height_in_blocks} + static_cast<std::uint64_t>(component.v_samp_factor);
      needed += wide * tall * sizeof(JBLOCK);
    }
    if (needed > workspace_.left())
      fail_for_memory(picture_,
                      info_.progressive_mode != FALSE ? "a progressive JPEG" : "a JPEG of several passes",
                      needed, workspace_.left(), "make it smaller, or save it without progression");
  }

  // Throws what libjpeg jumped back for.
  [[noreturn]] void fail_as_said() {
    if (input_.ended && input_.bytes->failed()) throw BadImage("cannot be read");
    if (input_.ended) throw BadImage("is truncated: the end of the JPEG is missing");
    if (errors_.msg_code == JERR_OUT_OF_MEMORY || errors_.msg_code == JERR_NO_BACKING_STORE)
      throw BadImage("takes more memory to decode than there is: make it smaller");
    char text[JMSG_LENGTH_MAX];
    errors_.format_message(reinterpret_cast<j_common_ptr>(&info_), text);
    throw BadImage("is damaged or truncated (" + std::string(text) + ")");
  }

  Workspace& workspace_;
  jpeg_decompress_struct info_{};
  Errors errors_{};
  Input input_{};
  Picture picture_;
};

}  // namespace

std::unique_ptr<ImageRows> jpeg_rows(Bytes& bytes, Workspace& workspace) {
  return std::make_unique<JpegRows>(bytes, workspace);
}

}  // namespace edge_bcs
