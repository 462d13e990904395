// The functions of edge_bcs.h: no exception leaves them.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "include/edge_bcs.h"
#include "ops/dispatch.h"
#include "session/course.h"
#include "session/run_folder.h"
#include "session/session.h"
#include "session/shuffle.h"

#ifndef EDGE_BCS_VERSION
#define EDGE_BCS_VERSION "unknown"
#endif

struct edge_bcs_network {
  edge_bcs::Session session;
  std::unique_ptr<edge_bcs::FolderFiles> files;  // none of what lay in memory
  std::unique_ptr<edge_bcs::RunFolder> run;      // that is saved into
  std::uint64_t opened_at;
  std::optional<edge_bcs::Course> course;  // of the training under way or last done
  std::uint64_t skipped_in_a_row = 0;
  edge_bcs::Text progress{edge_bcs::most_course}, header{edge_bcs::most_header};
  std::atomic_flag busy = ATOMIC_FLAG_INIT;  // while a call changes it

  explicit edge_bcs_network(std::unique_ptr<edge_bcs::FolderFiles> folder, const edge_bcs::Options& options)
      : session(*folder, options, true), files(std::move(folder)), opened_at(session.steps()) {}
  edge_bcs_network(const edge_bcs::MemoryFiles& memory, const edge_bcs::Options& options)
      : session(memory, options, false), opened_at(session.steps()) {}

  std::uint64_t done() const { return session.steps() - course->first_step; }

  // Makes the header of a state that is written now.
  std::string_view write_header() {
    progress.clear();
    if (course) course->write(progress);
    edge_bcs::write_header(header, {session.steps(), session.seed(), session.images(), progress.view()},
                           session.network().buffers().state_bytes());
    return header.view();
  }
};

namespace {

using edge_bcs::fail;
using edge_bcs::require;

constexpr std::uint32_t most_threads = 1024;
thread_local std::array<char, 8192> last_error{};

// Keeps a sentence for edge_bcs_last_error; names in it come from files, and must not act on a terminal.
edge_bcs_status refuse(edge_bcs_status status, const char* sentence) noexcept {
  std::string text;
  try {
    text = edge_bcs::shown(sentence, last_error.size() / 4 - 4);  // characters, of up to four bytes
  } catch (const std::exception&) {
    text = "no memory";  // short enough to need none
  }
  last_error[text.copy(last_error.data(), last_error.size() - 1)] = '\0';
  return status;
}

template <class Body>
edge_bcs_status guarded(const Body& body) noexcept {
  try {
    body();
    return EDGE_BCS_OK;
  } catch (const edge_bcs::Stopped& error) {
    return refuse(EDGE_BCS_STOPPED, error.what());
  } catch (const edge_bcs::NotFinite& error) {
    return refuse(EDGE_BCS_NOT_FINITE, error.what());
  } catch (const edge_bcs::NoMemory& error) {
    return refuse(EDGE_BCS_NO_MEMORY, error.what());
  } catch (const std::bad_alloc&) {
    return refuse(EDGE_BCS_NO_MEMORY, "this machine does not have the memory");
  } catch (const std::exception& error) {
    return refuse(EDGE_BCS_ERROR, error.what());
  } catch (...) {
    return refuse(EDGE_BCS_ERROR, "something unknown went wrong");
  }
}

// The same for what changes a handle: one call at a time.
template <class Body>
edge_bcs_status exclusive(edge_bcs_network* network, const Body& body) noexcept {
  if (network == nullptr) return refuse(EDGE_BCS_ERROR, "the handle is NULL");
  if (network->busy.test_and_set(std::memory_order_acquire))
    return refuse(EDGE_BCS_BUSY,
                  "the handle is in use by another thread, or by the call whose callback this is");
  const edge_bcs_status status = guarded(body);
  network->busy.clear(std::memory_order_release);
  return status;
}

// What the caller's struct says; fields that it does not have yet are 0.
template <class T>
T given(const T* from, const char* what) {
  T copy{};
  require(from != nullptr, "the ", what, " is NULL");
  require(from->size >= sizeof(std::uint32_t), "the size of the ", what, " is not set");
  std::memcpy(&copy, from, std::min<std::size_t>(from->size, sizeof copy));
  return copy;
}

// Fills the caller's struct, as far as it goes.
template <class T>
void fill(T* to, T filled, const char* what) {
  require(to != nullptr, "the ", what, " is NULL");
  require(to->size >= sizeof(std::uint32_t), "the size of the ", what, " is not set");
  const std::uint32_t size = to->size;
  filled.size = size;
  std::memcpy(to, &filled, std::min<std::size_t>(size, sizeof filled));
}

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
  return made;
}

edge_bcs::Images images_of(const edge_bcs_batch* batch, bool labelled) {
  const edge_bcs_batch copy = given(batch, "batch");
  require(copy.count > 0, "the batch has no images");
  const int sources = (copy.bytes != nullptr) + (copy.floats != nullptr) + (copy.read != nullptr);
  require(sources == 1, "the batch must have one of bytes, floats and read, not ", sources);
  require(!labelled || copy.read != nullptr || copy.labels != nullptr, "the batch has no labels");
  return {copy.count, copy.bytes, copy.floats, copy.labels, copy.read, copy.user, copy.weights};
}

template <class Open>
edge_bcs_status open(edge_bcs_network** opened, const Open& body) {
  return guarded([&] {
    require(opened != nullptr, "the place for the handle is NULL");
    *opened = nullptr;
    *opened = body().release();
  });
}

double share(double part, std::uint64_t all) {
  return all == 0 ? std::numeric_limits<double>::quiet_NaN() : part / static_cast<double>(all);
}

void step(edge_bcs::Session& session, const edge_bcs::Images& images, edge_bcs_step_result* result) {
  const edge_bcs::StepFacts facts = session.step(images);
  if (result == nullptr) return;
  const edge_bcs::Objective& objective = *session.network().manifest().objective;
  edge_bcs_step_result filled{};
  filled.step = session.steps();
  filled.labelled = facts.labelled;
  filled.loss = facts.loss;
  filled.accuracy = share(facts.correct[0], facts.labelled);
  filled.robust_accuracy = std::numeric_limits<double>::quiet_NaN();
  if (objective.two_branches) filled.robust_accuracy = share(facts.correct[1], facts.labelled);
  if (objective.accuracy_is_robust()) filled.robust_accuracy = filled.accuracy;
  fill(result, filled, "result");
}

template <class T>
std::optional<T> unless_zero(T value) {
  return value == T{} ? std::nullopt : std::optional<T>(value);
}

edge_bcs::Wishes wishes_of(const edge_bcs_training& training) {
  edge_bcs::Wishes wishes;
  wishes.images = training.images;
  wishes.batch_size = unless_zero(training.batch_size);
  wishes.epochs = unless_zero(training.epochs);
  wishes.steps = unless_zero(training.steps);
  wishes.learning_rate = unless_zero(training.learning_rate);
  if (training.schedule != nullptr) wishes.schedule = edge_bcs::schedule_named(training.schedule);
  if (training.augment != nullptr) wishes.augment = edge_bcs::augmentation_named(training.augment);
  if (training.has_warmup != 0) wishes.warmup = training.warmup;
  require(training.balance <= 2, "balance must be 0, 1 or 2, not ", training.balance);
  if (training.balance != 0) wishes.balance = training.balance == 1;
  return wishes;
}

// The training under way; Error if there is none, or no step of it is left.
edge_bcs::Course& course_of(edge_bcs_network& network) {
  require(network.course.has_value(), "no training was begun: call edge_bcs_begin");
  require(network.done() < network.course->total_steps, "the training is finished");
  return *network.course;
}

}  // namespace

uint32_t edge_bcs_abi_version(void) { return EDGE_BCS_ABI_VERSION; }

const char* edge_bcs_version(void) { return EDGE_BCS_VERSION; }

const char* edge_bcs_last_error(void) { return last_error.data(); }

edge_bcs_status edge_bcs_open(const char* folder, const edge_bcs_options* options,
                              edge_bcs_network** opened) {
  return open(opened, [&] {
    require(folder != nullptr, "the folder is NULL");
    return std::make_unique<edge_bcs_network>(std::make_unique<edge_bcs::FolderFiles>(folder),
                                              options_of(options));
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
    *bytes = edge_bcs::Program::arena(edge_bcs::Described::of(edge_bcs::FolderFiles(folder))->program);
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
    filled.batch_size = manifest.batch_size;
    filled.threads = static_cast<std::uint32_t>(session.network().threads());
    filled.attack_steps = manifest.attack_steps;
    filled.connections = manifest.kappa;
    filled.positions = manifest.size;
    filled.working_set_bytes = manifest.predicted_peak;
    filled.arena_bytes = session.network().arena_bytes();
    filled.bound_bytes = session.network().bound_bytes();
    filled.budget_bytes = manifest.budget;
    filled.state_bytes = edge_bcs::most_header;
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
  return network == nullptr ? "" : network->session.network().warning().c_str();
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

edge_bcs_status edge_bcs_step(edge_bcs_network* network, const edge_bcs_batch* batch,
                              edge_bcs_step_result* result) {
  return exclusive(network, [&] { step(network->session, images_of(batch, true), result); });
}

edge_bcs_status edge_bcs_get_rates(const edge_bcs_network* network, edge_bcs_rates* rates) {
  return guarded([&] {
    require(network != nullptr, "the handle is NULL");
    const edge_bcs::Rates& now = network->session.rates;
    fill(rates, {0, 0, now.learning_rate, now.weight_decay, now.momentum, now.noise}, "rates");
  });
}

edge_bcs_status edge_bcs_set_rates(edge_bcs_network* network, const edge_bcs_rates* rates) {
  return exclusive(network, [&] {
    const edge_bcs_rates wanted = given(rates, "rates");
    for (const double number : {wanted.learning_rate, wanted.weight_decay, wanted.momentum, wanted.noise})
      require(number >= 0 && number <= std::numeric_limits<float>::max(),
              "a rate must be a finite number of at least 0, not ", number);
    network->session.rates = {wanted.learning_rate, wanted.weight_decay, wanted.momentum, wanted.noise};
  });
}

uint64_t edge_bcs_steps(const edge_bcs_network* network) {
  return network == nullptr ? 0 : network->session.steps();
}

edge_bcs_status edge_bcs_predict(edge_bcs_network* network, const edge_bcs_batch* batch,
                                 float* probabilities) {
  return exclusive(network, [&] {
    require(probabilities != nullptr, "the place for the probabilities is NULL");
    network->session.predict(images_of(batch, false), probabilities);
  });
}

edge_bcs_status edge_bcs_evaluate(edge_bcs_network* network, const edge_bcs_batch* batch,
                                  const edge_bcs_measure* how, edge_bcs_measured* measured) {
  return exclusive(network, [&] {
    const edge_bcs_measure wanted = given(how, "measure");
    const edge_bcs::Images images = images_of(batch, true);
    const double epsilon =
        wanted.epsilon < 0 ? network->session.network().manifest().epsilon : wanted.epsilon;
    require(epsilon >= 0 && epsilon <= 1, "epsilon must lie in [0, 1], not be ", epsilon);
    const bool fgsm = wanted.fgsm != 0;
    const edge_bcs::Measured found = network->session.evaluate(
        images, {fgsm ? std::min<std::uint32_t>(wanted.attack_steps, 1) : wanted.attack_steps,
                 fgsm ? 1 : std::max<std::uint32_t>(wanted.restarts, 1), fgsm, epsilon});
    fill(measured, {0, 0, images.count, found.right, found.robust_right, found.unanswered}, "measured");
  });
}

edge_bcs_status edge_bcs_get_tensor(const edge_bcs_network* network, const char* name,
                                    edge_bcs_tensor* tensor) {
  return guarded([&] {
    require(network != nullptr && name != nullptr, "the handle, or the name, is NULL");
    const auto& names = edge_bcs::state_names;
    const auto found =
        std::ranges::find_if(names, [&](const char* known) { return std::strcmp(known, name) == 0; });
    require(found != names.end(), "the state has no tensor ", edge_bcs::shown(name));
    const auto place = static_cast<std::size_t>(found - names.begin());
    const std::span<std::byte> bytes = network->session.network().buffers().state[place];
    fill(tensor, {0, place == edge_bcs::coo_index ? 1u : 0u, bytes.size() / sizeof(float), bytes.data()},
         "tensor");
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

edge_bcs_status edge_bcs_save_into(edge_bcs_network* network, const char* folder) {
  return exclusive(network, [&] {
    require(folder != nullptr, "the folder is NULL");
    require(
        network->files != nullptr,
        "a network whose files lie in memory makes no run folders: keep its state by edge_bcs_state_write");
    network->run.reset();
    network->run = std::make_unique<edge_bcs::RunFolder>(folder, *network->files, network->session.network(),
                                                         network->opened_at);
  });
}

edge_bcs_status edge_bcs_save(edge_bcs_network* network, uint64_t* bytes) {
  return exclusive(network, [&] {
    require(network->run != nullptr, "no folder was named: call edge_bcs_save_into");
    const std::uint64_t written = network->run->save(network->session.network(), network->write_header());
    if (bytes != nullptr) *bytes = written;
  });
}

edge_bcs_status edge_bcs_state_write(edge_bcs_network* network, void* memory, size_t size, size_t* written) {
  return exclusive(network, [&] {
    require(memory != nullptr && written != nullptr, "the memory, or the place for its length, is NULL");
    const edge_bcs::Network& open = network->session.network();
    edge_bcs::check_state(open.buffers().state_bytes(), open.manifest());
    *written = edge_bcs::write_state(network->write_header(), open.buffers().state_bytes(),
                                     {static_cast<std::byte*>(memory), size});
  });
}

edge_bcs_status edge_bcs_state_stream(edge_bcs_network* network, edge_bcs_writer write, void* user) {
  return exclusive(network, [&] {
    require(write != nullptr, "the callback is NULL");
    const edge_bcs::Network& open = network->session.network();
    const edge_bcs::StateBytes state = open.buffers().state_bytes();
    edge_bcs::check_state(state, open.manifest());
    edge_bcs::write_parts(network->write_header(), state, [&](std::span<const std::byte> part) {
      if (write(user, part.data(), part.size()) != 0) throw edge_bcs::Stopped();
    });
  });
}

edge_bcs_status edge_bcs_state_read(edge_bcs_network* network, const void* memory, size_t size) {
  return exclusive(network, [&] {
    require(memory != nullptr, "the memory is NULL");
    network->session.network().replace_state({static_cast<const std::byte*>(memory), size});
    network->session.set_counters(network->session.network().read_header());
    network->course.reset();
  });
}

edge_bcs_status edge_bcs_begin(edge_bcs_network* network, const edge_bcs_training* training) {
  return exclusive(network, [&] {
    const edge_bcs_training wanted = given(training, "training");
    const edge_bcs::Wishes wishes = wishes_of(wanted);
    edge_bcs::Session& session = network->session;
    std::optional<edge_bcs::Course> earlier = network->course;
    std::uint64_t seen = 0;
    if (wanted.resume != 0 && !earlier) {
      const edge_bcs::StateHeader& header = session.network().read_header();
      const std::string* const saved = header.find("progress");
      if (saved != nullptr) earlier = edge_bcs::Course::read(*saved, header.step);
      // Runs of earlier releases do not say how many.
      seen = header.images.value_or(earlier ? (header.step - earlier->first_step) * earlier->batch_size : 0);
    }
    network->course = edge_bcs::Course::begin(wishes, earlier, wanted.resume != 0,
                                              session.network().manifest(), session.steps());
    session.count_images(seen);
    network->skipped_in_a_row = 0;
  });
}

edge_bcs_status edge_bcs_get_position(const edge_bcs_network* network, edge_bcs_position* position) {
  return guarded([&] {
    require(network != nullptr, "the handle is NULL");
    require(network->course.has_value(), "no training was begun: call edge_bcs_begin");
    const edge_bcs::Course& course = *network->course;
    edge_bcs_position filled{};
    filled.done = network->done();
    filled.total = course.total_steps;
    filled.finished = filled.done >= filled.total ? 1 : 0;
    filled.epoch = course.epoch(filled.done);
    std::tie(filled.first, filled.count) = course.images(filled.done);
    filled.skipped = course.skipped;
    filled.learning_rate = course.rates(filled.done, network->session.network().manifest()).first;
    filled.augment = edge_bcs::name_of(course.augment);
    filled.balance = course.balance ? 1 : 0;
    filled.steps_per_epoch = course.steps_per_epoch();
    fill(position, filled, "position");
  });
}

edge_bcs_status edge_bcs_order(const edge_bcs_network* network, uint64_t epoch, uint32_t* order,
                               size_t count) {
  return guarded([&] {
    require(network != nullptr && order != nullptr, "the handle, or the place for the order, is NULL");
    require(count > 0 && count <= std::numeric_limits<std::uint32_t>::max() && epoch < std::uint64_t{1} << 56,
            "there is no order of ", count, " images in epoch ", epoch);
    edge_bcs::shuffle({network->session.seed(), epoch, edge_bcs::Purpose::shuffle}, {order, count});
  });
}

edge_bcs_status edge_bcs_train(edge_bcs_network* network, const edge_bcs_batch* batch,
                               edge_bcs_step_result* result) {
  return exclusive(network, [&] {
    const edge_bcs::Course& course = course_of(*network);
    const edge_bcs::Images images = images_of(batch, true);
    const std::uint64_t expected = course.images(network->done()).second;
    require(images.count == expected, "the next step has ", expected, " images, not ", images.count);
    edge_bcs::Session& session = network->session;
    std::tie(session.rates.learning_rate, session.rates.weight_decay) =
        course.rates(network->done(), session.network().manifest());
    step(session, images, result);
    network->skipped_in_a_row = 0;
  });
}

edge_bcs_status edge_bcs_skip(edge_bcs_network* network) {
  return exclusive(network, [&] {
    edge_bcs::Course& course = course_of(*network);
    if (network->skipped_in_a_row + 1 >= course.steps_per_epoch())
      edge_bcs::fail_with<edge_bcs::NotFinite>("every batch of an epoch was skipped");
    ++network->skipped_in_a_row;
    ++course.skipped;
    network->session.count_step();
  });
}
