// Which of the compiled instruction sets runs here; CSP_KERNELS_ISA forces a lower one.
#pragma once
#include <cstdlib>
#include <cstring>
#include "stage.h"
#if defined(CSP_HAVE_V4AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace csp {

#define CSP_KERNELS_OF(isa) \
  namespace isa {           \
  extern const StageKernels stage_kernels; \
  }
#if defined(CSP_HAVE_BASELINE)
CSP_KERNELS_OF(baseline)
#endif
#if defined(CSP_HAVE_V3)
CSP_KERNELS_OF(v3)
#endif
#if defined(CSP_HAVE_V4)
CSP_KERNELS_OF(v4)
#endif
#if defined(CSP_HAVE_V4BF16)
CSP_KERNELS_OF(v4bf16)
#endif
#if defined(CSP_HAVE_V4AMX)
CSP_KERNELS_OF(v4amx)

// Has the processor tiles for bfloat16, and does the system let this process use them? Asking it also is the request.
inline bool has_tiles() {
  constexpr unsigned BFLOAT16 = 1u << 22, TILE = 1u << 24;  // of leaf 7, edx
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;          // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & BFLOAT16) && (edx & TILE) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif
#undef CSP_KERNELS_OF

struct Isa {
  const char* name;
  const StageKernels* stage;
  bool runs_here;
};

// Best first.
inline const Isa* isas(int* count) {
#if defined(CSP_ISAS_X86)
  __builtin_cpu_init();
  [[maybe_unused]] static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const Isa all[] = {
#if defined(CSP_HAVE_V4AMX)
      {"v4amx", &v4amx::stage_kernels, avx512 && __builtin_cpu_supports("avx512bf16") && has_tiles()},
#endif
#if defined(CSP_HAVE_V4BF16)
      {"v4bf16", &v4bf16::stage_kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
#if defined(CSP_HAVE_V4)
      {"v4", &v4::stage_kernels, avx512},
#endif
#if defined(CSP_HAVE_V3)
      {"v3", &v3::stage_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")},
#endif
#if defined(CSP_HAVE_BASELINE)
      {"baseline", &baseline::stage_kernels, true},
#endif
  };
  *count = int(sizeof(all) / sizeof(all[0]));
  return all;
}

// Null: CSP_KERNELS_ISA names a set that is not compiled in or does not run here.
inline const Isa* chosen_isa() {
  static const Isa* chosen = []() -> const Isa* {
    int n;
    const Isa* all = isas(&n);
    const char* wanted = std::getenv("CSP_KERNELS_ISA");
    for (int i = 0; i < n; i++)
      if (all[i].runs_here && (!wanted || !*wanted || !std::strcmp(wanted, all[i].name))) return &all[i];
    return nullptr;
  }();
  return chosen;
}
inline const char* isas_compiled() {  // "v3,baseline"
  static const char all[] = ""
#if defined(CSP_HAVE_V4AMX)
                            ",v4amx"
#endif
#if defined(CSP_HAVE_V4BF16)
                            ",v4bf16"
#endif
#if defined(CSP_HAVE_V4)
                            ",v4"
#endif
#if defined(CSP_HAVE_V3)
                            ",v3"
#endif
#if defined(CSP_HAVE_BASELINE)
                            ",baseline"
#endif
      ;
  return all + 1;
}

}  // namespace csp
