// What operators ask of their arguments. Every tensor passes `checked` before its memory is touched: an argument that is not as
// expected is an exception that names it, and text is built only then.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // of later releases than 2.11, with the message of the error; there the call alone is named
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace csp {

using torch::stable::Tensor;

// As messages call it: "dense_block: params[7] (norm1.bias)".
struct Argument {
  const char *op, *name;
  int64_t index = -1;          // in a list
  const char* role = nullptr;  // of an item of a list
};
inline std::ostream& operator<<(std::ostream& out, const Argument& a) {
  out << a.op << ": " << a.name;
  if (a.index >= 0) out << '[' << a.index << ']';
  if (a.role) out << " (" << a.role << ')';
  return out;
}

// Not STD_TORCH_CHECK, whose messages begin with a function, a file of the machine that built the library, and a line.
template <class... T> [[noreturn, gnu::cold, gnu::noinline]] void refuse(const Argument& a, const T&... message) {
  std::ostringstream text;
  text << a << ": ";
  ((text << message), ...);
  throw std::runtime_error(text.str());
}
template <class... T> void require(bool holds, const Argument& a, const T&... message) {
  if (!holds) [[unlikely]] refuse(a, message...);
}

// Numbers of dtypes and devices in this process' torch.
struct Codes {
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(), float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16(), int64 = aoti_torch_dtype_int64(), cpu = aoti_torch_device_type_cpu();
  bool storage(int32_t dtype) const { return dtype == float32 || dtype == bfloat16 || dtype == float16 || dtype == float64; }
  int32_t accumulation(int32_t dtype) const { return dtype == float64 ? float64 : float32; }  // of sums over it, and of parameters
  int64_t bytes(int32_t dtype) const { return dtype == float32 ? 4 : dtype == float64 || dtype == int64 ? 8 : 2; }
};
inline const Codes CODES;

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

struct Place {  // a device
  int32_t type, index;
  static Place of(const Tensor& t) {
    Place d{};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &d.type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &d.index));
    return d;
  }
};

// How elements lie. Sizes of one say nothing about strides, and an empty tensor may have any.
enum class Lies {
  Contiguous,
  Either,   // [g, b, 3, 3]: contiguous or channels_last
  Packed,   // [N, C, H, W]: channels_last
  Image,    // [N, C, H, W]: channels_last, or a channel slice of that: pixels may be further apart than their channels
  Rows,     // [P, n]: rows side by side or further apart, none inside another
  Anyhow,
};
constexpr int64_t ANY = -1;  // a size that is not asked for

using Sizes = std::initializer_list<int64_t>;

// The sizes and strides of a tensor, borrowed from it.
struct Extent {
  int64_t dim = 0, numel = 0;
  int64_t *size = nullptr, *stride = nullptr;

  explicit Extent(const Tensor& t) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t.get(), &numel));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &size));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &stride));
  }
  bool is(Sizes expected) const {
    if (dim != int64_t(expected.size())) return false;
    for (int64_t i = 0; i < dim; i++)
      if (const int64_t n = expected.begin()[i]; n != ANY && n != size[i]) return false;
    return true;
  }
  bool strides(Sizes expected) const {
    for (int64_t i = 0; i < dim; i++)
      if (size[i] > 1 && stride[i] != expected.begin()[i]) return false;
    return true;
  }
  bool contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; step *= size[i--])
      if (size[i] > 1 && stride[i] != step) return false;
    return true;
  }
  // Of [N, C, H, W]: elements from pixel to pixel.
  int64_t pitch() const { return numel == 0 ? size[1] : size[3] > 1 ? stride[3] : size[2] > 1 ? stride[2] : size[0] > 1 ? stride[0] : size[1]; }
  bool image(int64_t pitch) const { return pitch >= size[1] && strides({size[2] * size[3] * pitch, 1, size[3] * pitch, pitch}); }
  bool lies(Lies how) const {
    if (numel == 0) return true;
    switch (how) {
      case Lies::Contiguous: return contiguous();
      case Lies::Either: return contiguous() || image(size[1]);
      case Lies::Packed: return image(size[1]);
      case Lies::Image: return image(pitch());
      case Lies::Rows: return strides({stride[0], 1}) && (size[0] <= 1 || stride[0] >= size[1]);
      case Lies::Anyhow: return true;
    }
    return false;
  }
  // Bytes of the storage up to the last element; -1: more than can be counted.
  int64_t bytes(int64_t offset, int64_t element) const {
    if (numel == 0) return 0;
    int64_t last = offset, step;
    for (int64_t i = 0; i < dim; i++)
      if (__builtin_mul_overflow(size[i] - 1, stride[i], &step) || __builtin_add_overflow(last, step, &last)) return -1;
    return __builtin_add_overflow(last, 1, &last) || __builtin_mul_overflow(last, element, &last) ? -1 : last;
  }
};

// --- messages

struct List {
  const int64_t* values;
  int64_t count;
};
inline std::ostream& operator<<(std::ostream& out, const List& l) {
  out << '[';
  for (int64_t i = 0; i < l.count; i++) {
    if (i) out << ", ";
    if (l.values[i] == ANY) out << "any";
    else out << l.values[i];
  }
  return out << ']';
}
inline List list(Sizes s) { return {s.begin(), int64_t(s.size())}; }
inline List list(const std::vector<int64_t>& v) { return {v.data(), int64_t(v.size())}; }
inline std::string dtype_name(int32_t dtype) {
#define CSP_NAME(name) if (dtype == aoti_torch_dtype_##name()) return #name;
  CSP_NAME(float32) CSP_NAME(float64) CSP_NAME(float16) CSP_NAME(bfloat16) CSP_NAME(uint8) CSP_NAME(int8) CSP_NAME(int16)
  CSP_NAME(int32) CSP_NAME(int64) CSP_NAME(bool) CSP_NAME(complex32) CSP_NAME(complex64) CSP_NAME(complex128)
#undef CSP_NAME
  return "dtype number " + std::to_string(dtype);
}
inline std::string device_name(const Place& d) {
  if (d.type == CODES.cpu) return "cpu";
  const std::string type = d.type == aoti_torch_device_type_cuda() ? "cuda" : d.type == aoti_torch_device_type_meta() ? "meta" : "device type " + std::to_string(d.type);
  return d.index < 0 ? type : type + ":" + std::to_string(d.index);
}
struct Shown {  // "float32 [2, 10]"
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& out, const Shown& s) { return out << dtype_name(dtype_of(s.t)) << ' ' << List{s.t.sizes().data(), s.t.dim()}; }
inline const char* order_name(Lies how) {
  switch (how) {
    case Lies::Contiguous: return "contiguous ones: call .contiguous()";
    case Lies::Either: return "contiguous or channels_last ones: call .contiguous()";
    case Lies::Packed: return "those of channels_last: call .contiguous(memory_format=torch.channels_last)";
    case Lies::Image: return "those of channels_last, or of a channel slice of that: call .contiguous(memory_format=torch.channels_last)";
    case Lies::Rows: return "rows of adjacent elements that do not overlap: call .contiguous()";
    case Lies::Anyhow: break;
  }
  return "any";
}

// What is wrong with t.
[[noreturn, gnu::cold, gnu::noinline]] inline void refuse_tensor(const Argument& a, const Tensor& t, int32_t dtype, Sizes size, Lies how, const Place& device) {
  require(t.defined(), a, "got an undefined tensor, expected ", dtype_name(dtype), " ", list(size));
  int64_t dim = t.dim();
  bool shaped = dim == int64_t(size.size()) && dtype_of(t) == dtype;
  for (int64_t i = 0; shaped && i < dim; i++) shaped = size.begin()[i] == ANY || size.begin()[i] == t.size(i);
  require(shaped, a, "got ", Shown{t}, ", expected ", dtype_name(dtype), " ", list(size));
  const Place found = Place::of(t);
  require(found.type == device.type && (found.type == CODES.cpu || found.index == device.index), a, "got ", Shown{t}, " on ", device_name(found), ", expected it on ", device_name(device));
  const Extent extent(t);
  require(extent.lies(how), a, "got ", Shown{t}, " with strides ", List{extent.stride, dim}, ", expected ", order_name(how));
  int64_t held = 0, offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  refuse(a, "got ", Shown{t}, " whose storage holds ", held, " bytes, expected at least ", extent.bytes(offset, CODES.bytes(dtype)), ": it was freed or resized");
}

// --- tensors

inline const void* checked(const Argument& a, const Tensor& t, int32_t dtype, Sizes size, Lies how = Lies::Contiguous, const Place& device = {CODES.cpu, -1}) {
  Place found{};
  if (dtype_of(t) != dtype) [[unlikely]] refuse_tensor(a, t, dtype, size, how, device);  // first: an undefined tensor has no device
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &found.type));
  if (device.type != CODES.cpu) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &found.index));
  }
  const bool here = found.type == device.type && (found.type == CODES.cpu || found.index == device.index);
  const Extent extent(t);
  if (!here || !extent.is(size) || !extent.lies(how)) [[unlikely]] refuse_tensor(a, t, dtype, size, how, device);
  if (extent.numel == 0) return nullptr;
  int64_t held = 0, offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  const int64_t bytes = extent.bytes(offset, CODES.bytes(dtype));
  const void* data = bytes >= 0 && bytes <= held ? t.const_data_ptr() : nullptr;
  if (!data) [[unlikely]] refuse_tensor(a, t, dtype, size, how, device);
  return data;
}

// An image [N, C, H, W] that lies as `Lies::Image`, its sizes and its memory.
struct Shape {
  int64_t N, C, H, W, pitch;
  int32_t dtype;
  const void* data;
  int64_t pixels() const { return N * H * W; }
};
inline Shape image(const Argument& a, const Tensor& t, int32_t dtype, Sizes size, Lies how = Lies::Image) {
  const void* data = checked(a, t, dtype, size, how);
  const Extent extent(t);
  const int64_t* n = extent.size;
  require(n[1] > 0, a, "got ", Shown{t}, ", expected at least one channel");
  int64_t elements = 1;  // an empty tensor may have any other size: products of them are made later
  for (int i = 0; i < 4; i++)
    require(!__builtin_mul_overflow(elements, n[i] > 0 ? n[i] : 1, &elements) && elements < int64_t(1) << 40, a, "got ", Shown{t}, ", expected sizes whose product is below 2^40");
  return {n[0], n[1], n[2], n[3], extent.pitch(), dtype, data};
}
// The image that says which dtype the others have.
inline Shape first_image(const Argument& a, const Tensor& t, Lies how = Lies::Image) {
  require(t.defined(), a, "got an undefined tensor, expected an image [N, channels, H, W]");
  require(CODES.storage(dtype_of(t)), a, "got ", Shown{t}, ", expected float32, bfloat16, float16 or float64");
  return image(a, t, dtype_of(t), {ANY, ANY, ANY, ANY}, how);
}

// --- numbers

inline void check_count(const Argument& a, size_t got, size_t expected, const char* what) {
  require(got == expected, a, "got ", got, ", expected ", expected, ": ", what);
}
inline void check_eps(const Argument& a, double eps, bool frozen) {
  require(eps < HUGE_VAL && (frozen ? eps >= 0 : eps > 0), a, "got ", eps, ", expected a finite number above 0 (or 0 for a frozen norm)");
}
inline void check_range(const Argument& a, int64_t value, int64_t least, int64_t most) {
  require(value >= least && value <= most, a, "got ", value, ", expected ", least, " to ", most);
}
inline void check_winograd(const char* op, int64_t winograd) {
  require(winograd == 2 || winograd == 4, {op, "winograd"}, "got ", winograd, ", expected 2 or 4");
}

}  // namespace csp
