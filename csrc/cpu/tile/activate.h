// What follows the raw output z of a mix: normalisation, activation and averaging into one or more outputs, and back.
#pragma once
#include "activation.h"
#include "mix.h"

namespace csp::CSP_ISA {

template <class S> struct Output { S* y; int64_t pitch; };  // [P, pitch], a split each

// y = average(activation(norm(z))); z [N*H*W][pitch] in columns. Here and below no padding of z is read: it may lie behind the end,
// and is NaN where the product's input is not finite.
template <class S, class A>
void activate(const Parallel& parallel, const Grid& grid, const S* z, int64_t pitch, const Affine<typename Types<S>::T>& norm,
              const Splits& splits, const Output<S>* out, const A& activation) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>;
  int64_t P = grid.pixels(), W = grid.W;
  int tasks = choose_tasks(parallel, P, 16.0 * double(grid.N * grid.H * W * pitch));
  for_tasks(parallel, tasks, [&](int task) {
    Range r = share(P, task, tasks);
    for (int64_t p = r.begin; p < r.end; p++) {
      const S* row = z + grid.source(p) * pitch;
      splits.each([&](int64_t i, int64_t, int64_t column, int64_t size) {
        S* y = out[i].y + p * out[i].pitch;
        for (int64_t c = 0; c < size; c += L) {
          int64_t k = column + c, left = size - c;
          Vec<T> mean = load(norm.mean + k), scale = load(norm.scale + k), shift = load(norm.shift + k);
          auto at = [&](int64_t pixel) __attribute__((always_inline)) {
            return activation.value((load(row + pixel * pitch + k, left) - mean) * scale + shift);
          };
          store(y + c, grid.pool ? ((at(0) + at(1)) + (at(W) + at(W + 1))) * T(0.25) : at(0), left);
        }
      });
    }
  });
}

// dn = dy * activation'(norm(z)) [N*H*W][pitch] (null: not kept), and its sums. dy: the outputs' gradients, null: zero.
template <class S, class A>
void activate_backward(const Parallel& parallel, const Grid& grid, const S* z, int64_t pitch, const Affine<typename Types<S>::T>& norm,
                      const Splits& splits, const Output<const S>* out, const A& activation, S* dn,
                      const PartialSums<typename Types<S>::T>* parts, int tasks) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>, RUN = 32;  // pixels of a short sum: it loses less than a long one
  int64_t H = grid.H, W = grid.W, P = grid.N * H * W, h = grid.rows(), w = grid.columns();
  for_tasks(parallel, tasks, [&](int task) {
    Frame frame;
    Range r = share(P, task, tasks);
    int64_t* from = frame.take<int64_t>(RUN);
    parts[task].clear(0, pitch);
    for (int64_t p0 = r.begin; p0 < r.end; p0 += RUN) {
      int64_t m = min64(RUN, r.end - p0);
      for (int64_t i = 0; i < m; i++) {  // pixel of dy, -1: none
        int64_t p = p0 + i, y = p / W % H / 2, x = p % W / 2;
        from[i] = !grid.pool ? p : y < h && x < w ? (p / (W * H) * h + y) * w + x : -1;
      }
      splits.each([&](int64_t i, int64_t, int64_t column, int64_t size) {
        for (int64_t c = 0; c < padded_channels(size); c += L) {
          int64_t k = column + c;
          Vec<T> mean = load(norm.mean + k), scale = load(norm.scale + k), shift = load(norm.shift + k), sum{}, sum_x{};
          T part = grid.pool ? T(0.25) : T(1);
          for (int64_t q = 0; q < m; q++) {
            Vec<T> dy = out[i].y && from[q] >= 0 ? load(out[i].y + from[q] * out[i].pitch + c, size - c) * part : Vec<T>{};
            Vec<T> centred = load(z + (p0 + q) * pitch + k, size - c) - mean, d = activation.gradient(centred * scale + shift, dy);
            if (dn) store(dn + (p0 + q) * pitch + k, d);
            sum += d, sum_x += d * centred;
          }
          T *s = parts[task].sum + k, *sx = parts[task].sum_x + k;
          store(s, load(s) + sum), store(sx, load(sx) + sum_x);
        }
      });
    }
  });
}

// Where each vector of columns lies in the outputs.
template <class S> struct Places {
  struct Place { S* y; int64_t pitch, left; };
  Place* at;
  Places(Frame& frame, const Splits& splits, const Output<S>* out, int lanes) : at(frame.zeroed<Place>(splits.width() / lanes + 2)) {
    splits.each([&](int64_t i, int64_t, int64_t column, int64_t size) {
      for (int64_t c = 0; c < size; c += lanes) at[(column + c) / lanes] = {out[i].y + c, out[i].pitch, size - c};
    });
  }
};

// dz straight from the outputs' gradients: what activate_backward would keep is computed again.
template <class S, class A> struct ActivatedGradient final : Gradient<S> {
  using typename Gradient<S>::T;
  using typename Gradient<S>::U;
  const Places<const S>& dy;
  const S* z;
  int64_t pitch;
  const Affine<T>& norm;
  const Correction<T>& correction;  // its mean is the norm's
  A activation;
  ActivatedGradient(const Places<const S>& dy, const S* z, int64_t pitch, const Affine<T>& norm, const Correction<T>& correction, const A& activation)
      : dy(dy), z(z), pitch(pitch), norm(norm), correction(correction), activation(activation) {}

  void pack(int64_t columns, int64_t p0, int64_t m, int64_t M, Unit<U>* by_channel, Unit<U>* by_pixel) const override {
    pack_gradient<U>([&](int64_t pixel, int64_t n) __attribute__((always_inline)) {
      const auto& from = dy.at[n / LANES<T>];
      Vec<T> centred = load(z + pixel * pitch + n, from.left) - load(norm.mean + n), pre = centred * load(norm.scale + n) + load(norm.shift + n);
      Vec<T> d = from.left > 0 ? activation.gradient(pre, load(from.y + pixel * from.pitch, from.left)) : Vec<T>{};
      d *= load(correction.scale + n);
      return correction.owes ? d + (centred * load(correction.slope + n) + load(correction.offset + n)) : d;
    }, columns, p0, m, M, by_channel, by_pixel);
  }
};

// The outputs without z in between: folded norms leave y = activation(mix + bias).
template <class S, class A>
void mix_activated(const Mix<S>& mix, const Unit<typename Types<S>::Product>* W, const typename Types<S>::T* bias,
                   const Output<S>* out, const A& activation) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>, MR = TILE_ROWS;
  Frame frame;
  Places<S> places(frame, mix.out, out, L);
  mix.forward(W, [&](int, int64_t pixel, int m, int64_t n, const auto& acc) __attribute__((always_inline)) {
    constexpr int NV = int(sizeof(acc[0]) / sizeof(acc[0][0]));
    CSP_UNROLL(2) for (int j = 0; j < NV; j++) {
      const auto& to = places.at[n / L + j];
      Vec<T> b = load(bias + n + j * L);
      CSP_UNROLL(16) for (int i = 0; i < MR; i++)
        if (i < m) store(to.y + (pixel + i) * to.pitch, activation.value(acc[i][j] + b), to.left);
    }
  });
}

}  // namespace csp::CSP_ISA
