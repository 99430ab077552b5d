// Vectors of elements of a call's type.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace qllm {
namespace {

constexpr int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }  // an element
template <int64_t TYPE> constexpr int64_t SIZE = bytes_of(TYPE);

// Below this many multiplications a loop is done before other threads have begun.
constexpr int64_t WORTH_THREADS = 1 << 15;

// function<TYPE>(...) for the type of a call: known at compile time, it costs loops nothing.
#define BY_TYPE(type, function, ...)                                             \
    ((type) == FLOAT32   ? function<FLOAT32>(__VA_ARGS__)                        \
     : (type) == FLOAT16 ? function<FLOAT16>(__VA_ARGS__)                        \
                         : function<BFLOAT16>(__VA_ARGS__))

template <int64_t TYPE> inline VF load(const void *p, int64_t i, int64_t count) {
    return count >= WIDTH ? load_all<TYPE>(p, i) : load_as(p, i, TYPE, count);
}

template <int64_t TYPE> inline void store(void *p, int64_t i, int64_t count, VF v) {
    store_as(p, i, TYPE, count, v);
}

}  // namespace
}  // namespace qllm
