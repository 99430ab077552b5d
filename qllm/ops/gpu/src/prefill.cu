// y = x W^T + bias for the rows of a prompt, W packed as in qllm/ops/gpu/layout.py, by the matrix units
// of compute capability 9.0, which take weights from registers and x from shared memory.
//
// A block of threads takes 8 panels of 16 outputs, ROWS rows of x and a part of the inputs; a cluster of
// blocks has all parts, whose sums it adds up in their order. How many parts there are depends on the
// weight alone, and each adds up 16 inputs after the other: a row's sums are the same whatever is beside
// it, and whatever ROWS is.
//
// Eight warps multiply, two groups of four: a warp makes numbers of its panel's words, rounded as the
// reference's weights, which are operand A of its group's products. What runs asynchronously is the
// copies to shared memory, which two more warps start as stages become free, and the products: a warp
// makes the next 32 inputs' numbers while the last ones' are multiplied.
//
// The words of lane 4 g + t hold inputs 8 t to 8 t + 7 of each 32, while an operand takes 2 t and 2 t + 1
// of each 8: four lanes first exchange what they have, as words.
//
// Constants: BITS, FLOAT16, ZEROS, OFFSETS, WIDE and GROUP as in decode.cu; ROWS: 64, 128 or 256;
// X_STAGES, of 64 inputs, and W_STAGES, of 128: what shared memory holds.

struct Arguments {
    TensorMap x;       // (rows, inputs), in tiles of (ROWS, 64)
    TensorMap q;       // (panels, blocks, 32 BITS) of 64 bits, in tiles of 8 panels and a block
    TensorMap scales;  // (groups, panels, 8, 2): of rows g and g + 8; in tiles of GROUPS and 8 panels
    TensorMap zeros;   // the same, u8; or offsets, of the type of the scales
    const u16* bias;   // (outputs), or null
    u16* y;            // (rows, outputs)
    // 2^32 over the blocks that share a scale where GROUP is 128, rounded up: a block times it, less
    // its lower 32 bits, is the block's group.
    i64 groups_of_a_block;
    int rows, outputs, blocks;
    int parts;  // of the inputs
};

#define CONSUMERS 8   // warps that multiply
#define X_PRODUCER 8  // the warps that start copies
#define W_PRODUCER 9
#define OUTPUTS 128                 // of a block of threads
#define X_BYTES (ROWS * 128)        // of a stage
#define Q_BYTES (256 * BITS)        // of a block of a panel
#define SCALE_BYTES (WIDE ? 4 : 2)  // of a scale or an offset
#define GROUPS (128 / GROUP)        // of a block
#define SCALES_AT (8 * Q_BYTES)     // in a stage
#define ZEROS_AT (SCALES_AT + GROUPS * OUTPUTS * SCALE_BYTES)
#define W_BYTES (ZEROS_AT + GROUPS * OUTPUTS * (OFFSETS ? SCALE_BYTES : ZEROS ? 1 : 0))
#define W_AT (X_STAGES * X_BYTES)
#define BARRIERS_AT (W_AT + W_STAGES * W_BYTES)
#define AT_ONCE 4  // rows that a warp adds up
#define SUMS_STRIDE (OUTPUTS + 4)  // numbers: four rows' are in different banks

// A float16 scale is the sum of two bfloat16, of 8 and of 3 bits. An integer of up to 6 bits times the
// second is a bfloat16, so that one fused operation more rounds the whole product, once.
#define IN_PAIRS (!OFFSETS && !WIDE && (FLOAT16 || BITS <= 6))

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

// Start the copies of a weight's blocks from first to end, as stages become empty.
DEVICE void produce_weight(const Arguments& from, u32 shared, int panel, int first, int end) {
    Stage w;
#pragma unroll 1
    for (int block = first; block < end; ++block) {
        const u32 full = w_full(shared, w.index), to = shared + W_AT + w.index * W_BYTES;
        const int group =
            GROUP == 128 ? (int)((block * from.groups_of_a_block) >> 32) : block * GROUPS;
        wait(w_empty(shared, w.index), w.parity ^ 1);
        arrive_expecting(full, W_BYTES);
        copy_tile(to, from.q, block * 32 * BITS, panel, full);
        copy_tile(to + SCALES_AT, from.scales, panel * 16, group, full);
        if (ZEROS || OFFSETS) copy_tile(to + ZEROS_AT, from.zeros, panel * 16, group, full);
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

// Of two lanes whose numbers differ in the bit `apart`, the lower one's odd fields and the other one's
// even fields change places: all fields are of `width` bits.
DEVICE u32 exchange_fields(u32 word, int width, u32 apart, int lane) {
    const u32 other = exchange(word, apart);
    const bool upper = lane & apart;
    if (width >= 8) return select_bytes(word, other, upper ? 0x3715 : 0x6240);
    const u32 even = width == 1 ? 0x55555555 : width == 2 ? 0x33333333 : 0x0F0F0F0F;
    return select_bits(word, rotate_left(other, upper ? 32 - width : width), upper ? ~even : even);
}

// A lane's words of a block that have WIDTH bits of each value, as `pack` has them; then of lane t of
// four pair t of each eight inputs in place of the eight inputs t: pair j of 32 inputs is the j-th
// eight's.
template <int WIDTH>
DEVICE void load_part(u32* words, const u8* from, int lane) {
    if (!(BITS & WIDTH)) return;
    const int wider = BITS & ~(2 * WIDTH - 1), size = WIDTH == 1 ? 2 : 4;
    words += 2 * wider;
#pragma unroll
    for (int piece = 0; piece < 2 * WIDTH / size; ++piece)
        load_shared(words + piece * size, from + wider * 256 + (piece * 32 + lane) * size * 4, size);
#pragma unroll
    for (int i = 0; i < 2 * WIDTH; ++i) words[i] = exchange_fields(words[i], WIDTH, 1, lane);
#pragma unroll
    for (int i = 0; i < 2 * WIDTH; i += 2) {
        if (WIDTH < 8) {
            words[i] = exchange_fields(words[i], 2 * WIDTH, 2, lane);
            words[i + 1] = exchange_fields(words[i + 1], 2 * WIDTH, 2, lane);
            continue;
        }
        const bool upper = lane & 2;
        const u32 other = exchange(upper ? words[i] : words[i + 1], 2);
        words[i] = upper ? other : words[i];
        words[i + 1] = upper ? words[i + 1] : other;
    }
}

// The masks of values' bits in a word, by their number: a register each. A compiler that knew what is in
// them would fill one anew for each word, hence `nothing`: a zero of which it does not know.
struct Masks {
    u32 of[9];
};

DEVICE void make_masks(Masks& masks, u32 nothing) {
    int low = 0;
#pragma unroll
    for (int width = 8; width >= 1; width /= 2)
        if (BITS & width) {
            masks.of[width] = (((1u << width) - 1) * 0x10001u << low) + nothing;
            low += width;
        }
}

// The bits [low, low + width) of two values: the pair with this index of the 16 that a lane has of a
// row, whose words of this width these are.
DEVICE u32 field(const u32* words, int width, int low, int pair, u32 mask, u32 before) {
    const int shift = pair % (16 / width) * width - low;
    const u32 word = words[pair / (16 / width)];
    return and_or(shift < 0 ? word << -shift : word >> shift, mask, before);
}

// What added to a pair as `numbers` begins takes its zero off.
DEVICE u32 less_zero(u32 zero) {
    if (FLOAT16) return (0xE400 | zero) * 0x10001u;            // -(1024 + zero)
    if (BITS < 8) return (0xC300 | zero) * 0x10001u;           // -(128 + zero)
    return (bits_of(-(float)(int)zero) >> 16) * 0x10001u;      // -zero
}

// q - zero of two inputs, exactly: an integer put into the lowest bits of a power of two's fraction
// makes their sum.
DEVICE u32 numbers(const u32* words, const Masks& masks, int half, int pair, u32 minus) {
    const bool in_two = !FLOAT16 && BITS == 8;  // a bfloat16's fraction has seven bits
    u32 q = in_two ? 0 : FLOAT16 ? 0x64006400 : 0x43004300;
    int low = 0, before = 0;
#pragma unroll
    for (int width = 8; width >= 1; width /= 2)
        if (BITS & width) {
            q = field(words + before + half * width, width, low, pair, masks.of[width], q);
            before += 2 * width;
            low += width;
        }
    if (in_two) {  // 128 + the lower seven bits, less 128 where the eighth is not set
        const u32 eighth = ((~q >> 7) & 0x00010001) * 0xC300;
        q = add_pairs(and_or(q, 0x007F007F, 0x43004300), eighth);
    }
    return add_pairs(q, minus);
}

// What inputs of rows g and g + 8 that share a scale have in common.
struct Group {
    u32 minus[2];
    u32 high[2], low[2];         // where IN_PAIRS: the scale's two parts; of float16, one
    float scale[2], offset[2];  // else
};

DEVICE float number_at(const u8* from, int index) {
    return WIDE ? of_bits(((const u32*)from)[index]) : from_float16(((const u16*)from)[index]);
}

DEVICE void load_group(Group& group, const u8* stage, int i, int warp, int lane) {
    const int at = i * OUTPUTS + warp * 16 + lane / 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float scale = number_at(stage + SCALES_AT, at + r);
        const u32 zero = ZEROS ? stage[ZEROS_AT + at + r] : OFFSETS ? 0 : 1u << (BITS - 1);
        group.minus[r] = less_zero(zero);
        group.scale[r] = scale;
        if (OFFSETS) group.offset[r] = number_at(stage + ZEROS_AT, at + r);
        if (IN_PAIRS) {
            const u32 high = narrow(scale);
            const bool finite = (high & 0x7F80) != 0x7F80;  // of a bfloat16
            group.high[r] = high * 0x10001u;
            group.low[r] = finite ? narrow(scale - widen(high)) * 0x10001u : 0;
        }
    }
}

// Two weights, rounded to the type of x as the reference's are.
DEVICE u32 weights(u32 pair, const Group& group, int r) {
    if (IN_PAIRS && FLOAT16) return multiply_pairs(pair, group.high[r]);
    if (IN_PAIRS)
        return multiply_add_pairs(pair, group.high[r], multiply_pairs(pair, group.low[r]));
    float low = product(FLOAT16 ? widen(pair & 0xFFFF) : of_bits(pair << 16), group.scale[r]);
    float high = product(FLOAT16 ? widen(pair >> 16) : of_bits(pair & 0xFFFF0000), group.scale[r]);
    if (OFFSETS) {
        low = sum_of(low, group.offset[r]);
        high = sum_of(high, group.offset[r]);
    }
    return narrow_pair(low, high);
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
    Masks masks;
    make_masks(masks, nothing);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
        wait(w_full(shared, w.index), w.parity);
        const u8* stage = memory + W_AT + w.index * W_BYTES;
        u32 words[2 * MAX_BITS];
        load_part<8>(words, stage + warp * Q_BYTES, lane);
        load_part<4>(words, stage + warp * Q_BYTES, lane);
        load_part<2>(words, stage + warp * Q_BYTES, lane);
        load_part<1>(words, stage + warp * Q_BYTES, lane);
        Group group;
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            if (unit * 32 % GROUP == 0) load_group(group, stage, unit * 32 / GROUP, warp, lane);
            if (unit * 32 + GROUP == 128) {  // the last of the stage has been read
                warp_barrier();
                if (lane == 0) arrive(w_empty(shared, w.index));
                advance(w, W_STAGES);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    a[unit % 2][step][r] = weights(
                        numbers(
                            words, masks, r % 2, unit * 4 + step * 2 + r / 2, group.minus[r % 2]
                        ),
                        group, r % 2
                    );
            if (unit % 2 == 0) wait(x_full(shared, x.index), x.parity);
            begin_products();
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const u32 inputs = (unit % 2 * 2 + step) * 32;  // bytes of a row
                multiply_group(
                    sums, a[unit % 2][step], described + (x.index * X_BYTES + inputs) / 16,
                    block + unit + step > 0
                );
            }
            commit_products();
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
    const int panel = panel_index() * 8;
    const int first = (int)((i64)from.blocks * part / from.parts);
    const int end = (int)((i64)from.blocks * (part + 1) / from.parts);
    if (thread_index() == 0) {
        for (int stage = 0; stage < X_STAGES; ++stage) {
            init_barrier(x_full(shared, stage), 1);
            init_barrier(x_empty(shared, stage), CONSUMERS);
        }
        for (int stage = 0; stage < W_STAGES; ++stage) {
            init_barrier(w_full(shared, stage), 1);
            init_barrier(w_empty(shared, stage), CONSUMERS);
        }
        publish_barriers();
    }
    cluster_barrier();
    if (warp >= CONSUMERS) {
        give_up_registers();
        if (warp == X_PRODUCER && lane == 0) produce_x(from, shared, row, first, end);
        if (warp == W_PRODUCER && lane == 0) produce_weight(from, shared, panel, first, end);
        warp_barrier();
        cluster_barrier();
        cluster_barrier();
        return;
    }
    take_registers();
    float sums[MAX_ROWS / 2];
    consume(sums, memory, shared, warp, end - first, (u32)from.parts >> 31, lane);
    consumers_barrier();  // all is read of what the sums now take the place of
    float* to = (float*)memory + lane % 4 * 2 * SUMS_STRIDE + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i)
        to[(i / 4 * 8 + i % 2) * SUMS_STRIDE + i % 4 / 2 * 8] = sums[i];
    cluster_barrier();
    finish(from, shared, part, panel, row, warp, lane);
    cluster_barrier();  // one's sums are there until all have read them
}
