// A GPU for prefill.cu and prefill_int8.cu, as emulated.cpp is one for decode.cu, and the few functions
// of CUDA's driver that launch them.

#include "emulated_hopper.h"
#include "emulated_products.h"

namespace hopper {

namespace prompt {
#include "prefill.cu"
}

#undef CONSUMERS
#undef OUTPUTS
#undef X_BYTES
#undef BARRIERS_AT
#undef SCALES_AT
#undef AT_ONCE

namespace int8_prompt {
#include "prefill_int8.cu"
}

static prompt::Arguments arguments;
static int8_prompt::Arguments int8_arguments;

static int launch(const DecodeConfig& config, const void* function, void** parameters) {
    std::memcpy(&own, function, sizeof own);
    constants = {};
    constants.bits = own.bits;
    constants.float16 = own.float16;
    constants.zeros = own.zeros;
    constants.offsets = own.offsets;
    constants.wide = own.wide;
    constants.group = own.group;
    if (own.is_int8) {
        std::memcpy(&int8_arguments, parameters[0], sizeof int8_arguments);
        kernel = [] { int8_prompt::prefill_int8(int8_arguments); };
    } else {
        own.multiplying = 256;
        own.threads = 384;
        std::memcpy(&arguments, parameters[0], sizeof arguments);
        kernel = [] { prompt::prefill(arguments); };
    }
    threads = own.threads;
    block_count = 1;
    for (unsigned i = 0; i < config.attribute_count; ++i)
        if (config.attributes[i].id == 4) block_count = config.attributes[i].value[0];
    misaligned = wrong = false;
    const bool fits = config.shared_bytes <= SHARED_SIZE && (int)config.block[0] == threads;
    if (!fits || config.grid[0] % block_count || block_count > MAX_BLOCKS) return 1;
    for (row_of_grid = 0; row_of_grid < (int)config.grid[1]; ++row_of_grid)
        for (first_block = 0; first_block < (int)config.grid[0]; first_block += block_count)
            if (const int error = run_cluster()) return error;
    return 0;
}

}  // namespace hopper

extern "C" {

int cuModuleLoadData(void** module, const void* image) {
    auto copy = new hopper::Own;
    std::memcpy(copy, image, offsetof(hopper::Own, is_int8));
    *module = copy;
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = module;
    const bool is_int8 = !std::strcmp(name, "prefill_int8");
    static_cast<hopper::Own*>(module)->is_int8 = is_int8;
    return is_int8 || !std::strcmp(name, "prefill") ? 0 : 500;  // not found
}

int cuFuncSetAttribute(void*, int attribute, int value) {
    return attribute == 8 && value <= (int)hopper::SHARED_SIZE ? 0 : 1;
}

int cuTensorMapEncodeTiled(
    u64* map, int type, unsigned rank, void* address, const u64* sizes, const u64* strides,
    const unsigned* box, const unsigned* steps, int interleave, int swizzle, int, int fill
) {
    const u64 size = type == 0 ? 1 : type == 1 ? 2 : type == 2 ? 4 : 8;
    const bool fits = (uintptr_t)address % 16 == 0 && strides[0] % 16 == 0 && sizes[0] && sizes[1];
    const bool swizzled = swizzle == 3 && box[0] * size <= 128;
    if (type > 4 || rank != 2 || !fits || box[0] > 256 || box[1] > 256 || box[0] * size % 16 ||
        steps[0] != 1 || steps[1] != 1 || interleave || (swizzle && !swizzled) || fill ||
        (uintptr_t)map % 64)
        return 1;
    const u64 words[] = {(u64)address, sizes[0], sizes[1], strides[0], box[0], box[1], size, swizzled};
    std::memcpy(map, words, sizeof words);
    return 0;
}

int cuLaunchKernelEx(const DecodeConfig* config, const void* function, void** parameters, void**) {
    return hopper::launch(*config, function, parameters);
}
}
