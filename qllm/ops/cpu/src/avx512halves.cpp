// Apart from the rest of the path, which compiles at the same time.
#define HALF_GROUPS 1
#include "kernels.h"
#include "linear.h"

qllm::Status (*const qllm::avx512_halves)(const Linear &) = linear;
