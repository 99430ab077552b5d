// What AVX2 has for int8 activations times a few bits.
#define SHORT_SUMS 1
#include "kernels.h"
#include "linear.h"

qllm::Status (*const qllm::avx2_int8_linear)(const Linear &) = linear_of<1>;
