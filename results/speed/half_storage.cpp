// What half storage is worth where a processor only converts (AVX2 with F16C): a multiply-add of a vector that comes from float32
// memory, and of one that comes from float16 memory, by the bytes that the vectors lie in. One thread's processor time.
//
//   g++ -O3 -march=haswell half_storage.cpp -o half_storage && ./half_storage
#include <immintrin.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr std::size_t lanes = 8, sums = 8;
constexpr std::size_t row = 4,
                      jump = 7;  // vectors side by side, as in a row of a tile; rows from one to the next

double now() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

__m256 taken(const float* from) { return _mm256_loadu_ps(from); }
__m256 taken(const std::uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Nanoseconds of a multiply-add of a vector: each vector is met once in a pass, four side by side and then others, as a tile of a
// sparse row meets them, and goes into the next of eight sums.
template <typename Number>
double cost(std::size_t vectors) {
  std::vector<Number> memory(vectors * lanes, Number(1));
  std::vector<std::uint32_t> order;
  for (std::size_t first = 0; first < jump; ++first)
    for (std::size_t group = first; group < vectors / row; group += jump)
      for (std::size_t vector = 0; vector < row; ++vector)
        order.push_back(static_cast<std::uint32_t>((group * row + vector) * lanes));
  const __m256 weight = _mm256_set1_ps(0.5f);
  double best = 1e9;
  for (int run = 0; run < 15; ++run) {
    __m256 sum[sums];
    for (__m256& one : sum) one = _mm256_setzero_ps();
    const std::size_t passes = std::max<std::size_t>(1, (1u << 22) / vectors);
    const double began = now();
    for (std::size_t pass = 0; pass < passes; ++pass)
      for (std::size_t at = 0; at + sums <= order.size(); at += sums)
        for (std::size_t i = 0; i < sums; ++i)
          sum[i] = _mm256_fmadd_ps(weight, taken(memory.data() + order[at + i]), sum[i]);
    const double seconds = now() - began;
    for (std::size_t i = 1; i < sums; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
    volatile float kept = _mm256_cvtss_f32(sum[0]);
    static_cast<void>(kept);
    best = std::min(best, 1e9 * seconds / static_cast<double>(passes * (order.size() / sums * sums)));
  }
  return best;
}

}  // namespace

int main() {
  std::puts(
      "| float32 bytes of the vectors | float32, ns | float16, ns | times |\n| --- | ---: | ---: | ---: |");
  for (std::size_t kib = 16; kib <= 65536; kib *= 4) {
    const std::size_t vectors = kib * 1024 / (lanes * sizeof(float));
    const double whole = cost<float>(vectors), half = cost<std::uint16_t>(vectors);
    std::printf("| %zu KiB | %.2f | %.2f | %.2f |\n", kib, whole, half, whole / half);
  }
}
