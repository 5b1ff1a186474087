// The library and what it says of itself; each operator registers in its own file.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/scratch.h"
#include "tensors.h"

#ifndef CSP_CUDA_ARCHITECTURES
#define CSP_CUDA_ARCHITECTURES ""  // none compiled in
#endif

namespace csp {
namespace {

std::string cpu_isa() { return isa().name; }
std::string cpu_isas() { return isas_compiled(); }
std::string cuda_architectures() { return CSP_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY(csp_kernels, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("cuda_architectures() -> str");
  m.def("scratch_bytes() -> int");
  m.def("empty_cache() -> int");
  m.def("cuda_error() -> str");  // csrc/cuda/operators.cu, as all below
  // Parts of operators, on views [P, channels] of a GPU.
  m.def("conv3x3_unsupported(Tensor z, Tensor weight, Tensor slice, int[] images, bool tf32) -> str");
  m.def("conv3x3_forward(Tensor z, Tensor[] norm, Tensor weight, Tensor(a!) out, Tensor(b!)? statistics, int[] images, "
        "Tensor? seed, int layer, int threshold, float scale, bool tf32) -> ()");
  m.def("conv3x3_dgrad(Tensor features, Tensor gradient, Tensor[] correction, Tensor weight, Tensor z, Tensor[] norm, "
        "Tensor(a!) out, int[] images, Tensor? seed, int layer, int threshold, float scale, bool tf32) -> Tensor");
  m.def("conv3x3_wgrad(Tensor features, Tensor gradient, Tensor[] correction, Tensor weight, Tensor z, Tensor[] norm, "
        "int[] images, Tensor? seed, int layer, int threshold, float scale, bool tf32) -> Tensor");
  m.def("dense_layer_wins(Tensor features, Tensor weight2, Tensor out, int[] images) -> bool");
  m.def("dense_layer(Tensor features, Tensor[] norm1, Tensor weight1, Tensor[] norm2, Tensor weight2, Tensor(a!) out, "
        "int[] images) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&csp::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&csp::cpu_isas));
  m.impl("cuda_architectures", TORCH_BOX(&csp::cuda_architectures));
  m.impl("scratch_bytes", TORCH_BOX(&csp::scratch_bytes));
  m.impl("empty_cache", TORCH_BOX(&csp::give_back_scratch));
}
