// Weights of prefill.cu, rounded as the reference's: integers less their zeros, times their scales.

#define SCALE_BYTES (WIDE ? 4 : 2)                 // of a scale or an offset
#define GROUPS (128 / GROUP)                       // of a block
#define SCALES_AT (PANELS_OF_BLOCK * PANEL_BYTES)  // in a stage
#define ZEROS_AT (SCALES_AT + GROUPS * OUTPUTS * SCALE_BYTES)
#define W_END (ZEROS_AT + GROUPS * OUTPUTS * (OFFSETS ? SCALE_BYTES : ZEROS ? 1 : 0))
#define W_BYTES ((W_END + 1023) / 1024 * 1024)

// A float16 scale is the sum of two bfloat16, of 8 and of 3 bits. An integer of up to 6 bits times
// the second is a bfloat16, so that one fused operation more rounds the whole product, once.
#define IN_PAIRS (!OFFSETS && !WIDE && (FLOAT16 || BITS <= 6))

// Of rows g and g + 8 as they lie in memory: scales and offsets in a word or, where WIDE, two, and
// zeros in the lower bytes of one.
struct Scales {
    u32 scales[2], offsets[2], zeros;
};

DEVICE void load_two(u32* to, const u8* from, int at) {
    if (WIDE)
        load_shared(to, from + at * 4, 2);
    else
        to[0] = *(const u32*)(from + at * 2);
}

DEVICE void load_scales(Scales& found, const u8* stage, int at) {
    load_two(found.scales, stage + SCALES_AT, at);
    if (OFFSETS) load_two(found.offsets, stage + ZEROS_AT, at);
    found.zeros = ZEROS     ? *(const u16*)(stage + ZEROS_AT + at)
                  : OFFSETS ? 0
                            : 0x0101u << (BITS - 1);
}

// What inputs of rows g and g + 8 that share a scale have in common.
struct Group {
    u32 minus[2];
    u32 high[2], low[2];        // where IN_PAIRS: the scale's two parts; of float16, one
    float scale[2], offset[2];  // else
};

DEVICE float of_row(const u32* both, int second) {
    return WIDE ? of_bits(both[second]) : from_float16(both[0] >> 16 * second & 0xFFFF);
}

DEVICE void set_group(Group& group, const Scales& from) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float scale = of_row(from.scales, r);
        group.minus[r] = less_zero(from.zeros, r);
        group.scale[r] = scale;
        if (OFFSETS) group.offset[r] = of_row(from.offsets, r);
        if (IN_PAIRS) {
            group.high[r] = narrow_pair(scale, scale);
            // What is left of an infinity is no number, and the minimum of it and a number is that.
            const float left = fminf(scale - of_bits(group.high[r] & 0xFFFF0000), 65536);
            group.low[r] = narrow_pair(left, left);
        }
    }
}

// Two weights, rounded to the type of x as the reference's are: see `numbers`.
DEVICE u32 weights(
    const Words& words, const Layout& layout, const Group& group, int unit, int r, int other
) {
    float low, high;
    if (!FLOAT16 && BITS == 8) {  // a bfloat16's fraction has seven bits
        const u32 word = words.of_8[unit][r][other];
        const float minus = of_bits(group.minus[r]);
        low = sum_of(of_bits(select_bytes(word, 0x4B000000, layout.bytes[0])), minus);
        high = sum_of(of_bits(select_bytes(word, 0x4B000000, layout.bytes[1])), minus);
    } else {
        const u32 pair = numbers(words, layout, unit, r, other, group.minus[r]);
        if (IN_PAIRS && FLOAT16) return multiply_pairs(pair, group.high[r]);
        if (IN_PAIRS)
            return multiply_add_pairs(pair, group.high[r], multiply_pairs(pair, group.low[r]));
        low = FLOAT16 ? widen(pair & 0xFFFF) : of_bits(pair << 16);
        high = FLOAT16 ? widen(pair >> 16) : of_bits(pair & 0xFFFF0000);
    }
    if (OFFSETS && !WIDE) {  // an integer times a float16 is a float32, whose sum alone is rounded
        low = fused_multiply_add(low, group.scale[r], group.offset[r]);
        high = fused_multiply_add(high, group.scale[r], group.offset[r]);
    } else {
        low = product(low, group.scale[r]);
        high = product(high, group.scale[r]);
        if (OFFSETS) {
            low = sum_of(low, group.offset[r]);
            high = sum_of(high, group.offset[r]);
        }
    }
    return narrow_pair(low, high);
}
