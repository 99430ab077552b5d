// What is faster on CPUs of one maker, and slower on another's, that have the same instructions.
#pragma once

#include <cstdint>

namespace qllm {

constexpr int64_t FIRST_AHEAD = 4096;  // bytes

struct Machine {
    // Whether vectors are added by units that do not multiply, beside those that do: AMD's. Of
    // Intel's those that multiply int16 add as well, and one other at the most.
    bool spare_adders;
    // Whether memory is asked for into the first cache, FIRST_AHEAD of what is read, where there is
    // less to compute than to read. Zen 4 reads faster so. Intel's with AMX does not: into the
    // second cache it reads 4 and 8 bits at 95% of its rate, into the first at 80% to 90%.
    bool into_first;
    // Bytes ahead of what is read, into the second cache. Zen 4 needs the more; Intel's reads at a
    // tenth less of its rate from 8 KiB ahead than from 2 to 4.
    int64_t ahead;
};

constexpr Machine AMD_MACHINE = {true, true, 8192}, OTHER_MACHINE = {false, false, 3072};

// This one, once a path is taken.
extern Machine machine;

}  // namespace qllm
