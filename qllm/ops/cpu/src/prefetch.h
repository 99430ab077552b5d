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

// Asks for the line of memory that is there, into the first cache or the second one. Where there is
// about as much to compute as to read, the second is the better: Zen 4 then reads without a pause,
// where it has to wait for a place among the few lines that the first one is waiting for.
template <int CACHE> INLINE inline void prefetch_into(const void *line) {
    __builtin_prefetch(line, 0, CACHE == 1 ? 3 : 2);
}

// What is read once some other memory has been: it is asked for while that is read, as far in its
// own as that has come; into a cache as above.
template <int CACHE> class ComingInto {
  public:
    ComingInto() = default;
    // `bytes` of it, while `beside` bytes are read.
    ComingInto(const void *from, int64_t bytes, int64_t beside)
        : line(static_cast<const char *>(from)),
          end(line + bytes),
          pace((bytes * PARTS + beside - 1) / beside) {}

    // So many more bytes have been read of what is at hand.
    INLINE void ask(int64_t bytes) {
        due += bytes * pace;
        for (; due > 0 && line < end; due -= 64 * PARTS, line += 64) prefetch_into<CACHE>(line);
    }

  private:
    static constexpr int64_t PARTS = 1024;  // of a byte
    const char *line = nullptr, *end = nullptr;
    int64_t pace = 0, due = 0;  // in those parts
};
using Coming = ComingInto<1>;

// What is read once some turns of other work are done, of rows that are far apart: it is asked for
// in those, into the second cache, as many lines in each; no more of them than memory gives in the
// time of a product of tiles. What is left by then is not asked for.
class ComingRows {
  public:
    ComingRows() = default;
    ComingRows(const void *first, int64_t rows, int64_t stride, int64_t bytes)
        : line(static_cast<const char *>(first)),
          end(line + bytes),
          rows(rows),
          stride(stride),
          bytes(bytes) {}

    ComingRows in(int64_t turns) const {
        ComingRows some = *this;
        some.at_once = smaller(MAX_LINES, (rows * ((bytes + 63) / 64) + turns - 1) / turns);
        return some;
    }

    // One more turn is done.
    INLINE void ask() {
        for (int64_t i = 0; i < at_once && rows > 0; i++) {
            prefetch_into<2>(line);
            line += 64;
            if (line < end) continue;
            line = end + stride - bytes;
            end += stride;
            rows--;
        }
    }

  private:
    static constexpr int64_t MAX_LINES = 6;
    const char *line = nullptr, *end = nullptr;  // of a row
    int64_t rows = 0, stride = 0, bytes = 0, at_once = 0;
};

}  // namespace
}  // namespace qllm
