// What a path leaves to that of avx512.cpp.
#pragma once

#include "kernels.h"

namespace qllm {
namespace {

inline bool same_linear(const Linear &a) { return avx512_path.linear(a); }
inline void same_pack(const Packing &a) { avx512_path.pack(a); }
inline void same_unpack(const Packing &a) { avx512_path.unpack(a); }
inline void same_activate(const Activate &a) { avx512_path.activate(a); }
inline void same_norm(const Norm &a) { avx512_path.norm(a); }
inline void same_add(const Add &a) { avx512_path.add(a); }
inline void same_gather(const Gather &a) { avx512_path.gather(a); }
inline bool same_embed(const Embed &a) { return avx512_path.embed(a); }
inline bool same_attend(const Attend &a) { return avx512_path.attend(a); }
inline bool same_attend_prefill(const Attend &a) { return avx512_path.attend_prefill(a); }
inline int64_t same_read_all(const uint8_t *from, int64_t bytes) {
    return avx512_path.read_all(from, bytes);
}
inline int64_t same_multiply_all(int64_t rounds) { return avx512_path.multiply_all(rounds); }

}  // namespace
}  // namespace qllm
