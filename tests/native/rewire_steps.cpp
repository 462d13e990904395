// Many steps of RewireStep on inputs that are fixed to the bit, and a digest of the state after each:
//
//   rewire_steps LIBRARY CONNECTIONS POSITIONS STEPS SEED
//
// Prints a line for each step: the 64-bit FNV-1a hash of value, index and momentum. tests/helpers/rewire_digest.py makes
// the same inputs and prints the same lines with numpy, so that any two of the three can be compared.

#include <cstdlib>
#include <exception>
#include <iomanip>
#include <iostream>

#include "ops/philox.h"
#include "ort_host.h"

namespace {

using namespace ort_host;

// A purpose that no operator draws for.
constexpr auto test_purpose = static_cast<edge_bcs::Purpose>(200);

std::uint64_t hash(std::uint64_t state, const std::byte* bytes, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    state = (state ^ static_cast<std::uint64_t>(bytes[i])) * 0x100000001B3ull;
  return state;
}

template <class T>
struct Vector : Value {
  Vector(ElementType element, std::size_t count) : Value(element, {static_cast<std::int64_t>(count)}) {
    allocate();
  }
  T* begin() { return reinterpret_cast<T*>(data()); }
  T& operator[](std::size_t i) { return begin()[i]; }
};

// Uniform in [−1, 1): word t of the step's stream.
void fill(Vector<float>& vector, std::uint64_t seed, std::uint64_t step) {
  const edge_bcs::Philox philox(seed, step, test_purpose);
  edge_bcs::Philox::Words words{};
  for (std::size_t t = 0; t < static_cast<std::size_t>(vector.sizes[0]); ++t) {
    if (t % 4 == 0) words = philox.block(t / 4);
    vector[t] = static_cast<float>(words[t % 4] >> 8) * 0x1p-23f - 1.0f;
  }
}

void run(const char* path, std::size_t connections, std::int64_t positions, std::uint64_t steps,
         std::uint64_t seed) {
  const Library library(path);
  const KernelInfo attributes{{{"size", positions}}};
  const Operator step(library.find("edge_bcs", "RewireStep"), attributes);
  Vector<float> value(ElementType::float32, connections), momentum(ElementType::float32, connections),
      gradient(ElementType::float32, connections), hyper(ElementType::float32, 4);
  Vector<std::int32_t> index(ElementType::int32, connections);
  Vector<std::int64_t> counter(ElementType::int64, 2);
  fill(value, seed, 0);
  for (std::size_t t = 0; t < connections; ++t) {
    if (value[t] == 0) value[t] = 0.5f;
    index[t] = static_cast<std::int32_t>(static_cast<std::int64_t>(t) * positions /
                                         static_cast<std::int64_t>(connections));
    momentum[t] = 0;
  }
  hyper[0] = 0.05f, hyper[1] = 1e-3f, hyper[2] = 0.9f, hyper[3] = 0.25f;
  for (std::uint64_t number = 1; number <= steps; ++number) {
    fill(gradient, seed, number);
    counter[0] = static_cast<std::int64_t>(seed);
    counter[1] = static_cast<std::int64_t>(number);
    Value outputs[4];
    step.run({{&value, &index, &momentum, &gradient, &hyper, &counter},
              {&outputs[0], &outputs[1], &outputs[2], &outputs[3]},
              2});
    std::uint64_t digest = 0xCBF29CE484222325ull;
    for (const Value* part :
         {static_cast<Value*>(&value), static_cast<Value*>(&index), static_cast<Value*>(&momentum)})
      digest = hash(digest, part->data(), part->bytes());
    std::cout << std::hex << std::setfill('0') << std::setw(16) << digest << '\n';
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 6) throw std::runtime_error("use: rewire_steps LIBRARY CONNECTIONS POSITIONS STEPS SEED");
    const auto number = [&](int i) { return std::strtoull(arguments[i], nullptr, 10); };
    run(arguments[1], number(2), static_cast<std::int64_t>(number(3)), number(4), number(5));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "rewire_steps: " << error.what() << '\n';
    return 2;
  }
}
