#include "isa_avx2.h"
#include "tile.h"
#include "linear.h"
#include "limits.h"
#include "attention.h"
#include "dense_tile.h"
#include "dense.h"

static bool linear_by_bits(const qllm::Linear &a) {
    const bool fits = a.mode == qllm::WEIGHT_ONLY_INT8 && a.bits <= qllm::SHORT_SUM_BITS;
    return fits ? qllm::avx2_int8_linear(a) : qllm::linear(a);
}

const qllm::Path qllm::avx2_path = {"avx2", linear_by_bits, pack, unpack, activate, norm,   add,
                 gather, embed, attend, attend_prefill, dense, read_all, multiply_all};
