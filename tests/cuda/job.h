// What tests/cuda/emulator.py sends to a runner and takes back: a job (numbers, then buffers), the buffers as they are afterwards, a number
// that says what was planned, and what the emulation counted. Included after the kernels.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace csp::cuda {

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
  int64_t tile = -1;  // what was planned

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

}  // namespace csp::cuda
