"""The CPU kernels: C++ behind a C interface (`src/kernels.h`), compiled at first use.

One library holds a path for each instruction set, and takes the best that the machine has;
`QLLM_CPU_PATH` names a lesser one. A row's result does not depend on the rows computed beside it,
nor on the number of threads; that of a packed layer is the same to the bit on every path.
"""
