#include "dense.h"
#include "kernels.h"
#include "sequence_attention.h"

namespace qllm {
namespace {

// Only bfloat16 comes in pairs.
Status dense_by_type(const Dense &a) {
    return a.type == BFLOAT16 ? dense_of<BFLOAT16>(a) : avx512_path.dense(a);
}

constexpr Path path() {
    Path path = {"avx512bf16", &avx512_path};
    path.dense = dense_by_type;
    path.attend_sequences = attend_sequences;
    path.attend_sequences_backward = attend_sequences_backward;
    return path;
}

}  // namespace
}  // namespace qllm

const qllm::Path qllm::avx512bf16_path = path();
