// The threads of a runner, with jobs of all sizes:
//
//   check_pool LIBRARY THREADS
//
// Prints nothing and exits with 0 where each part of each job was done once. (The library is not used; every program is given it.)

#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "runner/pool.cpp"  // NOLINT(bugprone-suspicious-include): it is not in the library's interface

int main(int, char** arguments) {
  edge_bcs::Pool pool(std::stoi(arguments[2]));
  std::vector<int> done(300);
  for (std::size_t job = 0; job < 20'000; ++job) {
    const std::size_t parts = job % (done.size() + 1);
    pool.run([](void* all, std::size_t part) { ++static_cast<int*>(all)[part]; }, parts, done.data());
    for (std::size_t part = 0; part < done.size(); ++part) {
      if (done[part] != (part < parts ? 1 : 0)) {
        std::cerr << "part " << part << " of " << parts << " was done " << done[part] << " times\n";
        return 1;
      }
      done[part] = 0;
    }
  }
}
