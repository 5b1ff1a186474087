// The running statistics of batch norms, advanced by one batch: many small tensors in one call.
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace csp {
namespace {

constexpr const char* OP = "update_running";

template <class T> void advance(T* running, const double* batch, int64_t n, double momentum, double factor) {
  for (int64_t i = 0; i < n; i++) running[i] = T((1 - momentum) * double(running[i]) + momentum * (factor * batch[i]));
}

// running = (1 - momentum) * running + momentum * batch, of the mean and of the variance times `unbiased`, as nn.BatchNorm2d has it; the
// i-th norm's channels are those of stats [2, columns] (mean and biased variance) from starts[i] on. Norms advance one after
// the other, so that a shared one advances twice. Counters count one batch more. All is checked before anything is written.
void update_running(std::vector<Tensor> means, std::vector<Tensor> vars, std::vector<Tensor> counters, const Tensor& stats,
                    std::vector<int64_t> starts, std::vector<double> momenta, std::vector<double> unbiased) {
  check_count({OP, "vars"}, vars.size(), means.size(), "one for each mean");
  check_count({OP, "starts"}, starts.size(), means.size(), "one for each mean");
  check_count({OP, "momenta"}, momenta.size(), means.size(), "one for each mean");
  check_count({OP, "unbiased"}, unbiased.size(), means.size(), "one for each mean");
  const auto* batch = static_cast<const double*>(checked({OP, "stats"}, stats, CODES.float64, {2, ANY}));
  const int64_t columns = stats.size(1);
  for (size_t i = 0; i < means.size(); i++) {
    const Argument mean{OP, "means", int64_t(i)};
    const int32_t dtype = dtype_of(means[i]);
    require(dtype == CODES.float32 || dtype == CODES.float64, mean, "got ", Shown{means[i]}, ", expected float32 or float64");
    checked(mean, means[i], dtype, {ANY});
    const int64_t n = means[i].size(0);
    checked({OP, "vars", int64_t(i)}, vars[i], dtype, {n});
    require(n <= columns, mean, "got ", n, " channels, expected at most ", columns, ", the columns of stats");
    check_range({OP, "starts", int64_t(i)}, starts[i], 0, columns - n);
  }
  for (size_t i = 0; i < counters.size(); i++) checked({OP, "counters", int64_t(i)}, counters[i], CODES.int64, {});
  for (const Tensor& counter : counters) ++*static_cast<int64_t*>(counter.mutable_data_ptr());
  for (size_t i = 0; i < means.size(); i++) {
    const double *mean = batch + starts[i], *var = mean + columns;
    const int64_t n = means[i].size(0);
    void *m = means[i].mutable_data_ptr(), *v = vars[i].mutable_data_ptr();
    if (dtype_of(means[i]) == CODES.float32) {
      advance(static_cast<float*>(m), mean, n, momenta[i], 1), advance(static_cast<float*>(v), var, n, momenta[i], unbiased[i]);
    } else {
      advance(static_cast<double*>(m), mean, n, momenta[i], 1), advance(static_cast<double*>(v), var, n, momenta[i], unbiased[i]);
    }
  }
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("update_running(Tensor(a!)[] means, Tensor(b!)[] vars, Tensor(c!)[] counters, Tensor stats, int[] starts, float[] momenta, "
        "float[] unbiased) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) { m.impl("update_running", TORCH_BOX(&csp::update_running)); }
