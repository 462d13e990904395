// Runs one operator of the library without ONNX Runtime:
//
//   run_operator LIBRARY CALL RESULT    reads the call, writes the outputs
//   run_operator LIBRARY                says which instruction set the kernels use
//
// Exit status 1 and the operator's message on stderr: it refused. tests/helpers/operators.py writes calls and reads
// results: lines of text up to "data", then the tensors' bytes one after the other.

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>

#include "ort_host.h"

namespace {

using namespace ort_host;

struct Call {
  std::string domain, name;
  int threads = 1;
  bool half = false;
  KernelInfo info;
  std::vector<std::unique_ptr<Value>> inputs, outputs;  // null: absent
  std::vector<std::string> output_names;
};

std::vector<std::int64_t> read_integers(std::istringstream& line) {
  std::vector<std::int64_t> numbers;
  for (std::int64_t number = 0; line >> number;) numbers.push_back(number);
  return numbers;
}

Call read_call(std::istream& file) {
  Call call;
  for (std::string text; std::getline(file, text) && text != "data";) {
    std::istringstream line(text);
    std::string kind, name;
    line >> kind >> name;
    if (kind == "operator") {
      call.domain = name;
      line >> call.name;
    } else if (kind == "threads") {
      call.threads = std::atoi(name.c_str());
    } else if (kind == "half") {
      call.half = name == "1";
    } else if (kind == "int") {
      call.info.attributes[name] = read_integers(line).at(0);
    } else if (kind == "ints") {
      call.info.attributes[name] = read_integers(line);
    } else if (kind == "float") {
      std::string number;
      line >> number;
      call.info.attributes[name] = std::strtof(number.c_str(), nullptr);
    } else if (kind == "floats") {
      auto& numbers = call.info.attributes[name].emplace<std::vector<float>>();
      for (std::string number; line >> number;) numbers.push_back(std::strtof(number.c_str(), nullptr));
    } else if (kind == "text") {
      std::string value;
      line >> value;
      call.info.attributes[name] = value;
    } else if (kind == "input") {  // input TYPE SIZES…, or input absent
      auto& input = call.inputs.emplace_back();
      if (name == "absent") continue;
      input = std::make_unique<Value>(static_cast<ElementType>(std::atoi(name.c_str())), read_integers(line));
    } else if (kind == "output") {  // output NAME, or output absent
      call.output_names.push_back(name);
      call.outputs.push_back(name == "absent" ? nullptr : std::make_unique<Value>());
    } else {
      throw std::runtime_error("a call has the line " + text);
    }
  }
  for (const auto& input : call.inputs) {
    if (input == nullptr) continue;
    input->allocate();
    file.read(reinterpret_cast<char*>(input->data()), static_cast<std::streamsize>(input->bytes()));
  }
  if (!file) throw std::runtime_error("the call is truncated");
  return call;
}

// The outputs, then the inputs as the operator left them.
void write_result(std::ostream& file, const Call& call) {
  const auto describe = [&](const std::string& name, const Value& value) {
    file << name << ' ' << static_cast<int>(value.type);
    for (std::int64_t size : value.sizes) file << ' ' << size;
    file << '\n';
  };
  for (std::size_t i = 0; i < call.outputs.size(); ++i)
    if (call.outputs[i] != nullptr) describe(call.output_names[i], *call.outputs[i]);
  for (const auto& input : call.inputs)
    if (input != nullptr) describe("input", *input);
  file << "data\n";
  for (const auto* values : {&call.outputs, &call.inputs})
    for (const auto& value : *values)
      if (value != nullptr)
        file.write(reinterpret_cast<const char*>(value->data()),
                   static_cast<std::streamsize>(value->bytes()));
}

template <class T>
std::vector<T*> pointers(const std::vector<std::unique_ptr<T>>& owners) {
  std::vector<T*> all;
  all.reserve(owners.size());
  for (const auto& owner : owners) all.push_back(owner.get());
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 2 && count != 4) throw std::runtime_error("use: run_operator LIBRARY [CALL RESULT]");
    const Library library(arguments[1]);
    if (count == 2) {
      std::cout << library.function<const char*()>("edge_bcs_isa")() << '\n';
      return 0;
    }
    std::ifstream file(arguments[2], std::ios::binary);
    Call call = read_call(file);
    library.function<void(int)>("edge_bcs_half_precision")(call.half ? 1 : 0);
    const CustomOp* op = library.find(call.domain, call.name);
    try {
      Operator(op, call.info).run({pointers(call.inputs), pointers(call.outputs), call.threads});
    } catch (const Failure& failure) {
      std::cerr << failure.what() << '\n';
      return 1;
    }
    std::ofstream result(arguments[3], std::ios::binary);
    write_result(result, call);
    if (!result.flush()) throw std::runtime_error("the result could not be written");
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "run_operator: " << error.what() << '\n';
    return 2;
  }
}
