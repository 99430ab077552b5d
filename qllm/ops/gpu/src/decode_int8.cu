// y = (x W^T) x_scales scales + bias for the few rows of a decode step, x and W int8.
//
// A block of threads takes PANELS panels of 16 outputs and up to 8 TILES rows of x. Its warps take
// turns at blocks of 128 inputs; sums are integers and exact, in whichever order they are added.
//
// W lies in rows. For lane 4 g + t operand A of a product of 32 inputs is four bytes at 4 t and
// four at 16 + 4 t of rows g and g + 8: which inputs these are is free, if it is the same for x,
// operand B. So a lane loads 16 bytes of a row at 16 t of each 64, which are its parts of two
// products, and four lanes read 64 consecutive ones. Nothing goes through shared memory.
//
// Constants: FLOAT16: the type of bias and y, else bfloat16; WIDE: scales are float32, else
// float16; WARPS; DEPTH: blocks that a warp has asked for in advance; TILES; PANELS; WHOLE: inputs
// is a multiple of 128.

struct Arguments {
    const u32* x;           // (rows, inputs) of int8
    const u32* q;           // (outputs, inputs) of int8
    const float* x_scales;  // of row r the one at r x_scales_stride
    const void* scales;     // (outputs)
    const u16* bias;        // (outputs), or null
    u16* y;                 // (rows, outputs)
    int rows, inputs, outputs, blocks;  // inputs is a multiple of 16
    int x_scales_stride;                // 1, or 0 where there is one for all rows
    int prefetched;  // inputs up to which rows of q are asked for into the L2, a multiple of 16
};

// Of a block, what a lane holds: four words of each 64 inputs, of row g and of row g + 8.
struct Part {
    u32 words[2][2][4];
};

// Where what a lane takes of rows begins: of rows g and g + 8 of each panel, and of row g of each
// tile. Behind the last row it is that one again, whose results are not kept.
struct Rows {
    const u32 *q[MAX_PANELS][2], *x[MAX_TILES];
};

DEVICE const u32* row_of(const u32* matrix, const Arguments& from, int wanted, int rows, int lane) {
    const int row = wanted < rows ? wanted : rows - 1;
    return matrix + ((i64)row * from.inputs + lane % 4 * 16) / 4;
}

DEVICE bool is_inside(const Arguments& from, int block, int half, int lane) {
    return block * 128 + half * 64 + lane % 4 * 16 < from.inputs;
}

// `whole`: the block is known to have all of its inputs. What is asked for in front of the wait for
// the kernel before is checked in any case: loads that nothing depends on would be moved behind it.
DEVICE void load_panels(
    Part* parts, const Arguments& from, const Rows& rows, int block, int lane, bool whole
) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32* to = parts[panel].words[half][r];
                if (!whole) to[0] = to[1] = to[2] = to[3] = 0;
                if (whole || is_inside(from, block, half, lane))
                    load4(to, rows.q[panel][r] + block * 32 + half * 16);
            }
}

DEVICE void multiply_block(
    int (*total)[MAX_TILES][4], const Part* parts, const Arguments& from, const Rows& rows,
    int block, int lane
) {
    u32 x[2][MAX_TILES][4];  // of both halves, which hides how long one takes
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            u32* to = x[half][tile];
            if (!WHOLE) to[0] = to[1] = to[2] = to[3] = 0;
            if (WHOLE || is_inside(from, block, half, lane))
                load4_cached(to, rows.x[tile] + block * 32 + half * 16);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
            const u32(*words)[4] = parts[panel].words[half];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const u32 a[4] = {words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]};
                    multiply_int8(total[panel][tile], a, x[half][tile][i], x[half][tile][i + 1]);
                }
        }
}

// What is read behind the first blocks is asked for into the L2 before the wait for the kernel in
// front: meanwhile the GPU's memory would have next to nothing to do.
DEVICE void prefetch_rows(const Arguments& from, int first_panel) {
    const int begin = DEPTH * WARPS * 128;
    const int end = from.prefetched < from.inputs ? from.prefetched : from.inputs;
    const int row = first_panel * 16 + (int)thread_index();
    if ((int)thread_index() < 16 * PANELS && row < from.outputs && begin < end)
        prefetch_range((const u8*)from.q + (i64)row * from.inputs + begin, end - begin);
}

KERNEL decode_int8(Arguments from) {
    const int lane = (int)(thread_index() % 32), warp = (int)(thread_index() / 32);
    const int first_panel = panel_index() * PANELS, first_row = chunk_index() * (8 * TILES);
    let_next_begin();
    Rows rows;
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int wanted = (first_panel + panel) * 16 + lane / 4 + r * 8;
            rows.q[panel][r] = row_of(from.q, from, wanted, from.outputs, lane);
        }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        rows.x[tile] = row_of(from.x, from, first_row + tile * 8 + lane / 4, from.rows, lane);
    Part ahead[MAX_DEPTH][MAX_PANELS];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (warp + d * WARPS < from.blocks)
            load_panels(ahead[d], from, rows, warp + d * WARPS, lane, false);
    if (from.prefetched && chunk_index() == 0) prefetch_rows(from, first_panel);
    wait_for_previous();
    int total[MAX_PANELS][MAX_TILES][4] = {};
#pragma unroll 1
    for (int first = warp; first < from.blocks; first += DEPTH * WARPS) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int block = first + d * WARPS, next = block + DEPTH * WARPS;
            if (block < from.blocks) {
                multiply_block(total, ahead[d], from, rows, block, lane);
                // Into the registers that are free now: into others they would have to be moved,
                // and what moves them waits for them.
                if (next < from.blocks) load_panels(ahead[d], from, rows, next, lane, WHOLE);
            }
        }
    }

    SHARED int sums[MAX_WARPS][4 * MAX_TILES * MAX_PANELS][32];
#pragma unroll
    for (int i = 0; i < 4 * TILES * PANELS; ++i)
        sums[warp][i][lane] = total[i / 4 / TILES][i / 4 % TILES][i % 4];
    barrier();
#pragma unroll 1
    for (int at = (int)thread_index(); at < 128 * TILES * PANELS; at += 32 * WARPS) {
        const int i = at / 32, who = at % 32;
        int sum = 0;
        for (int other = 0; other < WARPS; ++other) sum += sums[other][i][who];
        const int row = first_row + i / 4 % TILES * 8 + who % 4 * 2 + i % 2;
        const int output = (first_panel + i / 4 / TILES) * 16 + who / 4 + i % 4 / 2 * 8;
        if (row < from.rows && output < from.outputs) {
            const float scale = WIDE ? ((const float*)from.scales)[output]
                                     : from_float16(((const u16*)from.scales)[output]);
            // Each step is rounded, as the reference's are.
            float value = product((float)sum, from.x_scales[row * from.x_scales_stride]);
            value = product(value, scale);
            if (from.bias) value = sum_of(value, widen(from.bias[output]));
            from.y[(i64)row * from.outputs + output] = narrow(value);
        }
    }
}
