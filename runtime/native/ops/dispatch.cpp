#include "ops/dispatch.h"

#include <unistd.h>
#ifdef EDGE_BCS_HAVE_AVX2
#include <cpuid.h>
#endif
#if defined(EDGE_BCS_HAVE_NEONFP16) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <string_view>

namespace edge_bcs {

namespace {

#ifdef EDGE_BCS_HAVE_AVX2
// Not by __builtin_cpu_supports, which knows this name in newer compilers only.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Whether the variant was compiled into the library and the processor has its instructions.
bool runs_here(Isa isa) {
  switch (isa) {
#ifdef EDGE_BCS_HAVE_AVX2
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
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

#ifdef EDGE_BCS_HAVE_AVX512BF16
// Not by __builtin_cpu_supports, as above. (Leaf 7, its first subleaf.)
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 5)) != 0;
}
#endif

#ifdef EDGE_BCS_HAVE_NEONFP16
// Whether vectors of FP16 can be added and multiplied, which processors from ARMv8.2 on may have: Cortex-A55, A76 and A78, not
// A53 and A72. All of Apple's that run macOS have it.
bool has_neon_fp16() {
#if defined(__linux__)
  constexpr unsigned long asimdhp = 1ul << 10;
  return (getauxval(AT_HWCAP) & asimdhp) != 0;
#else
  return true;
#endif
}
#endif

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

#ifdef EDGE_BCS_HAVE_AVX512
#define EDGE_BCS_AVX512(table) \
  case Isa::avx512:            \
    return table##_avx512;
#else
#define EDGE_BCS_AVX512(table)
#endif
#ifdef EDGE_BCS_HAVE_AVX2
#define EDGE_BCS_AVX2(table) \
  case Isa::avx2:            \
    return table##_avx2;
#else
#define EDGE_BCS_AVX2(table)
#endif
#ifdef EDGE_BCS_HAVE_NEON
#define EDGE_BCS_NEON(table) \
  case Isa::neon:            \
    return table##_neon;
#else
#define EDGE_BCS_NEON(table)
#endif
bool has_half_arithmetic() {
#if defined(EDGE_BCS_HAVE_AVX512BF16)
  static const bool has = selected_isa() == Isa::avx512 && has_avx512_bf16();
#elif defined(EDGE_BCS_HAVE_NEONFP16)
  static const bool has = selected_isa() == Isa::neon && has_neon_fp16();
#else
  constexpr bool has = false;
#endif
  return has;
}
const HalfKernels& half_kernels() {
#if defined(EDGE_BCS_HAVE_AVX512BF16)
  if (has_half_arithmetic()) return half_kernels_avx512bf16;
#elif defined(EDGE_BCS_HAVE_NEONFP16)
  if (has_half_arithmetic()) return half_kernels_neonfp16;
#endif
  return half_kernels_scalar;
}
const HalfRowKernels* half_rows() {
#if defined(EDGE_BCS_HAVE_AVX512BF16)
  if (has_half_arithmetic()) return &half_rows_avx512bf16;
#endif
  return nullptr;
}
bool has_half_kernels() { return has_half_arithmetic() || selected_isa() == Isa::scalar; }

#define EDGE_BCS_SELECT(table) \
  switch (selected_isa()) {    \
    EDGE_BCS_AVX512(table)     \
    EDGE_BCS_AVX2(table)       \
    EDGE_BCS_NEON(table)       \
    default:                   \
      return table##_scalar;   \
  }

const ConvKernels& conv_kernels() { EDGE_BCS_SELECT(conv_kernels) }
const RowKernels& row_kernels() { EDGE_BCS_SELECT(row_kernels) }
const NormKernels& norm_kernels() { EDGE_BCS_SELECT(norm_kernels) }
const NormalKernels& normal_kernels() { EDGE_BCS_SELECT(normal_kernels) }
const ProbeKernels& probe_kernels() { EDGE_BCS_SELECT(probe_kernels) }

}  // namespace edge_bcs
