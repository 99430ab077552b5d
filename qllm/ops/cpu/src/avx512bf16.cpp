#include "as_avx512.h"
#include "isa_avx512.h"
#include "dense_tile.h"
#include "dense.h"

namespace qllm {
namespace {

// Only bfloat16 comes in pairs.
static bool dense_by_type(const Dense &a) {
    return a.type == BFLOAT16 ? dense_of<BFLOAT16>(a) : avx512_path.dense(a);
}

}  // namespace
}  // namespace qllm

const qllm::Path qllm::avx512bf16_path = {
    "avx512bf16", same_linear, same_pack, same_unpack, same_activate, same_norm, same_add,
    same_gather, same_embed, same_attend, same_attend_prefill, dense_by_type, same_read_all,
    same_multiply_all};
