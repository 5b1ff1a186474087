// Which of the compiled instruction sets runs here; CSP_KERNELS_ISA forces a lower one.
#pragma once
#include <cstdlib>
#include <cstring>
#include "dense_block.h"

namespace csp {

namespace baseline { extern const DenseBlockKernels dense_block_kernels; }
#if defined(CSP_HAVE_V3)
namespace v3 { extern const DenseBlockKernels dense_block_kernels; }
#endif
#if defined(CSP_HAVE_V4)
namespace v4 { extern const DenseBlockKernels dense_block_kernels; }
#endif
#if defined(CSP_HAVE_V4BF16)
namespace v4bf16 { extern const DenseBlockKernels dense_block_kernels; }
#endif

struct Isa { const char* name; const DenseBlockKernels* kernels; bool runs_here; };

// Best first.
inline const Isa* isas(int* count) {
#if defined(CSP_ISAS_X86)
  __builtin_cpu_init();
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const Isa all[] = {
#if defined(CSP_HAVE_V4BF16)
      {"v4bf16", &v4bf16::dense_block_kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
#if defined(CSP_HAVE_V4)
      {"v4", &v4::dense_block_kernels, avx512},
#endif
#if defined(CSP_HAVE_V3)
      {"v3", &v3::dense_block_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")},
#endif
      {"baseline", &baseline::dense_block_kernels, true},
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
inline const char* isas_compiled() {
  return ""
#if defined(CSP_HAVE_V4BF16)
         "v4bf16,"
#endif
#if defined(CSP_HAVE_V4)
         "v4,"
#endif
#if defined(CSP_HAVE_V3)
         "v3,"
#endif
         "baseline";
}

}  // namespace csp
