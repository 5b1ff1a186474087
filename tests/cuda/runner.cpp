// Runs one of the launchers under the emulation: reads a job (numbers, then buffers), writes the buffers as they are afterwards and what
// the emulation counted. tests/cuda/emulator.py is the other side.
#include <cxxabi.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <typeinfo>
#include <vector>
#include "dense_block.cu"

using namespace csp::cuda;

namespace {

// Rows of bytes, far apart or one after another. Exact sizes, aligned as device memory is: a sanitizer sees one byte too far.
struct Free {
  void operator()(char* p) const { free(p); }
};
struct Buffer {
  std::unique_ptr<char, Free> data;
  int64_t rows, bytes, pitch;

  Buffer(int64_t rows, int64_t bytes, int64_t pitch) : rows(rows), bytes(bytes), pitch(pitch) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, size_t((rows - 1) * pitch + bytes + !bytes))) perror("memory"), exit(2);
    data.reset(static_cast<char*>(p));
  }
  explicit Buffer(int64_t bytes) : Buffer(1, bytes, bytes) {}
  char* row(int64_t i) const { return data.get() + i * pitch; }
  bool read(FILE* file) const {
    for (int64_t i = 0; i < rows; i++)
      if (fread(row(i), 1, size_t(bytes), file) != size_t(bytes)) return false;
    return true;
  }
  void write(FILE* file) const {
    for (int64_t i = 0; i < rows; i++) fwrite(row(i), 1, size_t(bytes), file);
  }
};

struct Job {
  std::vector<int64_t> numbers;
  std::vector<Buffer> buffers;
  size_t next = 0;
  int64_t tile = -1;  // the one that was chosen, and 256 for each split after the first

  explicit Job(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) perror(path), exit(2);
    auto number = [&] {
      int64_t n;
      if (fread(&n, 8, 1, file) != 1) exit(2);
      return n;
    };
    for (int64_t n = number(); n > 0; n--) numbers.push_back(number());
    for (int64_t n = number(); n > 0; n--) {
      const int64_t rows = number(), bytes = number(), pitch = number();
      buffers.emplace_back(rows, bytes, pitch);
      if (!buffers.back().read(file)) exit(2);
    }
    fclose(file);
  }
  void write(const char* path) const {
    FILE* file = fopen(path, "wb");
    if (!file) perror(path), exit(2);
    for (const Buffer& b : buffers) b.write(file);
    fwrite(&tile, sizeof tile, 1, file);
    fwrite(&emulation::counters, sizeof emulation::counters, 1, file);
    fclose(file);
  }
  int64_t take() { return numbers.at(next++); }
  void* buffer(int64_t i) const { return i < 0 ? nullptr : buffers.at(size_t(i)).data.get(); }

  // A buffer's number, or -1, then an offset and a pitch in elements of 16 bits.
  View view() {
    char* data = static_cast<char*>(buffer(take()));
    data += 2 * take();
    return {data, take()};
  }
  Output output() {
    View v = view();
    return {const_cast<void*>(v.data), v.pitch};
  }
  const float* floats() { return static_cast<const float*>(buffer(take())); }
  Weight weight() {
    Weight w{buffer(take()), false, 0, 0, 0};
    w.float32 = take() != 0, w.output_stride = take(), w.input_stride = take(), w.tap_stride = take();
    return w;
  }
  Dropout dropout() {
    Dropout d;
    d.seed = static_cast<const int64_t*>(buffer(take()));
    d.layer = uint32_t(take()), d.threshold = uint32_t(take());
    int64_t bits = take();
    memcpy(&d.scale, &bits, 4);
    return d;
  }
};

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
