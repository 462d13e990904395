// The functions of edge_bcs.h: the state, in memory and in a run folder. No exception leaves them.

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>

#include "session/handle.h"

using namespace edge_bcs::handle;
using edge_bcs::require;

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
    const std::uint64_t written = network->save();
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
    network->session.attack_kind = network->session.network().manifest().attack;
    network->notes = edge_bcs::notes_of(network->session.network().read_header());
    network->keep_read();
  });
}
