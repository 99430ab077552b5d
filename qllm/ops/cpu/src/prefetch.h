// Memory that is asked for before it is read.
#pragma once

#include "kernels.h"

namespace qllm {
namespace {

// Asks for the lines of rows that are far apart, to read them or to write to them in a while.
template <bool WRITE>
inline void prefetch_rows(const void *first, int64_t stride, int64_t bytes, int64_t rows) {
    const char *row = static_cast<const char *>(first);
    for (int64_t r = 0; r < rows; r++, row += stride)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, WRITE);
}

// Reads some of each line of rows that are far apart, so that the machine waits for all of them at
// once. Where many are asked for, Zen 4 leaves out a quarter and more of them, and whoever comes to
// those waits for one after the other.
inline void fetch_rows(const void *first, int64_t stride, int64_t bytes, int64_t rows) {
    const auto *row = static_cast<const volatile char *>(first);
    for (int64_t r = 0; r < rows; r++, row += stride)
        for (int64_t i = 0; i < bytes; i += 64) (void)row[i];
}

// What is read once some other memory has been: it is asked for while that is read, as far in its
// own as that has come.
class Coming {
  public:
    Coming() = default;
    // `bytes` of it, while `beside` bytes are read.
    Coming(const void *from, int64_t bytes, int64_t beside)
        : line(static_cast<const char *>(from)),
          due(line),
          end(line + bytes),
          pace((bytes + beside - 1) / beside) {}

    // So many more bytes have been read of what is at hand.
    INLINE void ask(int64_t bytes) {
        due += bytes * pace;
        const char *stop = due < end ? due : end;
        for (; line < stop; line += 64) __builtin_prefetch(line);
    }

  private:
    const char *line = nullptr, *due = nullptr, *end = nullptr;
    int64_t pace = 0;
};

}  // namespace
}  // namespace qllm
