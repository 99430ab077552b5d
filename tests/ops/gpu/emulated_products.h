// Products of a warpgroup (wgmma) on the CPU, of numbers and of int8: behind emulated_hopper.h.

namespace hopper {

DEVICE void begin_products() { lanes[current].fenced = true; }
DEVICE void commit_products() {
    lanes[current].committed.push_back(std::move(lanes[current].begun));
    lanes[current].begun.clear();
    lanes[current].fenced = false;  // registers change before the next ones
}

DEVICE u64 describe(u32 address) {
    return (address & 0x3FFFF) >> 4 | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

static void begin_product(const Product& product) {
    require(lanes[current].fenced, "registers may not be there yet for a product");
    lanes[current].begun.push_back(product);
}

DEVICE void multiply_group(float* c, const u32* a, u64 b, bool adds) {
    require(lanes[current].registers == 240, "sums have no registers");
    begin_product({c, nullptr, a, 0, b, adds});
}
DEVICE void multiply_group_int8(int* c, u64 a, u64 b, bool adds) {
    begin_product({nullptr, c, nullptr, a, b, adds});
}

// Read rows of an operand in shared memory, of which a product takes 32 bytes each, for a warp.
static void read_operand(void* to, u64 description, int first_row, int count, int first) {
    const u32 start = (description & 0x3FFF) << 4, eight_rows = (description >> 32 & 0x3FFF) << 4;
    require(description >> 62 == 1, "an operand lies without a swizzle");
    const order::Event by = {products_of(first), lanes[first].multiplied + 1};
    for (int i = 0; i < count; ++i)
        for (int k = 0; k < 32; k += 16) {
            const int row = first_row + i;
            const u32 at = start + row / 8 * eight_rows + row % 8 * 128 + k;
            const u8* from = shared_at(first / threads, swizzled(at), 16);
            order::read((u8*)to + i * 32 + k, from, 16, by, order::known());
        }
}

// Of a product, what each lane of a warp gave.
struct OfLanes {
    Product products[32];

    OfLanes(int first, size_t i) {
        for (int lane = 0; lane < 32; ++lane)
            products[lane] = lanes[first + lane].committed.front()[i];
    }
};

// A product of numbers: a warp's 16 rows of it.
UNTOLD static void multiply_numbers(int first, size_t i, bool adds) {
    static u16 bits[MAX_ROWS][16];
    static float a[16][16], b[MAX_ROWS][16];
    const OfLanes of(first, i);
    read_operand(bits, of.products[0].b, 0, ROWS, first);
    for (int n = 0; n < ROWS; ++n)
        for (int k = 0; k < 16; ++k) b[n][k] = widen(bits[n][k]);
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) {
            const u32 word = of.products[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            a[row][k] = widen(k % 2 ? word >> 16 : word & 0xFFFF);
        }
    for (int row = 0; row < 16; ++row)
        for (int n = 0; n < ROWS; ++n) {
            float& c = of.products[row % 8 * 4 + n % 8 / 2].c[n / 8 * 4 + row / 8 * 2 + n % 2];
            double sum = adds ? c : 0;
            for (int k = 0; k < 16; ++k) sum += (double)a[row][k] * b[n][k];
            c = (float)sum;
        }
}

UNTOLD static void multiply_int8_numbers(int first, size_t i, bool adds) {
    static int8_t a[16][32], b[MAX_ROWS][32];
    const OfLanes of(first, i);
    read_operand(a, of.products[0].described_a, first % threads % 128 / 2, 16, first);
    read_operand(b, of.products[0].b, 0, ROWS, first);
    for (int row = 0; row < 16; ++row)
        for (int n = 0; n < ROWS; ++n) {
            int& c = of.products[row % 8 * 4 + n % 8 / 2].sums[n / 8 * 4 + row / 8 * 2 + n % 2];
            int sum = adds ? c : 0;
            for (int k = 0; k < 32; ++k) sum += a[row][k] * b[n][k];
            c = sum;
        }
}

static bool are_same(const Product& a, const Product& b) {
    return a.b == b.b && a.described_a == b.described_a && a.adds == b.adds;
}

// The oldest group of products of a warp, which are those of its warpgroup.
static void multiply_oldest(int first) {
    std::vector<Product>& of_group = blocks[first / threads].products[first % threads / 128];
    const size_t count = lanes[first].committed.front().size();
    for (size_t i = 0; i < count; ++i) {
        const Product& own = lanes[first].committed.front()[i];
        const size_t number = lanes[first].multiplied * count + i;
        if (number == of_group.size()) of_group.push_back(own);
        require(are_same(own, of_group[number]), "warps of a group begin other products");
        for (int lane = first; lane < first + 32; ++lane)
            require(are_same(own, lanes[lane].committed.front()[i]), "lanes begin other products");
        (own.sums ? multiply_int8_numbers : multiply_numbers)(first, i, own.adds);
    }
    for (int lane = first; lane < first + 32; ++lane) {
        lanes[lane].committed.pop_front();
        ++lanes[lane].multiplied;
    }
}

// Each warp waits for its own.
template <int LEFT>
DEVICE void wait_for_products() {
    const int first = current / 32 * 32;
    meet(block().multiplying[thread_index() / 32], 32, [first] {
        for (int lane = first; lane < first + 32; ++lane)
            require(
                lanes[lane].committed.size() == lanes[first].committed.size(),
                "lanes begin other products"
            );
        while (!order::failure && lanes[first].committed.size() > LEFT) multiply_oldest(first);
    });
    order::learn({products_of(current), lanes[current].multiplied});
}

}  // namespace hopper
