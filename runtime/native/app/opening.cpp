#include "app/opening.h"

#include <unistd.h>

#include "app/paths.h"
#include "app/reading.h"
#include "app/saving.h"
#include "app/text.h"
#include "app/trust.h"
#include "session/archive_files.h"
#include "session/state.h"

namespace edge_bcs::app {

namespace {

// Whether the run in `folder` is one of the artifact: their manifests differ in nothing but names that outputs got, who made
// them, and files that follow from the rest. An artifact that is gone is no matter, for the run is complete.
void check_same_artifact(const std::string& folder, const std::string& artifact) {
  const Value run = manifest_of(folder), made = manifest_of(artifact);
  if (!run.is_object() || !made.is_object()) return;
  for (const auto& [name, value] : made.members()) {
    if (name == "created_by" || name == "classes" || name == "memory" || name == "files" ||
        name == "attack_precision")
      continue;
    const Value* const same = run.find(name);
    require(same != nullptr && same->dump() == value.dump(), plain(folder),
            " holds a run of another artifact: its ", name, " differs; choose another output folder.");
  }
  const Value *const files = made.find("files"), *const theirs = run.find("files");
  if (files == nullptr || theirs == nullptr || !files->is_object()) return;
  const Value *const program = files->find("program.bin"), *const same = theirs->find("program.bin");
  require(program == nullptr || (same != nullptr && same->dump() == program->dump()), plain(folder),
          " holds a run of another artifact: its program.bin is another; choose another output folder.");
}

// Says so where the attacks of a run are from here on in another precision.
void tell_of_precision(const std::string& folder, const Network& network) {
  const Value manifest = manifest_of(folder);
  const Value* const said = manifest.is_object() ? manifest.find("attack_precision") : nullptr;
  const char* const now = network.info().attack_precision;
  if (said == nullptr || now == nullptr || said->text() == "auto" || said->text() == now) return;
  say("Attacks of this run were in " + said->text() + "; from here on they are in " + now + ".");
}

}  // namespace

Value manifest_of(const std::string& path) {
  try {
    const std::unique_ptr<Files> files = open_files(path);
    const std::unique_ptr<Source> source = files->open(manifest_file);
    if (source == nullptr) return {};
    const Json read = Json::parse(read_all(*source, largest_manifest));
    return read.kind() == Json::Kind::object ? Value(read) : Value();
  } catch (const Error&) {
    return {};
  }
}

bool has_signature(const std::string& path) { return open_files(path)->open(signature_file) != nullptr; }

bool holds_run(const std::string& folder) {
  return is_file(joined(folder, manifest_file)) &&
         (is_file(joined(folder, state_file)) || is_file(joined(folder, previous_file)));
}

Opened open_run(const RunWishes& wanted) {
  const std::string& folder = wanted.folder;
  const bool is_run = is_file(joined(folder, manifest_file)), saved = holds_run(folder);
  if (saved && wanted.resume) {
    // What training wrote here has no signature; that it goes on from what was signed can be seen.
    if (wanted.machine.trusted.any()) {
      MachineWishes machine = wanted.machine;
      machine.attack_precision = "f32";  // which every machine has
      const Network signed_one(wanted.artifact, machine);
      check_release(wanted.artifact, signed_one.info().release, folder);
      check_same_artifact(folder, wanted.artifact);
      remember_release(signed_one.info().release, folder);
    } else {
      check_same_artifact(folder, wanted.artifact);
    }
    MachineWishes machine = wanted.machine;
    machine.trusted = {}, machine.seed.reset();
    Opened opened{std::make_unique<Network>(folder, machine), true};
    const std::uint64_t seed = opened.network->info().seed;
    require(wanted.machine.seed.value_or(seed) == seed, "a resumed run keeps its seed, here ", seed,
            ": leave --seed out.");
    tell_of_precision(folder, *opened.network);
    return opened;
  }
  require(!saved, plain(folder),
          " already holds a run: add --resume to go on with it, or choose another -o.");
  for (const char* const name : {report_file, metrics_file, record_file})
    require(is_run || access(joined(folder, name).c_str(), F_OK) != 0, plain(folder), " holds no run, but a ",
            name, " that the run would write over; choose another -o.");
  Opened opened{std::make_unique<Network>(wanted.artifact, wanted.machine), false};
  if (wanted.machine.trusted.any()) {
    check_release(wanted.artifact, opened.network->info().release, folder);
    remember_release(opened.network->info().release, folder);
  }
  return opened;
}

}  // namespace edge_bcs::app
