// Programs from their texts.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "checks.h"

namespace csp::stage {
namespace {

constexpr int64_t MOST = int64_t(1) << 31;  // of channels, items, columns: sums of a few cannot overflow

// Words to structs, field after field in the order of the dataclasses.
class Reader {
  std::istringstream words;
  std::string word;

  const std::string& next() {
    if (!(words >> word)) throw std::runtime_error("it ends too early");
    return word;
  }
  [[noreturn]] void bad(const char* expected) const { throw std::runtime_error("got '" + word.substr(0, 40) + "', expected " + expected); }

 public:
  explicit Reader(const std::string& text) : words(text) {}
  void end() { if (words >> word) bad("nothing behind the last instruction"); }

  void read(int64_t& x) {
    const std::string& w = next();
    if (w == "-") { x = -1; return; }
    if (w.empty() || w.size() > 10 || w.find_first_not_of("0123456789") != std::string::npos) bad("a number that is not negative, or -");
    x = std::stoll(w);
    if (x > MOST) bad("a smaller number");
  }
  void read(bool& x) {
    next();
    if (word != "0" && word != "1") bad("0 or 1");
    x = word == "1";
  }
  void read(double& x) {
    next();
    size_t used = 0;
    try { x = std::stod(word, &used); } catch (const std::exception&) { bad("a number"); }
    if (used != word.size() || !std::isfinite(x)) bad("a finite number");
  }
  void read(std::string& x) { x = next() == "-" ? "" : word; }
  template <class E, size_t N> void choose(E& x, const char* const (&names)[N]) {
    next();
    for (size_t i = 0; i < N; i++)
      if (word == names[i]) { x = E(i); return; }
    bad(names[0]);
  }
  void read(Activation& x) { choose(x, {"identity", "relu", "leaky_relu", "silu", "mish", "hardswish", "relu6", "gelu", "gelu_tanh"}); }
  void read(Gradient& x) { choose(x, {"-", "write", "add"}); }
  void read(Kind& x) { choose(x, {"input", "output", "kept", "scratch"}); }
  template <class X> void read(std::vector<X>& x) {
    int64_t n = 0;
    read(n);
    if (n < 0 || n > (1 << 20)) bad("a length");
    x.clear();
    for (int64_t i = 0; i < n; i++) read(x.emplace_back());
  }
  template <class... X> void all(X&... x) { (read(x), ...); }

  void read(Place& x) { all(x.buffer, x.start, x.stop); }
  void read(Segment& x) { all(x.place, x.column, x.act, x.slope, x.gradient, x.sums); }
  void read(Binding& x) { all(x.norm, x.at, x.count, x.column, x.statistics); }
  void read(Conv& x) { all(x.out_channels, x.kernel, x.stride, x.groups, x.bias, x.pool, x.drop_rate); }
  void read(Buffer& x) { all(x.kind, x.index, x.channels, x.size); }
  void read(Weight& x) {
    read(x.position);
    if (x.position >= 0) all(x.out_channels, x.in_channels, x.kernel, x.bias);
  }
  void read(Norm& x) { all(x.position, x.channels, x.running); }
  void read(Wanted& x) { all(x.inputs, x.nodes, x.norms); }
  void read(Copy& x) { all(x.source, x.to, x.statistics); }
  void read(Measure& x) { all(x.source, x.statistics); }
  void read(Fill& x) { all(x.bindings); }
  void read(Product& x) { all(x.nodes, x.conv, x.segments, x.to, x.statistics, x.drop, x.column, x.act, x.slope, x.residual); }
  void read(Add& x) { all(x.node, x.segments, x.to, x.act, x.slope, x.statistics); }
  void read(Maximum& x) { all(x.node, x.segments, x.to, x.size, x.stride, x.statistics); }
  void read(Activate& x) { all(x.segments, x.to, x.pool); }
  void read(Bottleneck& x) { all(x.reduce, x.conv); }
  void read(Settle& x) { all(x.bindings); }
  void read(Clear& x) { all(x.place); }
  void read(ActivateBackward& x) { all(x.segments, x.output, x.pool); }
  void read(ProductBackward& x) { all(x.nodes, x.conv, x.segments, x.of, x.owed, x.wanted, x.drop, x.behind); }
  void read(Behind& x) { all(x.segment, x.output); }
  void read(AddBackward& x) { all(x.segments, x.of, x.act, x.slope, x.owed); }
  void read(MaximumBackward& x) { all(x.segments, x.of, x.size, x.stride, x.owed); }
  void read(Finish& x) { all(x.index, x.of, x.owed); }
  template <class X> void make(Instruction& i) { read(i.emplace<X>()); }
  void read(Instruction& i) {
    int kind = 0;
    choose(kind, {"Copy", "Measure", "Fill", "Product", "Add", "Activate", "Bottleneck", "Maximum", "Settle", "Clear", "ActivateBackward", "ProductBackward", "AddBackward", "MaximumBackward", "Finish"});
    using Make = void (Reader::*)(Instruction&);
    static constexpr Make MAKE[] = {&Reader::make<Copy>, &Reader::make<Measure>, &Reader::make<Fill>, &Reader::make<Product>, &Reader::make<Add>, &Reader::make<Activate>,
                                    &Reader::make<Bottleneck>, &Reader::make<Maximum>, &Reader::make<Settle>, &Reader::make<Clear>, &Reader::make<ActivateBackward>, &Reader::make<ProductBackward>, &Reader::make<AddBackward>, &Reader::make<MaximumBackward>, &Reader::make<Finish>};
    (this->*MAKE[kind])(i);
  }
  void read(Program& x) { all(x.buffers, x.statistics, x.columns, x.weights, x.norms, x.wanted, x.forward, x.backward); }
};

// Everything an executor relies on.
class Check {
  const Program& p;

  static void expect(bool holds, const char* what) { if (!holds) throw std::runtime_error(what); }
  static bool inside(int64_t at, int64_t count, int64_t end) { return at >= 0 && count > 0 && at <= end - count; }

  const Buffer& buffer(const Place& x) const {
    expect(x.buffer >= 0 && x.buffer < int64_t(p.buffers.size()), "a place lies in no buffer");
    const Buffer& b = p.buffers[size_t(x.buffer)];
    expect(inside(x.start, x.stop - x.start, b.channels), "a place lies beyond its buffer's channels");
    return b;
  }
  void written(const Place& x) const { expect(buffer(x).kind != Kind::Input, "an instruction writes to an input"); }
  void statistics(int64_t column, const Place& x) const { expect(column == -1 || inside(column, x.channels(), p.statistics), "statistics lie beyond their columns"); }
  // The channels side by side, of one size; pool: after averaging.
  int64_t segments(const std::vector<Segment>& all, std::string& size) const {
    expect(!all.empty(), "an instruction reads nothing");
    int64_t n = 0;
    size = buffer(all[0].place).size;
    for (const Segment& s : all) {
      expect(buffer(s.place).size == size, "reads side by side differ in size");
      expect(s.column == -1 || inside(s.column, s.place.channels(), p.columns), "a norm lies beyond the columns");
      expect(s.column >= 0 || !s.sums, "sums are wanted of no norm");
      n += s.place.channels();
    }
    return n;
  }
  void product(const std::vector<int64_t>& nodes, const Conv& c, const std::vector<Segment>& from, const Place& to, int64_t drop) const {
    std::string size;
    int64_t K = segments(from, size), O = 0;
    expect(!nodes.empty() && (nodes.size() == 1 || (c.kernel == 1 && !c.bias && drop == -1)), "a product of these nodes is none");
    expect(c.kernel == 1 || c.kernel == 3, "a kernel is neither 1 nor 3");
    for (int64_t node : nodes) {
      expect(node >= 0 && node < int64_t(p.weights.size()) && p.weights[size_t(node)].position >= 0, "a product has no weight");
      const Weight& w = p.weights[size_t(node)];
      expect(w.kernel == c.kernel && w.bias == c.bias && c.groups >= 1 && w.in_channels <= K && w.in_channels * c.groups == K, "a weight does not fit what its product reads");
      O += w.out_channels;
    }
    expect(O == c.out_channels && O == to.channels() && buffer(to).size == size + (c.pool ? "f" : "") + (c.stride == 2 ? "c" : ""), "a product does not fit where it is written");
    expect(!c.bias, "biases are the reference's");
    expect(c.stride == 1 || (c.stride == 2 && drop == -1 && !c.pool), "a stride is neither 1 nor 2, or of what is averaged or dropped");
    expect(c.groups >= 1 && (c.groups == 1 || (c.kernel == 3 && drop == -1 && c.out_channels % c.groups == 0)), "groups of a 1x1, or of what is dropped, are the reference's");
    expect((drop == -1) == (c.drop_rate == 0) && c.drop_rate >= 0 && c.drop_rate < 1, "a drop rate is not in [0, 1)");
    expect(c.kernel == 3 ? !c.pool : drop == -1, "a 3x3 averages, or a 1x1 drops");
  }
  void sum(const std::vector<Segment>& terms, const Place& to) const {
    std::string size;
    segments(terms, size);
    for (const Segment& s : terms) expect(s.place.channels() == to.channels(), "terms of a sum differ in channels");
    expect(buffer(to).size == size, "a sum does not fit where it is written");
  }
  void maximum(const std::vector<Segment>& from, const Place& to, int64_t size, int64_t stride) const {
    std::string read;
    expect(segments(from, read) == to.channels() && (stride == 1 || stride == 2) && buffer(to).size == read + (stride == 2 ? "c" : ""), "a maximum does not fit where it is written");
    expect(from.size() == 1 && size > 0 && (size % 2 == 1 || (size == 2 && stride == 2)) && size <= 1023, "a maximum is not of one segment, over an odd number of pixels up to 1023 or over 2 with stride 2");
  }
  void activate(const std::vector<Segment>& from, const Place& to, bool pool) const {
    std::string size;
    expect(segments(from, size) == to.channels() && buffer(to).size == size + (pool ? "f" : ""), "an output does not fit what it is made of");
  }
  void bindings(const std::vector<Binding>& all) const {
    for (const Binding& b : all) {
      expect(b.norm >= 0 && b.norm < int64_t(p.norms.size()), "a binding of no norm");
      const Norm& n = p.norms[size_t(b.norm)];
      expect(inside(b.at, b.count, n.channels) && inside(b.column, b.count, p.columns), "a binding lies beyond its norm or the columns");
      expect(b.statistics == -1 ? n.running >= 0 : n.running == -1 && inside(b.statistics, b.count, p.statistics), "a binding has no statistics");
    }
  }
  // Side by side they are all that a 1x1 gives, each from a whole vector of channels on.
  void behind(const ProductBackward& i) const {
    int64_t at = i.of.start;
    for (const Behind& b : i.behind) {
      activate({b.segment}, b.output, false);
      const Segment& s = b.segment;
      expect(buffer(b.output).kind == Kind::Output && i.conv.kernel == 1, "a gradient comes from no output, or is a 3x3's");
      expect(s.place.buffer == i.of.buffer && s.place.start == at && (at - i.of.start) % 16 == 0, "outputs behind a product do not lie side by side");
      expect(s.act == i.behind[0].segment.act && s.slope == i.behind[0].segment.slope, "outputs behind a product have several activations");
      at = s.place.stop;
    }
    expect(i.behind.empty() || at == i.of.stop, "outputs behind a product leave some of it out");
  }
  static bool has(const std::vector<int64_t>& all, int64_t x) { return std::find(all.begin(), all.end(), x) != all.end(); }
  // Whatever is wanted is computed.
  void complete() const {
    std::vector<int64_t> inputs, nodes;
    std::vector<int64_t> norms(p.norms.size());
    for (const Instruction& i : p.backward) {
      if (const auto* finish = std::get_if<Finish>(&i)) inputs.push_back(finish->index);
      if (const auto* product = std::get_if<ProductBackward>(&i)) nodes.insert(nodes.end(), product->wanted.begin(), product->wanted.end());
      if (const auto* settle = std::get_if<Settle>(&i))
        for (const Binding& b : settle->bindings) norms[size_t(b.norm)] += b.count;
    }
    for (int64_t i : p.wanted.inputs) expect(has(inputs, i), "backward leaves out the gradient of an input");
    for (int64_t i : p.wanted.nodes) expect(has(nodes, i), "backward leaves out the gradient of a weight");
    for (int64_t i : p.wanted.norms) expect(norms[size_t(i)] == p.norms[size_t(i)].channels, "backward leaves out the gradient of a norm");
  }
  void indices(const std::vector<int64_t>& all, int64_t count) const {
    for (size_t i = 0; i < all.size(); i++) expect(all[i] >= 0 && all[i] < count && (i == 0 || all[i - 1] < all[i]), "what is wanted is not there");
  }

 public:
  explicit Check(const Program& p) : p(p) {}

  void operator()(const Copy& i) const {
    written(i.to), statistics(i.statistics, i.to);
    expect(buffer(i.source).size == buffer(i.to).size && i.source.channels() == i.to.channels(), "a copy differs from its source");
  }
  void operator()(const Measure& i) const { buffer(i.source), statistics(i.statistics, i.source); }
  void operator()(const Fill& i) const { bindings(i.bindings); }
  void operator()(const Product& i) const {
    written(i.to), statistics(i.statistics, i.to), product(i.nodes, i.conv, i.segments, i.to, i.drop);
    expect(i.column == -1 || inside(i.column, i.to.channels(), p.columns), "a norm lies beyond the columns");
    bool through = i.column >= 0 || i.act != Activation::Identity || !i.residual.empty();
    expect(!through || (i.statistics == -1 && i.drop == -1), "a norm, an activation or a residual follows what statistics are taken of, or what is dropped");
    expect(i.residual.size() <= 1, "several residuals");
    if (!i.residual.empty()) sum(i.residual, i.to);
  }
  void operator()(const Bottleneck& i) const {
    (*this)(i.reduce), (*this)(i.conv);
    expect(buffer(i.reduce.to).kind == Kind::Scratch, "what lies inside a bottleneck is not scratch memory");
    const auto& from = i.reduce.segments;
    expect(from.size() == 1 && from[0].column >= 0 && from[0].act == Activation::Relu && i.reduce.conv.kernel == 1 && !i.reduce.conv.pool && i.reduce.conv.stride == 1 && i.conv.conv.stride == 1 && i.conv.conv.groups == 1 &&
               i.reduce.column >= 0 && i.reduce.act == Activation::Relu && i.reduce.residual.empty() && i.conv.conv.kernel == 3 && i.conv.conv.drop_rate == 0 &&
               i.conv.statistics == -1 && i.conv.column == -1 && i.conv.act == Activation::Identity && i.conv.residual.empty(),
           "a bottleneck is not a 1x1 through norms and ReLUs with a 3x3 behind it");
    const auto& between = i.conv.segments;
    expect(between.size() == 1 && between[0].column == -1 && between[0].act == Activation::Identity && between[0].place.buffer == i.reduce.to.buffer &&
               between[0].place.start == i.reduce.to.start && between[0].place.stop == i.reduce.to.stop,
           "the 3x3 of a bottleneck does not read its 1x1");
  }
  void operator()(const Add& i) const { written(i.to), statistics(i.statistics, i.to), sum(i.segments, i.to); }
  void operator()(const Maximum& i) const { written(i.to), statistics(i.statistics, i.to), maximum(i.segments, i.to, i.size, i.stride); }
  void operator()(const Activate& i) const { written(i.to), activate(i.segments, i.to, i.pool); }
  void operator()(const Settle& i) const { bindings(i.bindings); }
  void operator()(const Clear& i) const { buffer(i.place); }
  void operator()(const ActivateBackward& i) const {
    expect(buffer(i.output).kind == Kind::Output, "a gradient comes from no output");
    activate(i.segments, i.output, i.pool);
  }
  void operator()(const ProductBackward& i) const {
    statistics(i.owed, i.of), product(i.nodes, i.conv, i.segments, i.of, i.drop);
    for (int64_t node : i.wanted) expect(has(i.nodes, node) && has(p.wanted.nodes, node), "what is wanted is not there");
    behind(i);
  }
  void operator()(const AddBackward& i) const { statistics(i.owed, i.of), sum(i.segments, i.of); }
  void operator()(const MaximumBackward& i) const { statistics(i.owed, i.of), maximum(i.segments, i.of, i.size, i.stride); }
  void operator()(const Finish& i) const {
    statistics(i.owed, i.of);
    expect(i.index >= 0 && i.index < p.count(Kind::Input), "the gradient of no input");
    const Buffer& input = p.buffers[size_t(i.index)];
    expect(input.channels == i.of.channels() && buffer(i.of).size.empty(), "the gradient of an input does not fit it");
  }
  void run() const {
    int64_t counts[4] = {};
    for (const Buffer& b : p.buffers) {
      expect(b.index == counts[int(b.kind)]++ && b.channels > 0, "buffers are not numbered");
      expect(b.size.size() <= 32 && b.size.find_first_not_of("fc") == std::string::npos, "a size is neither f nor c");
    }
    expect(counts[0] > 0 && counts[1] > 0, "there is no input or no output");
    for (int64_t i = 0; i < counts[0]; i++) expect(p.buffers[size_t(i)].kind == Kind::Input && p.buffers[size_t(i)].size.empty(), "inputs are not the first buffers");
    expect(p.statistics >= 0 && p.columns >= 0, "a number of columns is missing");
    for (const Weight& w : p.weights) expect(w.position == -1 || (w.out_channels > 0 && w.in_channels > 0), "a weight is empty");
    for (const Norm& n : p.norms) expect(n.position >= 0 && n.channels > 0, "a norm is empty");
    indices(p.wanted.inputs, counts[0]), indices(p.wanted.nodes, int64_t(p.weights.size())), indices(p.wanted.norms, int64_t(p.norms.size()));
    for (int64_t node : p.wanted.nodes) expect(p.weights[size_t(node)].position >= 0, "what is wanted is not there");
    for (const Instruction& i : p.forward) {
      expect(i.index() < FORWARD_KINDS, "backward begins in forward");
      std::visit(*this, i);
    }
    for (const Instruction& i : p.backward) std::visit(*this, i);
    complete();
  }
};

}  // namespace

std::shared_ptr<const Program> program_of(const char* op, const std::string& text) {
  static std::mutex mutex;
  static auto& known = *new std::unordered_map<std::string, std::shared_ptr<const Program>>;  // threads may outlive static objects
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = known.find(text); found != known.end()) return found->second;
  }
  auto made = std::make_shared<Program>();
  try {
    Reader reader(text);
    reader.read(*made), reader.end();
    Check(*made).run();
  } catch (const std::runtime_error& error) {
    refuse({op, "program"}, error.what(), "; expected the text of a program that csp_kernels made");
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= 4096) known.clear();
  return known[text] = made;
}

}  // namespace csp::stage
