// The library and what it says of itself; each operator registers in its own file.
#include <torch/csrc/stable/library.h>

#include <string>

#include "tensors.h"

namespace csp {
namespace {

std::string cpu_isa() { return isa().name; }
std::string cpu_isas() { return isas_compiled(); }

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY(csp_kernels, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&csp::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&csp::cpu_isas));
}
