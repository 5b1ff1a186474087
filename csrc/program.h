// How a stage is computed, as csp_kernels/stage/program.py describes it: instructions on buffers, read from its text form
// (csp_kernels/stage/text.py) and checked, so that no program reaches beyond its buffers. -1 stands for Python's None.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "cpu/call.h"

namespace csp::stage {

struct Place {  // channels [start, stop) of a buffer
  int64_t buffer = 0, start = 0, stop = 0;
  int64_t channels() const { return stop - start; }
};
enum class Gradient { None, Write, Add };
struct Segment {
  Place place;
  int64_t column = -1;
  Activation act = Activation::Identity;
  double slope = 0;
  Gradient gradient = Gradient::None;
  bool sums = false;
};
struct Binding { int64_t norm = 0, at = 0, count = 0, column = 0, statistics = -1; };
struct Conv {
  int64_t out_channels = 0, kernel = 1, stride = 1, groups = 1;
  bool bias = false, pool = false;
  double drop_rate = 0;
};

struct Copy { Place source, to; int64_t statistics = -1; };
struct Measure { Place source; int64_t statistics = -1; };
struct Fill { std::vector<Binding> bindings; };
struct Product {
  std::vector<int64_t> nodes;
  Conv conv;
  std::vector<Segment> segments;
  Place to;
  int64_t statistics = -1, drop = -1;
  int64_t column = -1;  // inference: a norm behind the convolution, folded into its weights, and its activation
  Activation act = Activation::Identity;
  double slope = 0;
  std::vector<Segment> residual;  // one at most, which is added to that
};
struct Add {
  int64_t node = 0;
  std::vector<Segment> segments;
  Place to;
  Activation act = Activation::Identity;
  double slope = 0;
  int64_t statistics = -1;
};
struct Maximum {
  int64_t node = 0;
  std::vector<Segment> segments;
  Place to;
  int64_t size = 3, stride = 1, statistics = -1;
};
struct Activate { std::vector<Segment> segments; Place to; bool pool = false; };
struct Bottleneck { Product reduce, conv; };  // inference: nothing but conv reads reduce.to, which need not be written
struct Settle { std::vector<Binding> bindings; };
struct Clear { Place place; };
struct ActivateBackward { std::vector<Segment> segments; Place output; bool pool = false; };
struct Behind { Segment segment; Place output; };  // what an output reads, and where it lies there
struct ProductBackward {
  std::vector<int64_t> nodes;
  Conv conv;
  std::vector<Segment> segments;
  Place of;
  int64_t owed = -1;
  std::vector<int64_t> wanted;
  int64_t drop = -1;
  std::vector<Behind> behind;  // from whose gradients that of `of` is computed on load; empty: it lies in memory
};
struct AddBackward {
  std::vector<Segment> segments;
  Place of;
  Activation act = Activation::Identity;
  double slope = 0;
  int64_t owed = -1;
};
struct MaximumBackward {
  std::vector<Segment> segments;
  Place of;
  int64_t size = 3, stride = 1, owed = -1;
};
struct Finish { int64_t index = 0; Place of; int64_t owed = -1; };
// The first FORWARD_KINDS may be in forward.
constexpr size_t FORWARD_KINDS = 8;
using Instruction = std::variant<Copy, Measure, Fill, Product, Add, Activate, Bottleneck, Maximum, Settle, Clear, ActivateBackward, ProductBackward, AddBackward, MaximumBackward, Finish>;

enum class Kind { Input, Output, Kept, Scratch };
struct Buffer {
  Kind kind = Kind::Input;
  int64_t index = 0, channels = 0;
  std::string size;  // "f": half, rounded down, "c": rounded up; of the inputs' height and width
  int64_t side(int64_t side) const {
    for (char half : size) side = half == 'f' ? side / 2 : (side + 1) / 2;
    return side;
  }
};
struct Weight {
  int64_t position = -1, out_channels = 0, in_channels = 0, kernel = 1;  // position -1: a sum has none
  bool bias = false;
};
struct Norm { int64_t position = 0, channels = 0, running = -1; };
struct Wanted { std::vector<int64_t> inputs, nodes, norms; };

struct Program {
  std::vector<Buffer> buffers;
  int64_t statistics = 0, columns = 0;
  std::vector<Weight> weights;
  std::vector<Norm> norms;
  Wanted wanted;
  std::vector<Instruction> forward, backward;
  int64_t count(Kind kind) const {
    int64_t n = 0;
    for (const Buffer& b : buffers) n += b.kind == kind;
    return n;
  }
};

// What an instruction touches: f(place, whether its gradient is meant).
template <class F> void places(const Instruction& instruction, F f) {
  struct Visit {
    F& f;
    void values(const std::vector<Segment>& segments) {
      for (const Segment& s : segments) f(s.place, false);
    }
    void both(const std::vector<Segment>& segments) {
      values(segments);
      for (const Segment& s : segments)
        if (s.gradient != Gradient::None) f(s.place, true);
    }
    void complete(const Place& of, int64_t owed) {
      if (owed >= 0) f(of, false);
      f(of, true);
    }
    void operator()(const Copy& i) { f(i.source, false), f(i.to, false); }
    void operator()(const Measure& i) { f(i.source, false); }
    void operator()(const Fill&) {}
    void operator()(const Product& i) { values(i.segments), values(i.residual), f(i.to, false); }
    void operator()(const Add& i) { values(i.segments), f(i.to, false); }
    void operator()(const Maximum& i) { values(i.segments), f(i.to, false); }
    void operator()(const Activate& i) { values(i.segments), f(i.to, false); }
    void operator()(const Bottleneck& i) { values(i.reduce.segments), f(i.conv.to, false); }
    void operator()(const Settle&) {}
    void operator()(const Clear& i) { f(i.place, true); }
    void operator()(const ActivateBackward& i) { both(i.segments); }
    void operator()(const ProductBackward& i) {
      both(i.segments);
      if (i.behind.empty()) complete(i.of, i.owed);
      else f(i.of, false);
    }
    void operator()(const AddBackward& i) { both(i.segments), complete(i.of, i.owed); }
    void operator()(const MaximumBackward& i) { both(i.segments), complete(i.of, i.owed); }
    void operator()(const Finish& i) { complete(i.of, i.owed); }
  };
  std::visit(Visit{f}, instruction);
}

// Of what an instruction of backward needs the values, f(place): the same rule as values_read in stage/program.py. The values of
// whatever else it touches change no gradient.
template <class F> void values_read(const Instruction& instruction, F f) {
  auto segments = [&](const std::vector<Segment>& all, bool every, bool for_gradients) {
    for (const Segment& s : all)
      if (every || s.sums || (s.gradient != Gradient::None && (for_gradients || s.act != Activation::Identity || s.column >= 0))) f(s.place);
  };
  struct Visit {
    decltype(segments)& read;
    F& f;
    void operator()(const Product& i) { read(i.segments, true, false), read(i.residual, true, false); }
    void operator()(const Add& i) { read(i.segments, true, false); }
    void operator()(const Maximum& i) { read(i.segments, true, false); }
    void operator()(const ActivateBackward& i) { read(i.segments, false, false); }
    void operator()(const ProductBackward& i) {
      read(i.segments, !i.wanted.empty(), i.conv.kernel == 3);
      if (i.owed >= 0 || !i.behind.empty()) f(i.of);
    }
    void operator()(const AddBackward& i) {
      read(i.segments, i.act != Activation::Identity, false);
      if (i.owed >= 0) f(i.of);
    }
    void operator()(const MaximumBackward& i) {
      read(i.segments, false, true);
      if (i.owed >= 0) f(i.of);
    }
    void operator()(const Finish& i) { if (i.owed >= 0) f(i.of); }
    void operator()(const Copy& i) { f(i.source); }
    void operator()(const Measure& i) { f(i.source); }
    void operator()(const Activate& i) { read(i.segments, true, false); }
    void operator()(const Bottleneck& i) { read(i.reduce.segments, true, false); }
    void operator()(const Fill&) {}
    void operator()(const Settle&) {}
    void operator()(const Clear&) {}
  };
  std::visit(Visit{segments, f}, instruction);
}

// The program of a text, read once per process. Throws std::runtime_error that begins with `op` for a text that is none.
std::shared_ptr<const Program> program_of(const char* op, const std::string& text);

}  // namespace csp::stage
