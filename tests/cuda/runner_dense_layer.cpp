// Runs the dense layer of one kernel under the emulation; tests/cuda/dense_layer_case.py is the other side.
#include <cxxabi.h>
#include <typeinfo>
#include "dense_layer.cu"
#include "job.h"

using namespace csp::cuda;

namespace {

DenseLayer layer_of(Job& job) {
  return {Type(job.take()), {job.take(), job.take(), job.take()}, job.take(), job.take(), job.take()};
}
// Bytes: tile, blocks (at most 255), rows and columns of a cell, cells of a tile down and across.
int64_t packed(const DensePlan& plan) {
  const Cut& c = plan.cut;
  int64_t all = 0;
  for (int part : {c.tile_across, c.tile_down, c.width, c.height, plan.blocks, plan.tile}) all = all << 8 | part;
  return all;
}

int run(Job& job) {
  emulation::schedule = emulation::Schedule(job.take());
  const DenseLayer layer = layer_of(job);
  const Device device{int(job.take()), job.take(), nullptr};
  if (const char* reason = unsupported(layer, device)) return fprintf(stderr, "unsupported: %s\n", reason), 4;
  job.tile = packed(plan_dense_layer(layer, device));
  Buffer workspace(workspace_bytes(layer, device));
  memset(workspace.data.get(), 0xff, size_t(workspace.bytes));
  const View features = job.view();
  const Norm norm1{job.floats(), job.floats(), job.floats()};
  const Weight weight1 = job.weight();
  const Norm norm2{job.floats(), job.floats(), job.floats()};
  const Weight weight2 = job.weight();
  const Dropout dropout = job.dropout();
  const Output out = job.output();
  return dense_layer_forward(layer, device, features, norm1, weight1, norm2, weight2, dropout, out, workspace.data.get());
}

// Lines of "N H W K B G": 1 where one kernel wins, and the estimated gain.
int print_wins(int capability) {
  long long n, h, w, k, b, g;
  while (scanf("%lld %lld %lld %lld %lld %lld", &n, &h, &w, &k, &b, &g) == 6)
    {
      const DenseLayer layer{Type::Half, {n, h, w}, k, b, g};
      const Machine machine = machine_of(capability);
      const bool can = !unsupported(layer, {machine.multiprocessors, machine.shared_bytes, nullptr});
      printf("%d %.3f\n", wins(layer, capability), can ? estimated_gain(layer, machine) : 0);
    }
  return 0;
}

// The tile for 64 images of 56x56 on a device of sm_90, and the shared memory of its block.
void print_shared(int k, int b, int g) {
  const Machine machine = machine_of(90);
  const DensePlan plan = plan_dense_layer({Type::Half, {64, 56, 56}, k, b, g}, {machine.multiprocessors, machine.shared_bytes, nullptr});
  with_tile(AllDenseTiles{}, plan.tile, [&](auto tile) {
    int status = 0;
    const std::unique_ptr<char, Free> name(abi::__cxa_demangle(typeid(tile).name(), nullptr, nullptr, &status));
    printf("%s\t%d\n", name.get(), int(DenseShared<decltype(tile)>(plan.cut, k, b).bytes));
    return cudaSuccess;
  });
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 5 && !strcmp(arguments[1], "shared")) return print_shared(atoi(arguments[2]), atoi(arguments[3]), atoi(arguments[4])), 0;
  if (count != 3) return fprintf(stderr, "usage: runner JOB RESULT, or runner wins CAPABILITY, or runner shared K B G\n"), 2;
  if (!strcmp(arguments[1], "wins")) return print_wins(atoi(arguments[2]));
  Job job(arguments[1]);
  if (int error = run(job)) return error;
  job.write(arguments[2]);
}
