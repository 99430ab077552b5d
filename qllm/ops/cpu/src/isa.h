// The instruction set that a file is compiled for.
#pragma once

#if defined(__AVX512F__)
#include "isa_avx512.h"
#elif defined(__AVX2__)
#include "isa_avx2.h"
#else
#include "isa_scalar.h"
#endif

#if defined(HAS_TILES)
// Tiles stand in for vectors: few rows are not for them, nor are int16.
#undef GEMV_OPERANDS
#undef HAS_WORDS
#undef GEMV_IN_WORDS
#endif
