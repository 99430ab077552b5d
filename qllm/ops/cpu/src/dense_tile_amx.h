// How activations lie for products of tiles on AMX (passes_amx.h), of bfloat16 or bytes: 64 bytes
// of each row of two tiles, then the next 64. In place of dense_tile.h.
#pragma once

#include "isa.h"
#include "operands.h"
#include "tile_amx.h"

namespace qllm {
namespace {

constexpr int64_t DENSE_TILE_ROWS = 2 * ROWS;
constexpr int64_t TILE_STEPS = ROW_BYTES / STEP;

// Rows of the tiles that take the first of those that are left.
inline int64_t dense_tile_rows(int64_t left) { return left > ROWS ? 2 * ROWS : ROWS; }

// Where a step of a row lies among the activations of a tile: 16 steps of each row, row by row.
inline int64_t dense_offset(int64_t rows, int64_t row, int64_t step) {
    return step / TILE_STEPS * TILE_STEPS * rows + row * TILE_STEPS + step % TILE_STEPS;
}

}  // namespace
}  // namespace qllm
