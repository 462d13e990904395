#include "runner/program.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "runner/flat.h"

namespace edge_bcs {

namespace {

constexpr std::uint32_t version = 1;
constexpr std::size_t alignment = 64;
// What no network comes near.
constexpr std::size_t largest_file = std::size_t{64} << 20, most_nodes = std::size_t{1} << 20,
                      most_tensors = most_nodes, most_ports = 4096, most_attributes = 128;
constexpr std::uint64_t largest_arena = std::uint64_t{1} << 46;

std::size_t element_bytes(ElementType type) {
  switch (type) {
    case float32:
    case int32:
      return 4;
    case uint16:
      return 2;
    case int64:
      return 8;
    case uint8:
    case boolean:
      return 1;
    default:
      fail("a tensor has the unknown element type ", static_cast<int>(type));
  }
}

// An attribute's number, or numbers, or text, as the file has it.
class NodeAttributes final : public AttributeSource {
 public:
  NodeAttributes(const flat::Tables& tables, bool half) : half_(half) {
    require(tables.size() <= most_attributes, "a node has ", tables.size(), " attributes");
    for (std::size_t i = 0; i < tables.size(); ++i) {
      const flat::Table table = tables[i];
      entries_.push_back({table.text(0), static_cast<Kind>(table.number<std::int8_t>(1, 0)),
                          table.numbers<std::int64_t>(2), table.numbers<float>(3), table.text(4)});
    }
  }

  bool half() const override { return half_; }
  std::optional<std::int64_t> integer(const char* name) const override {
    const Entry* const entry = find(name, Kind::integer);
    if (entry == nullptr || entry->integers.size() != 1) return {};
    return entry->integers[0];
  }
  std::optional<float> real(const char* name) const override {
    const Entry* const entry = find(name, Kind::real);
    if (entry == nullptr || entry->reals.size() != 1) return {};
    return entry->reals[0];
  }
  std::optional<std::vector<std::int64_t>> integers(const char* name) const override {
    const Entry* const entry = find(name, Kind::integers);
    if (entry == nullptr) return {};
    return list(entry->integers);
  }
  std::optional<std::vector<float>> reals(const char* name) const override {
    const Entry* const entry = find(name, Kind::reals);
    if (entry == nullptr) return {};
    return list(entry->reals);
  }
  std::optional<std::string> text(const char* name) const override {
    const Entry* const entry = find(name, Kind::text);
    if (entry == nullptr) return {};
    return std::string(entry->text);
  }

 private:
  enum class Kind : std::int8_t { integer = 0, real = 1, integers = 2, reals = 3, text = 4 };
  struct Entry {
    std::string_view name;
    Kind kind;
    flat::Numbers<std::int64_t> integers;
    flat::Numbers<float> reals;
    std::string_view text;
  };

  template <class T>
  static std::vector<T> list(const flat::Numbers<T>& numbers) {
    std::vector<T> values(numbers.size());
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = numbers[i];
    return values;
  }

  const Entry* find(std::string_view name, Kind kind) const {
    const auto found = std::ranges::find_if(
        entries_, [&](const Entry& entry) { return entry.name == name && entry.kind == kind; });
    return found == entries_.end() ? nullptr : &*found;
  }

  std::vector<Entry> entries_;
  bool half_;
};

PlacedTensor tensor(const flat::Table& table, std::size_t arena) {
  PlacedTensor made;
  made.name = table.text(0);
  made.type = static_cast<ElementType>(table.number<std::int8_t>(1, 0));
  std::uint64_t bytes = element_bytes(made.type);
  const auto dims = table.numbers<std::int64_t>(2);
  for (std::size_t axis = 0; axis < dims.size(); ++axis) {
    const std::int64_t extent = dims[axis];
    require(extent >= 0 &&
                static_cast<std::uint64_t>(extent) <= largest_arena / std::max<std::uint64_t>(bytes, 1),
            "the tensor ", made.name, " is larger than the arena");
    made.shape.append(extent);
    bytes *= static_cast<std::uint64_t>(extent);
  }
  const auto address = table.number<std::uint64_t>(3, 0);
  require(address % alignment == 0 && address <= arena && bytes <= arena - address, "the tensor ", made.name,
          " does not lie in the arena");
  made.address = static_cast<std::size_t>(address);
  made.bytes = static_cast<std::size_t>(bytes);
  return made;
}

bool meet(std::size_t begin, std::size_t end, const PlacedTensor& other) {
  return begin < other.end() && other.address < end;
}

// What a graph's tensor may be: a bound buffer of its own type, or the front of one (of images, for the training graph), or memory
// behind all of them.
void check_place(const PlacedTensor& given, const std::vector<PlacedTensor>& buffers,
                 std::size_t buffers_end) {
  if (given.bytes == 0 || given.address >= buffers_end) return;
  const bool front = std::ranges::any_of(buffers, [&](const PlacedTensor& buffer) {
    return buffer.address == given.address && buffer.bytes >= given.bytes && buffer.type == given.type;
  });
  require(front, "the tensor ", given.name, " lies across a buffer");
}

std::vector<std::int32_t> places(const flat::Numbers<std::int32_t>& numbers, std::size_t count) {
  require(numbers.size() <= most_ports, "a node has ", numbers.size(), " tensors");
  std::vector<std::int32_t> made(numbers.size());
  for (std::size_t i = 0; i < made.size(); ++i) {
    made[i] = numbers[i];
    require(made[i] >= -1 && (made[i] < 0 || static_cast<std::size_t>(made[i]) < count),
            "a node names a tensor that is not there");
  }
  return made;
}

// That an operator is given what its ports ask for, and that what it writes lies apart from what it reads, or at its place.
void check_node(const ProgramNode& node, const std::vector<PlacedTensor>& tensors, std::size_t arena,
                std::size_t buffers_end) {
  const std::span<const Port> inputs = node.declaration->inputs, outputs = node.declaration->outputs;
  const bool variadic = !inputs.empty() && inputs.back().use.variadic;
  require((node.inputs.size() <= inputs.size() || variadic) && node.outputs.size() <= outputs.size(), "node ",
          node.name, " has more tensors than ", node.declaration->name, " takes");
  require(
      node.work_bytes == 0 || (node.work_address % alignment == 0 && node.work_address >= buffers_end &&
                               node.work_address <= arena && node.work_bytes <= arena - node.work_address),
      "the work memory of node ", node.name, " does not lie in the arena");
  const auto typed = [&](std::int32_t place, const Port& port) {
    require(place < 0 || port.type == any || tensors[static_cast<std::size_t>(place)].type == port.type,
            "node ", node.name, " is given a tensor of another type for ", port.name);
  };
  for (std::size_t i = 0; i < node.inputs.size(); ++i)
    typed(node.inputs[i], inputs[std::min(i, inputs.size() - 1)]);
  const std::size_t work_end = node.work_address + node.work_bytes;
  const auto apart_from_work = [&](std::int32_t place) {
    require(place < 0 || node.work_bytes == 0 ||
                !meet(node.work_address, work_end, tensors[static_cast<std::size_t>(place)]),
            "the work memory of node ", node.name, " lies across its tensors");
  };
  std::ranges::for_each(node.inputs, apart_from_work);
  for (std::size_t i = 0; i < node.outputs.size(); ++i) {
    typed(node.outputs[i], outputs[i]);
    apart_from_work(node.outputs[i]);
    if (node.outputs[i] < 0) continue;
    const PlacedTensor& written = tensors[static_cast<std::size_t>(node.outputs[i])];
    for (std::size_t j = 0; j < node.inputs.size(); ++j) {
      if (node.inputs[j] < 0) continue;
      const PlacedTensor& read = tensors[static_cast<std::size_t>(node.inputs[j])];
      const int alias = outputs[i].use.alias;
      // What is continued may be its own token, too, which is not read.
      const bool itself = alias >= 0 && static_cast<std::size_t>(alias) < node.inputs.size() &&
                          node.inputs[static_cast<std::size_t>(alias)] == node.inputs[j] &&
                          inputs[std::min(j, inputs.size() - 1)].type == any;
      const bool continued = (alias == static_cast<int>(j) || itself) && read.address == written.address &&
                             read.bytes == written.bytes;
      require(continued || !meet(written.address, written.end(), read), "node ", node.name,
              " writes where it reads");
    }
    for (std::size_t j = 0; j < i; ++j)
      require(node.outputs[j] < 0 ||
                  !meet(written.address, written.end(), tensors[static_cast<std::size_t>(node.outputs[j])]),
              "node ", node.name, " writes two tensors to one place");
  }
}

const Declaration& operator_named(std::string_view name) {
  for (const Declaration& declaration : operators(Domain::edge_bcs))
    if (name == declaration.name) return declaration;
  fail("the operator ", std::string(name.substr(0, 64)),
       " is not known; this library is older than the program");
}

ProgramGraph graph_of(const flat::Table& table, const Program& program, std::size_t buffers_end, bool half) {
  ProgramGraph graph;
  graph.name = table.text(0);
  half &= graph.name == "attack";
  const flat::Tables tensors = table.tables(1), nodes = table.tables(2);
  require(tensors.size() <= most_tensors && nodes.size() <= most_nodes, "a graph has ", nodes.size(),
          " nodes and ", tensors.size(), " tensors");
  graph.tensors.reserve(tensors.size());
  graph.nodes.reserve(nodes.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    PlacedTensor& placed = graph.tensors.emplace_back(tensor(tensors[i], program.arena_bytes));
    check_place(placed, program.buffers, buffers_end);
    std::string().swap(placed.name);  // nobody asks for it again, and there are a thousand
  }
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const flat::Table node = nodes[i];
    const Declaration& declaration = operator_named(node.text(1));
    ProgramNode made{std::string(node.text(0)),
                     &declaration,
                     {nullptr, declaration.destroy},
                     places(node.numbers<std::int32_t>(3), graph.tensors.size()),
                     places(node.numbers<std::int32_t>(4), graph.tensors.size()),
                     static_cast<std::size_t>(node.number<std::uint64_t>(5, 0)),
                     static_cast<std::size_t>(node.number<std::uint64_t>(6, 0))};
    check_node(made, graph.tensors, program.arena_bytes, buffers_end);
    const NodeAttributes attributes(node.tables(2), half);
    try {
      made.object.reset(create(declaration, Attributes(attributes)));
    } catch (const std::exception& error) {
      fail(declaration.name, ": ", error.what());
    }
    graph.nodes.push_back(std::move(made));
  }
  return graph;
}

flat::Table root_of(const flat::File& file) {
  require(file.size() <= largest_file, "the file has ", file.size(), " bytes, more than any program");
  const flat::Table root = flat::root(file, "EBCS");
  const auto found = root.number<std::uint32_t>(0, 0);
  require(found == version, "the program has version ", found, ", and this library reads version ", version);
  return root;
}

std::size_t arena_of(const flat::Table& root) {
  const auto arena = root.number<std::uint64_t>(1, 0);
  require(arena <= largest_arena && arena <= std::numeric_limits<std::size_t>::max(), "the arena has ", arena,
          " bytes, more than can be addressed");
  return static_cast<std::size_t>(arena);
}

}  // namespace

std::size_t Program::arena(std::span<const std::byte> file) {
  const flat::File content(file);
  return arena_of(root_of(content));
}

Program Program::read(std::span<const std::byte> file, bool half) {
  const flat::File content(file);
  const flat::Table root = root_of(content);
  Program program;
  program.arena_bytes = arena_of(root);
  const flat::Tables buffers = root.tables(2), graphs = root.tables(3);
  require(buffers.size() <= most_ports && graphs.size() <= most_ports,
          "the program has too many buffers or graphs");
  std::size_t buffers_end = 0;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    program.buffers.push_back(tensor(buffers[i], program.arena_bytes));
    const PlacedTensor& buffer = program.buffers.back();
    require(buffer.address >= buffers_end, "the buffer ", buffer.name, " lies across the one before it");
    buffers_end = buffer.end();
  }
  for (std::size_t i = 0; i < graphs.size(); ++i)
    program.graphs.push_back(graph_of(graphs[i], program, buffers_end, half));
  return program;
}

const ProgramGraph& Program::graph(std::string_view name) const {
  for (const ProgramGraph& graph : graphs)
    if (graph.name == name) return graph;
  fail("the program has no graph ", std::string(name));
}

}  // namespace edge_bcs
