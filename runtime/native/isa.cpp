#include "isa.h"

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

}  // namespace edge_bcs
