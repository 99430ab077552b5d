// y = x W^T + bias for the few rows of a decode step, W packed as in qllm/ops/gpu/layout.py.
//
// PANELS panels of 16 outputs and up to 8 TILES rows of x are taken by WARPS warps, in turns at the
// panels' blocks of 128 inputs; what they find is added up in the order of the warps. The number of
// rows decides on no sum: neither on what is added up, nor in which order.
//
// These warps are one block of threads, or a cluster's PARTS, of which each adds up its part of the
// outputs. Smaller blocks begin sooner: when one in front of them has ended, and not two.
//
// A lane's part of a block lies in memory as it is loaded, 16 bytes at once and 512 consecutive
// ones by a warp, and as operand A of the products wants it: of rows g and g + 8 of the panel, for
// lane 4 g + t, inputs 8 t to 8 t + 7 of each 32. Nothing goes through shared memory. Of x, operand
// B, a lane loads the same inputs of row g.
//
// Constants: BITS; FLOAT16: the type of x, bias and y, else bfloat16; ZEROS: there are zeros, else
// each is 2^(BITS - 1); OFFSETS: in their place are numbers of the type of the scales, which are
// added to q times its scale; WIDE: scales are float32, else float16; GROUP: inputs of a block that
// share a scale, 32, 64 or 128; WARPS; DEPTH: blocks that a warp has asked for in advance; TILES;
// PANELS; WHOLE: inputs is a multiple of 128; PARTS; X_AHEAD: a block's x is asked for along with
// the block, for which there are registers where few panels are taken; RESIDENT: blocks of threads
// for which a multiprocessor is to have registers, or 0.

// Units of 32 inputs of which a lane loads its part of x at once: as many as there are
// registers left for.
#define UNITS (X_AHEAD || TILES == 1 ? 4 : TILES == 2 ? 2 : 1)

#define OWN_TILES (TILES * PANELS / PARTS)  // of 16 outputs and 8 rows, which a block adds up

struct Arguments {
    const u16* x;       // (rows, inputs), rows x_stride apart
    const u32* q;       // (panels, blocks, 64 BITS)
    const void* scales;  // (groups, panels, 8, 2): of rows g and g + 8
    const void* zeros;  // the same, u8; or offsets, of the type of the scales
    const u16* bias;    // (outputs), or null
    u16* y;             // (rows, outputs)
    i64 x_stride;       // a multiple of 8, as inputs is
    int rows, inputs, outputs, panels, blocks, groups;
    // 2^32 over the blocks that share a scale where GROUP is 128, rounded up, or 0 where each has
    // its own: a block times it, less its lower 32 bits, is the block's group.
    u32 groups_of_a_block;
    u32 prefetched;  // bytes of a panel up to which it is asked for into the L2, a multiple of 16
};

// Of a block, what a lane holds.
struct Part {
    u32 words[2 * MAX_BITS];            // by parts of 8, 4, 2, 1 bits; row g, then row g + 8
    u32 scales[MAX_SCALES][2], offsets[MAX_SCALES][2];  // as they lie: `of_row`
    u32 zeros[MAX_SCALES];              // that of row g + 8 in the higher byte
};

// Of some numbers of bits the parts are put together first, several pairs at once, in wider fields
// whose upper bits are anything: one part is left for each pair. Of five and six bits that takes
// more shifts than it saves where a fraction has room for several slots.
#define JOINED (BITS == 3 || BITS == 7 || (!FLOAT16 && (BITS == 5 || BITS == 6)))
#define FIELDS (!JOINED ? BITS : BITS < 4 ? 4 : 8)  // widths of what is put into fractions

DEVICE int widest() { return FIELDS & 8 ? 8 : FIELDS & 4 ? 4 : FIELDS & 2 ? 2 : 1; }

// Words of all lanes that come before those of `width` bits, the wider ones being first.
DEVICE int words_before(int width) { return (BITS & ~(2 * width - 1)) * 64; }

// Two scales, or two offsets: those of rows g and g + 8, in two words or in one.
DEVICE void load_two(u32* to, const void* from, u32 at) {
    if (WIDE)
        load2(to, (const u32*)from + at);
    else
        to[0] = *(const u32*)((const u16*)from + at);
}

DEVICE float of_row(const u32* both, int second) {
    return WIDE ? of_bits(both[second]) : from_float16(both[0] >> 16 * second & 0xFFFF);
}

DEVICE void load(Part& part, const Arguments& from, int panel, int block, u32 lane) {
    const u32* q = from.q + ((i64)panel * from.blocks + block) * (64 * BITS);
    u32* to = part.words;
#pragma unroll
    for (int width = 8; width > 1; width /= 2)
        if (BITS & width) {
#pragma unroll
            for (int piece = 0; piece < width / 2; ++piece, to += 4)
                load4(to, q + words_before(width) + piece * 128 + lane * 4);
        }
    if (BITS & 1) load2(to, q + words_before(1) + lane * 2);
#pragma unroll
    for (int i = 0; i < 128 / GROUP; ++i) {
        u32 group = block * (128 / GROUP) + i;
        if (GROUP == 128 && from.groups_of_a_block)
            group = multiply_high(block, from.groups_of_a_block);
        const u32 last = from.groups - 1;
        group = group < last ? group : last;  // behind the last, x is 0
        // There are fewer scales than 2^32: one for 32 inputs, and fewer weights than 2^37.
        const u32 at = (group * from.panels + panel) * 16 + lane / 4 * 2;
        load_two(part.scales[i], from.scales, at);
        if (OFFSETS) load_two(part.offsets[i], from.zeros, at);
        if (ZEROS) part.zeros[i] = *(const u16*)((const u8*)from.zeros + at);
    }
}

// An integer of a part of `width` bits, put into the fraction of a power of two, makes their sum;
// and where in the fraction it lies says which power it is to be. So fields that lie beside each
// other in a word are taken without shifting each to the same bit: a part has several slots,
// `width` bits apart. Where the first part has more than one, the others go along with it: what
// takes the zero off then takes their powers off as well. Else they have slots of their own.
//
// FRACTION: bits of a fraction of the type of x. `low`: what the part's lowest bit weighs: 2^low.

#define FRACTION (FLOAT16 ? 10 : 7)
#define MAX_SLOTS 4  // for each is a mask in a register, and a number that takes zeros off

DEVICE int at_most(int count) { return count < MAX_SLOTS ? count : MAX_SLOTS; }

// Those of the first part, beside which the whole zero has to lie in a fraction.
DEVICE int first_slots() { return at_most((FRACTION - BITS) / widest() + 1); }

DEVICE bool together() { return first_slots() > 1; }

// The lowest of the bits at which fields of a part are; the largest float16 power of two is 2^15.
DEVICE int lowest_bit(int width, int low) {
    if (low && together()) return FRACTION - first_slots() * width;
    return FLOAT16 && low > 5 ? low - 5 : 0;
}

DEVICE int slots(int width, int low) {
    if (!low || together()) return first_slots();
    return at_most((FRACTION - lowest_bit(width, low)) / width);
}

// Two numbers 2^exponent of the type of x.
DEVICE u32 powers(int exponent) {
    return (FLOAT16 ? (15 + exponent) << 10 : (127 + exponent) << 7) * 0x10001u;
}

struct Masks {
    u32 of[4][MAX_SLOTS];  // of parts of 1, 2, 4 and 8 bits
};

DEVICE int index_of(int width) { return width == 8 ? 3 : width / 2; }

DEVICE Masks masks(const Arguments& from) {
    Masks found = {};
    int low = 0;
#pragma unroll
    for (int width = 8; width >= 1; width /= 2)
        if (FIELDS & width) {
#pragma unroll
            for (int slot = 0; slot < MAX_SLOTS; ++slot)
                if (slot < slots(width, low)) {
                    const int bit = lowest_bit(width, low) + slot * width;
                    const u32 mask = (((1u << (JOINED ? BITS : width)) - 1) * 0x10001u) << bit;
                    // A number that the compiler knows it would load anew for each use.
                    found.of[index_of(width)][slot] = from.rows > 0 ? mask : 0;
                }
            low += width;
        }
    return found;
}

// A bfloat16's fraction is too short for eight bits.
#define IN_FLOAT32 (!FLOAT16 && BITS == 8)

// What added to the first part takes the zero off, for each slot of it: an integer of no more bits
// than a number of the type of x has.
DEVICE void less_zero(u32* minus, u32 zero) {
    const float with_zero = of_bits(0x4B000000 | zero);  // 2^23 + zero
    if (IN_FLOAT32) {
        minus[0] = bits_of(-with_zero);
        return;
    }
#pragma unroll
    for (int slot = 0; slot < MAX_SLOTS; ++slot)
        if (slot < first_slots()) {
            int power = 1 << (FRACTION - slot * widest()), low = 0;
#pragma unroll
            for (int width = 8; width >= 1; width /= 2)
                if (FIELDS & width) {
                    if (low && together())
                        power += 1 << (FRACTION + low - lowest_bit(width, low) - slot * width);
                    low += width;
                }
            const float less = sum_of((float)((1 << 23) - power), -with_zero);
            minus[slot] = narrow_pair(less, less);
        }
}

DEVICE u32 shift_up(u32 word, int bits) { return bits < 0 ? word >> -bits : word << bits; }

// Of each half of a word, `count` bits from one on to the lower byte and as many behind them to the
// upper one, from bit `to` on of each. Other bits are anything.
DEVICE u32 spread(u32 word, int from, int count, int to) {
    return choose(
        shift_up(word, to - from), shift_up(word, to + 8 - from - count), 0x00FF00FF
    );
}

// Where parts are JOINED, the word with the field of a pair: of those of the widest part's word
// there is one for the even pairs, and one for the others.
DEVICE u32 join(const u32* words, int half, int pair) {
    const int odd = pair % 2;
    if (BITS == 3) {
        const u32 fours = spread(words[4 + half], pair / 8 * 8, 4, 2);
        const u32 twos = choose(fours, fours << 2, 0x0F0F0F0F);  // from bit 2 on of each four
        return choose(words[half * 2 + pair / 8] >> 2 * odd, twos >> odd, 0x33333333);
    }
    u32 upper = 0;
    if (BITS & 2) upper = spread(words[8 + half * 2 + pair / 8], pair / 4 % 2 * 8, 4, 4) >> 2 * odd;
    if (BITS & 1) {
        const u32 word = words[2 * (BITS & 6) + half];
        const u32 last = spread(word, pair / 4 * 4, 2, (BITS & 2) + 4) >> odd;
        upper = BITS & 2 ? choose(upper, last, 0x3F3F3F3F) : last;
    }
    return choose(words[half * 4 + pair / 4] >> 4 * odd, upper, 0x0F0F0F0F);
}

// q - zero of two inputs, exactly: the pair with this index of the 16 that a lane has of a row.
DEVICE u32 numbers(const u32* words, const Masks& masks, int half, int pair, const u32* minus) {
    if (IN_FLOAT32) {
        const u32 word = words[half * 8 + pair / 2];
        const float low = of_bits(byte_of(word, pair % 2, 0x4B000000));
        const float high = of_bits(byte_of(word, pair % 2 + 2, 0x4B000000));
        const float less = of_bits(minus[0]);
        return narrow_pair(sum_of(low, less), sum_of(high, less));
    }
    u32 found = 0;
    int low = 0;
#pragma unroll
    for (int width = 8; width >= 1; width /= 2)
        if (FIELDS & width) {
            const int at = 2 * (BITS & ~(2 * width - 1)) + half * width + pair / (16 / width);
            const u32 word = JOINED ? join(words, half, pair) : words[at];
            const int index = JOINED ? pair % (32 / width) / 2 : pair % (16 / width);
            const int slot = JOINED ? index % first_slots()
                             : together() ? pair % (16 / widest()) % first_slots()
                                          : index % slots(width, low);
            const int bit = lowest_bit(width, low) + slot * width, shift = index * width - bit;
            const u32 own = powers(FRACTION + low - bit);
            const u32 mask = masks.of[index_of(width)][slot];
            const u32 part = and_or(shift < 0 ? word << -shift : word >> shift, mask, own);
            if (low == 0)
                found = add_pairs(part, minus[slot]);
            else
                found = add_pairs(found, together() ? part : add_pairs(part, 0x80008000 | own));
            low += width;
        }
    return found;
}

// Two values times their scale plus an offset, each rounded to the type of x as the reference's
// are: q alone would give other infinities than the weight does.
DEVICE u32 with_offset(u32 pair, float scale, float offset) {
    const float low = sum_of(product(widen(pair & 0xFFFF), scale), offset);
    const float high = sum_of(product(widen(pair >> 16), scale), offset);
    return narrow(low) | (u32)narrow(high) << 16;
}

// Of x, what a lane multiplies some units' products by: inputs 8 t to 8 t + 7 of row g of each
// tile. Behind the last row it is that one again, whose results are not kept.
DEVICE void load_x(
    u32 (*x)[MAX_TILES][4], const Arguments& from, const u16* const* rows, int first, int count,
    int block
) {
    const u16* in_block[MAX_TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) in_block[tile] = rows[tile] + (i64)block * 128;
#pragma unroll
    for (int unit = first; unit < first + count; ++unit)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            u32* to = x[unit][tile];
            if (!WHOLE) to[0] = to[1] = to[2] = to[3] = 0;
            if (WHOLE || block * 128 + unit * 32 + (int)(thread_index() % 4 * 8) < from.inputs)
                load4_cached(to, in_block[tile] + unit * 32);
        }
}

DEVICE void multiply_block(
    float (*total)[MAX_TILES][4], const Part* parts, u32 (*x_ahead)[MAX_TILES][4],
    const Arguments& from, const u16* const* rows, const Masks& masks, int block
) {
    u32 own_x[4][MAX_TILES][4];
    u32 (*const x)[MAX_TILES][4] = X_AHEAD ? x_ahead : own_x;
    float sums[MAX_PANELS][MAX_TILES][4];
    u32 minus[MAX_PANELS][2][MAX_SLOTS];
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
        // All units' x at once hide how long one takes, where there are registers for them.
        if (!X_AHEAD && unit % UNITS == 0) load_x(x, from, rows, unit, UNITS, block);
        const int i = unit * 32 / GROUP;
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
            const Part& part = parts[panel];
            if (unit * 32 % GROUP == 0) {
                const u32 middle = OFFSETS ? 0 : 1u << (BITS - 1);
                const u32 zeros = ZEROS ? part.zeros[i] : middle * 0x101u;
                less_zero(minus[panel][0], zeros & 0xFF);
                less_zero(minus[panel][1], zeros >> 8);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                    for (int c = 0; c < 4; ++c) sums[panel][tile][c] = 0;
            }
#pragma unroll
            for (int pair = 0; pair < 4; pair += 2) {
                u32 a[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    a[r] = numbers(
                        part.words, masks, r % 2, unit * 4 + pair + r / 2, minus[panel][r % 2]
                    );
                    if (OFFSETS)
                        a[r] = with_offset(
                            a[r], of_row(part.scales[i], r % 2), of_row(part.offsets[i], r % 2)
                        );
                }
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
                    multiply(sums[panel][tile], a, x[unit][tile][pair], x[unit][tile][pair + 1]);
            }
            if ((unit + 1) * 32 % GROUP == 0) {
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        const float scale = OFFSETS ? 1 : of_row(part.scales[i], c / 2);
                        total[panel][tile][c] =
                            fused_multiply_add(sums[panel][tile][c], scale, total[panel][tile][c]);
                    }
            }
        }
    }
}

DEVICE void load_panels(Part* parts, const Arguments& from, int first_panel, int block, u32 lane) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        // Behind the last panel it is the last one again, whose results are not kept.
        const int wanted = first_panel + panel;
        load(parts[panel], from, wanted < from.panels ? wanted : from.panels - 1, block, lane);
    }
}

// What is read behind the first blocks is asked for into the L2 before the wait for the kernel in
// front: meanwhile the GPU's memory would have next to nothing to do.
DEVICE void prefetch_panels(const Arguments& from, int first_panel) {
    const u32 bytes = from.blocks * (256 * BITS), begin = DEPTH * WARPS * (256 * BITS);
    const u32 end = from.prefetched < bytes ? from.prefetched : bytes;
    const int own = first_panel + (int)thread_index();
    if ((int)thread_index() < PANELS && own < from.panels && begin < end)
        prefetch_range((const u8*)from.q + (i64)own * bytes + begin, end - begin);
#pragma unroll 1
    for (int i = (int)thread_index(); i < from.groups * PANELS; i += OWN_WARPS * 32) {
        const int panel = first_panel + i % PANELS;
        if (panel >= from.panels) continue;
        const u32 at = ((u32)(i / PANELS) * from.panels + panel) * 16;
        prefetch_line((const u8*)from.scales + (i64)at * (WIDE ? 4 : 2));
        if (OFFSETS) prefetch_line((const u8*)from.zeros + (i64)at * (WIDE ? 4 : 2));
        if (ZEROS) prefetch_line((const u8*)from.zeros + at);
    }
}

KERNEL decode(Arguments from) {
    const u32 lane = thread_index() % 32;
    const int part = chunk_index() % PARTS, warp = (int)(thread_index() / 32) * PARTS + part;
    const int first_panel = panel_index() * PANELS, first_row = chunk_index() / PARTS * (8 * TILES);
    let_next_begin();
    if (PARTS > 1) arrive_in_cluster();
    Part ahead[MAX_DEPTH][MAX_PANELS];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (warp + d * WARPS < from.blocks)
            load_panels(ahead[d], from, first_panel, warp + d * WARPS, lane);
    if (from.prefetched && chunk_index() == 0) prefetch_panels(from, first_panel);
    const Masks own_masks = masks(from);
    const u16* rows[MAX_TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int wanted = first_row + tile * 8 + (int)lane / 4;
        const int row = wanted < from.rows ? wanted : from.rows - 1;
        rows[tile] = from.x + row * from.x_stride + lane % 4 * 8;
    }
    wait_for_previous();
    u32 x[MAX_DEPTH][4][MAX_TILES][4];
    if (X_AHEAD)
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (warp + d * WARPS < from.blocks) load_x(x[d], from, rows, 0, 4, warp + d * WARPS);
    float total[MAX_PANELS][MAX_TILES][4] = {};
    for (int first = warp; first < from.blocks; first += DEPTH * WARPS) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int block = first + d * WARPS, next = block + DEPTH * WARPS;
            if (block < from.blocks) {
                multiply_block(total, ahead[d], x[d], from, rows, own_masks, block);
                // Into the registers that are free now: into others they would have to be moved,
                // and what moves them waits for them.
                if (next < from.blocks) {
                    load_panels(ahead[d], from, first_panel, next, lane);
                    if (X_AHEAD) load_x(x[d], from, rows, 0, 4, next);
                }
            }
        }
    }

    // To the block that adds them up.
    float* const sums = shared_numbers();  // (WARPS, OWN_TILES, 32, 4)
    if (PARTS > 1) wait_for_cluster();     // all have begun
#pragma unroll
    for (int i = 0; i < PANELS * TILES; ++i)
        store4_in_block(
            sums + (warp * OWN_TILES + i % OWN_TILES) * 128 + lane * 4, i / OWN_TILES,
            total[i / TILES][i % TILES]
        );
    if (PARTS > 1) {
        arrive_in_cluster();
        wait_for_cluster();
    } else {
        barrier();
    }
#pragma unroll 1
    for (int at = (int)thread_index(); at < 128 * OWN_TILES; at += 32 * OWN_WARPS) {
        float sum = sums[at];
        for (int other = 1; other < WARPS; ++other) sum += sums[other * (128 * OWN_TILES) + at];
        const int i = part * OWN_TILES + at / 128, who = at / 4 % 32, c = at % 4;
        const int row = first_row + i % TILES * 8 + who % 4 * 2 + c % 2;
        const int output = (first_panel + i / TILES) * 16 + who / 4 + c / 2 * 8;
        if (row < from.rows && output < from.outputs) {
            if (from.bias) sum += widen(from.bias[output]);
            from.y[(i64)row * from.outputs + output] = narrow(sum);
        }
    }
}
