"""The CPU kernels: C++ behind a C interface (`src/kernels.h`), compiled at first use.

There is a path for each instruction set (`paths`): the best that the machine has is compiled and
taken; `QLLM_CPU_PATH` names a lesser one. A row's result does not depend on the rows computed
beside it, nor on the number of threads; that of a packed layer has the same bits on every path, but
for prefill in bfloat16 and float16 on AMX (`src/prefill_amx.h`).
"""
