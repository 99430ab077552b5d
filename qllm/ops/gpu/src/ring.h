// Stages of shared memory that are used in turns, for prefill.cu and prefill_int8.cu.

// A ring's stage in use, and the parity of the phase in which it is full.
struct Stage {
    int index = 0;
    u32 parity = 0;
};

DEVICE void advance(Stage& stage, int count) {
    if (++stage.index == count) {
        stage.index = 0;
        stage.parity ^= 1;
    }
}
