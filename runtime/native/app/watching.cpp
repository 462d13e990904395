#include "app/watching.h"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "app/text.h"

namespace edge_bcs::app {

AttackWatch::AttackWatch(Network& network, Data& data, const Match& match)
    : network_(network), match_(match), watched_(watched_of(network, data)) {}

Part AttackWatch::watched_of(const Network& network, Data& data) {
  edge_bcs_position position = sized<edge_bcs_position>();
  check(edge_bcs_get_position(network.handle(), &position));
  std::vector<std::uint32_t> places(data.size());
  check(edge_bcs_watched_places(network.handle(), places.data(), places.size()));
  return {data, std::span(places).first(position.watched)};
}

void AttackWatch::look(const edge_bcs_position& position, const std::function<void()>& between) {
  const std::string attack = position.attack;
  const edge_bcs_watched found = network_.watch(watched_, match_, between);
  if (found.collapsed == 0) return;
  say(attack + " has collapsed: it leaves " + percent(found.own) + " of the watched images right, PGD-20 " +
      percent(found.pgd) + "; from step " + std::to_string(position.done + 1) +
      " on the training attacks with PGD");
}

}  // namespace edge_bcs::app
