// What the launchers share: lists of tiles, the choice of one, how images are cut into strips.
#pragma once
#include <array>
#include <map>
#include "dense_block.h"
#include "device/tile.cuh"

namespace csp::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

template <class F> cudaError_t with_type(Type type, F f) { return type == Type::Half ? f(Half{}) : f(BFloat16{}); }

template <class... C> struct Tiles {};

template <class F, class... C> void each_tile(Tiles<C...>, F f) { (f(C{}), ...); }
// f(tile) of the tile at an index.
template <class F, class... C> cudaError_t with_tile(Tiles<C...> tiles, int index, F f) {
  cudaError_t error = cudaSuccess;
  int i = 0;
  each_tile(tiles, [&](auto tile) {
    if (i++ == index) error = f(tile);
  });
  return error;
}
// A tile's index, -1 if none is fit; splits of the channels that its blocks add up.
struct Choice {
  int tile = -1, splits = 1;
  int64_t cost = -1;
  void take(const Choice& other) {
    if (other.cost >= 0 && (cost < 0 || other.cost < cost)) *this = other;
  }
};
// The tile of least cost, the first of equals; a negative cost: unfit.
template <class F, class... C> Choice cheapest(Tiles<C...> tiles, F cost, int splits = 1) {
  Choice best;
  int i = 0;
  each_tile(tiles, [&](auto tile) { best.take({i++, splits, cost(tile)}); });
  return best;
}

using Key = std::array<int64_t, 10>;
inline Key key_of(const Layer& layer, const Device& device) {
  const Images& i = layer.images;
  return {int64_t(layer.type), i.n, i.h, i.w, layer.bottleneck, layer.growth, device.multiprocessors, device.shared_bytes, device.launch_ns};
}
// make() where a thread asks for a key the first time: a plan takes tens of microseconds, longer than a small kernel.
template <class F> auto remembered(const Key& key, F make) {
  constexpr size_t MOST = 4096;  // shapes, then from the beginning
  static thread_local std::map<Key, decltype(make())> known;
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= MOST) known.clear();
  return known.emplace(key, make()).first->second;
}

template <class C> Map map_of(const Images& images) {
  Map m;
  m.height = int(images.h), m.width = int(images.w);
  m.across = int(ceil_div(images.w, STRIP)), m.down = int(ceil_div(images.h, C::ROWS));
  m.strips = int(images.n * m.across * m.down), m.tiles = int(ceil_div(m.strips, C::STRIPS));
  return m;
}

}  // namespace csp::cuda
