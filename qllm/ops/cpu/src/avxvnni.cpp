#include "isa_avx2.h"
#include "tile.h"
#include "linear.h"
#include "limits.h"

const qllm::Path qllm::avxvnni_path = {"avxvnni", linear, pack, unpack, read_all, multiply_all};
