// What is computed without the C library's help: the function of each double of a file, into another.
//
//   elementary LIBRARY exp|log NUMBERS RESULTS

#include <fstream>
#include <iostream>
#include <string_view>

#include "ops/exponential.h"

namespace {

int compute(bool exponential, const char* from, const char* to) {
  std::ifstream in(from, std::ios::binary);
  std::ofstream out(to, std::ios::binary);
  double x = 0;
  while (in.read(reinterpret_cast<char*>(&x), sizeof x)) {
    const double y = exponential ? edge_bcs::exponential(x) : edge_bcs::logarithm(x);
    out.write(reinterpret_cast<const char*>(&y), sizeof y);
  }
  return out ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  const std::string_view what = count > 2 ? words[2] : "";
  if (count == 5 && (what == "exp" || what == "log")) return compute(what == "exp", words[3], words[4]);
  std::cerr << "use: elementary LIBRARY exp|log NUMBERS RESULTS\n";
  return 2;
}
