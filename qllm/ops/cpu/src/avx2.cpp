#include "prefill_attention.h"
#include "blocks.h"
#include "delta.h"
#include "dense.h"
#include "descent.h"
#include "experts.h"
#include "kernels.h"
#include "layout.h"
#include "limits.h"
#include "packed_embedding.h"
#include "rounding.h"
#include "sequence_attention.h"
#include "steps.h"

namespace qllm {
namespace {

Status linear(const Linear &a) {
    const bool fits = a.mode == WEIGHT_ONLY_INT8 && a.bits <= SHORT_SUM_BITS;
    if (a.group == HALF_K_BLOCK) return fits ? avx2_int8_halves(a) : avx2_halves(a);
    return fits ? avx2_int8_linear(a) : avx2_linear(a);
}

}  // namespace
}  // namespace qllm

const qllm::Path qllm::avx2_path = QLLM_WHOLE_PATH("avx2");
