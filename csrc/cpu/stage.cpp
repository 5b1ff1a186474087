// Runs programs: each instruction by the tile code that it takes. docs/algorithms.md has the mathematics of backward.
#include "stage.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "tile/activate.h"
#include "tile/conv3x3.h"
#include "tile/direct3x3.h"
#include "tile/elementwise.h"
#include "tile/fused_layer.h"
#include "tile/grouped3x3.h"
#include "tile/norm.h"
#include "tile/storage.h"
#include "tile/strided3x3.h"
#include "tile/strided_winograd.h"

#if defined(__AMX_BF16__)
namespace csp::v4bf16 {
extern const StageKernels stage_kernels;
}
#endif

namespace csp::CSP_ISA {
namespace {

// Memory of one call that is taken again after it was given back. Nothing else may be taken from the frame meanwhile.
class Pool {
  struct Block {
    char* memory;
    int64_t bytes;
    bool free;
  };
  Frame& frame;
  std::vector<Block> blocks;

 public:
  explicit Pool(Frame& frame) : frame(frame) {}
  void* take(int64_t bytes) {
    Block* best = nullptr;
    for (Block& b : blocks)
      if (b.free && b.bytes >= bytes && (!best || b.bytes < best->bytes)) best = &b;
    if (!best) blocks.push_back({frame.take<char>(bytes), bytes, true}), best = &blocks.back();
    best->free = false;
    return best->memory;
  }
  void give_back(const void* memory) {
    for (Block& b : blocks)
      if (b.memory == memory) b.free = true;
  }
};

// What a norm takes off the gradient of channels of a value: gradient = G - offset - (x - mean) * slope.
template <class T> struct Owed {
  Affine<T> correction;  // scale: slope, shift: offset
  bool any = false;      // else x, which may be NaN, does not count
  Owed(Frame& frame, int64_t channels) : correction(frame, channels) {}
};

// A value's gradient as a product's: see MixBackward.
template <class S> struct ValueGradient final : Gradient<S> {
  using typename Gradient<S>::T;
  using typename Gradient<S>::U;
  const S *g, *x;
  int64_t g_pitch, pitch, channels;
  const Owed<T>& owed;
  ValueGradient(const S* g, int64_t g_pitch, const S* x, int64_t pitch, int64_t channels, const Owed<T>& owed)
      : g(g), x(x), g_pitch(g_pitch), pitch(pitch), channels(channels), owed(owed) {}
  void pack(int64_t columns, int64_t p0, int64_t m, int64_t M, Unit<U>* by_channel, Unit<U>* by_pixel) const override {
    pack_gradient<U>([&](int64_t pixel, int64_t n) __attribute__((always_inline)) {
      int64_t left = channels - n;
      Vec<T> d = load(g + pixel * g_pitch + n, left);
      const Affine<T>& o = owed.correction;
      return owed.any ? d - ((load(x + pixel * pitch + n, left) - load(o.mean + n)) * load(o.scale + n) + load(o.shift + n)) : d;
    }, columns, p0, m, M, by_channel, by_pixel);
  }
};

// A value's gradient as a product's, where all of it comes from outputs that read it through a norm and an activation A:
// scale * activation'(norm(x)) * dy, less what is owed.
template <class S, class A> struct ActivatedValueGradient final : Gradient<S> {
  using typename Gradient<S>::T;
  using typename Gradient<S>::U;
  const Places<const S>& dy;
  const S* x;
  int64_t pitch;
  const Affine<T>& norm;
  const Owed<T>& owed;
  A activation;
  ActivatedValueGradient(const Places<const S>& dy, const S* x, int64_t pitch, const Affine<T>& norm, const Owed<T>& owed, const A& activation)
      : dy(dy), x(x), pitch(pitch), norm(norm), owed(owed), activation(activation) {}
  void pack(int64_t columns, int64_t p0, int64_t m, int64_t M, Unit<U>* by_channel, Unit<U>* by_pixel) const override {
    pack_gradient<U>([&](int64_t pixel, int64_t n) __attribute__((always_inline)) {
      const auto& from = dy.at[n / LANES<T>];
      Vec<T> centred = load(x + pixel * pitch + n, from.left) - load(norm.mean + n), scale = load(norm.scale + n);
      Vec<T> d = from.left > 0 ? activation.gradient(centred * scale + load(norm.shift + n), load(from.y + pixel * from.pitch, from.left)) * scale : Vec<T>{};
      const Affine<T>& o = owed.correction;  // its mean is the norm's
      return owed.any ? d - (centred * load(o.scale + n) + load(o.shift + n)) : d;
    }, columns, p0, m, M, by_channel, by_pixel);
  }
};

template <class S> struct Stage {
  using T = typename Types<S>::T;
  using U = typename Types<S>::Product;
  static constexpr int L = LANES<T>;

  // Whose gradient the gradient of a channel is: nobody's yet, that which was given for the output, or what `g` holds.
  enum Source : char { NOTHING, GIVEN, OWN };
  struct Memory {
    S* x = nullptr;
    int64_t pitch = 0;
    S* g = nullptr;
    int64_t g_pitch = 0;
    const S* given = nullptr;
    std::vector<Source> source;
    Grid grid{};
    bool take = false, take_g = true;  // from the pool
    int64_t last = -1, last_g = -1;    // instructions that touch it
    int64_t pixels() const { return grid.pixels(); }
  };

  const StageCall& a;
  const stage::Program& p;
  const bool backwards;
  Frame frame;
  Pool pool{frame};
  std::vector<Memory> memory;
  int64_t now = 0;             // the instruction that runs
  std::vector<int64_t> pixels;  // behind each column of statistics
  Affine<T> affine{frame, p.columns};
  double *rstd = frame.zeroed<double>(p.columns), *lost = frame.zeroed<double>(p.columns);
  double *sum = frame.zeroed<double>(p.columns), *sum_x = frame.zeroed<double>(p.columns);
  double *owed_mean = frame.zeroed<double>(p.statistics), *owed_slope = frame.zeroed<double>(p.statistics);

  Stage(const StageCall& call, bool backwards) : a(call), p(*call.program), backwards(backwards), memory(p.buffers.size()), pixels(size_t(p.statistics)) {
    for (size_t i = 0; i < memory.size(); i++) {
      const stage::Buffer& b = p.buffers[i];
      Memory& m = memory[i];
      m.grid = {a.N, b.side(a.H), b.side(a.W), false};
      m.x = static_cast<S*>(a.buffers[i].x), m.pitch = a.buffers[i].pitch, m.take = !m.x;
      m.given = static_cast<const S*>(a.buffers[i].gradient);
      m.g = static_cast<S*>(a.buffers[i].dx), m.g_pitch = b.kind == stage::Kind::Input ? b.channels : m.pitch, m.take_g = !m.g;
      m.source.assign(size_t(b.channels), NOTHING);
    }
    for (const stage::Instruction& i : p.forward) std::visit([&](const auto& step) { count_pixels(step); }, i);
  }
  template <class I> void count_pixels(const I& i) {
    if constexpr (requires { i.statistics; }) {
      if (i.statistics < 0) return;
      const stage::Place* place;
      if constexpr (requires { i.to; }) place = &i.to;
      else place = &i.source;
      for (int64_t c = 0; c < place->channels(); c++) pixels[size_t(i.statistics + c)] = of(*place).pixels();
    }
  }

  // --- memory
  Memory& of(const stage::Place& place) { return memory[size_t(place.buffer)]; }
  S* value(const stage::Place& place) { return of(place).x + place.start; }

  void run(const std::vector<stage::Instruction>& all) {
    for (size_t i = 0; i < all.size(); i++)
      stage::places(all[i], [&](const stage::Place& place, bool gradient) { (gradient ? of(place).last_g : of(place).last) = int64_t(i); });
    for (size_t i = 0; i < all.size(); i++) {
      now = int64_t(i);
      stage::places(all[i], [&](const stage::Place& place, bool gradient) { gradient ? take_gradient(place, all[i]) : take_value(place); });
      std::visit([&](const auto& step) { Frame inner; (*this)(step, inner); }, all[i]);
      for (Memory& m : memory) {
        if (m.take && m.x && m.last == int64_t(i)) pool.give_back(m.x), m.x = nullptr;
        if (m.take_g && m.g && m.last_g == int64_t(i)) pool.give_back(m.g), m.g = nullptr;
      }
    }
  }
  void take_value(const stage::Place& place) {
    Memory& m = of(place);
    if (!m.x) m.x = static_cast<S*>(pool.take(m.pixels() * m.pitch * int64_t(sizeof(S))));
  }
  // What stands for the gradient of an output as it was given needs no memory of its own.
  void take_gradient(const stage::Place& place, const stage::Instruction& i) {
    Memory& m = of(place);
    if (m.g) return;
    const auto* output = std::get_if<stage::ActivateBackward>(&i);
    const auto* product = std::get_if<stage::ProductBackward>(&i);
    const auto* add = std::get_if<stage::AddBackward>(&i);
    const stage::Place* read = product ? &product->of : add ? &add->of : &place;
    bool only_read = (product || add || std::holds_alternative<stage::Finish>(i)) && read->buffer == place.buffer && read->start == place.start;
    const stage::Segment* to = add ? heir(*add) : nullptr;
    if ((output && stands(*output)) || (only_read && all(place, GIVEN)) || (to && to->place.buffer == place.buffer)) return;
    m.g = static_cast<S*>(pool.take(m.pixels() * m.g_pitch * int64_t(sizeof(S))));
  }
  // The term whose gradient is that of the sum, and nothing else, and may have its memory: all of a buffer, of which nobody has
  // needed a gradient before, as nobody will need that of the sum. Null: none.
  const stage::Segment* heir(const stage::AddBackward& i) {
    auto whole = [&](const stage::Place& place) { return place.start == 0 && size_t(place.stop) == of(place).source.size(); };
    const Memory& sum = of(i.of);
    if (i.owed >= 0 || i.act != Activation::Identity || !sum.take_g || !sum.g || sum.last_g != now || !whole(i.of) || !all(i.of, OWN)) return nullptr;
    for (const stage::Segment& s : i.segments) {
      const Memory& m = of(s.place);
      if (s.gradient != stage::Gradient::Write || s.column >= 0 || s.act != Activation::Identity || s.sums) continue;
      if (m.g || !m.take_g || m.g_pitch != sum.g_pitch || !whole(s.place) || !all(s.place, NOTHING)) continue;
      if (std::count_if(i.segments.begin(), i.segments.end(), [&](const stage::Segment& t) { return t.place.buffer == s.place.buffer; }) == 1) return &s;
    }
    return nullptr;
  }
  bool all(const stage::Place& place, Source source) {
    for (int64_t c = place.start; c < place.stop; c++)
      if (of(place).source[size_t(c)] != source) return false;
    return true;
  }
  void mark(const stage::Place& place, Source source) {
    for (int64_t c = place.start; c < place.stop; c++) of(place).source[size_t(c)] = source;
  }
  // The gradient so far, in one piece.
  const S* gradient(const stage::Place& place) {
    Memory& m = of(place);
    if (all(place, GIVEN)) return m.given + place.start;
    for (int64_t c = place.start; c < place.stop; c++) {
      if (m.source[size_t(c)] != GIVEN) continue;
      int64_t end = c;
      while (end < place.stop && m.source[size_t(end)] == GIVEN) end++;
      copy_channels<S>(a.parallel, elementwise_tasks(m.pixels(), end - c), m.pixels(), end - c, m.given + c, m.pitch, m.g + c, m.g_pitch, nullptr);
      mark({place.buffer, c, end}, OWN);
    }
    return m.g + place.start;
  }
  int64_t gradient_pitch(const stage::Place& place) { return all(place, GIVEN) ? of(place).pitch : of(place).g_pitch; }
  Spread<S> spread(const stage::Segment& s) {
    if (s.gradient == stage::Gradient::None) return {nullptr, 0, nullptr, 0};
    Memory& m = of(s.place);
    Spread<S> to{nullptr, m.g_pitch, nullptr, 0};
    if (s.gradient == stage::Gradient::Add) to.in_pitch = gradient_pitch(s.place), to.in = gradient(s.place);
    to.g = m.g + s.place.start;
    mark(s.place, OWN);
    return to;
  }

  // --- numbers of norms
  Affine<T> norm(Frame& inner, const stage::Segment& s) {
    int64_t n = s.place.channels();
    Affine<T> to(inner, n);
    if (s.column < 0) std::fill(to.scale, to.scale + n, T(1));
    else copy(to.mean, affine.mean + s.column, n), copy(to.scale, affine.scale + s.column, n), copy(to.shift, affine.shift + s.column, n);
    return to;
  }
  static void copy(T* to, const T* from, int64_t n) { memcpy(to, from, size_t(n) * sizeof(T)); }
  Owed<T> owed(Frame& inner, const stage::Place& place, int64_t column) {
    Owed<T> o(inner, place.channels());
    for (int64_t c = 0; column >= 0 && c < place.channels(); c++) {
      double mean = a.mean[column + c], slope = owed_slope[column + c], offset = owed_mean[column + c];
      o.any = o.any || slope != 0 || offset != 0;
      o.correction.mean[c] = T(mean), o.correction.scale[c] = T(slope), o.correction.shift[c] = T(offset - slope * (mean - double(T(mean))));
    }
    return o;
  }
  void add_sums(const stage::Segment& s, const PartialSums<T>* parts, int tasks, int64_t at) {
    if (!s.sums) return;
    for (int64_t c = 0; c < s.place.channels(); c++)
      for (int t = 0; t < tasks; t++) sum[s.column + c] += double(parts[t].sum[at + c]), sum_x[s.column + c] += double(parts[t].sum_x[at + c]);
  }
  int elementwise_tasks(int64_t P, int64_t channels) { return choose_pieces(a.parallel, P, 16.0 * double(P * channels)); }
  Statistics<T>* statistics(Frame& inner, int64_t column, int tasks, int64_t channels) { return column < 0 ? nullptr : take_statistics<T>(inner, tasks, channels); }
  void merge_statistics(const Statistics<T>* stats, int tasks, const stage::Place& place, int64_t column) {
    if (stats) merge(a.parallel, stats, tasks, value(place), of(place).pitch, of(place).pixels(), place.channels(), a.mean + column, a.var + column);
  }
  // Of the activations that products apply on load.
  static OnLoad<T> act_of(const stage::Segment& s) {
    if (s.act == Activation::LeakyRelu) return {T(s.slope), true};
    return {s.act == Activation::Relu ? T(0) : -std::numeric_limits<T>::infinity(), false};
  }
  static bool on_load(Activation act) { return act == Activation::Relu || act == Activation::LeakyRelu || act == Activation::Identity; }
  // A 1x1 applies SiLU too: it reads each value once.
  static bool on_load(Activation act, const stage::Conv& conv) { return on_load(act) || (conv.kernel == 1 && act == Activation::Silu); }
  Read<S> read(Frame& inner, const stage::Segment& s) {
    return {value(s.place), of(s.place).pitch, s.place.channels(), norm(inner, s), {s.act, T(s.slope)}};
  }

  // --- forward
  void operator()(const stage::Copy& i, Frame& inner) {
    int tasks = elementwise_tasks(of(i.to).pixels(), i.to.channels());
    Statistics<T>* stats = statistics(inner, i.statistics, tasks, i.to.channels());
    copy_channels(a.parallel, tasks, of(i.to).pixels(), i.to.channels(), value(i.source), of(i.source).pitch, value(i.to), of(i.to).pitch, stats);
    merge_statistics(stats, tasks, i.to, i.statistics);
  }
  void operator()(const stage::Measure& i, Frame& inner) {
    int tasks = elementwise_tasks(of(i.source).pixels(), i.source.channels());
    Statistics<T>* stats = statistics(inner, i.statistics, tasks, i.source.channels());
    copy_channels<S>(a.parallel, tasks, of(i.source).pixels(), i.source.channels(), value(i.source), of(i.source).pitch, nullptr, 0, stats);
    merge_statistics(stats, tasks, i.source, i.statistics);
  }
  void operator()(const stage::Fill& i, Frame&) {
    for (const stage::Binding& b : i.bindings) {
      const BatchNorm& n = a.norms[b.norm];
      bool frozen = b.statistics < 0;
      int64_t at = frozen ? 0 : b.statistics;
      Moments<T> m{a.mean + at, a.var + at, frozen ? static_cast<const T*>(n.running_mean) + b.at : nullptr, frozen ? static_cast<const T*>(n.running_var) + b.at : nullptr, n.eps};
      m.fill(affine.from(b.column), static_cast<const T*>(n.gamma) + b.at, static_cast<const T*>(n.beta) + b.at, b.count);
      for (int64_t c = 0; backwards && c < b.count; c++) rstd[b.column + c] = m.rstd(c), lost[b.column + c] = m.lost(c);
    }
  }

  // What a product reads: segments that are normalised on load, and scratch memory that holds the others.
  struct Reads {
    std::vector<Segment<S>> segments;
    std::vector<std::pair<size_t, Read<S>>> activated;  // index, and what was activated
    std::vector<Affine<T>> norms;
  };
  static bool overlap(const stage::Place& a, const stage::Place& b) { return a.buffer == b.buffer && a.start < b.stop && b.start < a.stop; }
  // Whether each segment is read from scratch memory: for its activation or, beside such a one, for sharing channels with
  // another segment. Backward adds up their gradients one after the other, in the order of the segments.
  static std::vector<bool> apart(const std::vector<stage::Segment>& segments, const stage::Conv& conv) {
    std::vector<bool> found;
    bool any = false;
    for (const stage::Segment& s : segments) any = any || !on_load(s.act, conv);
    for (const stage::Segment& s : segments) {
      int sharing = 0;
      for (const stage::Segment& other : segments) sharing += overlap(s.place, other.place);
      found.push_back(!on_load(s.act, conv) || (any && sharing > 1));
    }
    return found;
  }
  Reads reads(Frame& inner, const std::vector<stage::Segment>& from, const stage::Conv& conv) {
    Reads r;
    r.norms.reserve(from.size());
    const std::vector<bool> scratch = apart(from, conv);
    for (const stage::Segment& s : from) {
      Segment<S> to{value(s.place), of(s.place).pitch, s.place.channels(), nullptr, nullptr, 0, 0};
      if (scratch[r.segments.size()]) {
        r.activated.emplace_back(r.segments.size(), read(inner, s));
        to.pitch = padded_channels(to.channels);
        S* y = inner.take<S>(of(s.place).pixels() * to.pitch);
        add_terms<S>(a.parallel, elementwise_tasks(of(s.place).pixels(), to.channels), of(s.place).pixels(), &r.activated.back().second, 1, {Activation::Identity, T(0)}, y, to.pitch, nullptr);
        to.x = y;
      } else if (s.column >= 0 || s.act != Activation::Identity) {
        to.norm = &r.norms.emplace_back(norm(inner, s)), to.act = act_of(s), to.silu = s.act == Activation::Silu;
      }
      r.segments.push_back(to);
    }
    return r;
  }
  // Weights of the nodes in the order of a product. Calls of inference can share them: then they are behind a head, some of the
  // weights and the whole scale, by which a later call sees whether they are still those of its own parameters.
  // number: which of the packed weights of a call they are; the call that keeps them makes them in the order of their numbers.
  static constexpr int64_t SAMPLES = 32;  // of each node
  size_t shared = 0;                      // how many were asked for
  size_t next_packed(size_t count = 1) { return std::exchange(shared, shared + count); }
  template <class P, class Make> const P* packed(Frame& inner, int64_t count, const std::vector<int64_t>& nodes, const T* scale, int64_t scales, size_t number, const Make& make) {
    if (!shares_weights()) return make(inner.take<P>(count));
    const int64_t samples = SAMPLES * int64_t(nodes.size()), head = round_up((samples + scales) * int64_t(sizeof(T)), 64), bytes = head + round_up(count * int64_t(sizeof(P)), 64);
    std::vector<T> now;
    for (int64_t node : nodes) {
      const stage::Weight& w = p.weights[size_t(node)];
      const int64_t last = w.out_channels * w.in_channels * w.kernel * w.kernel - 1;
      for (int64_t i = 0; i < SAMPLES; i++) now.push_back(static_cast<const T*>(a.weights[node].weight)[last * i / (SAMPLES - 1)]);
    }
    for (int64_t c = 0; c < scales; c++) now.push_back(scale[c]);
    const size_t size = now.size() * sizeof(T);
    if (a.packed) {
      const PackedWeights found = number < size_t(a.packed_count) ? a.packed[number] : PackedWeights{nullptr, 0};
      if (found.bytes != bytes) throw std::runtime_error("stage_inference: packed[" + std::to_string(number) + "]: got " + std::to_string(found.bytes) + " bytes, expected " + std::to_string(bytes) + ", as a call of the same program returned them");
      if (memcmp(found.memory, now.data(), size) == 0) return reinterpret_cast<const P*>(static_cast<const char*>(found.memory) + head);
      return make(inner.take<P>(count));
    }
    char* memory = static_cast<char*>(a.keep(a.keep_context, bytes));
    memcpy(memory, now.data(), size);
    return make(reinterpret_cast<P*>(memory + head));
  }
  const T* weight(int64_t node) const { return static_cast<const T*>(a.weights[node].weight); }
  const T* stacked(Frame& inner, const std::vector<int64_t>& nodes, int64_t K) {  // [out of all][K]
    if (nodes.size() == 1) return weight(nodes[0]);
    int64_t rows = 0;
    for (int64_t node : nodes) rows += p.weights[size_t(node)].out_channels;
    T* all = inner.take<T>(rows * K);
    T* to = all;
    for (int64_t node : nodes) {
      int64_t n = p.weights[size_t(node)].out_channels * K;
      memcpy(to, weight(node), size_t(n) * sizeof(T)), to += n;
    }
    return all;
  }
  static int64_t channels(const std::vector<stage::Segment>& segments) {
    int64_t n = 0;
    for (const stage::Segment& s : segments) n += s.place.channels();
    return n;
  }

  void operator()(const stage::Product& i, Frame& inner) {
    if (i.conv.groups > 1) return narrow(i.conv, i.nodes[0]) ? narrow_groups(i, inner) : grouped(i);
    if (i.conv.kernel == 3) {
      const Dense weights{a.weights[i.nodes[0]], next_packed()};
      if (i.conv.stride > 1) return strided(i, inner, weights);
      return with_tiles(i.to, [&](auto m) { conv3x3<decltype(m)::value>(i, inner, weights); });
    }
    Reads r = reads(inner, i.segments, i.conv);
    const Grid grid = read_by(i.segments, i.conv);
    const int64_t out = i.conv.out_channels;
    Memory& to = of(i.to);
    if (i.column >= 0 && i.residual.empty() && plain(i.segments, i.conv)) return folded(i, inner, r);
    if (has_after(i)) return folded(i, inner, Mix<S>(a.parallel, grid, r.segments.data(), int64_t(r.segments.size()), {&out, 1}));
    if (plain(i.segments, i.conv) && i.to.start == 0 && padded_channels(out) <= to.pitch && i.to.stop == p.buffers[size_t(i.to.buffer)].channels) {
      int64_t K = channels(i.segments), P = to.pixels();
      int tasks = choose_pieces(a.parallel, ceil_div(P, TILE_ROWS), 2.0 * double(P) * double(K) * double(out));
      Statistics<T>* stats = statistics(inner, i.statistics, tasks, out);
      const Unit<U>* w = packed_1x1(inner, i, K, tasks);
      pointwise_forward<U>(a.parallel, tasks, P, r.segments[0].x, r.segments[0].pitch, K, r.norms[0], w, out, to.x, to.pitch, stats);
      return merge_statistics(stats, tasks, i.to, i.statistics);
    }
    Mix<S> mix(a.parallel, grid, r.segments.data(), int64_t(r.segments.size()), {&out, 1});
    raw(i, inner, mix, packed_mix(inner, i, mix));
  }
  // The pixels that a 1x1 reads: all, their averages, or each second in each second row.
  Grid read_by(const std::vector<stage::Segment>& segments, const stage::Conv& conv) {
    Grid grid = of(segments[0].place).grid;
    grid.pool = conv.pool;
    if (conv.stride > 1) grid.step = conv.stride, grid.h = ceil_div(grid.H, conv.stride), grid.w = ceil_div(grid.W, conv.stride);
    return grid;
  }
  // Makes `to` a gradient so far of all pixels, for a 1x1 that adds to that of some of them.
  void of_all_pixels(const stage::Place& place, Spread<S>& to) {
    const int64_t P = of(place).pixels(), n = place.channels();
    for (int64_t q = 0; to.g && !to.in && q < P; q++) memset(static_cast<void*>(to.g + q * to.pitch), 0, size_t(n) * sizeof(S));
    if (to.in && to.in != to.g) copy_channels<S>(a.parallel, elementwise_tasks(P, n), P, n, to.in, to.in_pitch, to.g, to.pitch, nullptr);
    to.in = to.g, to.in_pitch = to.pitch;
  }
  // y = x * scale + bias
  T* bias(Frame& inner, int64_t column, int64_t channels) const {
    T* to = inner.zeroed<T>(Affine<T>::padded(channels));
    if (column < 0) return to;
    for (int64_t c = 0; c < channels; c++) to[c] = T(double(affine.shift[column + c]) - double(affine.mean[column + c]) * double(affine.scale[column + c]));
    return to;
  }
  static bool has_after(const stage::Product& i) { return i.column >= 0 || i.act != Activation::Identity || !i.residual.empty(); }
  const T* scale_of(const stage::Product& i) const { return i.column < 0 ? nullptr : affine.scale + i.column; }
  const Unit<U>* packed_1x1(Frame& inner, const stage::Product& i, int64_t K, int tasks) {
    const int64_t out = i.conv.out_channels;
    return packed<Unit<U>>(inner, packed_size<U>(K, out), i.nodes, scale_of(i), i.column < 0 ? 0 : out, next_packed(), [&](Unit<U>* to) {
      Frame frame;
      return pack<true>(to, stacked(frame, i.nodes, K), K, out, tasks, scale_of(i));
    });
  }
  const Unit<U>* packed_mix(Frame& inner, const stage::Product& i, const Mix<S>& mix) {
    return packed_mix(inner, i, mix, next_packed(), [&](Frame& frame) { return stacked(frame, i.nodes, channels(i.segments)); });
  }
  // weights: f(frame), [out][channels of all segments]
  template <class Weights> const Unit<U>* packed_mix(Frame& inner, const stage::Product& i, const Mix<S>& mix, size_t number, const Weights& weights) {
    const int64_t out = i.conv.out_channels;
    return packed<Unit<U>>(inner, mix.units(), i.nodes, scale_of(i), i.column < 0 ? 0 : out, number, [&](Unit<U>* to) {
      Frame frame;
      T* scale = frame.zeroed<T>(mix.O);
      if (i.column >= 0) copy(scale, affine.scale + i.column, out);
      return mix.template pack<false>(to, weights(frame), i.column < 0 ? nullptr : scale);
    });
  }
  // f(what follows a product of inference)
  template <class A, class F> void with_after(const stage::Product& i, Frame& inner, const A& activation, F f) {
    const T* shift = bias(inner, i.column, i.to.channels());
    if (i.residual.empty()) return f(After<S, A>{shift, activation, nullptr});
    const Read<S> residual = read(inner, i.residual[0]);
    f(After<S, A>{shift, activation, &residual});
  }
  void folded(const stage::Product& i, Frame& inner, const Reads& r) {
    const int64_t K = channels(i.segments), out = i.conv.out_channels, P = of(i.to).pixels();
    int tasks = choose_pieces(a.parallel, ceil_div(P, TILE_ROWS), 2.0 * double(P) * double(K) * double(out));
    const Unit<U>* packed = packed_1x1(inner, i, K, tasks);
    const T* shift = bias(inner, i.column, out);
    auto run = [&](auto act) { pointwise_activated<U>(a.parallel, tasks, P, r.segments[0].x, r.segments[0].pitch, K, r.norms[0], packed, shift, out, value(i.to), of(i.to).pitch, act); };
    if (i.act == Activation::Relu) run(Relu<T>{});
    else run(AnyActivation<T>{i.act, T(i.slope)});
  }
  void folded(const stage::Product& i, Frame& inner, const Mix<S>& mix) { folded(i, inner, mix, packed_mix(inner, i, mix)); }
  template <class M, class W> void folded(const stage::Product& i, Frame& inner, const M& product, const W* w) {
    with_activation<T>(i.act, i.slope, [&](auto act) {
      with_after(i, inner, act, [&](const auto& after) { forward_after(product, w, after, value(i.to), of(i.to).pitch, i.to.channels()); });
    });
  }
  template <class M, class W> void raw(const stage::Product& i, Frame& inner, const M& product, const W* w) {
    Statistics<T>* stats = statistics(inner, i.statistics, product.shares.rows, padded_channels(i.conv.out_channels));
    forward_raw(product, w, value(i.to), of(i.to).pitch, i.conv.out_channels, stats);
    merge_statistics(stats, product.shares.rows, i.to, i.statistics);
  }
  void operator()(const stage::Bottleneck& i, Frame& inner) {
    with_tiles(i.conv.to, [&](auto m) { bottleneck<decltype(m)::value>(i, inner); });
  }
  template <int M> void bottleneck(const stage::Bottleneck& i, Frame& inner) {
    const stage::Segment& s = i.reduce.segments[0];
    const int64_t K = s.place.channels(), b = i.reduce.conv.out_channels, g = i.conv.conv.out_channels;
    Memory &from = of(s.place), &between = of(i.reduce.to), &to = of(i.conv.to);
    const Grid& grid = to.grid;
    auto one_by_one = [&] {
      between.x = inner.take<S>(between.pixels() * between.pitch);
      (*this)(i.reduce, inner), (*this)(i.conv, inner);
      between.x = nullptr;
    };
    if constexpr (M == DIRECT) one_by_one();
    else {
      Tiling<M> tiling(grid.N, grid.H, grid.W, b * g);
      int tasks = choose_tasks(a.parallel, tiling.rows, 2.0 * double(grid.pixels()) * double(b) * double(K + 9 * g));
      // Strip by strip, each task computes the bottleneck at its edges once more: too much where it has but a few rows.
      if (tasks > 1 && tiling.rows < 4 * tasks) return one_by_one();
      Affine<T> before = norm(inner, s);
      const Unit<U>* w1 = packed_1x1(inner, i.reduce, K, tasks);
      const T* w2 = packed_3x3<M>(inner, i.conv, b, Dense{a.weights[i.conv.nodes[0]], next_packed()});
      FusedLayer<M, U, S>{a.parallel, tasks, grid.N, grid.H, grid.W, K, b, g, from.pitch, to.pitch, before, w1, bias(inner, i.reduce.column, b), w2}.run(value(s.place), value(i.conv.to));
    }
  }
  // One segment through norm and ReLU: the loops of pointwise.h.
  static bool plain(const std::vector<stage::Segment>& s, const stage::Conv& conv) { return s.size() == 1 && s[0].column >= 0 && s[0].act == Activation::Relu && !conv.pool && conv.stride == 1; }
  // scale: of each channel, null: 1
  template <bool BY_CHANNEL> Unit<U>* pack(Unit<U>* to, const T* w, int64_t depth, int64_t channels, int tasks, const T* scale = nullptr) {
    int64_t blocks = ceil_div(depth, depth_block<U>());
    int n = int(min64(tasks, blocks));
    for_tasks(a.parallel, n, [&](int task) { pack_product<U, BY_CHANNEL>(to, depth, channels, w, scale, share(blocks, task, n)); });
    return to;
  }

  // --- the 3x3
  template <class F> void with_tiles(const stage::Place& place, F f) {
    const Grid& grid = of(place).grid;
    if constexpr (TILES<U>) return f(std::integral_constant<int, DIRECT>{});
    else {
      if constexpr (sizeof(S) < 8) if (large_tiles(grid.H, grid.W, a.winograd)) return f(std::integral_constant<int, 4>{});
      f(std::integral_constant<int, 2>{});
    }
  }
  // What tasks share of a 3x3: rows of the image or of output tiles, forward whole batches of those.
  template <int M> static int64_t rows3(const Grid& g, int64_t weights, bool batches) {
    if constexpr (M == DIRECT) return Tall{g.N, g.H, g.W}.rows();
    else return batches ? Tiling<M>(g.N, g.H, g.W, weights).batches() : Tiling<M>(g.N, g.H, g.W, weights).rows;
  }
  static double flops3(const Grid& g, int64_t b, int64_t out) { return 18.0 * double(g.pixels()) * double(b) * double(out); }
  // The weights of a 3x3: how they lie, those of a gradient, and their number among packed ones.
  struct Dense {
    const StageWeight& w;
    size_t number = 0;
    bool channels_last() const { return w.channels_last; }
    const T* weights(Frame&) const { return static_cast<const T*>(w.weight); }
    T* gradient(Frame&) const { return static_cast<T*>(w.dweight); }
    void finish(const T*) const {}
  };
  // Some groups of a 3x3 as one dense one, zero where channels are of different groups: [groups * out][groups * in][9].
  struct Groups {
    const StageWeight& w;
    int64_t first, groups, out, in;  // channels of a group
    size_t number = 0;
    bool channels_last() const { return false; }
    int64_t size() const { return groups * out * groups * in * 9; }
    // f(index in the tensor, index in the dense one)
    template <class F> void each(F f) const {
      for (int64_t n = 0; n < groups * out; n++)
        for (int64_t c = 0; c < in; c++)
          for (int64_t t = 0; t < 9; t++) f((first * out + n) * in * 9 + (w.channels_last ? t * in + c : c * 9 + t), (n * groups * in + n / out * in + c) * 9 + t);
    }
    const T* weights(Frame& inner) const {
      T* dense = inner.zeroed<T>(size());
      each([&](int64_t from, int64_t to) { dense[to] = static_cast<const T*>(w.weight)[from]; });
      return dense;
    }
    T* gradient(Frame& inner) const { return inner.take<T>(size()); }
    void finish(const T* dense) const {
      each([&](int64_t to, int64_t from) { static_cast<T*>(w.dweight)[to] = dense[from]; });
    }
  };
  // Channels [from, to) of segments side by side.
  static std::vector<stage::Segment> cut(const std::vector<stage::Segment>& all, int64_t from, int64_t to) {
    std::vector<stage::Segment> found;
    int64_t at = 0;
    for (stage::Segment s : all) {
      const int64_t n = s.place.channels(), begin = max64(from - at, 0), end = min64(to - at, n);
      at += n;
      if (begin >= end) continue;
      s.place = {s.place.buffer, s.place.start + begin, s.place.start + end};
      if (s.column >= 0) s.column += begin;
      found.push_back(s);
    }
    return found;
  }
  static stage::Place cut(const stage::Place& place, int64_t from, int64_t to) { return {place.buffer, place.start + from, place.start + to}; }
  // f(groups, first and last channel that they read, first and last that they give): as many groups at a time as fill a vector, on
  // tiles a block; those side by side: what is a task of its own in a task runs where it is. in_order: one after the other.
  template <class F> void each_groups(const stage::Conv& conv, int64_t node, bool in_order, F f) {
    const int64_t in = p.weights[size_t(node)].in_channels, out = conv.out_channels / conv.groups, step = ceil_div((TILES<U> ? 2 : 1) * L, max64(1, min64(in, out)));
    const int64_t count = ceil_div(conv.groups, step);
    const size_t number = next_packed(size_t(count));
    auto one = [&](int part) {
      const int64_t first = part * step, end = min64(first + step, conv.groups);
      f(Groups{a.weights[node], first, end - first, out, in, number + size_t(part)}, first * in, end * in, first * out, end * out);
    };
    if (in_order || count < 2 * a.parallel.threads) for (int part = 0; part < count; part++) one(part);
    else for_tasks(a.parallel, int(count), one);
  }
  // Whether packed weights are those of other calls.
  bool shares_weights() const { return !backwards && (a.packed || a.keep); }
  void grouped(const stage::Product& i) {
    each_groups(i.conv, i.nodes[0], a.keep != nullptr, [&](const Groups& groups, int64_t in, int64_t in_end, int64_t out, int64_t out_end) {
      stage::Product part = i;
      part.conv.groups = 1, part.conv.out_channels = out_end - out;
      part.segments = cut(i.segments, in, in_end), part.residual = cut(i.residual, out, out_end), part.to = cut(i.to, out, out_end);
      if (i.statistics >= 0) part.statistics += out;
      if (i.column >= 0) part.column += out;
      Frame inner;
      if (part.conv.stride > 1) strided(part, inner, groups);
      else with_tiles(i.to, [&](auto m) { conv3x3<decltype(m)::value>(part, inner, groups); });
    });
  }
  void grouped(const stage::ProductBackward& i) {
    bool twice = false;  // what is read more than once gets its gradient from several groups
    for (const stage::Segment& s : i.segments)
      for (const stage::Segment& other : i.segments) twice = twice || (&s != &other && overlap(s.place, other.place));
    each_groups(i.conv, i.nodes[0], twice, [&](const Groups& groups, int64_t in, int64_t in_end, int64_t out, int64_t out_end) {
      stage::ProductBackward part = i;
      part.conv.groups = 1, part.conv.out_channels = out_end - out;
      part.segments = cut(i.segments, in, in_end), part.of = cut(i.of, out, out_end);
      if (i.owed >= 0) part.owed += out;
      Frame inner;
      if (part.conv.stride > 1) strided(part, inner, groups);
      else with_tiles(i.of, [&](auto m) { conv3x3_backward<decltype(m)::value>(part, inner, groups); });
    });
  }
  // --- the 3x3 with stride 2: a product over nine segments, one for each tap
  std::vector<Segment<S>> taps(const Reads& r) {
    std::vector<Segment<S>> all;
    for (int64_t t = 0; t < 9; t++)
      for (Segment<S> s : r.segments) {
        s.tap = true, s.dy = t / 3 - 1, s.dx = t % 3 - 1;
        all.push_back(s);
      }
    return all;
  }
  // Its outputs among the pixels of its input.
  static Grid every_second(const Grid& g) { return {g.N, g.H, g.W, false, 2, ceil_div(g.H, 2), ceil_div(g.W, 2)}; }
  // [out][9][in]
  template <class Weights> const T* by_tap(Frame& inner, const Weights& weights, int64_t out, int64_t C) {
    const T* w = weights.weights(inner);
    if (weights.channels_last()) return w;
    T* to = inner.take<T>(out * C * 9);
    for (int64_t n = 0; n < out * C * 9; n += C * 9)
      for (int64_t t = 0; t < 9; t++)
        for (int64_t c = 0; c < C; c++) to[n + t * C + c] = w[n + c * 9 + t];
    return to;
  }
  template <class Weights> void strided(const stage::Product& i, Frame& inner, const Weights& weights) {
    Reads r = reads(inner, i.segments, i.conv);
    const int64_t out = i.conv.out_channels;
    const bool done = by_rows(r, of(i.segments[0].place).grid, out, [&](const auto& rows) {
      const T* w = packed<T>(inner, rows.packed(), i.nodes, scale_of(i), i.column < 0 ? 0 : out, weights.number, [&](T* to) {
        Frame frame;
        return rows.pack(to, by_tap(frame, weights, out, rows.C), scale_of(i));
      });
      has_after(i) ? with_after(i, inner, AnyActivation<T>{i.act, T(i.slope)}, [&](const auto& after) { forward_after(rows, w, after, value(i.to), of(i.to).pitch, out); }) : raw(i, inner, rows, w);
    });
    if (done) return;
    std::vector<Segment<S>> all = taps(r);
    Mix<S> mix(a.parallel, every_second(of(i.segments[0].place).grid), all.data(), int64_t(all.size()), {&out, 1});
    const Unit<U>* w = packed_mix(inner, i, mix, weights.number, [&](Frame& frame) { return by_tap(frame, weights, out, channels(i.segments)); });
    has_after(i) ? folded(i, inner, mix, w) : raw(i, inner, mix, w);
  }
  // Whether weights are made ready at each call. In inference they are kept, or could be: then too, so that both compute the same.
  bool transforms_anew() const { return backwards || p.statistics > 0; }
  // f(Strided3x3 or StridedWinograd) and true where a 3x3 with stride 2 is one; not of 16 bits, which would be a third more of code to compile.
  static constexpr bool HAS_ROWS = sizeof(S) == sizeof(T) && !TILES<U>;
  template <class F> bool by_rows(const Reads& r, const Grid& in, int64_t out, F f) {
    if constexpr (HAS_ROWS) {
      int64_t C = 0, count = int64_t(r.segments.size());
      for (const Segment<S>& s : r.segments) C += s.channels;
      auto with = [&]<class Form>(std::type_identity<Form>) {
        if (!Form::fits(in, r.segments.data(), count, C, transforms_anew())) return false;
        f(Form(a.parallel, in, r.segments.data(), count, C, out));
        return true;
      };
      return with(std::type_identity<Strided3x3<S, COLOURS>>{}) || with(std::type_identity<StridedWinograd<S>>{}) || with(std::type_identity<Strided3x3<S, L>>{});
    } else return false;
  }
  template <class Weights> void strided(const stage::ProductBackward& i, Frame& inner, const Weights& weights) {
    const int64_t out = i.conv.out_channels, P = of(i.of).pixels();
    Owed<T> o = owed(inner, i.of, i.owed);
    int64_t dz_pitch = gradient_pitch(i.of);
    const S* dz = gradient(i.of);
    if (o.any) {  // it is read nine times
      S* to = inner.take<S>(P * padded_channels(out));
      settle(dz, dz_pitch, value(i.of), of(i.of).pitch, o, P, out, to, padded_channels(out));
      dz = to, dz_pitch = padded_channels(out);
    }
    Reads r = reads(inner, i.segments, i.conv);
    std::vector<Spread<S>> targets;
    for (const stage::Segment& s : i.segments) targets.push_back(spread(s));
    if (!i.wanted.empty()) strided_wgrad(i, r, dz, dz_pitch, weights);
    const T* w = by_tap(inner, weights, out, channels(i.segments));
    const std::vector<bool> scratch = apart(i.segments, i.conv);
    for (size_t k = 0, at = 0; k < i.segments.size(); at += size_t(r.segments[k].channels), k++) {
      const stage::Segment& s = i.segments[k];
      if (!targets[k].g && !s.sums) continue;
      Frame frame;
      if (!scratch[k]) {
        strided_dgrad(i, int64_t(at), read(frame, s), act_of(s), targets[k], s.column < 0 && s.act == Activation::Identity ? nullptr : &s, dz, dz_pitch, w);
        continue;
      }
      const int64_t pitch = r.segments[k].pitch, n = r.segments[k].channels;
      S* g = frame.take<S>(of(s.place).pixels() * pitch);
      const Read<S> activated{r.segments[k].x, pitch, n, Affine<T>(frame, n), {Activation::Identity, T(0)}};
      strided_dgrad(i, int64_t(at), activated, {}, {g, pitch, nullptr, 0}, nullptr, dz, dz_pitch, w);
      back(read(frame, s), s, targets[k], frame, [&](int64_t pixel, int64_t c) __attribute__((always_inline)) { return load_ahead(g + pixel * pitch + c, n - c); });
    }
  }
  // to = g less what is owed
  void settle(const S* g, int64_t g_pitch, const S* x, int64_t pitch, const Owed<T>& o, int64_t P, int64_t n, S* to, int64_t to_pitch) {
    const int tasks = elementwise_tasks(P, n);
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(P, task, tasks);
      for (int64_t q = r.begin; q < r.end; q++)
        for (int64_t c = 0; c < n; c += L) {
          Vec<T> d = load(g + q * g_pitch + c, n - c);
          if (o.any) d -= (load(x + q * pitch + c, n - c) - load(o.correction.mean + c)) * load(o.correction.scale + c) + load(o.correction.shift + c);
          store(to + q * to_pitch + c, d, n - c);
        }
    });
  }
  template <class Weights> void strided_wgrad(const stage::ProductBackward& i, const Reads& r, const S* dz, int64_t dz_pitch, const Weights& weights) {
    Frame inner;
    const int64_t out = i.conv.out_channels, C = channels(i.segments);
    T* dweight = weights.gradient(inner);
    T* dw = weights.channels_last() ? dweight : inner.take<T>(out * C * 9);
    const Grid& grid = of(i.segments[0].place).grid;
    const bool done = by_rows(r, grid, out, [&](const auto& rows) { rows.wgrad(dz, dz_pitch, dw); });
    if (!done) {
      std::vector<Segment<S>> all = taps(r);
      Mix<S> mix(a.parallel, every_second(grid), all.data(), int64_t(all.size()), {&out, 1});
      PartialSums<T>* parts = PartialSums<T>::take(inner, mix.tasks, MixBackward<S>::weights(mix), MixBackward<S>::pitch(mix));
      const Owed<T> nothing(inner, out);
      ValueGradient<S> gradient(dz, dz_pitch, dz, dz_pitch, out, nothing);
      MixBackward<S>{mix, gradient, nullptr, parts, dw, false}.run();
    }
    if (weights.channels_last()) return;
    for (int64_t n = 0; n < out * C * 9; n += C * 9)
      for (int64_t t = 0; t < 9; t++)
        for (int64_t c = 0; c < C; c++) dweight[n + c * 9 + t] = dw[n + t * C + c];
    weights.finish(dweight);
  }
  // The gradient of channels at.. of the input, `from`, read through `act` and a norm of `sums`, null: as it is. Pixels of even or odd row and column are each a product of
  // the taps that reach them: a row 2y is read by the middle tap of row y alone, 2y + 1 by the last tap of y and the first of y + 1.
  void strided_dgrad(const stage::ProductBackward& i, int64_t at, const Read<S>& from, const OnLoad<T>& act, const Spread<S>& to, const stage::Segment* sums, const S* dz, int64_t dz_pitch, const T* w) {
    Frame inner;
    const Grid in = of(i.segments[0].place).grid, z = of(i.of).grid;
    const int64_t n = from.channels, out = i.conv.out_channels, C = channels(i.segments);
    const int most = most_pieces(a.parallel);
    PartialSums<T>* parts = PartialSums<T>::take(inner, most, 0, round_up(n, 2 * L));
    for (int t = 0; t < most; t++) parts[t].clear(0, round_up(n, 2 * L));
    auto with = [&](auto load_of) {
      constexpr Load LOAD = decltype(load_of)::value;
      // acc: nv vectors of each of m pixels
      auto emit = [&](int part, int64_t odd_y, int64_t odd_x, int64_t pixel, int m, int64_t column, const Vec<T>* acc, int nv) {
        const int64_t rows = (in.H + 1 - odd_y) / 2, columns = (in.W + 1 - odd_x) / 2;
        for (int j = 0; j < nv && column + j * L < n; j++) {
          const int64_t c = column + j * L, left = n - c;
          const Vec<T> mean = load(from.norm.mean + c), scale = load(from.norm.scale + c), shift = load(from.norm.shift + c), number = Vec<T>{} + act.number;
          Vec<T> sum{}, sum_x{};
          int64_t image = pixel / (rows * columns), y = pixel / columns % rows, x = pixel % columns;
          for (int row = 0; row < m; row++) {
            const int64_t q = (image * in.H + 2 * y + odd_y) * in.W + 2 * x + odd_x;
            if (++x == columns && (x = 0, ++y == rows)) y = 0, image++;
            Vec<T> d = acc[row * nv + j];
            if constexpr (LOAD != Load::Raw) {
              const Vec<T> centred = load(from.x + q * from.pitch + c, left) - mean;
              d = on_load_gradient<LOAD == Load::Leaky, T>(centred * scale + shift, d, number);
              sum += d, sum_x += d * centred, d *= scale;
            }
            if (to.g) store(to.g + q * to.pitch + c, to.in ? load(to.in + q * to.in_pitch + c, left) + d : d, left);
          }
          if constexpr (LOAD == Load::Raw) continue;
          T *s = parts[part].sum + c, *sx = parts[part].sum_x + c;
          store(s, load(s) + sum), store(sx, load(sx) + sum_x);
        }
      };
      if constexpr (HAS_ROWS) if (StridedWinograd<S>::fits(in, nullptr, 1, C, true))
        return StridedWinogradDgrad<S>{a.parallel, {in.N, in.H, in.W}, C, out, int64_t(at), n}.run_all(dz, dz_pitch, w, emit);
      if constexpr (HAS_ROWS) if (Strided3x3<S, L>::fits(in, 1, C)) {
        const Strided3x3Dgrad<S> dgrad{a.parallel, in.N, in.H, in.W, out, n};
        return dgrad.run_all(dz, dz_pitch, dgrad.pack(inner.take<T>(dgrad.packed()), w, C, at), emit);
      }
      for (int64_t parity = 0; parity < 4; parity++) strided_dgrad_of(parity / 2, parity % 2, in, z, at, n, out, C, dz, dz_pitch, w, emit);
    };
    if (!sums) with(std::integral_constant<Load, Load::Raw>{});
    else if (act.leaky) with(std::integral_constant<Load, Load::Leaky>{});
    else with(std::integral_constant<Load, Load::Floor>{});
    if (sums) add_sums(*sums, parts, most, 0);
  }
  // Of pixels of odd or even row and column: a product over the taps that reach them.
  template <class Emit> void strided_dgrad_of(int64_t odd_y, int64_t odd_x, const Grid& in, const Grid& z, int64_t at, int64_t n, int64_t out, int64_t C, const S* dz, int64_t dz_pitch, const T* w, const Emit& emit) {
    Frame frame;
    const Grid pixels{z.N, z.H, z.W, false, 1, (in.H + 1 - odd_y) / 2, (in.W + 1 - odd_x) / 2};
    if (!pixels.h || !pixels.w) return;
    std::vector<Segment<S>> read;
    std::vector<int64_t> kernel;
    for (int64_t ky = odd_y ? 0 : 1; ky < 3; ky += 2)
      for (int64_t kx = odd_x ? 0 : 1; kx < 3; kx += 2) {
        Segment<S> s{dz, dz_pitch, out, nullptr, nullptr, 0, 0};
        s.tap = true, s.dy = ky == 0, s.dx = kx == 0;
        read.push_back(s), kernel.push_back(ky * 3 + kx);
      }
    Mix<S> mix(a.parallel, pixels, read.data(), int64_t(read.size()), {&n, 1});
    Unit<U>* packed = frame.take<Unit<U>>(packed_size<U>(mix.Kp, mix.O));
    const int64_t blocks = ceil_div(mix.Kp, depth_block<U>()), each = mix.Kp / int64_t(read.size());
    const int tasks = int(min64(mix.tasks, blocks));
    for_tasks(a.parallel, tasks, [&](int task) {
      auto row = [&](int64_t q) { return q % each < out ? w + (q % each * 9 + kernel[size_t(q / each)]) * C + at : nullptr; };
      pack_rows_of_weights<U>(packed, mix.Kp, mix.O, n, row, share(blocks, task, tasks));
    });
    mix.forward(packed, [&](int part, int64_t pixel, int m, int64_t column, const auto& acc) __attribute__((always_inline)) {
      emit(part, odd_y, odd_x, pixel, m, column, &acc[0][0], int(sizeof(acc[0]) / sizeof(acc[0][0])));
    });
  }
  template <int M, bool TRANSPOSED> const T* pack3x3(T* to, const WinogradWeights<T, M, TRANSPOSED>& weights) {
    int tasks = choose_tasks(a.parallel, weights.blocks, 60.0 * double(weights.place.b * weights.place.g * (M + 2) * (M + 2)));
    for_tasks(a.parallel, tasks, [&](int task) { weights.pack(to, share(weights.blocks, task, tasks)); });
    return to;
  }
  // Whether a task multiplies each of its panels once: then it packs them itself.
  template <int M> static bool packs_panels(const Grid& g, int64_t weights, const Shares& shares) { return shares.rows == 1 && Tiling<M>(g.N, g.H, g.W, weights).batches() == 1; }
  template <int M, class Weights> auto packed_3x3(Frame& inner, const stage::Product& i, int64_t depth, const Weights& weights) {
    const int64_t out = i.conv.out_channels;
    if constexpr (M == DIRECT) return packed<Unit<U>>(inner, direct_size<U>(depth, out), i.nodes, scale_of(i), i.column < 0 ? 0 : out, weights.number, [&](Unit<U>* to) {
      Frame frame;
      return pack_direct3x3<false>(to, by_tap(frame, weights, out, depth), out, depth, scale_of(i));
    });
    else return packed<T>(inner, winograd_size<T, M>(depth, out), i.nodes, scale_of(i), i.column < 0 ? 0 : out, weights.number, [&](T* to) {
      Frame frame;
      return pack3x3<M, false>(to, {weights.weights(frame), {out, depth, weights.channels_last()}, scale_of(i)});
    });
  }
  // w: [out][9][in]
  template <bool TRANSPOSED> Unit<U>* pack_direct3x3(Unit<U>* to, const T* w, int64_t out, int64_t in, const T* scale = nullptr) {
    const int64_t panels = csp::CSP_ISA::panels<T>(TRANSPOSED ? in : out);
    int tasks = choose_tasks(a.parallel, panels, 60.0 * double(9 * out * in));
    for_tasks(a.parallel, tasks, [&](int task) { pack_direct<U, TRANSPOSED>(to, w, out, in, scale, share(panels, task, tasks)); });
    return to;
  }
  // The one segment that a 3x3 reads; several are laid side by side in scratch memory.
  struct Input3x3 {
    const S* z;
    int64_t pitch, channels;
    Affine<T> norm;
    OnLoad<T> act;
    std::vector<Read<S>> gathered;  // empty: z is the value itself
  };
  Input3x3 input3x3(Frame& inner, const std::vector<stage::Segment>& from) {
    const stage::Segment& s = from[0];
    int64_t n = channels(from);
    if (from.size() == 1 && on_load(s.act)) return {value(s.place), of(s.place).pitch, n, norm(inner, s), act_of(s), {}};
    Input3x3 in{nullptr, padded_channels(n), n, Affine<T>(inner, n), act_of({}), {}};
    std::fill(in.norm.scale, in.norm.scale + n, T(1));
    S* z = inner.take<S>(of(s.place).pixels() * in.pitch);
    in.z = z;
    for (const stage::Segment& each : from) {
      in.gathered.push_back(read(inner, each));
      add_terms<S>(a.parallel, elementwise_tasks(of(s.place).pixels(), each.place.channels()), of(s.place).pixels(), &in.gathered.back(), 1, {Activation::Identity, T(0)}, z, in.pitch, nullptr);
      z += each.place.channels();
    }
    return in;
  }
  // What the backward of a 3x3 reads, and where its gradient goes: of one segment to that, of several to scratch memory first.
  struct Back3x3 {
    Input3x3 in;
    std::vector<Spread<S>> targets;
    Spread<S> to;
    bool wanted;  // this gradient, or sums of it
    ReadGradient<S> dz() const { return {to.g, to.pitch, to.in, to.in_pitch}; }
  };
  Back3x3 back3x3(Frame& inner, const stage::ProductBackward& i) {
    Back3x3 back{input3x3(inner, i.segments), {}, {}, false};
    for (const stage::Segment& s : i.segments) back.targets.push_back(spread(s)), back.wanted = back.wanted || back.targets.back().g || s.sums;
    back.to = back.targets[0];
    const int64_t P = of(i.segments[0].place).pixels(), pitch = back.in.pitch;
    if (!back.in.gathered.empty()) back.to = {back.wanted ? inner.take<S>(P * pitch) : nullptr, pitch, nullptr, 0};
    return back;
  }
  // parts: sums of so many tasks
  void hand_on(const stage::ProductBackward& i, Frame& inner, const Back3x3& from, const PartialSums<T>* parts, int tasks) {
    if (from.in.gathered.empty()) return add_sums(i.segments[0], parts, tasks, 0);
    const S* g = from.to.g;
    for (size_t k = 0; from.wanted && k < i.segments.size(); k++) {
      const int64_t n = from.in.gathered[k].channels;
      if (from.targets[k].g || i.segments[k].sums)
        back(from.in.gathered[k], i.segments[k], from.targets[k], inner, [&](int64_t pixel, int64_t c) __attribute__((always_inline)) { return load_ahead(g + pixel * from.in.pitch + c, n - c); });
      g += n;
    }
  }
  template <int M, class Weights> void conv3x3(const stage::Product& i, Frame& inner, const Weights& weights) {
    Input3x3 in = input3x3(inner, i.segments);
    const int64_t out = i.conv.out_channels;
    const Grid& g = of(i.to).grid;
    // Each task transforms what it reads: for four panels at least.
    const Shares shares = choose_shares(a.parallel, rows3<M>(g, in.channels * out, true), panels<T>(out), 4, double(out) / double(g.pixels()), flops3(g, in.channels, out));
    Dropout<T> dropout(i.conv.drop_rate, a.seed, i.drop);
    Statistics<T>* stats = statistics(inner, i.statistics, shares.rows, out);
    Conv3x3<S> conv{a.parallel, shares, g.N, g.H, g.W, in.channels, in.pitch, out, of(i.to).pitch, in.norm, dropout, in.act};
    auto run = [&](Statistics<T>* stats, const auto& after) {
      if constexpr (M == DIRECT) direct3x3_forward<U>(conv, in.z, packed_3x3<M>(inner, i, in.channels, weights), value(i.to), stats, after);
      else {
        const bool here = !shares_weights() && packs_panels<M>(g, in.channels * out, shares);
        const Panels<T, M, false> w{{here ? weights.weights(inner) : nullptr, {out, in.channels, weights.channels_last()}, scale_of(i)}, here ? nullptr : packed_3x3<M>(inner, i, in.channels, weights)};
        conv3x3_forward<M>(conv, in.z, w, value(i.to), stats, after);
      }
    };
    if (!has_after(i)) run(stats, dropout);
    else with_after(i, inner, AnyActivation<T>{i.act, T(i.slope)}, [&](const auto& after) { run(nullptr, after); });
    merge_statistics(stats, shares.rows, i.to, i.statistics);
  }

  // --- the 3x3 in narrow groups
  // Whether groups are narrower than a vector, as many channels in as out. Tiles multiply 8 channels of bfloat16 faster with zeros
  // between the groups: by a sixth at 256 channels, 28x28; of 4 and fewer, and in two parts, they are slower.
  bool narrow(const stage::Conv& conv, int64_t node) const {
    const int64_t size = conv.out_channels / conv.groups;
    const bool zeros_pay = TILES<U> && sizeof(S) == 2 && size > 4;
    return p.weights[size_t(node)].in_channels == size && Grouped3x3<S>::fits(size) && !zeros_pay;
  }
  Grouped3x3<S> grouped3x3(const stage::Conv& conv, const stage::Place& from, const Input3x3& in, int64_t pitch) {
    const Grid& g = of(from).grid;
    return {a.parallel, g.N, g.H, g.W, in.channels, in.channels / conv.groups, conv.stride, in.pitch, pitch, in.norm, in.act};
  }
  void narrow_groups(const stage::Product& i, Frame& inner) {
    const Input3x3 in = input3x3(inner, i.segments);
    const Grouped3x3<S> conv = grouped3x3(i.conv, i.segments[0].place, in, of(i.to).pitch);
    const StageWeight& w = a.weights[i.nodes[0]];
    const T* weights = packed<T>(inner, conv.weights(), i.nodes, scale_of(i), i.column < 0 ? 0 : conv.channels, next_packed(), [&](T* to) {
      conv.template pack<false>(to, static_cast<const T*>(w.weight), w.channels_last, scale_of(i));
      return to;
    });
    Statistics<T>* stats = statistics(inner, i.statistics, conv.shares.rows, conv.channels);
    S* y = value(i.to);
    auto write = [&](const T* sums, int64_t pixel, int64_t count, int64_t ch, const auto& after) __attribute__((always_inline)) {
      for (int64_t k = 0; k < count; k++, pixel++) store_masked(y + pixel * conv.pitch + ch, after(load(sums + k * L), pixel, ch), conv.channels - ch);
    };
    if (!has_after(i)) grouped3x3_forward(conv, in.z, weights, stats, [&](const T* sums, int64_t pixel, int64_t count, int64_t ch) {
      write(sums, pixel, count, ch, [](Vec<T> sum, int64_t, int64_t) __attribute__((always_inline)) { return sum; });
    });
    else with_after(i, inner, Identity<T>{}, [&](const auto& plain) {
      grouped3x3_forward(conv, in.z, weights, stats, [&](const T* sums, int64_t pixel, int64_t count, int64_t ch) {
        with_activation<T>(i.act, i.slope, [&](auto act) { write(sums, pixel, count, ch, After<S, decltype(act)>{plain.bias, act, plain.residual}); });
      });
    });
    merge_statistics(stats, conv.shares.rows, i.to, i.statistics);
  }
  void narrow_groups(const stage::ProductBackward& i, Frame& inner) {
    const Owed<T> o = owed(inner, i.of, i.owed);
    const int64_t g_pitch = gradient_pitch(i.of);
    const S* g = gradient(i.of);
    const Back3x3 back = back3x3(inner, i);
    const Grouped3x3<S> conv = grouped3x3(i.conv, i.segments[0].place, back.in, of(i.of).pitch);
    const StageWeight& w = a.weights[i.nodes[0]];
    T* weights = back.wanted ? inner.take<T>(conv.weights()) : nullptr;
    if (weights) conv.template pack<true>(weights, static_cast<const T*>(w.weight), w.channels_last, nullptr);
    const PartialSums<T>* parts = PartialSums<T>::take(inner, conv.shares.rows, conv.weights(), conv.vectors() * L);
    const Affine<T>& c = o.correction;
    Grouped3x3Backward<S>{conv, value(i.of), g, g_pitch, {c.mean, c.scale, c.shift, o.any}, back.in.z, weights, back.dz(), parts}.run(i.wanted.empty() ? nullptr : static_cast<T*>(w.dweight), w.channels_last);
    hand_on(i, inner, back, parts, conv.shares.rows);
  }
  void operator()(const stage::Add& i, Frame& inner) {
    int64_t P = of(i.to).pixels(), n = i.to.channels();
    int tasks = elementwise_tasks(P, n * int64_t(i.segments.size()));
    std::vector<Read<S>> terms;
    for (const stage::Segment& s : i.segments) terms.push_back(read(inner, s));
    Statistics<T>* stats = statistics(inner, i.statistics, tasks, n);
    add_terms(a.parallel, tasks, P, terms.data(), int64_t(terms.size()), AnyActivation<T>{i.act, T(i.slope)}, value(i.to), of(i.to).pitch, stats);
    merge_statistics(stats, tasks, i.to, i.statistics);
  }
  // What a maximum is of, and what becomes of it on load: f(memory, pitch, prologue). A costly activation, or one that each of many
  // windows would do again, is done once, in scratch memory.
  template <class F> void with_read(const stage::Segment& s, const Windows& windows, Frame& inner, F f) {
    const int64_t n = s.place.channels(), P = of(s.place).pixels(), pitch = padded_channels(n);
    if (s.column < 0 && s.act == Activation::Identity) return f(value(s.place), of(s.place).pitch, Nothing<T>{});
    Read<S> from = read(inner, s);
    if (windows.size <= 3 && windows.stride == 2) {
      if (s.act == Activation::Identity) return f(from.x, from.pitch, NormAct<T, Identity<T>>{from.norm, {}});
      if (s.act == Activation::Relu) return f(from.x, from.pitch, NormAct<T, Relu<T>>{from.norm, {}});
      if (s.act == Activation::LeakyRelu) return f(from.x, from.pitch, NormAct<T, LeakyRelu<T>>{from.norm, {T(s.slope)}});
    }
    S* y = inner.take<S>(P * pitch);
    add_terms<S>(a.parallel, elementwise_tasks(P, n), P, &from, 1, {Activation::Identity, T(0)}, y, pitch, nullptr);
    f(y, pitch, Nothing<T>{});
  }
  Windows windows(const stage::Segment& from, const stage::Place& to, int64_t size, int64_t stride) {
    return {of(from.place).grid, size, stride, of(to).grid.H, of(to).grid.W};
  }
  void operator()(const stage::Maximum& i, Frame& inner) {
    const int64_t n = i.to.channels();
    const Windows all = windows(i.segments[0], i.to, i.size, i.stride);
    int tasks = elementwise_tasks(all.count(), n * i.size);
    Statistics<T>* stats = statistics(inner, i.statistics, tasks, n);
    with_read(i.segments[0], all, inner, [&](const S* x, int64_t pitch, const auto& prologue) {
      maxima<false>(a.parallel, tasks, all, x, pitch, n, prologue, value(i.to), nullptr, of(i.to).pitch, stats);
    });
    merge_statistics(stats, tasks, i.to, i.statistics);
  }
  void operator()(const stage::Activate& i, Frame& inner) {
    int64_t at = 0;
    for (const stage::Segment& s : i.segments) {
      const int64_t n = s.place.channels();
      Grid grid = of(s.place).grid;
      grid.pool = i.pool;
      Affine<T> affine = norm(inner, s);
      Output<S> out{value(i.to) + at, of(i.to).pitch};
      with_activation<T>(s.act, s.slope, [&](auto act) { activate(a.parallel, grid, value(s.place), of(s.place).pitch, affine, Splits{&n, 1}, &out, act); });
      at += n;
    }
  }

  // --- backward
  void operator()(const stage::Settle& i, Frame&) {
    for (const stage::Binding& b : i.bindings) {
      const BatchNorm& n = a.norms[b.norm];
      for (int64_t c = 0; c < b.count; c++) {
        double r = rstd[b.column + c], dbeta = sum[b.column + c], dgamma = r * (sum_x[b.column + c] - lost[b.column + c] * dbeta);
        if (n.dgamma) static_cast<T*>(n.dgamma)[b.at + c] = T(dgamma), static_cast<T*>(n.dbeta)[b.at + c] = T(dbeta);
        if (b.statistics < 0) continue;
        int64_t s = b.statistics + c;
        double scale = double(static_cast<const T*>(n.gamma)[b.at + c]) * r / double(pixels[size_t(s)]);
        owed_mean[s] += scale * dbeta, owed_slope[s] += scale * r * dgamma;
      }
    }
  }
  void operator()(const stage::Clear& i, Frame&) {
    Memory& m = of(i.place);
    for (int64_t q = 0; q < m.pixels(); q++) memset(static_cast<void*>(m.g + q * m.g_pitch + i.place.start), 0, size_t(i.place.channels()) * sizeof(S));
    mark(i.place, OWN);
  }
  // Can the gradient of the output stand for that of what it holds?
  static bool stands(const stage::ActivateBackward& i) {
    const stage::Segment& s = i.segments[0];
    return i.segments.size() == 1 && !i.pool && s.gradient == stage::Gradient::Write && s.column < 0 && s.act == Activation::Identity &&
           s.place.buffer == i.output.buffer && s.place.start == i.output.start;
  }
  void operator()(const stage::ActivateBackward& i, Frame& inner) {
    if (stands(i)) return mark(i.output, GIVEN);
    int64_t at = i.output.start;
    for (const stage::Segment& s : i.segments) {
      Memory &from = of(s.place), &output = of(i.output);
      Grid grid = from.grid;
      grid.pool = i.pool;
      int64_t W = grid.W, H = grid.H, h = grid.rows(), w = grid.columns(), n = s.place.channels(), pitch = output.pitch;
      const S* dy = output.given + at;
      auto plain = [&](int64_t pixel, int64_t c) __attribute__((always_inline)) { return load_ahead(dy + pixel * pitch + c, n - c); };
      auto averaged = [&](int64_t pixel, int64_t c) __attribute__((always_inline)) {
        int64_t y = pixel / W % H / 2, x = pixel % W / 2;
        return y < h && x < w ? load(dy + ((pixel / (W * H) * h + y) * w + x) * pitch + c, n - c) * T(0.25) : Vec<T>{};
      };
      if (i.pool) back(s, inner, averaged);
      else back(s, inner, plain);
      at += n;
    }
  }
  template <class Value> void back(const stage::Segment& s, Frame& inner, const Value& dy) {
    if (s.gradient == stage::Gradient::None && !s.sums) return;
    back(read(inner, s), s, spread(s), inner, dy);
  }
  template <class Value> void back(const Read<S>& from, const stage::Segment& s, const Spread<S>& to, Frame& inner, const Value& dy) {
    int64_t P = of(s.place).pixels();
    int tasks = elementwise_tasks(P, from.channels);
    PartialSums<T>* parts = PartialSums<T>::take(inner, tasks, 0, round_up(from.channels, L));
    if (s.act == Activation::Relu) spread_gradient(a.parallel, tasks, P, from, Relu<T>{}, to, parts, dy);
    else if (s.act == Activation::Identity) spread_gradient(a.parallel, tasks, P, from, Identity<T>{}, to, parts, dy);
    else spread_gradient(a.parallel, tasks, P, from, from.activation, to, parts, dy);
    add_sums(s, parts, tasks, 0);
  }
  void operator()(const stage::AddBackward& i, Frame& inner) {
    Owed<T> o = owed(inner, i.of, i.owed);
    int64_t g_pitch = gradient_pitch(i.of), pitch = of(i.of).pitch, n = i.of.channels();
    const S *g = gradient(i.of), *x = value(i.of);
    std::vector<Read<S>> terms;
    for (const stage::Segment& s : i.segments) terms.push_back(read(inner, s));
    AnyActivation<T> activation{i.act, T(i.slope)};
    auto dy = [&](int64_t pixel, int64_t c) __attribute__((always_inline)) {
      Vec<T> d = load_ahead(g + pixel * g_pitch + c, n - c);
      if (o.any) d -= (load_ahead(x + pixel * pitch + c, n - c) - load(o.correction.mean + c)) * load(o.correction.scale + c) + load(o.correction.shift + c);
      if (activation.kind == Activation::Identity) return d;
      Vec<T> total = terms[0].value(pixel, c);
      for (size_t k = 1; k < terms.size(); k++) total += terms[k].value(pixel, c);
      return activation.gradient(total, d);
    };
    const stage::Segment* to = heir(i);
    for (const stage::Segment& s : i.segments)
      if (&s != to) back(s, inner, dy);
    if (to) std::swap(of(to->place).g, of(i.of).g), mark(to->place, OWN);
  }

  void operator()(const stage::MaximumBackward& i, Frame& inner) {
    Owed<T> o = owed(inner, i.of, i.owed);
    const Windows all = windows(i.segments[0], i.of, i.size, i.stride);
    const int64_t g_pitch = gradient_pitch(i.of), pitch = of(i.of).pitch, n = i.of.channels(), padded = padded_channels(n);
    const S *g = gradient(i.of), *y = value(i.of);
    T* position = inner.take<T>(all.count() * padded);
    with_read(i.segments[0], all, inner, [&](const S* x, int64_t x_pitch, const auto& prologue) {
      maxima<true, S>(a.parallel, elementwise_tasks(all.count(), n * i.size), all, x, x_pitch, n, prologue, nullptr, position, padded, nullptr);
    });
    auto d = [&](int64_t q, int64_t c) __attribute__((always_inline)) {
      Vec<T> d = load(g + q * g_pitch + c, n - c);
      if (o.any) d -= (load(y + q * pitch + c, n - c) - load(o.correction.mean + c)) * load(o.correction.scale + c) + load(o.correction.shift + c);
      return d;
    };
    back(i.segments[0], inner, MaximaGradient<T, decltype(d)>{all, position, padded, d});
  }

  void operator()(const stage::ProductBackward& i, Frame& inner) {
    if (i.conv.groups > 1) return narrow(i.conv, i.nodes[0]) ? narrow_groups(i, inner) : grouped(i);
    if (i.conv.stride > 1 && i.conv.kernel == 3) return strided(i, inner, Dense{a.weights[i.nodes[0]]});
    if (i.conv.kernel == 3) return with_tiles(i.of, [&](auto m) { conv3x3_backward<decltype(m)::value>(i, inner, Dense{a.weights[i.nodes[0]]}); });
    Owed<T> o = owed(inner, i.of, i.owed);
    int64_t g_pitch = gradient_pitch(i.of), K = channels(i.segments);
    const S* g = i.behind.empty() ? gradient(i.of) : nullptr;
    Reads r = reads(inner, i.segments, i.conv);
    std::vector<Spread<S>> targets;
    for (const stage::Segment& s : i.segments) targets.push_back(spread(s));
    for (size_t k = 0; i.conv.stride > 1 && k < targets.size(); k++) of_all_pixels(i.segments[k].place, targets[k]);
    const T* w = stacked(inner, i.nodes, K);
    if (g && plain(i.segments, i.conv) && i.segments[0].gradient == stage::Gradient::Add && g_pitch == of(i.of).pitch &&
        targets[0].pitch == r.segments[0].pitch && targets[0].in_pitch == r.segments[0].pitch)
      return pointwise_backward(i, inner, o, g, r, targets[0], w);
    for (size_t k = 0; k < r.segments.size(); k++)
      r.segments[k].g = targets[k].g, r.segments[k].g_pitch = targets[k].pitch, r.segments[k].g_in = targets[k].in, r.segments[k].g_in_pitch = targets[k].in_pitch;
    for (auto& [k, from] : r.activated) {  // their gradients behind the activation
      Segment<S>& s = r.segments[k];
      bool needed = s.g || i.segments[k].sums;
      const int64_t count = of(i.segments[k].place).pixels() * s.pitch;
      s.g = !needed ? nullptr : i.conv.stride > 1 ? inner.zeroed<S>(count) : inner.take<S>(count), s.g_pitch = s.pitch, s.g_in = nullptr;
    }
    const Grid grid = read_by(i.segments, i.conv);
    const int64_t out = i.conv.out_channels;
    Mix<S> mix(a.parallel, grid, r.segments.data(), int64_t(r.segments.size()), {&out, 1});
    PartialSums<T>* parts = PartialSums<T>::take(inner, mix.tasks, MixBackward<S>::weights(mix), MixBackward<S>::pitch(mix));
    auto* packed = mix.template packed<true>(inner, w);
    auto run = [&](const Gradient<S>& dz) {
      auto with = [&](T* dw) { MixBackward<S>{mix, dz, packed, parts, dw}.run(); };
      if (i.wanted.empty()) with(nullptr);
      else hand_out(i, inner, K, with);
    };
    if (g) run(ValueGradient<S>(g, g_pitch, value(i.of), of(i.of).pitch, out, o));
    else with_value_gradient(i, inner, o, run);
    const std::vector<bool> scratch = apart(i.segments, i.conv);
    for (size_t k = 0; k < r.segments.size(); k++)
      if (!scratch[k]) add_sums(i.segments[k], parts, mix.tasks, r.segments[k].column);
    for (auto& [k, from] : r.activated) {
      const Segment<S>& s = r.segments[k];
      if (s.g) back(from, i.segments[k], targets[k], inner, [&](int64_t pixel, int64_t c) __attribute__((always_inline)) { return load(s.g + pixel * s.g_pitch + c, s.channels - c); });
    }
  }
  // f(the gradient of i.of, computed on load from those of outputs)
  template <class F> void with_value_gradient(const stage::ProductBackward& i, Frame& inner, const Owed<T>& o, F f) {
    const int64_t n = i.of.channels();
    Affine<T> norms(inner, n);
    Places<const S> dy(inner, Splits{&n, 1}, L);
    for (const stage::Behind& b : i.behind) {
      const int64_t at = b.segment.place.start - i.of.start, channels = b.segment.place.channels();
      Affine<T> to = norms.from(at), from = norm(inner, b.segment);
      copy(to.mean, from.mean, channels), copy(to.scale, from.scale, channels), copy(to.shift, from.shift, channels);
      dy.set(at / L, of(b.output).given + b.output.start, of(b.output).pitch, channels);
    }
    const stage::Segment& s = i.behind[0].segment;
    with_activation<T>(s.act, s.slope, [&](auto act) { f(ActivatedValueGradient<S, decltype(act)>(dy, value(i.of), of(i.of).pitch, norms, o, act)); });
  }
  // The gradient of stacked weights to those of the nodes that want theirs.
  template <class Make> void hand_out(const stage::ProductBackward& i, Frame& inner, int64_t K, Make make) {
    if (i.nodes.size() == 1) return make(static_cast<T*>(a.weights[i.nodes[0]].dweight));
    T* all = inner.take<T>(i.conv.out_channels * K);
    make(all);
    for (int64_t node : i.nodes) {
      int64_t n = p.weights[size_t(node)].out_channels * K;
      if (a.weights[node].dweight) memcpy(a.weights[node].dweight, all, size_t(n) * sizeof(T));
      all += n;
    }
  }
  void pointwise_backward(const stage::ProductBackward& i, Frame& inner, const Owed<T>& o, const S* g, const Reads& r, const Spread<S>& to, const T* w) {
    int64_t K = channels(i.segments), out = i.conv.out_channels, P = of(i.of).pixels(), Kp = round_up(K, 2 * L), rows = round_up(out, 16);
    int tasks = choose_pieces(a.parallel, ceil_div(P, TILE_ROWS), 4.0 * double(P) * double(K) * double(out), double(rows * Kp * int64_t(sizeof(T))), double(P * (K + out) * int64_t(sizeof(S))));
    Affine<T> negative(inner, out);
    for (int64_t c = 0; c < out; c++) negative.scale[c] = -o.correction.scale[c], negative.shift[c] = -o.correction.shift[c];
    PartialSums<T>* parts = PartialSums<T>::take(inner, tasks, rows * (Kp + 2 * L), Kp + 2 * L);
    PointwiseBackward<U, S> back_product{r.segments[0].x, to.in, to.g, P, to.pitch, K, out, of(i.of).pitch, r.norms[0], g, value(i.of),
                                         {o.correction.mean, negative.scale, negative.shift, o.any}, pack<false>(inner.take<Unit<U>>(packed_size<U>(out, K)), w, out, K, tasks), Kp, parts, rows, !i.wanted.empty()};
    back_product.run(a.parallel, tasks);
    if (!i.wanted.empty()) hand_out(i, inner, K, [&](T* dw) { back_product.weight_gradient(a.parallel, tasks, dw); });
    add_sums(i.segments[0], parts, tasks, 0);
  }
  template <int M, class Weights> void conv3x3_backward(const stage::ProductBackward& i, Frame& inner, const Weights& weights) {
    Owed<T> o = owed(inner, i.of, i.owed);
    const int64_t out = i.conv.out_channels, E = (M + 2) * (M + 2), gp = round_up(out, L);
    int64_t g_pitch = gradient_pitch(i.of);
    const S* g = gradient(i.of);
    const Back3x3 back = back3x3(inner, i);
    const Input3x3& in = back.in;
    const bool wants_dgrad = back.wanted;
    const Grid& grid = of(i.of).grid;
    Dropout<T> dropout(i.conv.drop_rate, a.seed, i.drop);
    const int64_t sums = M == DIRECT ? Direct3x3Backward<U, S>::weights(out, in.channels) : E * round_up(in.channels, L) * gp;
    const int tasks = choose_pieces(a.parallel, rows3<M>(grid, in.channels * out, false), flops3(grid, in.channels, out), double(sums * int64_t(sizeof(T))), double(grid.pixels() * (in.channels + out) * int64_t(sizeof(S))));
    Conv3x3<S> conv{a.parallel, {tasks, 1}, grid.N, grid.H, grid.W, in.channels, in.pitch, out, of(i.of).pitch, in.norm, dropout, in.act};
    const SliceGradient<T> correction{o.correction.mean, o.correction.scale, o.correction.shift, o.any};
    const ReadGradient<S> dz = back.dz();
    PartialSums<T>* parts;
    int count = tasks;  // of parts
    auto run = [&](const auto& back_product, const auto& lie) {
      T* dweight = i.wanted.empty() ? nullptr : weights.gradient(inner);
      back_product.run(dweight, lie);
      if (dweight) weights.finish(dweight);
    };
    auto take = [&](int sets) { parts = PartialSums<T>::take(inner, count, sets, sums, round_up(in.channels, L) + 2 * L); };
    if constexpr (M == DIRECT) {
      const bool apart = Direct3x3Backward<U, S>::shares(tasks, conv);
      take(apart ? 1 : tasks);
      Unit<U>* w = pack_direct3x3<true>(inner.take<Unit<U>>(direct_size<U>(out, in.channels)), by_tap(inner, weights, out, in.channels), out, in.channels);
      run(Direct3x3Backward<U, S>{conv, value(i.of), g, correction, in.z, w, dz, parts, wants_dgrad, apart, g_pitch}, weights.channels_last());
    } else {
      Weights3x3<T> lie{out, in.channels, weights.channels_last()};
      const bool apart = Conv3x3Backward<M, S>::shares(tasks, conv, gp);
      const Shares dgrad_shares = apart ? choose_shares(a.parallel, rows3<M>(grid, in.channels * out, true), panels<T>(in.channels), 4, double(in.channels) / double(grid.pixels()), flops3(grid, in.channels, out)) : conv.shares;
      count = std::max(tasks, dgrad_shares.rows);
      take(apart ? 0 : tasks);
      const WinogradWeights<T, M, true> w{weights.weights(inner), lie};
      const bool here = apart && packs_panels<M>(grid, in.channels * out, dgrad_shares);
      const Panels<T, M, true> panels{w, here ? nullptr : pack3x3<M, true>(inner.take<T>(winograd_size<T, M>(out, in.channels)), w)};
      run(Conv3x3Backward<M, S>{conv, value(i.of), g, correction, in.z, panels, dz, gp, parts, wants_dgrad, apart, dgrad_shares, g_pitch}, lie);
      if (apart) count = dgrad_shares.rows;  // of those that were cleared
    }
    hand_on(i, inner, back, parts, count);
  }

  void operator()(const stage::Finish& i, Frame& inner) {
    Owed<T> o = owed(inner, i.of, i.owed);
    Memory& input = memory[size_t(i.index)];
    int64_t g_pitch = gradient_pitch(i.of), pitch = of(i.of).pitch, n = i.of.channels(), P = input.pixels();
    const S *g = gradient(i.of), *x = value(i.of);
    S* dx = input.take_g ? nullptr : static_cast<S*>(a.buffers[i.index].dx);
    if (!dx || (dx == g && !o.any)) return;
    settle(g, g_pitch, x, pitch, o, P, n, dx, n);
  }
};

#if defined(__AMX_BF16__)
// What tiles multiply: bfloat16, and float in precision "high".
bool on_tiles(const StageCall& a) { return a.storage == Storage::BFloat16 || (a.storage == Storage::Float32 && a.winograd == 4); }
template <class F> void with_storage(const StageCall& a, F f) {
  if (a.storage == Storage::BFloat16) f(BFloat16{});
  else f(Split{});
}
#else
template <class F> void with_storage(const StageCall& a, F f) { csp::CSP_ISA::with_storage(a.storage, f); }
#endif
template <class F> void run(const StageCall& a, bool backwards, F f) {
  with_storage(a, [&](auto s) { Stage<decltype(s)> stage(a, backwards); f(stage); });
}

}  // namespace

extern const StageKernels stage_kernels;
const StageKernels stage_kernels = {
    [](const StageCall& a) {
#if defined(__AMX_BF16__)
      if (!on_tiles(a)) return v4bf16::stage_kernels.forward(a);
#endif
      run(a, false, [&](auto& s) {
        s.run(a.program->forward);
        if (a.packed && s.shared != size_t(a.packed_count)) throw std::runtime_error("stage_inference: packed: got " + std::to_string(a.packed_count) + " tensors, expected " + std::to_string(s.shared));
      });
    },
    [](const StageCall& a) {
#if defined(__AMX_BF16__)
      if (!on_tiles(a)) return v4bf16::stage_kernels.backward(a);
#endif
      run(a, true, [&](auto& s) { s.run(a.program->backward); });
    },
};

}  // namespace csp::CSP_ISA
