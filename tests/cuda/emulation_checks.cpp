// What the emulation must do and must notice, one case a run: emulation_checks NAME. Wrong uses end in its own error.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include "device/ptx.cuh"

using namespace csp::cuda;

namespace {

void require(bool ok, const char* what) {
  if (!ok) fprintf(stderr, "wrong: %s\n", what), exit(1);
}
void launch_one(void (*kernel)(float*), int threads, float* out, int shared_bytes = 4096) {
  launch(kernel, dim3(2), threads, size_t(shared_bytes), nullptr, out);
}

void leave_early(float*) {
  if (threadIdx.x < 32) return;
  barrier();
}
void outside_shared(float*) { store_shared4(4096 - 4 + 4 * (threadIdx.x == 63), 1.f); }
void misaligned_shared(float*) { load_shared16(4 * threadIdx.x); }
void lanes_differ(float* out) {
  if (threadIdx.x % 32 < 16) out[0] = shuffle_xor(1.f, 1);
  else out[1] = load_shared4<float>(0), load_shared16(0);
}

// Neighbours' values, across warps.
void neighbours(float* out) {
  const int i = int(threadIdx.x), n = int(blockDim.x);
  store_shared4(uint32_t(i * 4), float(i));
  barrier();
  const float next = load_shared4<float>(uint32_t((i + 1) % n * 4));
  barrier();
  store_shared4(uint32_t(i * 4), next + shuffle_xor(next, 5) * 0);
  barrier();
  out[blockIdx.x * unsigned(n) + unsigned(i)] = load_shared4<float>(uint32_t((i + 1) % n * 4));
}

// A copy is there after its wait, not before; a later group's is not.
alignas(16) float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
void copies(float* out) {
  const bool first = threadIdx.x == 0;
  copy16(first, 0, source);
  commit_copies();
  copy16(first, 16, source + 4);
  commit_copies();
  if (first) out[0] = load_shared4<float>(0);
  wait_copies<1>();
  if (first) out[1] = load_shared4<float>(0), out[2] = load_shared4<float>(16);
  wait_copies<0>();
  if (first) out[3] = load_shared4<float>(16);
}
void load_off(float* out) {
  uint4 v = make_uint4(0, 0, 0, 0);
  load16(false, v, nullptr);
  memcpy(out, &v, 16);
}

// c [16, 8] = a [16, 16] b [16, 8] of small integers, through shared memory.
int a_of(int i, int k) { return (3 * i + 5 * k) % 7 - 3; }
int b_of(int k, int j) { return (2 * k + 3 * j) % 5 - 2; }
template <class T> void product(float* out) {
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    const uint32_t pair = pack<T>(float(a_of(i / 16, i % 16)), 0), row = pack<T>(float(b_of(i / 8 % 16, i % 8)), 0);
    const uint16_t a = uint16_t(pair), b = uint16_t(row);
    emulation::check_shared(uint32_t(i * 2), 2);
    memcpy(emulation::shared_memory() + i * 2, &a, 2);
    if (i < 128) memcpy(emulation::shared_memory() + 512 + i * 2, &b, 2);
  }
  barrier();
  uint32_t a[4], b[2];
  ldmatrix(a, uint32_t((lane % 16) * 32 + lane / 16 * 16));
  ldmatrix_transposed(b, uint32_t(512 + (lane % 16) * 16));
  float c[4] = {};
  mma<T>(c, a, b[0], b[1]);
  for (int e = 0; e < 4; e++) out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = c[e];
}
template <class T> void check_product() {
  float out[128];
  launch_one(product<T>, 32, out);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      int sum = 0;
      for (int k = 0; k < 16; k++) sum += a_of(i, k) * b_of(k, j);
      require(out[i * 8 + j] == float(sum), "product");
    }
}

// c [16, 8] = a [16, 8] b [8, 8], straight from registers.
void product_tf32(float* out) {
  const int lane = int(threadIdx.x), row = lane / 4, k = lane % 4;
  auto bits = [](int x) {
    const float value = float(x);
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
  };
  const uint32_t a[4] = {bits(a_of(row, k)), bits(a_of(row + 8, k)), bits(a_of(row, k + 4)), bits(a_of(row + 8, k + 4))};
  float c[4] = {};
  mma_tf32(c, a, bits(b_of(k, row)), bits(b_of(k + 4, row)));
  for (int e = 0; e < 4; e++) out[(row + e / 2 * 8) * 8 + k * 2 + e % 2] = c[e];
}
void check_product_tf32() {
  float out[128];
  launch_one(product_tf32, 32, out);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      int sum = 0;
      for (int k = 0; k < 8; k++) sum += a_of(i, k) * b_of(k, j);
      require(out[i * 8 + j] == float(sum), "product of TF32");
    }
}

// Rows 128 bytes apart meet in the same banks; rows 16 bytes apart do not.
void rows_apart(float* out) {
  uint32_t to[4];
  ldmatrix(to, threadIdx.x * uint32_t(out[0]));
}
// Of one word and of two: four pixels of eight words, conflict-free where they are 8 words apart.
template <int WORDS> void words_apart(float* out) {
  const uint32_t pixel = threadIdx.x % 4, word = threadIdx.x / 4;
  uint32_t to[WORDS];
  load_shared_words(to, pixel * uint32_t(out[0]) + word * 4 * WORDS);
}
void check_narrow_conflicts() {
  for (int apart : {32, 128}) {
    float distance = float(apart);
    emulation::counters = {};
    launch_one(words_apart<1>, 32, &distance);
    launch_one(words_apart<2>, 32, &distance);
    require(emulation::counters.narrow_loads == 6, "narrow loads");  // two blocks
    require(emulation::counters.narrow_wavefronts == (apart == 32 ? 6 : 24), "wavefronts of narrow loads");
  }
}
void check_conflicts() {
  check_narrow_conflicts();
  for (int apart : {16, 128}) {
    float distance = float(apart);
    emulation::counters = {};
    launch_one(rows_apart, 32, &distance);
    require(emulation::counters.matrices == 8, "matrices");
    require(emulation::counters.matrix_wavefronts == (apart == 16 ? 8 : 64), "wavefronts");
  }
}
void check_neighbours() {
  for (int s = 0; s < emulation::SCHEDULES; s++) {
    emulation::schedule = emulation::Schedule(s);
    float out[256];
    launch_one(neighbours, 128, out);
    for (int i = 0; i < 256; i++) require(out[i] == float((i + 2) % 128), "neighbours");
  }
}
void check_copies() {
  float out[4];
  launch_one(copies, 32, out);
  require(out[0] != out[0] && out[1] == 1 && out[2] != out[2] && out[3] == 5, "copies");
  launch_one(load_off, 32, out);
  require(out[0] != out[0] && out[3] != out[3], "a load that is off");
}
void check_rounding() {
  require(pack<Half>(1.00048828125f, -65520.f) == 0xfc003c00u, "half: to even, infinity");
  require(pack<BFloat16>(1.00390625f, 1.01171875f) == 0x3f823f80u, "bfloat16: to even");
  require(to_tf32(1 + 0x1p-11f) == 1 + 0x1p-10f && to_tf32(-1 - 0x1p-12f) == -1, "TF32: half away from zero");
  require(std::isinf(to_tf32(INFINITY)) && std::isnan(to_tf32(NAN)), "TF32: what is not finite");
  require(pack_relu<Half>(-1, 2) == 0x40000000u && unpack<BFloat16>(0x40400000u).y == 3, "relu, unpack");
}

}  // namespace

int main(int count, char** arguments) {
  float out[64];
  const std::map<std::string, std::function<void()>> cases = {
      {"barrier", [&] { launch_one(leave_early, 64, out); }},
      {"outside", [&] { launch_one(outside_shared, 64, out); }},
      {"misaligned", [&] { launch_one(misaligned_shared, 32, out); }},
      {"lanes", [&] { launch_one(lanes_differ, 32, out); }},
      {"product", [] { check_product<Half>(), check_product<BFloat16>(), check_product_tf32(); }},
      {"conflicts", check_conflicts},
      {"schedules", check_neighbours},
      {"copies", check_copies},
      {"rounding", check_rounding},
  };
  const auto found = cases.find(count == 2 ? arguments[1] : "");
  if (found == cases.end()) return 2;
  found->second();
}
