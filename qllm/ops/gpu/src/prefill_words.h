// The words of a stage of prefill.cu's weight, and the integers in them.
//
// The words of lane 4 g + t hold inputs 8 t to 8 t + 7 of each 32, while an operand takes
// 2 t and 2 t + 1 of each 8: a lane reads the words of all four lanes with its g, and takes its
// pair from each. They are copied with a swizzle, so that lanes that read at once read from
// different banks.

#define PANELS_OF_BLOCK (OUTPUTS / 16)  // of threads: one for each warp that multiplies
#define Q_BYTES (256 * BITS)            // of a block of a panel
// Of it in a stage, where the swizzle begins anew.
#define PANEL_BYTES ((Q_BYTES + 1023) / 1024 * 1024)

// Two addresses of a lane in place of one; of 7 bits there are most words, and no register is left.
#define ODD_APART (BITS >= 4 && BITS != 7)

// A number as it is, of which the compiler cannot know that: it stays in a register, where it would
// otherwise be computed anew for each use.
DEVICE u32 opaque(u32 number) { return exchange(number, 0); }

// What a lane knows of the words that it reads: those of four lanes, of which it takes its
// own pairs.
struct Layout {
    // In a stage, of each of these lanes' words: in pieces of 16 bytes, the first one and all
    // others an even number of pieces away, and those between them; and in a piece of 8 bytes those
    // of the first and of the third lane, behind which the second and the fourth one's are.
    u32 even[4], odd[4], single[2];
    u32 rotations[5];  // by how many bits, to the left, words of a width are rotated
    u32 masks[5];  // of bits of a width in turned words
    u32 bytes[2];  // which bytes of a word of 8 bits are its own
    u32 power;     // pairs of powers of two, in whose fractions integers are put
};

// `nothing` is zero, which the compiler does not know.
DEVICE Layout layout_of(int warp, int lane, u32 nothing) {
    Layout layout;
    const u32 g = lane / 4, t = lane % 4, panel = warp * PANEL_BYTES, zero = nothing & lane;
#pragma unroll
    for (u32 other = 0; other < 4; ++other) {
        // Pieces of 16 bytes of a row of 128 are XORed with the row's last three bits.
        u32 at = g / 2 * 128 + (g % 2 * 4 + (other ^ g / 2)) * 16;
        if (BITS == 8) at += t / 2 * 4;
        if (BITS > 1) layout.even[other] = opaque(panel + at);
        if (ODD_APART) layout.odd[other] = opaque(panel + (at ^ 64));
        at = g / 4 * 128 + ((g % 4 * 2 + other / 2) ^ g / 4) * 16;
        if (BITS & 1 && other % 2 == 0)
            layout.single[other / 2] = opaque(panel + (at ^ (BITS & 2) * 32));
    }
    u32 low = 0;
#pragma unroll
    for (int width = 4; width >= 1; width /= 2)
        if (BITS & width) {
            layout.rotations[width] = opaque((low - width * t) % 32);
            layout.masks[width] = opaque((((1u << width) - 1) * 0x10001u << low) + zero);
            low += width;
        }
    layout.bytes[0] = opaque(FLOAT16 ? 0x5250 + t % 2 * 0x0101u : 0x7650 + t % 2);
    layout.bytes[1] = opaque(0x7652 + t % 2);
    layout.power = opaque((FLOAT16 ? 0x64006400 : 0x43004300) + zero);
    return layout;
}

// Where the words of a lane are in the pieces of an even or an odd number.
DEVICE u32 lane_offset(const Layout& layout, int odd, int other) {
    if (ODD_APART) return odd ? layout.odd[other] : layout.even[other];
    return layout.even[other] ^ odd * 64;
}

// What a lane reads of a block: of each of four lanes, as many bits of each value as a word has.
struct Words {
    u32 of_8[4][2][4];     // of each unit of 32 inputs, of rows g and g + 8, of each lane
    u32 of_4[2][2][4][2];  // of each two units, of rows g and g + 8, of each lane, of both units
    u32 of_2[4][4];        // of each lane, of rows g and g + 8, of each two units
    u32 of_1[4][2];        // of each lane, of rows g and g + 8, of all four units
};

// Load the words of two units; with the first ones', words of one and of two bits come as a whole.
DEVICE void load_words(Words& words, const u8* stage, int half, const Layout& layout) {
#pragma unroll
    for (int other = 0; other < 4; ++other) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int unit = 0; unit < 2; ++unit)
                if (BITS == 8)
                    words.of_8[half * 2 + unit][r][other] = *(const u32*)(
                        stage + lane_offset(layout, half, other) + r * 1024 + half * 512 + unit * 8
                    );
            if (BITS & 4)
                load_shared(
                    words.of_4[half][r][other],
                    stage + lane_offset(layout, r, other) + r * 512 + half * 8, 2
                );
        }
        if (BITS & 2 && half == 0)
            load_shared(
                words.of_2[other], stage + lane_offset(layout, 0, other) + (BITS & 4) * 256, 4
            );
        if (BITS & 1 && half == 0) {
            const u8* from = stage + layout.single[other / 2] + (BITS & 6) * 256;
            load_shared(words.of_1[other], from + other % 2 * 8, 2);
        }
    }
}

// Rotate the words of two units so that the bits of a lane's own pair of the first unit that a word
// has are where an integer has them.
DEVICE void rotate_words(Words& words, const Words& from, int half, const Layout& layout) {
#pragma unroll
    for (int other = 0; other < 4; ++other)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (BITS == 8)
                    words.of_8[half * 2 + i][r][other] = from.of_8[half * 2 + i][r][other];
                if (BITS & 4)
                    words.of_4[half][r][other][i] =
                        rotate_left(from.of_4[half][r][other][i], layout.rotations[4]);
                if (BITS & 2 && half == 0)
                    words.of_2[other][r * 2 + i] =
                        rotate_left(from.of_2[other][r * 2 + i], layout.rotations[2]);
            }
            if (BITS & 1 && half == 0)
                words.of_1[other][r] = rotate_left(from.of_1[other][r], layout.rotations[1]);
        }
}

// What added to a pair as `numbers` begins takes its zero off, which is this byte of a word.
DEVICE u32 less_zero(u32 zeros, int byte) {
    if (FLOAT16) return select_bytes(zeros, 0xE4, 0x4040 + byte * 0x0101);  // -(1024 + zero)
    // As a float32, -(2^23 + zero).
    if (BITS == 8) return select_bytes(zeros, 0xCB000000, 0x7650 + byte);
    return select_bytes(zeros, 0xC3, 0x4040 + byte * 0x0101);  // -(128 + zero)
}

// q - zero of two inputs, exactly: an integer put into the lowest bits of a power of two's fraction
// makes their sum. They are the pair of the lane `other` in a unit.
DEVICE u32 numbers(
    const Words& words, const Layout& layout, int unit, int r, int other, u32 minus
) {
    u32 q = layout.power;
    if (BITS == 8) q = select_bytes(words.of_8[unit][r][other], q, layout.bytes[0]);
    if (BITS & 4) q = and_or(words.of_4[unit / 2][r][other][unit % 2], layout.masks[4], q);
    if (BITS & 2) {
        const u32 word = words.of_2[other][r * 2 + unit / 2];
        q = and_or(rotate_left(word, 32 - unit % 2 * 8), layout.masks[2], q);
    }
    if (BITS & 1) {
        const u32 word = words.of_1[other][r];
        q = and_or(rotate_left(word, 32 - unit * 4), layout.masks[1], q);
    }
    return add_pairs(q, minus);
}
