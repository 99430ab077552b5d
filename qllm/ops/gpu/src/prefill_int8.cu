// y = (x W^T) x_scales scales + bias for the rows of a prompt, x and W int8, by the matrix units of
// compute capability 9.0, which take both from shared memory.
//
// A block of threads takes OUTPUTS outputs, ROWS rows of x and a part of the inputs; a cluster of
// blocks has all parts and adds up their sums, which are integers and exact: how a product is cut
// changes no bit. One thread starts the copies of 128 inputs at a time as stages become free, and a
// warpgroup multiplies 64 outputs with all ROWS rows.
//
// Constants: FLOAT16: the type of bias and y, else bfloat16; WIDE: scales are float32, else
// float16; ROWS: 64, 128 or 256; STAGES: what shared memory holds; MULTIPLYING: threads that
// multiply, 128 or 256, of THREADS; BLOCKS: of a multiprocessor.

struct Arguments {
    TensorMap x;            // (rows, inputs) of int8, in tiles of (ROWS, 128)
    TensorMap q;            // (outputs, inputs) of int8, in tiles of (OUTPUTS, 128)
    const float* x_scales;  // of row r the one at r x_scales_stride
    const void* scales;     // (outputs)
    const u16* bias;        // (outputs), or null
    u16* y;                 // (rows, outputs)
    int rows, outputs;
    int stages, parts;    // of the inputs; a stage has 128
    int x_scales_stride;  // 1, or 0 where there is one for all rows
};

#define CONSUMERS (MULTIPLYING / 32)  // warps that multiply; the next one starts copies
#define OUTPUTS (MULTIPLYING / 2)     // of a block of threads
#define X_BYTES (ROWS * 128)          // of a stage
#define STAGE_BYTES (X_BYTES + OUTPUTS * 128)
#define BARRIERS_AT (STAGES * STAGE_BYTES)
#define SCALES_AT (BARRIERS_AT + 16 * STAGES)  // of the rows, then of the outputs, then the bias
#define SUMS_STRIDE (OUTPUTS + 4)  // numbers: four rows' are in different banks
#define LANES (OUTPUTS / 4)        // that a row's sums take
#define AT_ONCE 8                  // rows that they add up

DEVICE u32 full_barrier(u32 shared, int stage) { return shared + BARRIERS_AT + 8 * stage; }
DEVICE u32 empty_barrier(u32 shared, int stage) { return full_barrier(shared, STAGES + stage); }

// What a block of threads takes: a part of the inputs, and outputs and rows from one on.
struct TileCoord {
    int part, output, row;
};

// Start the copies of inputs of some stages, as these become empty.
DEVICE void produce(const Arguments& from, u32 shared, TileCoord coord, int first, int end) {
    Stage stage;
#pragma unroll 1
    for (int block = first; block < end; ++block) {
        const u32 full = full_barrier(shared, stage.index), to = shared + stage.index * STAGE_BYTES;
        wait(empty_barrier(shared, stage.index), stage.parity ^ 1);
        arrive_expecting(full, STAGE_BYTES);
        copy_tile(to + X_BYTES, from.q, block * 128, coord.output, full);
        copy_tile(to, from.x, block * 128, coord.row, full);
        advance(stage, STAGES);
    }
}

// A multiplying warp: the sums of its group's 64 outputs. That of output 8 i + g of the warp's 16
// and of row 8 j + 2 t + k is at 4 j + 2 i + k.
DEVICE void consume(int* sums, u32 shared, int warp, int blocks, int lane) {
    Stage stage;
    const u64 x = describe(shared), q = describe(shared + X_BYTES + warp / 4 * 64 * 128);
    u32 to_empty = 0;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
        wait(full_barrier(shared, stage.index), stage.parity);
        const u64 at = stage.index * (STAGE_BYTES / 16);
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; ++step)  // 32 inputs each
            multiply_group_int8(sums, q + at + step * 2, x + at + step * 2, block + step > 0);
        commit_products();
        wait_for_products<1>();  // those with the stage before this one have ended
        if (lane == 0 && to_empty) arrive(to_empty);
        to_empty = empty_barrier(shared, stage.index);
        advance(stage, STAGES);
    }
    wait_for_products<0>();
}

// What sums are multiplied with, and the bias, to shared memory: while the first stages are copied.
DEVICE void load_scales(const Arguments& from, float* to, TileCoord coord) {
    for (int i = (int)thread_index(); i < ROWS; i += MULTIPLYING) {
        const int row = coord.row + i;
        to[i] = row < from.rows ? from.x_scales[(i64)row * from.x_scales_stride] : 0;
    }
    const int i = (int)thread_index(), output = coord.output + i;
    if (i >= OUTPUTS) return;
    float scale = 0, bias = 0;
    if (output < from.outputs) {
        scale = WIDE ? ((const float*)from.scales)[output]
                     : from_float16(((const u16*)from.scales)[output]);
        if (from.bias) bias = widen(from.bias[output]);
    }
    to[ROWS + i] = scale;
    to[ROWS + OUTPUTS + i] = bias;
}

// Sums of all parts of a slice of the rows, and what follows. A lane takes four outputs.
DEVICE void finish(const Arguments& from, const u8* memory, u32 shared, TileCoord coord) {
    const int thread = (int)thread_index(), lane = thread % LANES;
    const int slice = (ROWS + from.parts - 1) / from.parts, begin = coord.part * slice;
    const int end = begin + slice < ROWS ? begin + slice : ROWS;
    const int output = coord.output + lane * 4;
    const float* x_scales = (const float*)(memory + SCALES_AT);
    const float* scales = x_scales + ROWS + lane * 4;
    const float* bias = scales + OUTPUTS;
    const int step = MULTIPLYING / LANES;  // rows that all threads take together
#pragma unroll 1
    for (int next = begin + thread / LANES; next < end; next += AT_ONCE * step) {
        int sums[AT_ONCE][4] = {};
        const u32 at = (next * SUMS_STRIDE + lane * 4) * 4, next_row = step * SUMS_STRIDE * 4;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (next + i * step < end)
                load_shared((u32*)sums[i], memory + at + i * next_row, 4);
#pragma unroll 1
        for (int other = 1; other < from.parts; ++other) {
            const int part = coord.part + other;  // each block begins with another one
            const int block = part < from.parts ? part : part - from.parts;
            int more[AT_ONCE][4] = {};
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (next + i * step < end)
                    load4_of_block(more[i], shared + at + i * next_row, block);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[i][k] += more[i][k];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int in_tile = next + i * step, row = coord.row + in_tile;
            if (in_tile >= end || row >= from.rows) continue;
            u16* to = from.y + (i64)row * from.outputs + output;
            u16 y[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                // Each step is rounded, as the reference's are.
                float value = product(product((float)sums[i][k], x_scales[in_tile]), scales[k]);
                if (from.bias) value = sum_of(value, bias[k]);
                y[k] = narrow(value);
            }
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

KERNEL prefill_int8(PARAMETER Arguments from) {
    u8* memory = shared_memory();
    const u32 shared = address_of(memory);
    const int lane = (int)(thread_index() % 32), warp = (int)(thread_index() / 32);
    const TileCoord coord = {
        chunk_index() % from.parts, panel_index() * OUTPUTS, chunk_index() / from.parts * ROWS
    };
    const int first = (int)((i64)from.stages * coord.part / from.parts);
    const int end = (int)((i64)from.stages * (coord.part + 1) / from.parts);
    if (thread_index() == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(full_barrier(shared, stage), 1);
            init_barrier(empty_barrier(shared, stage), CONSUMERS);
        }
        publish_barriers();
    }
    cluster_barrier();
    if (warp >= CONSUMERS) {
        if (warp == CONSUMERS && lane == 0) produce(from, shared, coord, first, end);
        warp_barrier();
        cluster_barrier();
        cluster_barrier();
        return;
    }
    load_scales(from, (float*)(memory + SCALES_AT), coord);
    int sums[MAX_ROWS / 2];
    consume(sums, shared, warp, end - first, lane);
    consumers_barrier();  // all is read of what the sums now take the place of
    int* to = (int*)memory + lane % 4 * 2 * SUMS_STRIDE + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i)
        to[(i / 4 * 8 + i % 2) * SUMS_STRIDE + i % 4 / 2 * 8] = sums[i];
    cluster_barrier();
    finish(from, memory, shared, coord);
    warp_barrier();     // lanes may have taken other numbers of rows
    cluster_barrier();  // one's sums are there until all have read them
}
