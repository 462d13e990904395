#include "isa.h"

#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace edge_bcs {

namespace {

// Whether the variant was compiled into the library and the processor has its instructions.
bool runs_here(Isa isa) {
  switch (isa) {
#ifdef EDGE_BCS_HAVE_AVX2
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#endif
#ifdef EDGE_BCS_HAVE_AVX512
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("fma");
#endif
#ifdef EDGE_BCS_HAVE_NEON
    case Isa::neon:
      return true;  // part of every aarch64 processor
#endif
    case Isa::scalar:
      return true;
    default:
      return false;
  }
}

Isa choose() {
  constexpr Isa best_first[] = {Isa::avx512, Isa::avx2, Isa::neon, Isa::scalar};
  if (const char* wanted = std::getenv("EDGE_BCS_ISA"))
    for (Isa isa : best_first)
      if (std::string_view(wanted) == isa_name(isa) && runs_here(isa)) return isa;
  for (Isa isa : best_first)
    if (runs_here(isa)) return isa;
  return Isa::scalar;
}

}  // namespace

Isa selected_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::neon:
      return "neon";
    default:
      return "scalar";
  }
}

std::int64_t first_level_cache() {
  std::int64_t bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 32 << 10;
}

const ConvKernels* conv_kernels(Isa isa) {
  switch (isa) {
#ifdef EDGE_BCS_HAVE_AVX512
    case Isa::avx512:
      return &conv_kernels_avx512;
#endif
#ifdef EDGE_BCS_HAVE_AVX2
    case Isa::avx2:
      return &conv_kernels_avx2;
#endif
#ifdef EDGE_BCS_HAVE_NEON
    case Isa::neon:
      return &conv_kernels_neon;
#endif
    case Isa::scalar:
      return &conv_kernels_scalar;
    default:
      return nullptr;
  }
}

}  // namespace edge_bcs

// The kernels of this machine's instruction set and, with `scalar` not 0, the scalar ones that they are checked against.
extern "C" __attribute__((visibility("default"))) const edge_bcs::ConvKernels* edge_bcs_conv_kernels(int scalar) {
  using namespace edge_bcs;
  return conv_kernels(scalar != 0 ? Isa::scalar : selected_isa());
}
