// Runs one of the float32 launchers under the emulation; tests/cuda/conv3x3_float32_case.py is the other side.
#include <cxxabi.h>
#include <typeinfo>
#include "dense_block_float32.cu"
#include "job.h"

using namespace csp::cuda;

namespace {

int run(Job& job) {
  const Pass pass = Pass(job.take());
  emulation::schedule = emulation::Schedule(job.take());
  const Layer layer{Type(job.take()), {job.take(), job.take(), job.take()}, job.take(), job.take()};
  const Device device{int(job.take()), job.take(), nullptr};
  if (const char* reason = float32::unsupported(layer, device)) return fprintf(stderr, "unsupported: %s\n", reason), 4;
  using float32::plan_dgrad, float32::plan_forward, float32::plan_wgrad;
  job.tile = (pass == Pass::Forward ? plan_forward : pass == Pass::Dgrad ? plan_dgrad : plan_wgrad)(layer, device).tile;
  Buffer workspace(float32::workspace_bytes(layer, device, pass));
  memset(workspace.data.get(), 0xff, size_t(workspace.bytes));
  const View z = job.view();
  if (const char* reason = float32::unsupported(z)) return fprintf(stderr, "unsupported: %s\n", reason), 4;
  const Norm norm{job.floats(), job.floats(), job.floats()};
  const Dropout dropout = job.dropout();
  if (pass == Pass::Forward) {
    const Weight weight = job.weight();
    if (const char* reason = float32::unsupported(weight)) return fprintf(stderr, "unsupported: %s\n", reason), 4;
    const Output out = job.output();
    const Statistics statistics{static_cast<double*>(job.buffer(job.take())), layer.growth};
    return float32::conv3x3_forward(layer, device, z, norm, weight, dropout, out, statistics, workspace.data.get());
  }
  const View features = job.view(), gradient = job.view();
  const Correction correction{job.floats(), job.floats(), job.floats()};
  if (pass == Pass::Dgrad) {
    const Weight weight = job.weight();
    const Output out = job.output();
    float* sums = static_cast<float*>(job.buffer(job.take()));
    return float32::conv3x3_dgrad(layer, device, features, gradient, correction, dropout, weight, z, norm, out, sums, workspace.data.get());
  }
  WeightGradient dweight{static_cast<float*>(job.buffer(job.take())), 0, 0, 0};
  dweight.output_stride = job.take(), dweight.input_stride = job.take(), dweight.tap_stride = job.take();
  return float32::conv3x3_wgrad(layer, device, features, gradient, correction, dropout, z, norm, dweight, workspace.data.get());
}

// Lines of a kernel's name and tile, and the shared memory of its block.
template <class C> void print_shared(const char* kernel, int64_t bytes) {
  int status = 0;
  const std::unique_ptr<char, Free> name(abi::__cxa_demangle(typeid(C).name(), nullptr, nullptr, &status));
  printf("%s %s\t%lld\n", kernel, name.get(), static_cast<long long>(bytes));
}
template <class... C> void print_shared(Tiles<C...>, const char* kernel, int channels, bool dgrad) {
  (print_shared<C>(kernel, C::shared_bytes(channels, dgrad)), ...);
}
template <class... C> void print_shared(Tiles<C...>) { (print_shared<C>("wgrad", C::SHARED_BYTES), ...); }

}  // namespace

int main(int count, char** arguments) {
  if (count == 4 && !strcmp(arguments[1], "shared")) {
    print_shared(float32::ForwardTiles{}, "forward", atoi(arguments[2]), false);
    print_shared(float32::DgradTiles{}, "dgrad", atoi(arguments[3]), true);
    print_shared(float32::WgradTiles{});
    return 0;
  }
  if (count != 3) return fprintf(stderr, "usage: runner_float32 JOB RESULT, or runner_float32 shared BOTTLENECK GROWTH\n"), 2;
  Job job(arguments[1]);
  if (int error = run(job)) return error;
  job.write(arguments[2]);
}
