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
    return a.group == HALF_K_BLOCK ? avxvnni_halves(a) : avxvnni_linear(a);
}

}  // namespace
}  // namespace qllm

const qllm::Path qllm::avxvnni_path = QLLM_WHOLE_PATH("avxvnni");
