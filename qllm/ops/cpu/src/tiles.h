// The tiles that a file is compiled for: those of AMX, or of vectors.
#pragma once

#if defined(HAS_TILES)
#include "dense_tile_amx.h"
#include "tile_amx.h"
#else
#include "dense_tile.h"
#include "tile.h"
#endif
