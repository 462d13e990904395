#include "app/exchange.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "app/network.h"
#include "app/opening.h"
#include "app/paths.h"
#include "app/saving.h"
#include "app/text.h"
#include "session/handle.h"

namespace edge_bcs::app {

namespace {

constexpr const char *merged_name = "merged", *merge_report = "merge.json";
constexpr const char *round_note = "fleet.round", *board_note = "fleet.board", *begins_note = "fleet.begins";
constexpr std::size_t longest_name = 64, most_digits = 9;

bool is_letter(char letter) {
  return (letter >= 'A' && letter <= 'Z') || (letter >= 'a' && letter <= 'z') ||
         (letter >= '0' && letter <= '9');
}

bool fits_in_name(char letter) {
  return is_letter(letter) || std::string_view("._-").find(letter) != std::string_view::npos;
}

bool is_board(std::string_view name) {
  return !name.empty() && name.size() <= longest_name && is_letter(name[0]) &&
         std::ranges::all_of(name, fits_in_name) && name != merged_name;
}

// A number of up to nine digits; 0 of anything else.
std::uint64_t small_number(std::string_view text) {
  std::uint64_t number = 0;
  if (text.size() > most_digits || text.find_first_not_of("0123456789") != std::string_view::npos) return 0;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

}  // namespace

Exchange::Exchange(std::string folder, std::string board)
    : folder_(std::move(folder)), board_(std::move(board)) {
  require(is_board(board_), "'", plain(board_), "' is no name for a board: take letters, digits, and . _ - ",
          "between them, and not '", merged_name, "' (--board).");
}

std::string Exchange::place(std::uint64_t round) const {
  std::string number = std::to_string(round);
  number.insert(0, 4 - std::min<std::size_t>(number.size(), 4), '0');
  return joined(folder_, "round-" + number);
}

std::string Exchange::merged(std::uint64_t round) const { return joined(place(round), merged_name); }

std::uint64_t Exchange::last_merged() const {
  constexpr std::string_view begin = "round-";
  std::uint64_t last = 0;
  for (const std::string& name : exists(folder_) ? names_in(folder_) : std::vector<std::string>{}) {
    if (!name.starts_with(begin) || name.size() < begin.size() + 4) continue;
    const std::string state = joined(joined(joined(folder_, name), merged_name), state_file);
    if (const std::uint64_t round = small_number(std::string_view(name).substr(begin.size()));
        round > last && is_file(state))
      last = round;
  }
  return last;
}

bool Exchange::is_merged(std::uint64_t round) const { return is_file(joined(merged(round), state_file)); }

std::size_t Exchange::sent(std::uint64_t round) const {
  const std::string folder = place(round);
  const std::vector<std::string> names = exists(folder) ? names_in(folder) : std::vector<std::string>{};
  return static_cast<std::size_t>(std::ranges::count_if(names, [&](const std::string& name) {
    return is_board(name) && is_file(joined(joined(folder, name), state_file));
  }));
}

std::uint64_t Exchange::send(edge_bcs_network& network, std::uint64_t round) const {
  const std::string folder = joined(place(round), board_);
  const Session& session = network.session;
  const Buffers& buffers = session.network().buffers();
  const Manifest& manifest = session.network().manifest();
  for (const StateTensor momentum : {coo_momentum, dense_momentum})
    std::ranges::fill(buffers.state[momentum], std::byte{0});
  const StateBytes ours = buffers.state_bytes();
  if (is_file(joined(folder, state_file))) {
    const std::unique_ptr<StoredState> there = StoredState::newest(FolderFiles(folder), manifest);
    require(there == nullptr ||
                std::ranges::equal(there->tensors, ours,
                                   [](auto one, auto other) { return std::ranges::equal(one, other); }),
            plain(folder), " holds another run than this board's: give each board a name of its own ",
            "(--board), or remove it if it is an old one of this board.");
  }
  RunFolder run(folder, *network.files, session.network(), network.opened_at);
  const Metadata notes{{board_note, board_}, {round_note, std::to_string(round)}};
  Text header(most_header_of(notes));
  write_header(header, {session.steps(), session.seed(), session.images(), {}, notes}, ours);
  return run.save(session.network(), header.view());
}

void Exchange::take(edge_bcs_network& network, std::uint64_t round) const {
  const std::string path = merged(round);
  edge_bcs::Network& open = network.session.network();
  open.adopt(FolderFiles(path));
  const std::uint64_t of = round_of(network);
  require(of == 0 || of == round, plain(path), " is of round ", of, ", not ", round, ".");
  if (!open.warning().empty()) say(open.warning());
}

Value Exchange::report(std::uint64_t round) const {
  const Value told = read_json(joined(merged(round), merge_report), largest_report);
  return tells(told) ? told : Value(Value::Object{});
}

std::string name_of_host() {
  std::array<char, 256> host{};
  if (gethostname(host.data(), host.size() - 1) != 0) host[0] = '\0';
  std::string name = std::string(host.data()).substr(0, longest_name);
  std::ranges::replace_if(name, [](char letter) { return !fits_in_name(letter); }, '-');
  name.erase(0, std::min(name.find_first_not_of("._-"), name.size()));
  return name.empty() ? "board" : name;
}

std::uint64_t round_of(const edge_bcs_network& network) {
  const std::string* const text = network.session.network().read_header().find(round_note);
  return text == nullptr ? 0 : small_number(*text);
}

bool begins_anew(const edge_bcs_network& network) {
  const StateHeader& header = network.session.network().read_header();
  const std::string* const begins = header.find(begins_note);
  std::uint64_t step = 0;
  if (begins != nullptr) std::from_chars(begins->data(), begins->data() + begins->size(), step);
  return !network.kept_progress.empty() && Course::read(network.kept_progress, header.step).first_step < step;
}

void begin_round(edge_bcs_network& network, const std::string& run, std::uint64_t round, bool goes_on) {
  Session& session = network.session;
  if (!goes_on) network.kept_progress.clear();
  // What was trained before is over, and says in which epoch the next one begins.
  if (!network.course && !network.kept_progress.empty())
    network.course = Course::read(network.kept_progress, session.steps());
  network.kept_progress.clear(), network.kept_images = 0;
  network.notes = {{begins_note, std::to_string(session.steps())}, {round_note, std::to_string(round)}};
  network.make_room();
  check(edge_bcs_save_into(&network, run.c_str()));
  check(edge_bcs_save(&network, nullptr));
}

bool tells(const Value& report) {
  const Value *const overlap = report.find("overlap"), *const runs = report.find("runs"),
                     *const left_out = report.find("left_out");
  const Value* const pairwise = overlap == nullptr ? nullptr : overlap->find("pairwise");
  if (pairwise == nullptr || !pairwise->is_number() || !std::isfinite(pairwise->number()) ||
      runs == nullptr || !runs->is_list() || left_out == nullptr || !left_out->is_list())
    return false;
  return std::ranges::all_of(left_out->items(), [](const Value& one) {
    const Value* const why = one.find("why");
    return why != nullptr && why->is_text();
  });
}

}  // namespace edge_bcs::app
