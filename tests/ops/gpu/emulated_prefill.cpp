// A GPU for prefill.cu and prefill_int8.cu, as emulated_decode.cpp is one for decode.cu, and the
// few functions of CUDA's driver that launch them.

#include "emulated_hopper.h"
#include "emulated_products.h"

namespace hopper {

#define init_barrier UNLESS_LEFT_OUT init_barrier
#define publish_barriers UNLESS_LEFT_OUT publish_barriers
#define arrive UNLESS_LEFT_OUT arrive
#define arrive_expecting UNLESS_LEFT_OUT arrive_expecting
#define wait UNLESS_LEFT_OUT wait
#define warp_barrier UNLESS_LEFT_OUT warp_barrier
#define consumers_barrier UNLESS_LEFT_OUT consumers_barrier
#define cluster_barrier UNLESS_LEFT_OUT cluster_barrier
#define cluster_barrier_relaxed UNLESS_LEFT_OUT cluster_barrier_relaxed
#define give_up_registers UNLESS_LEFT_OUT give_up_registers
#define take_registers UNLESS_LEFT_OUT take_registers
#define begin_products UNLESS_LEFT_OUT begin_products
#define commit_products UNLESS_LEFT_OUT commit_products
#define wait_for_products UNLESS_LEFT_OUT wait_for_products

#include "ring.h"

namespace prompt {
#include "prefill_words.h"
#include "prefill_weights.h"
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

static int launch(const LaunchConfig& config, const void* function, void** parameters) {
    std::memcpy(&constants, function, sizeof constants);
    if (constants.is_int8) {
        std::memcpy(&int8_arguments, parameters[0], sizeof int8_arguments);
        kernel = [] { int8_prompt::prefill_int8(int8_arguments); };
    } else {
        constants.multiplying = 256;
        constants.threads = 384;
        std::memcpy(&arguments, parameters[0], sizeof arguments);
        kernel = [] { prompt::prefill(arguments); };
    }
    threads = constants.threads;
    cluster_size = config.attribute(CLUSTER_DIMENSION, 1);
    shared_size = config.shared_bytes;
    const bool fits = config.shared_bytes <= SHARED_SIZE && (int)config.block[0] == threads;
    if (!fits || config.grid[0] % cluster_size || cluster_size > MAX_BLOCKS) return 1;
    return run_grid(config, run_cluster);
}

}  // namespace hopper

extern "C" {

int cuCtxGetCurrent(void** context) {
    *context = &hopper::lanes;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    return cuCtxGetCurrent(context);
}

int cuCtxSetCurrent(void*) {
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    return find_function(function, module, name, "prefill", "prefill_int8");
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
    const u64 words[] = {
        (u64)address, sizes[0], sizes[1], strides[0], box[0], box[1], size, swizzled
    };
    std::memcpy(map, words, sizeof words);
    return 0;
}

int cuLaunchKernelEx(const LaunchConfig* config, const void* function, void** parameters, void**) {
    return hopper::launch(*config, function, parameters);
}
}
