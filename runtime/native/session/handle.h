// What the functions of edge_bcs.h share: the handle, and how no exception leaves them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "include/edge_bcs.h"
#include "session/course.h"
#include "session/run_folder.h"
#include "session/session.h"

struct edge_bcs_network {
  edge_bcs::Session session;
  std::unique_ptr<edge_bcs::Files> files;    // none of what lay in memory
  std::unique_ptr<edge_bcs::RunFolder> run;  // that is saved into
  std::uint64_t opened_at;
  std::optional<edge_bcs::Course> course;  // of the training under way or last done
  std::uint64_t skipped_in_a_row = 0;
  std::string warning;                                   // why the best state could not be used
  edge_bcs::Metadata notes = session.network().notes();  // that are saved with the state
  std::string kept_progress;               // of the training that the state was saved in, as it was read
  std::uint64_t kept_images = 0;           // that it had seen
  std::size_t label_room = 0;              // bytes of a saved state for the labels of unlabelled images
  std::vector<std::int32_t> fresh_labels;  // of them, while the network gives them
  edge_bcs::Text progress{edge_bcs::most_course}, header{edge_bcs::most_header_of(notes)};
  std::atomic_flag busy = ATOMIC_FLAG_INIT;  // while a call changes it

  explicit edge_bcs_network(std::unique_ptr<edge_bcs::Files> folder, const edge_bcs::Options& options)
      : session(*folder, options, true), files(std::move(folder)), opened_at(session.steps()) {
    keep_read();
  }
  edge_bcs_network(const edge_bcs::MemoryFiles& memory, const edge_bcs::Options& options)
      : session(memory, options, false), opened_at(session.steps()) {
    keep_read();
  }

  std::uint64_t done() const { return session.steps() - course->first_step; }

  // Notes what the state that was read says of the training that it was saved in, and makes the room to write a state. Allocates.
  void keep_read() {
    const edge_bcs::StateHeader& read = session.network().read_header();
    const std::string* const saved = read.find("progress");
    kept_progress = saved == nullptr ? std::string() : *saved;
    kept_images = read.images.value_or(0);
    if (!read.images && saved != nullptr) kept_images = edge_bcs::images_seen(*saved, read.step);
    make_room();
  }

  // Makes the room for what a state says beside its tensors. Allocates.
  void make_room() {
    const std::uint64_t unlabelled = course ? course->unlabelled : 0;
    label_room = edge_bcs::room_of_labels(unlabelled, session.network().manifest().num_classes);
    progress = edge_bcs::Text(edge_bcs::most_course + label_room);
    header = edge_bcs::Text(most_header());
  }

  // Bytes of what a state says beside its tensors, at most; what it was saved in may hold labels, too.
  std::size_t most_header() const {
    const std::size_t kept = 2 * std::max(kept_progress.size(), edge_bcs::most_course);
    return edge_bcs::most_header_of(notes) + std::max(label_room, kept - 2 * edge_bcs::most_course);
  }

  // Saves into the run folder; returns the bytes.
  std::uint64_t save() { return run->save(session.network(), write_header()); }

  // Makes the header of a state that is written now. One that goes back to where it was read, as it was, stays what it was saved
  // in.
  std::string_view write_header() {
    progress.clear();
    if (course) course->write(progress);
    const edge_bcs::StateHeader& read = session.network().read_header();
    const bool untouched = !course && run != nullptr && run->is_source() && session.steps() == read.step &&
                           session.seed() == read.seed;
    edge_bcs::write_header(header,
                           {session.steps(), session.seed(), untouched ? kept_images : session.images(),
                            untouched ? std::string_view(kept_progress) : progress.view(), notes},
                           session.network().buffers().state_bytes());
    return header.view();
  }
};

namespace edge_bcs::handle {

// Keeps a sentence for edge_bcs_last_error; names in it come from files, and must not act on a terminal.
edge_bcs_status refuse(edge_bcs_status status, const char* sentence) noexcept;

template <class Body>
edge_bcs_status guarded(const Body& body) noexcept {
  try {
    body();
    return EDGE_BCS_OK;
  } catch (const Stopped& error) {
    return refuse(EDGE_BCS_STOPPED, error.what());
  } catch (const NotFinite& error) {
    return refuse(EDGE_BCS_NOT_FINITE, error.what());
  } catch (const NoMemory& error) {
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

}  // namespace edge_bcs::handle
