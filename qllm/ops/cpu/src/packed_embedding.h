// Rows of a packed weight as numbers: of an embedding, which may be the LM head's matrix as well.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "scales.h"

namespace qllm {
namespace {

// (q - zero) * scale, or q * scale + offset, in float32, rounded to the type of y once.
template <int64_t TYPE> void embed_packed_row(const EmbedPacked &a, int64_t row) {
    const int64_t groups = (a.in + a.group - 1) / a.group, k_blocks = row_k_blocks(a.in, a.group);
    const int64_t panel = a.index[row] / LANES, lane = a.index[row] % LANES;
    char *y = static_cast<char *>(a.y) + row * a.in * SIZE<TYPE>;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t at = (panel * groups + group) * LANES + lane;
        const auto number = [&](const void *of_groups) {
            return scale_at(of_groups, a.scale_type, a.group, groups, panel, group, lane);
        };
        const VF scale = set_f(number(a.scales));
        const VF offset = set_f(a.offsets ? number(a.offsets) : 0);
        const int zero = a.offsets ? 0 : a.zeros ? a.zeros[at] : 1 << (a.bits - 1);
        const int64_t end = smaller((group + 1) * a.group, a.in);
        for (int64_t k = group * a.group, count; k < end; k += count) {
            alignas(64) uint8_t bytes[64 * STEPS];
            float values[K_BLOCK];
            const Place from = place_of(k, a.group);
            unpack_integers(a, a.q + (panel * k_blocks + from.k_block) * 64 * a.held_bits(), bytes);
            for (int64_t i = from.input; i < K_BLOCK; i++)
                values[i - from.input] =
                    float(bytes[i / STEP * 64 + lane * STEP + i % STEP] - zero);
            count = smaller(smaller(a.group, K_BLOCK), end - k);
            for (int64_t i = 0; i < count; i += WIDTH) {
                VF value = mul_f(load_f(values + i), scale);
                if (a.offsets) value = add_f(value, offset);
                store<TYPE>(y, k + i, count - i, value);
            }
        }
    }
}

static Status embed_packed(const EmbedPacked &a) {
    for (int64_t row = 0; row < a.rows; row++)
        if (a.index[row] < 0 || a.index[row] >= a.table_rows) return Status::BAD_INDEX;
    for_each(a.rows, a.rows * a.in > WORTH_THREADS, [&](int64_t row, int64_t) {
        BY_TYPE(a.type, embed_packed_row, a, row);
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
