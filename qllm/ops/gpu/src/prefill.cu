// y = x W^T + bias for the rows of a prompt, W packed as in qllm/ops/gpu/layout.py, by the matrix
// units of compute capability 9.0, which take weights from registers and x from shared memory.
//
// A block of threads takes OUTPUTS outputs, ROWS rows of x and a part of the inputs; a cluster of
// blocks has all parts, whose sums it adds up in their order. How many parts there are depends on
// the weight alone, and each adds up 16 inputs after the other: a row's sums are the same whatever
// is beside it, and whatever ROWS and OUTPUTS are.
//
// Eight warps multiply, two groups of four, or four where OUTPUTS is 64: a warp makes numbers of
// the words of its panel of 16 outputs, rounded as the reference's weights, which are operand A of
// its group's products. What runs asynchronously is the copies to shared memory, which four more
// warps start as stages become free, and the products: a warp makes the next 32 inputs' numbers
// while the last ones' are multiplied. Its next words it loads ahead, so that it does not wait for
// shared memory. How words lie and become numbers is in prefill_words.h and prefill_weights.h.
//
// Constants: BITS, FLOAT16, ZEROS, OFFSETS, WIDE and GROUP as in decode.cu; ROWS: 64, 128, 192 or
// 256; OUTPUTS: 64 or 128; X_STAGES, of 64 inputs, and W_STAGES, of 128: what shared memory holds.

struct Arguments {
    TensorMap x;       // (rows, inputs), in tiles of (ROWS, 64)
    TensorMap q;       // (panels, blocks, 2 BITS, 128) bytes, in tiles of a block of a panel
    TensorMap scales;  // (groups, panels, 8, 2): of rows g and g + 8; tiles of GROUPS and OUTPUTS
    TensorMap zeros;   // the same, u8; or offsets, of the type of the scales
    const u16* bias;   // (outputs), or null
    u16* y;            // (rows, outputs)
    // 2^32 over the blocks that share a scale where GROUP is 128, rounded up: a block times it,
    // less its lower 32 bits, is the block's group.
    i64 groups_of_a_block;
    int rows, outputs, blocks;
    int parts;  // of the inputs
};

#define CONSUMERS 8   // warps of the two groups that may multiply
#define X_PRODUCER 8  // the warps that start copies
#define W_PRODUCER 9  // the first one of those of the weight
#define W_PRODUCERS 3
#define X_BYTES (ROWS * 128)  // of a stage
#define W_AT (X_STAGES * X_BYTES)
#define BARRIERS_AT (W_AT + W_STAGES * W_BYTES)
#define AT_ONCE 8                  // rows that a warp adds up
#define SUMS_STRIDE (OUTPUTS + 4)  // numbers: four rows' are in different banks
#define AHEAD (ROWS < 256)         // sums leave registers for words that are loaded ahead

// Barriers of stages: full and empty ones of x, then of the weight.
DEVICE u32 x_full(u32 shared, int stage) { return shared + BARRIERS_AT + 8 * stage; }
DEVICE u32 x_empty(u32 shared, int stage) { return x_full(shared, X_STAGES + stage); }
DEVICE u32 w_full(u32 shared, int stage) { return x_full(shared, 2 * X_STAGES + stage); }
DEVICE u32 w_empty(u32 shared, int stage) { return w_full(shared, W_STAGES + stage); }

// Start the copies of a weight's blocks from first to end, as stages become empty: one
// producer's part.
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
                to + i * PANEL_BYTES, from.q, 0, ((panel + i) * from.blocks + block) * 2 * BITS,
                full
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

// A multiplying warp: the sums of its group's four panels. That of output 8 i + g of its panel and
// row 8 j + 2 t + k is at 4 j + 2 i + k.
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
            if (unit % 2 == 0) rotate_words(words, loaded, unit / 2, layout);
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

// Sums of all parts of a slice of the rows, in the parts' order, and what follows. A warp takes a
// row, a lane of it four outputs.
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
            for (int k = 0; k < 4; ++k)
                y[k] = narrow(from.bias ? sums[i][k] + bias[k] : sums[i][k]);
            if (from.outputs % 4 == 0) {
                if (output < from.outputs)
                    store2(to, y[0] | (u32)y[1] << 16, y[2] | (u32)y[3] << 16);
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
