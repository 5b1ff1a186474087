// Prints how the launchers of dense_block.cu plan layers, and how they would without what is done for small maps.
//
//   plans MULTIPROCESSORS SHARED_BYTES LAUNCH_NS < lines of "N H W BOTTLENECK GROWTH"
//
// A line a layer and pass: images, widths, pass, then tile, splits, blocks, predicted nanoseconds; the same four again as they were.
#include <cstdio>
#include <cstdlib>
#include "dense_block.cu"

using namespace csp::cuda;

namespace {

struct Line {
  int tile, splits;
  long long blocks, ns;
};
void print(const Layer& layer, const char* pass, const Line& now, const Line& usual) {
  const Images& i = layer.images;
  printf("%lld %lld %lld %lld %lld %s", (long long)i.n, (long long)i.h, (long long)i.w, (long long)layer.bottleneck,
         (long long)layer.growth, pass);
  for (const Line& l : {now, usual}) printf(" %d %d %lld %lld", l.tile, l.splits, l.blocks, l.ns);
  printf("\n");
}

Line forward(const Layer& layer, const Device& device, const Choice& choice) {
  Line line{choice.tile, choice.splits, 0, 0};
  with_tile(ForwardTiles{}, choice.tile, [&](auto tile) {
    using C = decltype(tile);
    const int64_t columns = layer.growth / C::COLUMNS * choice.splits;
    line.blocks = columns * blocks_of<C>(layer, device, columns), line.ns = forward_ns<C>(layer, device, choice.splits);
    return cudaSuccess;
  });
  return line;
}
Line dgrad(const Layer& layer, const Device& device, const Choice& choice) {
  Line line{choice.tile, 1, 0, 0};
  with_tile(DgradTiles{}, choice.tile, [&](auto tile) {
    using C = decltype(tile);
    const int64_t columns = ceil_div(layer.bottleneck, C::COLUMNS);
    line.blocks = columns * blocks_of<C>(layer, device, columns), line.ns = dgrad_ns<C>(layer, device);
    return cudaSuccess;
  });
  return line;
}
Line wgrad(const Layer& layer, const Device& device, const Choice& choice) {
  Line line{choice.tile, 1, 0, 0};
  with_tile(WgradTiles{}, choice.tile, [&](auto tile) {
    using C = decltype(tile);
    const int64_t columns = layer.growth / C::COLUMNS * ceil_div(layer.bottleneck, C::CHANNELS);
    line.blocks = columns * blocks_of<C>(layer, device, columns), line.ns = wgrad_ns<C>(layer, device);
    return cudaSuccess;
  });
  return line;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return fprintf(stderr, "usage: plans MULTIPROCESSORS SHARED_BYTES LAUNCH_NS\n"), 2;
  const Device device{atoi(arguments[1]), atoll(arguments[2]), nullptr, atoll(arguments[3])};
  long long n, h, w, b, g;
  while (scanf("%lld %lld %lld %lld %lld", &n, &h, &w, &b, &g) == 5) {
    const Layer layer{Type::Half, {n, h, w}, b, g};
    print(layer, "forward", forward(layer, device, choose_forward(layer, device)), forward(layer, device, usual_forward(layer, device)));
    print(layer, "dgrad", dgrad(layer, device, choose_dgrad(layer, device)), dgrad(layer, device, usual_dgrad(layer, device)));
    print(layer, "wgrad", wgrad(layer, device, choose_wgrad(layer, device)), wgrad(layer, device, usual_wgrad(layer, device)));
  }
}
