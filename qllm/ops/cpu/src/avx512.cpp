#include "isa_avx512.h"
#include "tile.h"
#include "linear.h"
#include "limits.h"

const qllm::Path qllm::avx512_path = {"avx512", linear, pack, unpack, read_all, multiply_all};
