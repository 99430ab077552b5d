// Apart from the rest of the path, which compiles at the same time and takes half as long.
#include "kernels.h"
#include "linear.h"

qllm::Status (*const qllm::avx512_linear)(const Linear &) = linear;
