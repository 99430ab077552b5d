#include "isa_scalar.h"
#include "tile.h"
#include "linear.h"
#include "limits.h"
#include "attention.h"
#include "dense_tile.h"
#include "dense.h"

const qllm::Path qllm::scalar_path = {"scalar", linear, pack, unpack, activate, norm,   add,
                 gather, embed, attend, attend_prefill, dense, read_all, multiply_all};
