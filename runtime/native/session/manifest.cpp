#include "session/manifest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>

#include "ops/op.h"

namespace edge_bcs {

namespace {

constexpr std::uint64_t most = (std::uint64_t{1} << 31) - 1;
constexpr double largest_number = 3.4e38;  // of float
constexpr std::uint64_t largest_graph = std::uint64_t{64} << 20, largest_file = std::uint64_t{2} << 30;
constexpr std::array graphs{"training_model.onnx", "attack_model.onnx", "eval_model.onnx",
                            "optimizer_model.onnx", "lists_model.onnx"};

constexpr std::array<std::string_view, 3> precisions{"f32", "half", "auto"},
    attacks{"pgd", "fgsm-rs", "n-fgsm"};
constexpr std::uint64_t in_part = 2, single_step = 3, wide_attack = 4;  // versions of the format

constexpr std::array objectives{
    Objective{"natural", false, Objective::Start::uniform, false, 0.0, false},
    Objective{"at", true, Objective::Start::uniform, false, 1.0, false},
    Objective{"mixed", true, Objective::Start::uniform, false, 0.5, false},
    Objective{"trades", true, Objective::Start::gaussian, true, 1.0, true},
    Objective{"rst", true, Objective::Start::gaussian, true, 1.0, true},
    Objective{"mart", true, Objective::Start::gaussian, false, 1.0, true},
};

// Typed access to an object of the manifest; every fault names the field.
class Fields {
 public:
  Fields(const Json* value, std::string where) : value_(value), where_(std::move(where)) {
    require(value_ != nullptr && value_->kind() == Json::Kind::object, "the manifest's ",
            where_.empty() ? "content" : where_, " is not an object");
  }

  bool has(std::string_view name) const { return value_->find(name) != nullptr; }
  const Json& value() const { return *value_; }

  std::uint64_t integer(std::string_view name, std::uint64_t low = 0, std::uint64_t high = most) const {
    const Json* const found = value_->find(name);
    const std::optional<std::uint64_t> number = found == nullptr ? std::nullopt : found->whole();
    if (!number || *number < low || *number > high) wrong(name, "a whole number from ", low, " to ", high);
    return *number;
  }

  double number(std::string_view name, double high = largest_number) const {
    const Json* const found = value_->find(name);
    const std::optional<double> number = found == nullptr ? std::nullopt : found->number();
    if (!number || !(*number >= 0 && *number <= high)) wrong(name, "a finite number from 0 to ", high);
    return *number;
  }

  const std::string& text(std::string_view name) const {
    const Json* const found = value_->find(name);
    if (found == nullptr || found->kind() != Json::Kind::text) wrong(name, "text");
    return found->text();
  }

  // Place of a text among those that there are.
  template <std::size_t n>
  std::size_t choice(std::string_view name, const std::array<std::string_view, n>& known) const {
    const auto found = std::ranges::find(known, text(name));
    if (found != known.end()) return static_cast<std::size_t>(found - known.begin());
    std::string all;
    for (const std::string_view one : known) all += (all.empty() ? "" : " or ") + std::string(one);
    wrong(name, all, ", not '", shown(text(name)), "'");
  }

  bool boolean(std::string_view name) const {
    const Json* const found = value_->find(name);
    if (found == nullptr || found->kind() != Json::Kind::boolean) wrong(name, "true or false");
    return found->text() == "true";
  }

  std::vector<std::uint64_t> integers(std::string_view name, std::size_t fewest, std::size_t many,
                                      std::uint64_t low = 1) const {
    const Json& found = list(name);
    if (found.items().size() < fewest || found.items().size() > many)
      wrong(name, "a list of ", fewest, " to ", many, " numbers");
    std::vector<std::uint64_t> numbers;
    for (const Json& item : found.items()) {
      const auto number = item.whole();
      if (!number || *number < low || *number > most) wrong(name, "a list of whole numbers from ", low);
      numbers.push_back(*number);
    }
    return numbers;
  }

  // `count` numbers; where the field is absent, as in files of 0.1, so many times `one`, or 1.
  std::vector<std::uint64_t> each(std::string_view name, std::size_t count, std::string_view one = {},
                                  std::uint64_t low = 1) const {
    if (has(name)) return integers(name, count, count, low);
    return std::vector(count, one.empty() ? 1 : integer(one, low, 1 << 10));
  }

  Fields object(std::string_view name) const { return {value_->find(name), path(name)}; }

  std::vector<Fields> objects(std::string_view name) const {
    std::vector<Fields> found;
    for (const Json& item : list(name).items())
      found.emplace_back(&item, path(name) + "[" + std::to_string(found.size()) + "]");
    return found;
  }

  // The texts of a list.
  std::vector<std::string> texts(std::string_view name) const {
    std::vector<std::string> found;
    for (const Json& item : list(name).items()) {
      if (item.kind() != Json::Kind::text) wrong(name, "a list of names");
      found.push_back(item.text());
    }
    return found;
  }

  template <class... Parts>
  [[noreturn]] void wrong(std::string_view name, const Parts&... expected) const {
    fail("the manifest's field ", path(name), " must be ", expected...);
  }

 private:
  std::string path(std::string_view name) const {
    return where_.empty() ? std::string(name) : where_ + "." + std::string(name);
  }

  const Json& list(std::string_view name) const {
    const Json* const found = value_->find(name);
    if (found == nullptr || found->kind() != Json::Kind::list) wrong(name, "a list");
    return *found;
  }

  const Json* value_;
  std::string where_;
};

std::uint64_t product(std::span<const std::uint64_t> numbers) {
  std::uint64_t total = 1;
  for (const std::uint64_t number : numbers) {
    require(number == 0 || total <= most / number,
            "the manifest has a shape of more numbers than any buffer");
    total *= number;
  }
  return total;
}

// Segments one after the other, from 0 on; `extent` reads how many numbers each has.
template <class Extent>
std::vector<Segment> segments(const std::vector<Fields>& entries, const char* table, const Extent& extent) {
  std::vector<Segment> made;
  std::size_t end = 0;
  for (const Fields& item : entries) {
    const std::uint64_t offset = item.integer("offset");
    require(offset == end, "the manifest's ", table, " table has a gap or overlap at ", end);
    made.push_back({item.has("name") ? item.text("name") : std::string(table), end,
                    static_cast<std::size_t>(extent(item))});
    end = made.back().end();
    require(end <= most, "the manifest's ", table, " table holds more numbers than any buffer");
  }
  return made;
}

// What the lists of connections take for one layer: a list for each row, and for each input channel and phase.
struct ListEnds {
  std::uint64_t rows, columns;
};

ListEnds read_layer(const Fields& item) {
  const auto shape = item.integers("shape", 2, 4);
  if (shape.size() == 3) item.wrong("shape", "a list of 2 or 4 numbers");
  item.integers("kernel", 2, 2);
  const auto strides = item.each("strides", 2, "stride");
  item.each("pads", 4, "padding", 0);
  item.each("dilations", 2);
  const std::uint64_t groups = item.has("groups") ? item.integer("groups", 1, 1 << 23) : 1;
  item.number("density", 1.0);
  if (const std::string& algorithm = item.text("algorithm"); algorithm != "sparse" && algorithm != "dense")
    item.wrong("algorithm", "sparse or dense");
  const std::array<std::uint64_t, 4> columns{shape[1], groups, strides[0], strides[1]};
  return {shape[0] + 1, product(columns) + 1};
}

// Marks the segments that a list names, in their order; returns how many there are.
std::size_t choose(const Fields& train, const char* name, std::vector<Segment>& of) {
  for (Segment& segment : of) segment.trained = false;
  auto next = of.begin();
  std::size_t count = 0;
  for (const std::string& wanted : train.texts(name)) {
    next = std::find_if(next, of.end(), [&](const Segment& segment) { return segment.name == wanted; });
    if (next == of.end()) train.wrong(name, "names of the manifest's ", name, ", in their order");
    (next++)->trained = true;
    ++count;
  }
  return count;
}

std::size_t trained_size(const std::vector<Segment>& segments) {
  std::size_t total = 0;
  for (const Segment& segment : segments)
    if (segment.trained) total += segment.size;
  return total;
}

bool is_part(std::string_view text) {
  if (text == "head" || text == "norm" || text == "bias") return true;
  if (!text.starts_with("last:")) return false;
  text.remove_prefix(5);
  return !text.empty() && text.size() <= 9 &&
         text.find_first_not_of("0123456789") == std::string_view::npos &&
         text.find_first_not_of('0') != std::string_view::npos;
}

void read_trained(const Fields& fields, Manifest& made) {
  const std::uint64_t version = fields.integer("version", 1, wide_attack);
  const bool part = fields.has("train");
  require(version >= single_step || (version == in_part) == part, "the manifest's format version is ",
          version, ", and it says ", version == in_part ? "nothing " : "", "of a part that is trained");
  if (part) {
    const Fields train = fields.object("train");
    made.trained = train.text("part");
    if (!is_part(made.trained)) train.wrong("part", "head, last:N, norm or bias");
    choose(train, "layers", made.kernels);
    choose(train, "dense", made.dense);
  }
  const std::size_t inside = trained_size(made.kernels), outside = made.size - inside;
  made.trained_dense_size = trained_size(made.dense);
  made.trained_kappa = made.kappa;
  if (!part) return;
  made.trained_kappa = static_cast<std::size_t>(fields.object("train").integer(
      "kappa", made.kappa > outside ? made.kappa - outside : 0, std::min(made.kappa, inside)));
  require(made.trained_kappa + made.trained_dense_size > 0,
          "the manifest's field train names nothing that is trained");
}

// What `lists_length` must be; see runtime/manifest.py.
std::uint64_t expected_lists_length(const Fields& fields, const Manifest& made,
                                    const std::vector<ListEnds>& ends) {
  std::vector<Segment> through = made.kernels;
  std::uint64_t transposed = made.kappa;
  for (Segment& segment : through) segment.trained = true;
  if (fields.has("train") && fields.object("train").has("transposed")) {
    const Fields kept = fields.object("train").object("transposed");
    choose(kept, "layers", through);
    transposed = kept.integer("kappa", 0, made.kappa);
  }
  std::uint64_t total = made.kappa + 2 * transposed;
  for (std::size_t i = 0; i < ends.size(); ++i)
    total += ends[i].rows + (through[i].trained ? ends[i].columns : 0);
  return total;
}

const Objective* read_objective(const Fields& fields, Manifest& made) {
  const std::string& name = fields.text("name");
  const auto found =
      std::ranges::find_if(objectives, [&](const Objective& objective) { return name == objective.name; });
  if (found == objectives.end()) fields.wrong("name", "an objective that this version knows");
  made.beta = fields.number("beta");
  made.epsilon = fields.number("epsilon", 1.0);
  made.step_size = fields.number("step_size", 1.0);
  made.attack_steps = static_cast<std::uint32_t>(fields.integer("attack_steps", 0, 100'000));
  if (fields.has("training_attack"))
    made.attack = static_cast<AttackKind>(fields.choice("training_attack", attacks));
  require(made.attack == AttackKind::pgd || found->adversarial, name, " training attacks nothing: leave ",
          name_of(made.attack), " out, or choose another objective");
  require(made.attack == AttackKind::pgd || made.attack_steps > 0, name_of(made.attack),
          " needs a PGD to fall back on: attack_steps of at least 1, not 0");
  const char* const start = found->start == Objective::Start::uniform ? "uniform" : "gaussian";
  const char* const loss = found->increases_kl ? "kl" : "cross_entropy";
  require(fields.text("start") == start && fields.text("attack_loss") == loss &&
              fields.boolean("two_branches") == found->two_branches,
          "the manifest's objective ", name, " is not what this version knows by that name");
  return &*found;
}

std::vector<ListedFile> read_files(const Fields& files) {
  for (const char* const graph : graphs) files.object(graph);
  std::vector<ListedFile> found;
  for (const std::string& name : files.value().names()) {
    require(!name.empty() && name != "." && name != ".." &&
                name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos,
            "the manifest names the file '", shown(name), "', which does not lie in the artifact's folder");
    const Fields entry = files.object(name);
    const bool graph = name.ends_with("_model.onnx") || name == "program.bin";
    found.push_back(
        {name, entry.integer("bytes", 0, graph ? largest_graph : largest_file), entry.text("sha256")});
  }
  return found;
}

void check_no_text_acts(const Json& value) {
  const auto check = [](const std::string& text) {
    require(!acts_on_terminals(text), "the manifest holds the text '", shown(text, 40),
            "', whose control characters could act on a terminal; it is refused");
  };
  if (value.kind() == Json::Kind::text) check(value.text());
  std::ranges::for_each(value.names(), check);
  for (const Json& item : value.items()) check_no_text_acts(item);
}

std::size_t characters(std::string_view text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char letter) { return (letter & '\xc0') != '\x80'; }));
}

}  // namespace

Precision precision_named(std::string_view name) {
  const auto found = std::ranges::find(precisions, name);
  require(found != precisions.end(), "the attack precision is f32, half or auto, not '", shown(name), "'");
  return static_cast<Precision>(found - precisions.begin());
}

const char* name_of(AttackKind kind) { return attacks[static_cast<std::size_t>(kind)].data(); }

const ListedFile* Manifest::file(std::string_view name) const {
  const auto found = std::ranges::find_if(files, [&](const ListedFile& entry) { return entry.name == name; });
  return found == files.end() ? nullptr : &*found;
}

Manifest Manifest::read(const Json& content) {
  const Fields fields(&content, "");
  require(fields.has("format") && fields.text("format") == "edge-bcs-artifact",
          "the manifest does not describe an edge-bcs artifact");
  const std::uint64_t version = fields.integer("version", 0, 1 << 20);
  require(version <= wide_attack, "the artifact has format ", version, ", and this library reads up to ",
          wide_attack, ": take a newer one, or export again with an older edge-bcs");
  check_no_text_acts(content);

  Manifest made;
  const Fields network = fields.object("network");
  made.network = network.text("name");
  made.resize = network.has("resize") ? network.text("resize") : "squash";
  const auto image = network.integers("input_shape", 3, 3);
  product(image);
  for (std::size_t i = 0; i < image.size(); ++i) made.image[i] = static_cast<std::uint32_t>(image[i]);
  made.num_classes = static_cast<std::uint32_t>(network.integer("num_classes", 2));
  made.sparsity = fields.text("sparsity");
  made.kappa = static_cast<std::size_t>(fields.integer("kappa", 1));
  made.size = static_cast<std::size_t>(fields.integer("size", 1));
  require(made.kappa <= made.size, "the manifest has kappa ", made.kappa, " above the network's size ",
          made.size);
  made.seed = fields.integer("seed", 0, std::numeric_limits<std::uint64_t>::max());

  std::vector<ListEnds> ends;
  made.kernels = segments(fields.objects("layers"), "layers", [&](const Fields& item) {
    ends.push_back(read_layer(item));
    item.text("name");
    return product(item.integers("shape", 2, 4));
  });
  const std::size_t covered = made.kernels.empty() ? 0 : made.kernels.back().end();
  require(covered == made.size, "the manifest's layers hold ", covered, " positions and its size is ",
          made.size);
  made.dense = segments(fields.objects("dense"), "dense",
                        [](const Fields& item) { return product(item.integers("shape", 0, 4)); });
  made.statistics = segments(fields.objects("statistics"), "statistics",
                             [](const Fields& item) { return item.integer("channels", 1); });
  made.dense_size = made.dense.empty() ? 0 : made.dense.back().end();
  made.statistics_size = made.statistics.empty() ? 0 : made.statistics.back().end();
  read_trained(fields, made);
  made.lists_length = static_cast<std::size_t>(fields.integer("lists_length", 1));
  const std::uint64_t expected = expected_lists_length(fields, made, ends);
  require(made.lists_length == expected, "the manifest's lists_length is ", made.lists_length,
          "; its layers need ", expected);

  made.objective = read_objective(fields.object("objective"), made);
  const bool single = made.attack != AttackKind::pgd;
  require(version == wide_attack || (version == single_step) == single, "the manifest's format version is ",
          version, ", and its training attack ", name_of(made.attack));
  if (fields.has("attack_precision"))
    made.attack_precision = static_cast<Precision>(fields.choice("attack_precision", precisions));
  made.batch_norm = fields.text("batch_norm");
  if (made.batch_norm != "frozen" && made.batch_norm != "batch")
    fields.wrong("batch_norm", "frozen or batch");
  made.micro_batch = made.attack_micro_batch =
      static_cast<std::uint32_t>(fields.integer("micro_batch", 1, 1 << 16));
  const bool wide = fields.has("attack_micro_batch");
  if (wide)
    made.attack_micro_batch =
        static_cast<std::uint32_t>(fields.integer("attack_micro_batch", 2 * made.micro_batch, 1 << 16));
  require(wide == (version == wide_attack) && made.attack_micro_batch % made.micro_batch == 0,
          "the manifest's attack_micro_batch is ", made.attack_micro_batch, ", with a micro-batch of ",
          made.micro_batch, " and the format version ", version);
  fields.integer("lanes", 1, 64);
  made.batch_size = static_cast<std::uint32_t>(fields.integer("batch_size", 1, 1 << 20));
  const Fields hyper = fields.object("hyper");
  made.learning_rate = hyper.number("learning_rate");
  made.weight_decay = hyper.number("weight_decay");
  made.momentum = hyper.number("momentum");
  made.noise = hyper.number("noise");
  const Fields memory = fields.object("memory");
  constexpr std::uint64_t largest_budget = std::uint64_t{1} << 50;
  made.predicted_peak = memory.integer("predicted_peak_bytes", 0, largest_budget);
  if (const Json* const budget = memory.value().find("budget");
      budget != nullptr && budget->kind() != Json::Kind::null)
    made.budget = memory.integer("budget", 1, largest_budget);
  if (fields.has("release")) made.release = fields.integer("release", 1, (std::uint64_t{1} << 53) - 1);
  if (fields.has("classes")) {
    made.classes = fields.texts("classes");
    require(made.classes.size() == made.num_classes, "the manifest's classes must be ", made.num_classes,
            " names, not ", made.classes.size());
    check_class_names(made.classes);
  }
  made.files = read_files(fields.object("files"));
  return made;
}

bool may_become(const std::vector<std::string>& stored, const std::vector<std::string>& names) {
  if (stored.empty()) return true;
  if (stored.size() != names.size()) return false;
  for (std::size_t place = 0; place < stored.size(); ++place) {
    const std::string& old = stored[place];
    const std::string number = std::to_string(place);
    if (old != names[place] && old != number && old != "class " + number) return false;
  }
  return true;
}

void check_class_names(const std::vector<std::string>& names) {
  for (const std::string& name : names)
    require(name.find_first_not_of(' ') != std::string::npos && characters(name) <= 255 &&
                !acts_on_terminals(name),
            "the classes must be printable names of 1 to 255 characters, not '", shown(name), "'");
  std::vector<std::string_view> sorted(names.begin(), names.end());
  std::ranges::sort(sorted);
  const auto twice = std::ranges::adjacent_find(sorted);
  require(twice == sorted.end(), "the classes must be distinct, but there are two '",
          twice == sorted.end() ? std::string() : shown(*twice), "'");
}

}  // namespace edge_bcs
