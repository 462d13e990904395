// The functions of edge_bcs.h: errors, opening and what an open network is. No exception leaves them.

#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ops/dispatch.h"
#include "session/archive_files.h"
#include "session/handle.h"

#ifndef EDGE_BCS_VERSION
#define EDGE_BCS_VERSION "unknown"
#endif

namespace {

using namespace edge_bcs::handle;
using edge_bcs::require;

constexpr std::uint32_t most_threads = 1024, most_keys = 1024;
thread_local std::array<char, 8192> last_error{};

edge_bcs::Options options_of(const edge_bcs_options* options) {
  edge_bcs::Options made;
  if (options == nullptr) return made;
  const edge_bcs_options copy = given(options, "options");
  require(copy.threads <= most_threads, "threads must lie between 1 and ", most_threads, ", not be ",
          copy.threads);
  made.threads = static_cast<int>(copy.threads);
  if (copy.arena != nullptr)
    made.arena = {static_cast<std::byte*>(copy.arena), static_cast<std::size_t>(copy.arena_bytes)};
  else
    made.cap = copy.arena_bytes;
  if (copy.seeded != 0) made.seed = copy.seed;
  require(copy.trusted_count <= most_keys && (copy.trusted_count == 0 || copy.trusted_keys != nullptr),
          "the trusted keys are NULL, or more than ", most_keys);
  made.trust.keys.resize(static_cast<std::size_t>(copy.trusted_count));
  for (std::size_t i = 0; i < made.trust.keys.size(); ++i)
    std::memcpy(made.trust.keys[i].data(), copy.trusted_keys + i * made.trust.keys[i].size(),
                made.trust.keys[i].size());
  made.trust.min_release = copy.min_release;
  if (copy.attack_precision != nullptr)
    made.attack_precision = edge_bcs::precision_named(copy.attack_precision);
  return made;
}

template <class Open>
edge_bcs_status open(edge_bcs_network** opened, const Open& body) {
  return guarded([&] {
    require(opened != nullptr, "the place for the handle is NULL");
    *opened = nullptr;
    *opened = body().release();
  });
}

}  // namespace

edge_bcs_status edge_bcs::handle::refuse(edge_bcs_status status, const char* sentence) noexcept {
  std::string text;
  try {
    text = edge_bcs::shown(sentence, last_error.size() / 4 - 4);  // characters, of up to four bytes
  } catch (const std::exception&) {
    text = "no memory";  // short enough to need none
  }
  last_error[text.copy(last_error.data(), last_error.size() - 1)] = '\0';
  return status;
}

uint32_t edge_bcs_abi_version(void) { return EDGE_BCS_ABI_VERSION; }

const char* edge_bcs_version(void) { return EDGE_BCS_VERSION; }

const char* edge_bcs_last_error(void) { return last_error.data(); }

edge_bcs_status edge_bcs_open(const char* folder, const edge_bcs_options* options,
                              edge_bcs_network** opened) {
  return open(opened, [&] {
    require(folder != nullptr, "the folder is NULL");
    return std::make_unique<edge_bcs_network>(edge_bcs::open_files(folder), options_of(options));
  });
}

edge_bcs_status edge_bcs_open_files(const edge_bcs_file* files, size_t count, const edge_bcs_options* options,
                                    edge_bcs_network** opened) {
  return open(opened, [&] {
    require(files != nullptr, "the files are NULL");
    std::vector<edge_bcs::MemoryFiles::File> blocks;
    for (const edge_bcs_file& file : std::span(files, count)) {
      require(file.name != nullptr && (file.data != nullptr || file.size == 0),
              "a file has no name, or no content");
      blocks.push_back({file.name, {static_cast<const std::byte*>(file.data), file.size}});
    }
    return std::make_unique<edge_bcs_network>(edge_bcs::MemoryFiles(std::move(blocks)), options_of(options));
  });
}

edge_bcs_status edge_bcs_arena_bytes(const char* folder, uint64_t* bytes) {
  return guarded([&] {
    require(folder != nullptr && bytes != nullptr, "the folder, or the place for the bytes, is NULL");
    *bytes = edge_bcs::Program::arena(edge_bcs::Described::of(*edge_bcs::open_files(folder), {})->program);
  });
}

void edge_bcs_close(edge_bcs_network* network) { std::unique_ptr<edge_bcs_network>(network).reset(); }

edge_bcs_status edge_bcs_get_info(const edge_bcs_network* network, edge_bcs_info* info) {
  return guarded([&] {
    require(network != nullptr, "the handle is NULL");
    const edge_bcs::Session& session = network->session;
    const edge_bcs::Manifest& manifest = session.network().manifest();
    edge_bcs_info filled{};
    filled.channels = manifest.image[0], filled.height = manifest.image[1], filled.width = manifest.image[2];
    filled.classes = manifest.num_classes;
    filled.named = manifest.classes.empty() ? 0 : 1;
    filled.micro_batch = manifest.micro_batch;
    filled.attack_micro_batch = manifest.attack_micro_batch;
    filled.batch_size = manifest.batch_size;
    filled.threads = static_cast<std::uint32_t>(session.network().threads());
    filled.attack_steps = manifest.attack_steps;
    filled.connections = manifest.kappa;
    filled.positions = manifest.size;
    filled.working_set_bytes = manifest.predicted_peak;
    filled.arena_bytes = session.network().arena_bytes();
    filled.bound_bytes = session.network().bound_bytes();
    filled.budget_bytes = manifest.budget;
    filled.state_bytes = network->most_header();
    for (const std::span<std::byte> tensor : session.network().buffers().state)
      filled.state_bytes += tensor.size();
    filled.release = manifest.release;
    filled.seed = session.seed();
    filled.epsilon = manifest.epsilon;
    filled.step_size = manifest.step_size;
    filled.name = manifest.network.c_str();
    filled.objective = manifest.objective->name;
    filled.batch_norm = manifest.batch_norm.c_str();
    filled.sparsity = manifest.sparsity.c_str();
    filled.resize = manifest.resize.c_str();
    filled.trained = manifest.trained.c_str();
    filled.instruction_set = edge_bcs::isa_name(edge_bcs::selected_isa());
    if (manifest.attack_precision) filled.attack_precision = session.network().half() ? "half" : "f32";
    filled.attack = edge_bcs::name_of(manifest.attack);
    fill(info, filled, "info");
  });
}

edge_bcs_status edge_bcs_scratch(edge_bcs_network* network, void** memory, uint64_t* bytes) {
  return guarded([&] {
    require(network != nullptr && memory != nullptr && bytes != nullptr,
            "the handle, or the place for the memory, is NULL");
    const std::span<std::byte> scratch = network->session.network().scratch();
    *memory = scratch.data();
    *bytes = scratch.size();
  });
}

const char* edge_bcs_warning(const edge_bcs_network* network) {
  if (network == nullptr) return "";
  return (network->warning.empty() ? network->session.network().warning() : network->warning).c_str();
}

const char* edge_bcs_class_name(const edge_bcs_network* network, uint32_t label) {
  if (network == nullptr) return nullptr;
  const auto& classes = network->session.network().manifest().classes;
  return label < classes.size() ? classes[label].c_str() : nullptr;
}

edge_bcs_status edge_bcs_on_progress(edge_bcs_network* network, edge_bcs_progress progress, void* user) {
  return exclusive(network, [&] {
    network->session.on_progress = progress;
    network->session.progress_user = user;
  });
}

edge_bcs_status edge_bcs_name_classes(edge_bcs_network* network, const char* const* names, size_t count) {
  return exclusive(network, [&] {
    edge_bcs::Manifest& manifest = network->session.network().manifest();
    require(names != nullptr && count == manifest.num_classes, "the network has ", manifest.num_classes,
            " classes, and ", count, " names are given");
    std::vector<std::string> given;
    for (const char* const name : std::span(names, count)) {
      require(name != nullptr, "a name is NULL");
      given.emplace_back(name);
    }
    edge_bcs::check_class_names(given);
    require(manifest.classes.empty() || manifest.classes == given,
            "the network has other names for its classes");
    require(network->run == nullptr, "names are given before edge_bcs_save_into, which keeps them");
    manifest.classes = std::move(given);
  });
}
