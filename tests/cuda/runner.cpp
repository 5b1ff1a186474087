// Runs one of the launchers under the emulation: reads a job (numbers, then buffers), writes the buffers as they are afterwards and what
// the emulation counted. tests/cuda/emulator.py is the other side.
#include <cxxabi.h>
#include <typeinfo>
#include "dense_block.cu"
#include "job.h"

using namespace csp::cuda;

namespace {

// Of what is planned: the tile that was chosen, and 256 for each split after the first.
int run(Job& job) {
  const Pass pass = Pass(job.take());
  emulation::schedule = emulation::Schedule(job.take());
  const Layer layer{Type(job.take()), {job.take(), job.take(), job.take()}, job.take(), job.take()};
  Device device{int(job.take()), job.take(), nullptr};
  if (const char* ns = getenv("CSP_LAUNCH_NS")) device.launch_ns = atoll(ns);
  if (const char* reason = unsupported(layer, device)) return fprintf(stderr, "unsupported: %s\n", reason), 4;
  const Plan plan = (pass == Pass::Forward ? plan_forward : pass == Pass::Dgrad ? plan_dgrad : plan_wgrad)(layer, device);
  job.tile = plan.tile + 256 * (plan.splits - 1);
  Buffer workspace(workspace_bytes(layer, device, pass));
  memset(workspace.data.get(), 0xff, size_t(workspace.bytes));
  const View z = job.view();
  const Norm norm{job.floats(), job.floats(), job.floats()};
  const Dropout dropout = job.dropout();
  if (pass == Pass::Forward) {
    const Weight weight = job.weight();
    const Output out = job.output();
    const Statistics statistics{static_cast<double*>(job.buffer(job.take())), layer.growth};
    return conv3x3_forward(layer, device, z, norm, weight, dropout, out, statistics, workspace.data.get());
  }
  const View features = job.view(), gradient = job.view();
  const Correction correction{job.floats(), job.floats(), job.floats()};
  if (pass == Pass::Dgrad) {
    const Weight weight = job.weight();
    const Output out = job.output();
    float* sums = static_cast<float*>(job.buffer(job.take()));
    return conv3x3_dgrad(layer, device, features, gradient, correction, dropout, weight, z, norm, out, sums, workspace.data.get());
  }
  WeightGradient dweight{static_cast<float*>(job.buffer(job.take())), 0, 0, 0};
  dweight.output_stride = job.take(), dweight.input_stride = job.take(), dweight.tap_stride = job.take();
  return conv3x3_wgrad(layer, device, features, gradient, correction, dropout, z, norm, dweight, workspace.data.get());
}

// Lines of a tile's name and the shared memory of its block.
template <class C> void print_shared(int64_t bytes) {
  int status = 0;
  std::unique_ptr<char, Free> name(abi::__cxa_demangle(typeid(C).name(), nullptr, nullptr, &status));
  printf("%s\t%lld\n", name.get(), static_cast<long long>(bytes));
}
template <class... C> void print_shared(Tiles<C...>, int channels) { (print_shared<C>(C::shared_bytes(channels)), ...); }
template <class... C> void print_shared(Tiles<C...>) { (print_shared<C>(C::SHARED_BYTES), ...); }

}  // namespace

int main(int count, char** arguments) {
  if (count == 4 && !strcmp(arguments[1], "shared")) {
    print_shared(ForwardTiles{}, atoi(arguments[2])), print_shared(DgradTiles{}, atoi(arguments[3])), print_shared(WgradTiles{});
    return 0;
  }
  if (count != 3) return fprintf(stderr, "usage: runner JOB RESULT, or runner shared BOTTLENECK GROWTH\n"), 2;
  Job job(arguments[1]);
  if (int error = run(job)) return error;
  job.write(arguments[2]);
}
