// What AVX2 has for int8 activations times a few bits, in groups of 16.
#define SHORT_SUMS 1
#define HALF_GROUPS 1
#include "kernels.h"
#include "linear.h"

qllm::Status (*const qllm::avx2_int8_halves)(const Linear &) = linear_of<1>;
