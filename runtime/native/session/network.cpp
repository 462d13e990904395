#include "session/network.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <new>
#include <string_view>

#include "ops/dispatch.h"
#include "session/sha256.h"

namespace edge_bcs {

namespace {

constexpr const char* program_file = "program.bin";
constexpr std::size_t alignment = 64, piece = std::size_t{1} << 16;

// The error, with the file's name before it.
[[noreturn]] void blame(const std::string& file, const std::exception& error) {
  fail(file, ": ", error.what());
}

std::unique_ptr<Source> open(const Files& files, const std::string& name) {
  std::unique_ptr<Source> source;
  try {
    source = files.open(name);
  } catch (const Error& error) {
    blame(files.shown_name(name), error);
  }
  require(source != nullptr, files.shown_name(name), " is missing; copy or export the artifact again");
  return source;
}

void check_size(const std::string& shown, const Source& source, const ListedFile& listed) {
  require(source.size() == listed.bytes, shown, " is ",
          source.size() < listed.bytes ? "truncated" : "altered", ": ", source.size(), " bytes instead of ",
          listed.bytes, "; copy the artifact again");
}

void check_content(const std::string& shown, Sha256& digest, const ListedFile& listed) {
  require(view(digest.finish()) == listed.sha256, shown,
          " was altered: its sha256 is not the manifest's; copy the artifact again");
}

void verify(const Files& files, const ListedFile& listed) {
  const std::string shown = files.shown_name(listed.name);
  const std::unique_ptr<Source> source = open(files, listed.name);
  check_size(shown, *source, listed);
  Sha256 digest;
  if (const auto memory = source->memory()) {
    digest.add(*memory);
    return check_content(shown, digest, listed);
  }
  std::string part(piece, '\0');
  for (std::uint64_t at = 0; at < listed.bytes; at += part.size()) {
    part.resize(static_cast<std::size_t>(std::min<std::uint64_t>(piece, listed.bytes - at)));
    try {
      source->read(at, std::as_writable_bytes(std::span(part)));
    } catch (const Error& error) {
      blame(shown, error);
    }
    digest.add(part);
  }
  check_content(shown, digest, listed);
}

// The content of a file: where it lies, or read into `room`.
std::span<const std::byte> read_listed(const Files& files, const ListedFile& listed, std::string& room) {
  const std::string shown = files.shown_name(listed.name);
  const std::unique_ptr<Source> source = open(files, listed.name);
  check_size(shown, *source, listed);
  std::span<const std::byte> content;
  if (const auto memory = source->memory()) {
    content = *memory;
  } else {
    try {
      room = read_all(*source, listed.bytes);
    } catch (const Error& error) {
      blame(shown, error);
    }
    content = std::as_bytes(std::span(room));
  }
  Sha256 digest;
  digest.add(content);
  check_content(shown, digest, listed);
  return content;
}

std::string read_manifest(const Files& files) {
  const std::unique_ptr<Source> source = open(files, manifest_file);
  try {
    return read_all(*source, largest_manifest);
  } catch (const Error& error) {
    blame(files.shown_name(manifest_file), error);
  }
}

// Whether two objects have these fields alike.
bool alike(const Json* one, const Json* other, std::initializer_list<std::string_view> fields) {
  if (one == nullptr || other == nullptr) return one == other;
  return std::ranges::all_of(fields, [&](std::string_view field) {
    const Json *const ours = one->find(field), *const theirs = other->find(field);
    return ours == nullptr || theirs == nullptr ? ours == theirs : same(*ours, *theirs);
  });
}

// What two manifests say of different networks: the name of the first such field; null if of one. How a board computes it
// and how it is trained may differ.
const char* other_network(const Json& one, const Json& other) {
  for (const char* const field : {"network", "sparsity", "kappa", "size", "dense", "statistics"})
    if (!alike(&one, &other, {field})) return field;
  if (!alike(one.find("train"), other.find("train"), {"part", "layers", "dense", "kappa"})) return "train";
  const auto &ours = one.find("layers")->items(), &theirs = other.find("layers")->items();
  const auto is_layer = [](const Json& layer, const Json& counterpart) {
    return alike(&layer, &counterpart,
                 {"name", "shape", "offset", "kernel", "strides", "pads", "dilations", "groups"});
  };
  return std::ranges::equal(ours, theirs, is_layer) ? nullptr : "layers";
}

// Throws Error unless one of the keys signed the manifest.
void check_signature(const Files& files, std::string_view manifest, const Trust& trust) {
  std::string signature;
  try {
    const std::unique_ptr<Source> source = files.open(signature_file);
    if (source != nullptr) signature = read_all(*source, largest_signature);
  } catch (const Error& error) {
    blame(files.shown_name(signature_file), error);
  }
  require(!signature.empty(), files.shown_name(manifest_file),
          " is not signed, and a trusted key was given: export the artifact with --sign-key; runs are never "
          "signed");
  const bool valid = std::ranges::any_of(trust.keys, [&](const PublicKey& key) {
    return is_signed_by(key, std::as_bytes(std::span(signature)), std::as_bytes(std::span(manifest)));
  });
  require(valid, files.shown_name(manifest_file),
          " was altered or signed with another key: its signature is not that of a trusted key");
}

// Throws Error unless what was signed says all that must be, and is new enough.
void check_signed(const Files& files, const Manifest& manifest, const Trust& trust) {
  require(manifest.file(state_file) != nullptr, "the signed ", files.shown_name(manifest_file),
          " does not list ", state_file);
  if (manifest.release >= trust.min_release) return;
  const std::string release =
      manifest.release == 0 ? "of no release" : "release " + std::to_string(manifest.release);
  fail(files.shown_name(manifest_file), " is ", release, ", and release ", trust.min_release,
       " or a later one is required");
}

// Whether attacks are in half precision here; throws Error if they are to be, and cannot.
bool half_attack(std::optional<Precision> wish, std::optional<Precision> artifact) {
  const Precision asked = wish ? *wish : artifact.value_or(Precision::f32);
  if (asked == Precision::f32 || (asked != Precision::half && !artifact)) return false;
  require(
      artifact.has_value(),
      "the attack of this network has no half-precision form (or an earlier release exported it); take the "
      "attack precision f32, or export it again");
  require(asked != Precision::half || has_half_kernels(),
          "this processor has no arithmetic in half precision (AVX-512 BF16, ARM's FP16); take the attack "
          "precision f32",
          wish ? "" : ", with which the run goes on from where it stands");
  return asked == Precision::half || has_half_arithmetic();
}

}  // namespace

std::unique_ptr<Described> Described::of(const Files& files, const Trust& trust) {
  require(trust.min_release == 0 || !trust.keys.empty(),
          "a lowest release needs trusted keys: anybody can change a number that is not signed");
  auto made = std::make_unique<Described>();
  const std::string shown = files.shown_name(manifest_file);
  made->text = read_manifest(files);
  if (!trust.keys.empty()) check_signature(files, made->text, trust);
  try {
    made->manifest = Manifest::read(Json::parse(made->text));
  } catch (const Error& error) {
    blame(shown, error);
  }
  if (!trust.keys.empty()) check_signed(files, made->manifest, trust);
  const ListedFile* const program = made->manifest.file(program_file);
  require(program != nullptr, shown, " lists no ", program_file,
          ", which artifacts of 0.1 do not have; export it again");
  made->program = read_listed(files, *program, made->read);
  return made;
}

void Network::Free::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t{alignment});
}

Network::Network(const Files& files, const Options& options, bool all_files) {
  const std::unique_ptr<Described> read = Described::of(files, options.trust);
  Described& described = *read;
  for (const ListedFile& listed : described.manifest.files)
    if (listed.name != program_file && (all_files || listed.name == state_file)) verify(files, listed);
  half_ = half_attack(options.attack_precision, described.manifest.attack_precision);
  threads_ = options.threads == 0 ? available_threads() : options.threads;
  try {
    take_arena(described, options);
    runner_ = std::make_unique<Runner>(described.program, arena_, threads_, half_);
  } catch (const NoMemory&) {
    throw;
  } catch (const Error& error) {
    fail(files.shown_name(program_file), " cannot be used: ", error.what(), "; export the artifact again");
  }
  manifest_ = std::move(described.manifest);
  text_ = std::move(described.text);
  // What no run has written yet is 0, as numpy's buffers are.
  for (const PlacedTensor& buffer : runner_->program().buffers)
    std::memset(arena_.data() + buffer.address, 0, buffer.bytes);
  buffers_ = std::make_unique<Buffers>(runner_->program(), arena_.data(), manifest_);
  read_state(files, manifest_.file(state_file) != nullptr);
  build_lists();
}

void Network::take_arena(const Described& described, const Options& options) {
  const std::size_t needed = std::max(Program::arena(described.program), alignment);
  if (options.arena.data() != nullptr) {
    if (options.arena.size() < needed)
      fail_with<NoMemory>("the arena has ", options.arena.size(), " bytes, and the network needs ", needed);
    arena_ = options.arena.first(needed);
    return;
  }
  const std::uint64_t cap = options.cap != 0 ? options.cap : described.manifest.budget;
  if (cap != 0 && needed > cap)
    fail_with<NoMemory>("the arena needs ", needed, " bytes, and ", cap,
                        " are allowed: allow more, or export for a smaller budget");
  owned_.reset(static_cast<std::byte*>(::operator new(needed, std::align_val_t{alignment}, std::nothrow)));
  if (owned_ == nullptr)
    fail_with<NoMemory>("this machine does not have the ", needed, " bytes of memory for the arena");
  arena_ = {owned_.get(), needed};
}

// Returns why a slot cannot be used; empty if it is there now.
std::string Network::read_slot(const Files& files, const std::string& name, bool sealed) {
  try {
    const std::unique_ptr<Source> source = files.open(name);
    if (source == nullptr) return name + " is missing";
    header_ = StateHeader::read(*source, manifest_);
    for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
      source->read(header_.offsets[tensor], buffers_->state[tensor]);
    if (!sealed) check_sum(header_, buffers_->state_bytes());
    check_state(buffers_->state_bytes(), manifest_);
    return {};
  } catch (const Error& error) {
    return name + ": " + error.what();
  }
}

void Network::read_state(const Files& files, bool sealed) {
  if (sealed) {
    const std::string fault = read_slot(files, state_file, true);
    require(fault.empty(), files.shown_name(fault), "; copy the artifact again");
    return;
  }
  // A cut between the two renamings of a save leaves a whole partial file, which is then the newest.
  if (read_slot(files, partial_file, false).empty()) return;
  const std::string newest = read_slot(files, state_file, false);
  if (newest.empty()) return;
  const std::string before = read_slot(files, previous_file, false);
  require(before.empty(), files.shown_name(""), " holds no intact state (", newest, "; ", before,
          "); copy the folder again or start anew");
  warning_ = "the newest save cannot be used (" + newest + "); the one before it is used, of step " +
             std::to_string(header_.step);
}

void Network::replace_state(std::span<const std::byte> memory) {
  StateHeader header = StateHeader::read(MemorySource(memory), manifest_);
  StateBytes state;
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
    state[tensor] =
        memory.subspan(static_cast<std::size_t>(header.offsets[tensor]), buffers_->state[tensor].size());
  check_sum(header, state);
  check_state(state, manifest_);
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
    std::ranges::copy(state[tensor], buffers_->state[tensor].begin());
  header_ = std::move(header);
  build_lists();
}

void Network::adopt(const Files& run) {
  const std::string shown = run.shown_name(manifest_file), text = read_manifest(run);
  Json content;
  Manifest theirs;
  try {
    content = Json::parse(text);
    theirs = Manifest::read(content);
  } catch (const Error& error) {
    blame(shown, error);
  }
  const char* const field = other_network(content, Json::parse(text_));
  require(field == nullptr, shown, " is of another network than this one: its ",
          field == nullptr ? "" : field, " differs");
  require(theirs.classes.empty() || may_become(manifest_.classes, theirs.classes) ||
              may_become(theirs.classes, manifest_.classes),
          shown, " is of a network with other classes than this one");
  const ListedFile* const listed = theirs.file(state_file);
  if (listed != nullptr) verify(run, *listed);
  warning_.clear();
  read_state(run, listed != nullptr);
  build_lists();
  if (!theirs.classes.empty() && may_become(manifest_.classes, theirs.classes))
    manifest_.classes = std::move(theirs.classes);
}

std::string Network::return_to_best(const Files& run, std::uint64_t step) {
  const StateHeader newest = header_;
  std::string fault = read_slot(run, best_file, false);
  if (fault.empty() && header_.step != step)
    fault = "it is of step " + std::to_string(header_.step) + ", not " + std::to_string(step);
  if (!fault.empty())
    if (const std::string other = read_slot(run, state_file, false); !other.empty())
      fail(run.shown_name(other), "; open the run again");
  header_ = newest;
  build_lists();
  return fault;
}

void Network::run(const char* graph) {
  try {
    runner_->run(graph);
  } catch (const std::exception& error) {
    if (std::strstr(error.what(), "not finite") != nullptr) throw NotFinite(error.what());
    throw;
  }
}

std::size_t Network::bound_bytes() const {
  std::size_t bytes = 0;  // one behind the other, each from a line on
  for (const PlacedTensor& buffer : runner_->program().buffers)
    bytes += (buffer.bytes + alignment - 1) / alignment * alignment;
  return bytes;
}

std::span<std::byte> Network::scratch() const {
  std::size_t end = 0;
  for (const PlacedTensor& buffer : runner_->program().buffers) end = std::max(end, buffer.end());
  return arena_.subspan(end);
}

}  // namespace edge_bcs
