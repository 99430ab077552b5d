// Products of a warpgroup (wgmma) on the CPU, of numbers and of int8: behind emulated_hopper.h.

namespace hopper {

DEVICE void begin_products() {}
DEVICE void commit_products() {
    lanes[current].committed.push_back(std::move(lanes[current].begun));
    lanes[current].begun.clear();
}

DEVICE u64 describe(u32 address) {
    return (address & 0x3FFFF) >> 4 | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

DEVICE void multiply_group(float* c, const u32* a, u64 b, bool adds) {
    lanes[current].begun.push_back({c, nullptr, a, 0, b, adds});
}
DEVICE void multiply_group_int8(int* c, u64 a, u64 b, bool adds) {
    lanes[current].begun.push_back({nullptr, c, nullptr, a, b, adds});
}

// The bytes from one on of a row of an operand in shared memory, up to 16.
static const u8* bytes_of(int of_block, u64 description, int row, int first) {
    const u32 start = (description & 0x3FFF) << 4, eight_rows = (description >> 32 & 0x3FFF) << 4;
    failed |= description >> 62 != 1;
    return place(of_block, swizzled(start + row / 8 * eight_rows + row % 8 * 128 + first), 1);
}

static float element_of(int of_block, u64 description, int row, int k) {
    u16 bits;
    std::memcpy(&bits, bytes_of(of_block, description, row, k * 2), 2);
    return widen(bits);
}

// A product of a group, of a warpgroup's.
static void multiply_numbers(int first, const Product& of_first, size_t i) {
    float a[64][16];
    static float b[MAX_ROWS][16];
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k) {
            const Lane& lane = lanes[first + row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
            const u32 word = lane.committed.front()[i].a[row % 16 / 8 + k / 8 * 2];
            a[row][k] = widen(k % 2 ? word >> 16 : word & 0xFFFF);
        }
    for (int n = 0; n < ROWS; ++n)
        for (int k = 0; k < 16; ++k) b[n][k] = element_of(first / threads, of_first.b, n, k);
    for (int row = 0; row < 64; ++row)
        for (int n = 0; n < ROWS; ++n) {
            const Lane& lane = lanes[first + row / 16 * 32 + row % 8 * 4 + n % 8 / 2];
            float& c = lane.committed.front()[i].c[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
            double sum = of_first.adds ? c : 0;
            for (int k = 0; k < 16; ++k) sum += (double)a[row][k] * b[n][k];
            c = (float)sum;
        }
}

static void multiply_int8_numbers(int first, const Product& of_first, size_t i) {
    const int of_block = first / threads;
    static int8_t a[64][32], b[MAX_ROWS][32];
    for (int row = 0; row < MAX_ROWS; ++row)
        for (int k = 0; k < 32; k += 16) {
            if (row < 64) std::memcpy(&a[row][k], bytes_of(of_block, of_first.described_a, row, k), 16);
            if (row < ROWS) std::memcpy(&b[row][k], bytes_of(of_block, of_first.b, row, k), 16);
        }
    for (int row = 0; row < 64; ++row)
        for (int n = 0; n < ROWS; ++n) {
            const Lane& lane = lanes[first + row / 16 * 32 + row % 8 * 4 + n % 8 / 2];
            int& c = lane.committed.front()[i].sums[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
            int sum = of_first.adds ? c : 0;
            for (int k = 0; k < 32; ++k) sum += a[row][k] * b[n][k];
            c = sum;
        }
}

// The oldest group of products of a warpgroup.
static void multiply_oldest(int first) {
    const size_t count = lanes[first].committed.front().size();
    for (size_t i = 0; i < count; ++i) {
        const Product& of_first = lanes[first].committed.front()[i];
        for (int lane = first; lane < first + 128; ++lane) {
            const Product& product = lanes[lane].committed.front()[i];
            failed |= product.b != of_first.b || product.described_a != of_first.described_a;
            failed |= product.adds != of_first.adds;
        }
        (of_first.sums ? multiply_int8_numbers : multiply_numbers)(first, of_first, i);
    }
    for (int lane = first; lane < first + 128; ++lane) lanes[lane].committed.pop_front();
}

template <int LEFT>
DEVICE void wait_for_products() {
    const int group = (int)thread_index() / 128, first = current - (int)thread_index() % 128;
    meet(block().products[group], 128, [first] {
        for (int lane = first; lane < first + 128; ++lane)
            failed |= lanes[lane].committed.size() != lanes[first].committed.size();
        while (lanes[first].committed.size() > LEFT) multiply_oldest(first);
    });
}

}  // namespace hopper
