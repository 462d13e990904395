// libFuzzer target: a manifest and a state as the C interface reads them. A case is four bytes that say how long the manifest
// is, the manifest, and the state. record_files.py writes those to begin with.

#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <string_view>

#include "ops/op.h"
#include "session/course.h"
#include "session/manifest.h"
#include "session/state.h"

namespace {

using namespace edge_bcs;

void read(std::span<const std::byte> content) {
  std::uint32_t length = 0;
  if (content.size() < sizeof length) return;
  std::memcpy(&length, content.data(), sizeof length);
  content = content.subspan(sizeof length);
  if (length > content.size()) return;
  const Manifest manifest =
      Manifest::read(Json::parse({reinterpret_cast<const char*>(content.data()), length}));
  content = content.subspan(length);
  const StateHeader header = StateHeader::read(MemorySource(content), manifest);
  StateBytes state;
  const auto counts = state_counts(manifest);
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
    state[tensor] =
        content.subspan(static_cast<std::size_t>(header.offsets[tensor]), counts[tensor] * sizeof(float));
  try {
    check_sum(header, state);
  } catch (const Error&) {
    // No change of bytes finds the right one.
  }
  check_state(state, manifest);
  Text text(most_header), progress(most_course);
  if (const std::string* const saved = header.find("progress"); saved != nullptr) {
    const Course course = Course::read(*saved, header.step);
    course.write(progress);
    Wishes wishes;
    wishes.images = course.samples;
    const Course next = Course::begin(wishes, course, true, manifest, header.step);
    next.images(header.step - next.first_step);
    next.rates(header.step - next.first_step, manifest);
  }
  write_header(text, {header.step, header.seed, header.images.value_or(0), progress.view()}, state);
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
    for (std::size_t place = 0; place < counts[tensor]; place += 97)
      owner(manifest, static_cast<StateTensor>(tensor), place, state);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    read(std::as_bytes(std::span(data, size)));
  } catch (const edge_bcs::Error&) {
    return 0;
  }
  return 0;
}
