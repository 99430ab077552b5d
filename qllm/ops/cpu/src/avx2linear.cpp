// Apart from the rest of the path, which compiles at the same time.
#include "kernels.h"
#include "linear.h"

qllm::Status (*const qllm::avx2_linear)(const Linear &) = linear;
