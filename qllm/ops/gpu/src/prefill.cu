// y = x W^T + bias for the rows of a prompt, W packed as in qllm/ops/gpu/layout.py, by the matrix units
// of compute capability 9.0, which take weights from registers and x from shared memory.
//
// A block of threads takes OUTPUTS outputs, ROWS rows of x and a part of the inputs; a cluster of
// blocks has all parts, whose sums it adds up in their order. How many parts there are depends on the
// weight alone, and each adds up 16 inputs after the other: a row's sums are the same whatever is beside
// it, and whatever ROWS and OUTPUTS are.
//
// Eight warps multiply, two groups of four, or four where OUTPUTS is 64: a warp makes numbers of the
// words of its panel of 16 outputs, rounded as the reference's weights, which are operand A of its
// group's products. What runs asynchronously is the copies to shared memory, which four more warps start
// as stages become free, and the products: a warp makes the next 32 inputs' numbers while the last ones'
// are multiplied. Its next words it loads ahead, so that it does not wait for shared memory.
//
// The words of lane 4 g + t hold inputs 8 t to 8 t + 7 of each 32, while an operand takes 2 t and 2 t + 1
// of each 8: a lane reads the words of all four lanes with its g, and takes its pair from each. They
// are copied with a swizzle, so that lanes that read at once read from different banks.
//
// Constants: BITS, FLOAT16, ZEROS, OFFSETS, WIDE and GROUP as in decode.cu; ROWS: 64, 128, 192 or 256;
// OUTPUTS: 64 or 128; X_STAGES, of 64 inputs, and W_STAGES, of 128: what shared memory holds.

struct Arguments {
    TensorMap x;       // (rows, inputs), in tiles of (ROWS, 64)
    TensorMap q;       // (panels, blocks, 2 BITS, 128) bytes, in tiles of a block of a panel
    TensorMap scales;  // (groups, panels, 8, 2): of rows g and g + 8; in tiles of GROUPS and OUTPUTS
    TensorMap zeros;   // the same, u8; or offsets, of the type of the scales
    const u16* bias;   // (outputs), or null
    u16* y;            // (rows, outputs)
    // 2^32 over the blocks that share a scale where GROUP is 128, rounded up: a block times it, less
    // its lower 32 bits, is the block's group.
    i64 groups_of_a_block;
    int rows, outputs, blocks;
    int parts;  // of the inputs
};

#define CONSUMERS 8   // warps of the two groups that may multiply
#define X_PRODUCER 8  // the warps that start copies
#define W_PRODUCER 9  // the first one of those of the weight
#define W_PRODUCERS 3
#define PANELS_OF_BLOCK (OUTPUTS / 16)  // of threads: one for each warp that multiplies
#define X_BYTES (ROWS * 128)            // of a stage
#define Q_BYTES (256 * BITS)            // of a block of a panel
#define PANEL_BYTES ((Q_BYTES + 1023) / 1024 * 1024)  // of it in a stage, where the swizzle begins anew
#define SCALE_BYTES (WIDE ? 4 : 2)                    // of a scale or an offset
#define GROUPS (128 / GROUP)                          // of a block
#define SCALES_AT (PANELS_OF_BLOCK * PANEL_BYTES)     // in a stage
#define ZEROS_AT (SCALES_AT + GROUPS * OUTPUTS * SCALE_BYTES)
#define W_END (ZEROS_AT + GROUPS * OUTPUTS * (OFFSETS ? SCALE_BYTES : ZEROS ? 1 : 0))
#define W_BYTES ((W_END + 1023) / 1024 * 1024)
#define W_AT (X_STAGES * X_BYTES)
#define BARRIERS_AT (W_AT + W_STAGES * W_BYTES)
#define AT_ONCE 8  // rows that a warp adds up
#define SUMS_STRIDE (OUTPUTS + 4)  // numbers: four rows' are in different banks

// A float16 scale is the sum of two bfloat16, of 8 and of 3 bits. An integer of up to 6 bits times the
// second is a bfloat16, so that one fused operation more rounds the whole product, once.
#define IN_PAIRS (!OFFSETS && !WIDE && (FLOAT16 || BITS <= 6))

// Where registers are left by the sums of a tile's rows, words are loaded ahead.
#define AHEAD (ROWS < 256)
// Two addresses of a lane in place of one; of 7 bits there are most words, and no register is left.
#define ODD_APART (BITS >= 4 && BITS != 7)

// A ring's stage in use, and the parity of the phase in which it is full.
struct Stage {
    int index = 0;
    u32 parity = 0;
};

DEVICE void advance(Stage& stage, int count) {
    if (++stage.index == count) {
        stage.index = 0;
        stage.parity ^= 1;
    }
}

// Barriers of stages: full and empty ones of x, then of the weight.
DEVICE u32 x_full(u32 shared, int stage) { return shared + BARRIERS_AT + 8 * stage; }
DEVICE u32 x_empty(u32 shared, int stage) { return x_full(shared, X_STAGES + stage); }
DEVICE u32 w_full(u32 shared, int stage) { return x_full(shared, 2 * X_STAGES + stage); }
DEVICE u32 w_empty(u32 shared, int stage) { return w_full(shared, W_STAGES + stage); }

// Start the copies of a weight's blocks from first to end, as stages become empty: one producer's part.
DEVICE void produce_weight(
    const Arguments& from, u32 shared, int panel, int first, int end, int producer
) {
    Stage w;
#pragma unroll 1
    for (int block = first; block < end; ++block) {
        const u32 full = w_full(shared, w.index), to = shared + W_AT + w.index * W_BYTES;
        const int group =
            GROUP == 128 ? (int)((block * from.groups_of_a_block) >> 32) : block * GROUPS;
        wait(w_empty(shared, w.index), w.parity ^ 1);
        if (producer == 0) arrive_expecting(full, PANELS_OF_BLOCK * Q_BYTES + W_END - SCALES_AT);
#pragma unroll 1
        for (int i = producer; i < PANELS_OF_BLOCK; i += W_PRODUCERS)
            copy_tile(
                to + i * PANEL_BYTES, from.q, 0, ((panel + i) * from.blocks + block) * 2 * BITS, full
            );
        if (producer == 2) copy_tile(to + SCALES_AT, from.scales, panel * 16, group, full);
        if (producer == 1 && (ZEROS || OFFSETS))
            copy_tile(to + ZEROS_AT, from.zeros, panel * 16, group, full);
        advance(w, W_STAGES);
    }
}

// The same of x.
DEVICE void produce_x(const Arguments& from, u32 shared, int row, int first, int end) {
    Stage x;
#pragma unroll 1
    for (int k = first * 128; k < end * 128; k += 64) {
        const u32 full = x_full(shared, x.index);
        wait(x_empty(shared, x.index), x.parity ^ 1);
        arrive_expecting(full, X_BYTES);
        copy_tile(shared + x.index * X_BYTES, from.x, k, row, full);
        advance(x, X_STAGES);
    }
}

// A number as it is, of which the compiler cannot know that: it stays in a register, where it would
// otherwise be computed anew for each use.
DEVICE u32 opaque(u32 number) { return exchange(number, 0); }

// What a lane knows of the words that it reads: those of four lanes, of which it takes its own pairs.
struct Layout {
    // In a stage, of each of these lanes' words: in pieces of 16 bytes, the first one and all others an
    // even number of pieces away, and those between them; and in a piece of 8 bytes those of the first
    // and of the third lane, behind which the second and the fourth one's are.
    u32 even[4], odd[4], single[2];
    u32 turns[5];  // by how many bits, to the left, words of a width are turned
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
            layout.turns[width] = opaque((low - width * t) % 32);
            layout.masks[width] = opaque((((1u << width) - 1) * 0x10001u << low) + zero);
            low += width;
        }
    layout.bytes[0] = opaque(FLOAT16 ? 0x5250 + t % 2 * 0x0101u : 0x7650 + t % 2);
    layout.bytes[1] = opaque(0x7652 + t % 2);
    layout.power = opaque((FLOAT16 ? 0x64006400 : 0x43004300) + zero);
    return layout;
}

// Where the words of a lane are in the pieces of an even or an odd number.
DEVICE u32 place(const Layout& layout, int odd, int other) {
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
                        stage + place(layout, half, other) + r * 1024 + half * 512 + unit * 8
                    );
            if (BITS & 4)
                load_shared(
                    words.of_4[half][r][other],
                    stage + place(layout, r, other) + r * 512 + half * 8, 2
                );
        }
        if (BITS & 2 && half == 0)
            load_shared(words.of_2[other], stage + place(layout, 0, other) + (BITS & 4) * 256, 4);
        if (BITS & 1 && half == 0) {
            const u8* from = stage + layout.single[other / 2] + (BITS & 6) * 256;
            load_shared(words.of_1[other], from + other % 2 * 8, 2);
        }
    }
}

// Turn the words of two units so that the bits of a lane's own pair of the first unit that a word has
// are where an integer has them.
DEVICE void turn_words(Words& words, const Words& from, int half, const Layout& layout) {
#pragma unroll
    for (int other = 0; other < 4; ++other)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (BITS == 8) words.of_8[half * 2 + i][r][other] = from.of_8[half * 2 + i][r][other];
                if (BITS & 4)
                    words.of_4[half][r][other][i] =
                        rotate_left(from.of_4[half][r][other][i], layout.turns[4]);
                if (BITS & 2 && half == 0)
                    words.of_2[other][r * 2 + i] =
                        rotate_left(from.of_2[other][r * 2 + i], layout.turns[2]);
            }
            if (BITS & 1 && half == 0)
                words.of_1[other][r] = rotate_left(from.of_1[other][r], layout.turns[1]);
        }
}

// What added to a pair as `numbers` begins takes its zero off, which is this byte of a word.
DEVICE u32 less_zero(u32 zeros, int byte) {
    if (FLOAT16) return select_bytes(zeros, 0xE4, 0x4040 + byte * 0x0101);   // -(1024 + zero)
    if (BITS == 8) return select_bytes(zeros, 0xCB000000, 0x7650 + byte);    // -(2^23 + zero), a float32
    return select_bytes(zeros, 0xC3, 0x4040 + byte * 0x0101);                // -(128 + zero)
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

// Of rows g and g + 8 as they lie in memory: scales and offsets in a word or, where WIDE, two, and zeros
// in the lower bytes of one.
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
    found.zeros = ZEROS ? *(const u16*)(stage + ZEROS_AT + at) : OFFSETS ? 0 : 0x0101u << (BITS - 1);
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

// Load what a block begins with, once it is there.
DEVICE void load_first(
    Words& words, Scales* scales, const u8* memory, u32 shared, const Stage& w,
    const Layout& layout, int at
) {
    const u8* stage = memory + W_AT + w.index * W_BYTES;
    wait(w_full(shared, w.index), w.parity);
    load_words(words, stage, 0, layout);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        if (AHEAD || i == 0) load_scales(scales[i], stage, i * OUTPUTS + at);
}

// All of a stage has been loaded.
DEVICE void release_weight(u32 shared, Stage& w, int lane) {
    warp_barrier();
    if (lane == 0) arrive(w_empty(shared, w.index));
    advance(w, W_STAGES);
}

// A warp has done with a stage, if it is one.
DEVICE void release(u32 empty, int lane) {
    if (lane == 0 && empty) arrive(empty);
}

// A multiplying warp: the sums of its group's four panels. That of output 8 i + g of its panel and row
// 8 j + 2 t + k is at 4 j + 2 i + k.
DEVICE void consume(
    float* sums, const u8* memory, u32 shared, int warp, int blocks, u32 nothing, int lane
) {
    Stage x, w;
    const u64 described = describe(shared);
    u32 a[2][2][4], to_empty = 0;
    const Layout layout = layout_of(warp, lane, nothing);
    const int at = (int)opaque(warp * 16 + lane / 4 * 2);
    Words loaded, words;
    Scales next_scales[4], scales[4];
    if (AHEAD) load_first(loaded, next_scales, memory, shared, w, layout, at);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
        const u8* stage = memory + W_AT + w.index * W_BYTES;
        Group group;
        if (!AHEAD) load_first(loaded, next_scales, memory, shared, w, layout, at);
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) scales[i] = next_scales[i];
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            if (!AHEAD && unit == 2) load_words(loaded, stage, 1, layout);
            if (unit % 2 == 0) turn_words(words, loaded, unit / 2, layout);
            if (unit * 32 % GROUP == 0) {
                const int i = unit * 32 / GROUP;
                if (!AHEAD && i > 0) load_scales(scales[i], stage, i * OUTPUTS + at);
                set_group(group, scales[i]);
            }
            if (!AHEAD && unit == (GROUP == 32 ? 3 : 2)) release_weight(shared, w, lane);
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    a[unit % 2][step][r] =
                        weights(words, layout, group, unit, r % 2, step * 2 + r / 2);
            if (unit % 2 == 0) wait(x_full(shared, x.index), x.parity);
            const u64 operand = described + x.index * (X_BYTES / 16);
            begin_products();
#pragma unroll
            for (int step = 0; step < 2; ++step)
                multiply_group(
                    sums, a[unit % 2][step], operand + (unit % 2 * 2 + step) * 2,  // 32 bytes each
                    block + unit + step > 0
                );
            commit_products();
            if (AHEAD && unit == 0) load_words(loaded, stage, 1, layout);
            if (AHEAD && unit == 2) {
                release_weight(shared, w, lane);
                if (block + 1 < blocks)
                    load_first(loaded, next_scales, memory, shared, w, layout, at);
            }
            wait_for_products<1>();
            if (unit % 2 == 0) {  // those with the stage before this one have ended
                release(to_empty, lane);
            } else {
                to_empty = x_empty(shared, x.index);
                advance(x, X_STAGES);
            }
        }
    }
    wait_for_products<0>();
}

// Sums of all parts of a slice of the rows, in the parts' order, and what follows. A warp takes a row,
// a lane of it four outputs.
DEVICE void finish(
    const Arguments& from, u32 shared, int part, int panel, int row, int warp, int lane
) {
    if (lane * 4 >= OUTPUTS) return;
    const int slice = ROWS / from.parts, output = panel * 16 + lane * 4;
    float bias[4] = {};
    for (int k = 0; k < 4; ++k)
        if (from.bias && output + k < from.outputs) bias[k] = widen(from.bias[output + k]);
#pragma unroll 1
    for (int first = warp; first < slice; first += AT_ONCE * CONSUMERS) {
        float sums[AT_ONCE][4], other[AT_ONCE][4];
        const u32 at = shared + ((part * slice + first) * SUMS_STRIDE + lane * 4) * 4;
        const u32 next_row = CONSUMERS * SUMS_STRIDE * 4;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i * CONSUMERS < slice) load4_of_block(sums[i], at + i * next_row, 0);
#pragma unroll 1
        for (int next = 1; next < from.parts; ++next) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i * CONSUMERS < slice)
                    load4_of_block(other[i], at + i * next_row, next);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[i][k] += other[i][k];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int in_slice = first + i * CONSUMERS, target = row + part * slice + in_slice;
            if (in_slice >= slice || target >= from.rows) continue;
            u16* to = from.y + (i64)target * from.outputs + output;
            u16 y[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) y[k] = narrow(from.bias ? sums[i][k] + bias[k] : sums[i][k]);
            if (from.outputs % 4 == 0) {
                if (output < from.outputs) store2(to, y[0] | (u32)y[1] << 16, y[2] | (u32)y[3] << 16);
                continue;
            }
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (output + k < from.outputs) to[k] = y[k];
        }
    }
}

KERNEL prefill(PARAMETER Arguments from) {
    u8* memory = shared_memory();
    const u32 shared = address_of(memory);
    const int lane = (int)(thread_index() % 32), warp = (int)(thread_index() / 32);
    const int part = chunk_index() % from.parts, row = chunk_index() / from.parts * ROWS;
    const int panel = panel_index() * PANELS_OF_BLOCK;
    const int first = (int)((i64)from.blocks * part / from.parts);
    const int end = (int)((i64)from.blocks * (part + 1) / from.parts);
    if (thread_index() == 0) {
        for (int stage = 0; stage < X_STAGES; ++stage) {
            init_barrier(x_full(shared, stage), 1);
            init_barrier(x_empty(shared, stage), PANELS_OF_BLOCK);
        }
        for (int stage = 0; stage < W_STAGES; ++stage) {
            init_barrier(w_full(shared, stage), 1);
            init_barrier(w_empty(shared, stage), PANELS_OF_BLOCK);
        }
        publish_barriers();
    }
    cluster_barrier_relaxed();
    if (warp >= CONSUMERS) {
        give_up_registers();
        if (warp == X_PRODUCER && lane == 0) produce_x(from, shared, row, first, end);
        if (warp >= W_PRODUCER && lane == 0)
            produce_weight(from, shared, panel, first, end, warp - W_PRODUCER);
        warp_barrier();
        cluster_barrier();
        cluster_barrier_relaxed();
        return;
    }
    take_registers();
    float sums[MAX_ROWS / 2];
    if (warp < PANELS_OF_BLOCK)
        consume(sums, memory, shared, warp, end - first, (u32)from.parts >> 31, lane);
    consumers_barrier();  // all is read of what the sums now take the place of
    float* to = (float*)memory + lane % 4 * 2 * SUMS_STRIDE + warp * 16 + lane / 4;
    if (warp < PANELS_OF_BLOCK)
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i)
            to[(i / 4 * 8 + i % 2) * SUMS_STRIDE + i % 4 / 2 * 8] = sums[i];
    cluster_barrier();
    finish(from, shared, part, panel, row, warp, lane);
    warp_barrier();
    cluster_barrier_relaxed();  // one's sums are there until all have read them
}
