// From the storage type of a call to code for it.
#pragma once
#include "../call.h"
#include "vec.h"

namespace csp::CSP_ISA {

template <class F> inline void with_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::Float32: f(float{}); break;
    case Storage::BFloat16: f(BFloat16{}); break;
    case Storage::Float16: f(Half{}); break;
    case Storage::Float64: f(double{}); break;
  }
}

}  // namespace csp::CSP_ISA
