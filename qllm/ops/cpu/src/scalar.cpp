#include "isa_scalar.h"
#include "tile.h"
#include "linear.h"
#include "limits.h"

const qllm::Path qllm::scalar_path = {"scalar", linear, pack, unpack, read_all, multiply_all};
