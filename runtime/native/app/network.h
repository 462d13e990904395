// An open network, as the commands use it: the C interface with exceptions.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "app/answers.h"
#include "app/classes.h"
#include "app/data.h"
#include "app/trust.h"
#include "app/value.h"
#include "include/edge_bcs.h"

namespace edge_bcs::app {

// A batch that holds something that is not finite: the state is as before.
class NotFiniteBatch : public Error {
 public:
  using Error::Error;
};

// A struct of the C interface with its size and zeros.
template <class Struct>
Struct sized() {
  Struct made{};
  made.size = sizeof(Struct);
  return made;
}

// Throws what the last call failed for: Error, NotFiniteBatch, or what a callback kept.
void check(edge_bcs_status status);

// The images of a data set at the places of an order, with the network's labels, for the C interface.
class Images {
 public:
  Images(Data& data, const std::vector<std::int64_t>& labels, std::span<const std::uint64_t> places);
  // How they are changed; the position of the image is filled in.
  void draw(const Draw& draw) { draw_ = draw; }

  // Refers to this.
  edge_bcs_batch batch();
  // Throws what reading failed for, if it did.
  void rethrow() const;

 private:
  static int read(void* user, std::uint64_t first, std::uint64_t count, float* images,
                  std::int64_t* labels) noexcept;

  Data& data_;
  const std::vector<std::int64_t>& labels_;
  std::span<const std::uint64_t> places_;
  Draw draw_{Augmentation::none, 0, 0, 0};
  std::string failed_;
};

struct MachineWishes {
  std::optional<std::uint64_t> memory, seed;
  std::uint32_t threads = 0;
  std::optional<std::string> attack_precision =
      {};  // none: what the artifact says, or the run was begun with
  Trusted trusted;
};

class Network {
 public:
  // Throws Error.
  Network(const std::string& folder, const MachineWishes& wishes);

  edge_bcs_network* handle() const { return handle_.get(); }
  const edge_bcs_info& info() const { return info_; }
  ImageShape shape() const;
  // The names of the outputs; none if they have none.
  const Names& classes() const { return classes_; }
  std::string class_name(std::size_t label) const;
  void name(const Names& names);
  std::uint64_t steps() const { return edge_bcs_steps(handle()); }

  // How its data is opened; images are decoded in the memory that the plan leaves between its graphs.
  Opening opening(const Handling& handling) const;
  // Matches the data's classes, says what is worth knowing, and takes the data's names where `naming`.
  Match match(const Data& data, bool naming, bool resumed);

  // Clean and robust accuracy, as `Trainer.evaluate` reports them.
  struct Measure {
    edge_bcs_measure how;
    std::optional<std::uint64_t> limit;
    Answers* answers = nullptr;          // to be counted
    std::function<void()> between = {};  // called after each micro-batch; what it throws ends the measurement
  };
  Value evaluate(Data& data, const Match& match, const Measure& measure, const std::string& what);

  // Looks at a single-step attack, when that is due, on the images of `data`.
  edge_bcs_watched watch(Data& data, const Match& match, const std::function<void()>& between);

  // Labels the images of `data`, which have none, for the epoch that begins.
  void label(Data& data, const std::function<void()>& between);

  // What "memory" of a report has.
  Value memory(std::optional<std::uint64_t> cap) const;
  std::optional<std::uint64_t> cap(const MachineWishes& wishes) const;

 private:
  // Lets `call` read the images, showing how far it is; `between` as in Measure.
  void follow(const std::string& what, Images& images, std::size_t count,
              const std::function<void()>& between, const std::function<edge_bcs_status()>& call);

  struct Close {
    void operator()(edge_bcs_network* handle) const { edge_bcs_close(handle); }
  };

  std::unique_ptr<edge_bcs_network, Close> handle_;
  edge_bcs_info info_ = sized<edge_bcs_info>();
  Names classes_;
  mutable std::unique_ptr<std::byte[]> workspace_;
};

// The most memory that this process has occupied.
std::uint64_t resident_peak();

}  // namespace edge_bcs::app
