// The 3x3 convolution with stride 2 of few channels and wide rows, for which gathering what a product reads, tap by tap, would take as
// long as multiplying it (mix.h does so for the others). Rows of the input are moved once, to where products read them as they lie:
//   y[r][q] = sum over ky < 3, blocks and k < 3 * PIXEL of row(2 * r + ky - 1)[block][2 * q * PIXEL + k] * w[ky][block][k]
// A row begins with the zeros left of the map, so the taps kx = 0, 1, 2 of an output lie side by side. A block is a vector of channels,
// PIXEL = LANES of them, or an image's COLOURS, of which a vector has room for all three taps.
#pragma once
#include "mix.h"

namespace csp::CSP_ISA {

constexpr int COLOURS = 3;

// acc[MR][NV] += A * B. A: rows of K values, STEP apart; B: [K][NV * LANES].
template <class T, int STEP, int MR, int NV> CSP_INLINE void product_of_rows(Vec<T> (&acc)[MR][NV], const T* A, const T* B, int64_t K) {
  constexpr int L = LANES<T>;
  CSP_UNROLL(2) for (int64_t k = 0; k < K; k++, B += NV * L) {
    Vec<T> b[NV];
    CSP_UNROLL(2) for (int j = 0; j < NV; j++) b[j] = load(B + j * L);
    CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) acc[i][j] += b[j] * A[i * STEP + k];
  }
}

// f(integral_constant of the vectors of a panel)
template <class T, class F> CSP_INLINE void with_panel(int64_t channels, int64_t panel, F f) {
  if (panel_vectors<T>(channels, panel) == 2) f(std::integral_constant<int, 2>{});
  else f(std::integral_constant<int, 1>{});
}

template <class S, int PIXEL> struct Strided3x3 {
  using T = typename Types<S>::T;
  static constexpr int L = LANES<T>, MR = REGISTER_ROWS;
  static constexpr bool IN_MEMORY = true;  // the sums that are emitted
  static constexpr int64_t RUN = 3 * PIXEL, VECTORS = (RUN + L - 1) / L;
  const Parallel& parallel;
  int64_t N, H, W;
  const Segment<S>* segments;  // of one pixel each: PIXEL = COLOURS: one
  int64_t count, C, O;
  int64_t h = ceil_div(H, 2), w = ceil_div(W, 2), P = N * h * w, blocks = 0;
  Shares shares{1, 1};  // of the rows of the output

  Strided3x3(const Parallel& parallel, const Grid& in, const Segment<S>* segments, int64_t count, int64_t C, int64_t O)
      : parallel(parallel), N(in.N), H(in.H), W(in.W), segments(segments), count(count), C(C), O(O) {
    for (int64_t i = 0; i < count; i++) blocks += ceil_div(segments[i].channels, PIXEL);
    shares.rows = choose_pieces(parallel, N * h, 18.0 * double(P * C * O), double(weights() * int64_t(sizeof(T))), double(P * (4 * C + O) * int64_t(sizeof(S))));
  }
  static bool fits(const Grid& in, const Segment<S>*, int64_t count, int64_t C, bool) { return fits(in, count, C); }
  static bool fits(const Grid& in, int64_t count, int64_t C) {
    if (ceil_div(in.W, 2) < MR) return false;
    return PIXEL == COLOURS ? L >= COLOURS && count == 1 && C == COLOURS : C <= WIDEST;
  }
  static constexpr int64_t WIDEST = 64;  // channels; with more, gathering is little and weights are large

  int64_t ldw() const { return 3 * blocks * VECTORS * L; }
  int64_t weights() const { return round_up(O, L) * ldw(); }  // of a task's sums
  int64_t length() const { return (round_up(w, MR) * 2 + 3) * PIXEL + L; }  // of a block of a row
  // f(block, first channel, channels) of each
  template <class F> CSP_INLINE void each_block(F f) const {
    for (int64_t i = 0, block = 0, first = 0; i < count; first += segments[i].channels, i++)
      for (int64_t c = 0; c < segments[i].channels; c += PIXEL) f(block++, first + c, min64(PIXEL, segments[i].channels - c));
  }

  // w [O][9][C], each channel of the output times scale (null: 1), to [panel][ky][block][RUN][NV * LANES].
  int64_t packed() const { return panels<T>(O) * 3 * blocks * RUN * 2 * L; }
  T* pack(T* to, const T* w, const T* scale) const {
    T* o = to;
    for (int64_t p = 0; p < panels<T>(O); p++)
      for (int64_t ky = 0; ky < 3; ky++)
        each_block([&](int64_t, int64_t first, int64_t channels) {
          const int64_t nv = panel_vectors<T>(O, p);
          for (int64_t kx = 0; kx < 3; kx++, o += PIXEL * nv * L)
            for (int64_t j = 0; j < nv; j++) {
              const int64_t n = p * 2 * L + j * L;
              auto row = [&](int64_t i) { return n + i < O ? load(w + ((n + i) * 9 + ky * 3 + kx) * C + first, channels) * (scale ? scale[n + i] : T(1)) : Vec<T>{}; };
              if constexpr (PIXEL == L) store_transposed(o + j * L, nv * L, false, [&](int64_t i, bool) { return row(i); });
              else if constexpr (PIXEL <= L)  // as fits() says
                for (int64_t i = 0; i < L; i++) for (int64_t k = 0; k < PIXEL; k++) o[(k * nv + j) * L + i] = row(i)[k];
            }
        });
    return to;
  }

  // Row `row` of all images as products read it, zeros at both ends.
  CSP_NOINLINE void move_row(int64_t row, T* to) const {
    for (int64_t i = 0; i < count; i++) {
      const Segment<S>& s = segments[i];
      const S* from = s.x + row * W * s.pitch;
      const Vec<T> number = Vec<T>{} + s.act.number;
      for (int64_t c = 0; c < s.channels; c += PIXEL, to += length()) {
        const int64_t n = s.channels - c;
        for (int k = 0; k < PIXEL; k++) to[k] = T(0);
        with_load(s, false, [&](auto load_of, auto) __attribute__((always_inline)) {
          constexpr Load LOAD = decltype(load_of)::value;
          Vec<T> mean{}, scale{}, shift{};
          if constexpr (LOAD != Load::Raw) mean = load(s.norm->mean + c), scale = load(s.norm->scale + c), shift = load(s.norm->shift + c);
          for (int64_t x = 0; x < W; x++) {
            __builtin_prefetch(from + (W + x) * s.pitch + c);
            Vec<T> value = load_masked(from + x * s.pitch + c, n);
            if constexpr (LOAD == Load::Silu) value = Silu<T>{}.value((value - mean) * scale + shift);
            else if constexpr (LOAD != Load::Raw) value = on_load<LOAD == Load::Leaky, T>((value - mean) * scale + shift, number);
            store(to + (x + 1) * PIXEL, value);  // the next one is written over what is too much of it
          }
        });
        for (int k = 0; k < PIXEL; k++) to[(W + 1) * PIXEL + k] = T(0);
      }
    }
  }
  // f(row q of the output, the three rows of the input that it reads) for the rows of a task
  template <class F> CSP_INLINE void each_row(Frame& frame, int task, F f) const {
    LastRows<T> rows(frame, blocks * length());
    const T* zeros = frame.zeroed<T>(blocks * length());
    const Range r = shares.rows_of(N * h, task);
    for (int64_t q = r.begin; q < r.end; q++) {
      const T* of[3];
      for (int64_t ky = 0; ky < 3; ky++) {
        const int64_t y = q % h * 2 + ky - 1, row = q / h * H + y;
        of[ky] = y < 0 || y >= H ? zeros : rows.row(row, [&](T* to) { move_row(row, to); });
      }
      f(q, of);
    }
  }

  int64_t first_pixel(int part) const { return share(N * h, part, shares.rows).begin * w; }
  // emit(part of the rows, pixel, m, column, acc): m pixels of one panel, as Mix has it.
  template <class Emit> void forward(const T* weight, const Emit& emit) const {
    for_tasks(parallel, shares.tasks(), [&](int task) {
      Frame frame;
      each_row(frame, task, [&](int64_t q, const T* const* of) {
        for (int64_t p = 0; p < panels<T>(O); p++) {
          const T* B = weight + p * 3 * blocks * RUN * 2 * L;
          for (int64_t x = 0; x < w; x += MR) {
            with_panel<T>(O, p, [&](auto vectors) {
              Vec<T> acc[MR][decltype(vectors)::value];
              panel(of, x, B, acc);
              emit(task, q * w + x, int(min64(MR, w - x)), p * 2 * L, acc);
            });
          }
        }
      });
    });
  }
  // Into memory: what is done with the sums is no part of this loop, or there would be a copy of it for each activation.
  template <int NV> CSP_NOINLINE void panel(const T* const* of, int64_t x, const T* B, Vec<T> (&to)[MR][NV]) const {
    Vec<T> acc[MR][NV];
    clear(acc);
    for (int64_t ky = 0; ky < 3; ky++)
      for (int64_t block = 0; block < blocks; block++, B += RUN * NV * L) product_of_rows<T, 2 * PIXEL>(acc, of[ky] + block * length() + 2 * x * PIXEL, B, RUN);
    CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) to[i][j] = acc[i][j];
  }

  // dw [O][9][C] = dz^T x; dz: [P][pitch]. A task's sums: [O rounded to a vector][ky][block][VECTORS * LANES].
  void wgrad(const S* dz, int64_t pitch, T* dw) const {
    Frame shared;
    const PartialSums<T>* parts = PartialSums<T>::take(shared, shares.rows, weights(), 0);
    const int64_t vectors = 3 * blocks * VECTORS;
    for_tasks(parallel, shares.tasks(), [&](int task) {
      Frame frame;
      T *gradient = frame.take<T>(round_up(O, L) * w), *sums = parts[task].weight;
      const int64_t begin = shares.rows_of(N * h, task).begin;
      each_row(frame, task, [&](int64_t q, const T* const* of) {
        for (int64_t o = 0; o < O; o += L)
          for (int64_t x = 0; x < w; x++) store(gradient + (o * w / L + x) * L, load_masked(dz + (q * w + x) * pitch + o, O - o));
        auto input = [&](int64_t v) { return of[v / VECTORS / blocks] + v / VECTORS % blocks * length() + v % VECTORS * L; };
        for (int64_t v = 0; v < vectors; v += 2)
          for (int64_t o = 0; o < O; o += L)
            for (int row = 0; row < L; row += WROWS<T>) {
              const T *A = gradient + o * w + row, *b = input(v);
              T* to = sums + (o + row) * ldw() + v * L;
              if (v + 1 < vectors) outer<2>(A, b, input(v + 1), to, q == begin);
              else outer<1>(A, b, b, to, q == begin);
            }
      });
    });
    const int tasks = int(min64(O, shares.rows));
    for_tasks(parallel, tasks, [&](int task) {
      const Range r = share(O, task, tasks);
      for (int64_t o = r.begin; o < r.end; o++)
        for (int64_t ky = 0; ky < 3; ky++)
          each_block([&](int64_t block, int64_t first, int64_t channels) {
            const int64_t at = o * ldw() + (ky * blocks + block) * VECTORS * L;
            T* to = dw + (o * 9 + ky * 3) * C + first;
            if (PIXEL == COLOURS) add_weights(parts, shares.rows, at, RUN, to);
            else for (int64_t kx = 0; kx < 3; kx++) add_weights(parts, shares.rows, at + kx * PIXEL, channels, to + kx * C);
          });
    });
  }
  template <int NV> CSP_INLINE void outer(const T* A, const T* b0, const T* b1, T* to, bool first) const {
    if (first) outer_product<Plain<T>, WROWS<T>, NV, true>(A, b0, b1, w, to, ldw(), 2 * PIXEL);
    else outer_product<Plain<T>, WROWS<T>, NV>(A, b0, b1, w, to, ldw(), 2 * PIXEL);
  }
};

// dgrad of the same, of channels at.. of the input, n of them. Pixels of even or odd row and column are each a product of the taps that
// reach them: a row 2r is read by the middle tap of row r of the output alone, 2r + 1 by the last tap of r and the first of r + 1.
template <class S> struct Strided3x3Dgrad {
  using T = typename Types<S>::T;
  static constexpr int L = LANES<T>, MR = REGISTER_ROWS;
  const Parallel& parallel;
  int64_t N, H, W, O, n;
  int64_t h = ceil_div(H, 2), w = ceil_div(W, 2), blocks = ceil_div(O, L), length = (round_up(w, MR) + 1) * L;
  int tasks = choose_pieces(parallel, N * h, 18.0 * double(N * h * w * n * O));

  // Rows of the kernel that read a row of the input that is odd or not, in the order of the rows of the output; so of columns.
  static int64_t taps(int64_t odd) { return 1 + odd; }
  static int64_t tap(int64_t odd, int64_t k) { return odd ? 2 - 2 * k : 1; }
  int64_t run(int64_t odd_x) const { return taps(odd_x) * L; }
  int64_t panel_size(int64_t odd_y, int64_t odd_x) const { return taps(odd_y) * blocks * run(odd_x) * 2 * L; }
  // Weights of the pixels in front of these.
  int64_t before(int64_t odd_y, int64_t odd_x) const {
    int64_t size = 0;
    for (int64_t parity = 0; parity < odd_y * 2 + odd_x; parity++) size += panels<T>(n) * panel_size(parity / 2, parity % 2);
    return size;
  }
  int64_t packed() const { return before(2, 0); }
  // weight: [O][9][C], to [parity][panel][row of the output][block of its channels][column][LANES][NV * LANES].
  const T* pack(T* to, const T* weight, int64_t C, int64_t at) const {
    for (int64_t parity = 0; parity < 4; parity++) {
      const int64_t odd_y = parity / 2, odd_x = parity % 2;
      for (int64_t p = 0; p < panels<T>(n); p++) {
        T* o = to + before(odd_y, odd_x) + p * panel_size(odd_y, odd_x);
        for (int64_t ky = 0; ky < taps(odd_y); ky++)
          for (int64_t k = 0; k < blocks * run(odd_x); k++)
            for (int j = 0; j < panel_vectors<T>(n, p); j++, o += L) {
              const int64_t kx = k % run(odd_x) / L, out = k / run(odd_x) * L + k % L, c = p * 2 * L + j * L;
              store(o, out < O ? load(weight + (out * 9 + tap(odd_y, ky) * 3 + tap(odd_x, kx)) * C + at + c, n - c) : Vec<T>{});
            }
      }
    }
    return to;
  }
  // emit(task, whether the row is odd, whether the column is, pixel among such ones, m, column, acc, nv): nv vectors of each of m pixels
  template <class Emit> void run_all(const S* dz, int64_t pitch, const T* weight, const Emit& emit) const {
    for_tasks(parallel, tasks, [&](int task) {
      Frame frame;
      LastRows<T> rows(frame, blocks * length);
      const T* zeros = frame.zeroed<T>(blocks * length);
      const Range r = share(N * h, task, tasks);
      for (int64_t q = r.begin; q < r.end; q++) {
        const T* of[2];
        for (int64_t k = 0; k < 2; k++) of[k] = q % h + k == h ? zeros : rows.row(q + k, [&](T* to) { move_row(dz + (q + k) * w * pitch, pitch, to); });
        for (int64_t odd_y = 0; odd_y < min64(2, H - q % h * 2); odd_y++)
          for (int64_t odd_x = 0; odd_x < 2; odd_x++) {
            const int64_t columns = (W + 1 - odd_x) / 2, first = (q / h * ((H + 1 - odd_y) / 2) + q % h) * columns;
            for (int64_t p = 0; p < panels<T>(n); p++) {
              const T* B = weight + before(odd_y, odd_x) + p * panel_size(odd_y, odd_x);
              for (int64_t x = 0; x < columns; x += MR) {
                with_panel<T>(n, p, [&](auto vectors) {
                  Vec<T> acc[MR][decltype(vectors)::value];
                  panel(of, x, B, taps(odd_y), run(odd_x), acc);
                  emit(task, odd_y, odd_x, first + x, int(min64(MR, columns - x)), p * 2 * L, &acc[0][0], decltype(vectors)::value);
                });
              }
            }
          }
      }
    });
  }

 private:
  // A row of dz as [block][column][LANES], zeros behind its end.
  CSP_NOINLINE void move_row(const S* from, int64_t pitch, T* to) const {
    for (int64_t c = 0; c < O; c += L, to += length) {
      for (int64_t x = 0; x < w; x++) store(to + x * L, load_masked(from + x * pitch + c, O - c));
      store(to + w * L, Vec<T>{});
    }
  }
  template <int NV> CSP_NOINLINE void panel(const T* const* of, int64_t x, const T* B, int64_t rows, int64_t K, Vec<T> (&to)[MR][NV]) const {
    Vec<T> acc[MR][NV];
    clear(acc);
    for (int64_t k = 0; k < rows; k++)
      for (int64_t block = 0; block < blocks; block++, B += K * NV * L) product_of_rows<T, L>(acc, of[k] + block * length + x * L, B, K);
    CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) to[i][j] = acc[i][j];
  }
};

}  // namespace csp::CSP_ISA
