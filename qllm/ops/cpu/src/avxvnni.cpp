#include "isa_avx2.h"
#include "tile.h"
#include "linear.h"
#include "limits.h"
#include "attention.h"
#include "dense_tile.h"
#include "dense.h"

const qllm::Path qllm::avxvnni_path = {"avxvnni", linear, pack, unpack, activate, norm,   add,
                 gather, embed, attend, attend_prefill, dense, read_all, multiply_all};
