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
      const S* row = z + grid.source(p).pixel * pitch;
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

// Where each vector of columns lies in the outputs.
template <class S> struct Places {
  struct Place { S* y; int64_t pitch, left; };
  Place* at;
  int lanes;
  Places(Frame& frame, const Splits& splits, int lanes) : at(frame.zeroed<Place>(splits.width() / lanes + 2)), lanes(lanes) {}
  Places(Frame& frame, const Splits& splits, const Output<S>* out, int lanes) : Places(frame, splits, lanes) {
    splits.each([&](int64_t i, int64_t, int64_t column, int64_t size) { set(column / lanes, out[i].y, out[i].pitch, size); });
  }
  // Channels of an output from a vector on.
  void set(int64_t vector, S* y, int64_t pitch, int64_t channels) {
    for (int64_t c = 0; c < channels; c += lanes) at[vector + c / lanes] = {y + c, pitch, channels - c};
  }
};

}  // namespace csp::CSP_ISA
