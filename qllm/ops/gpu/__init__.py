"""The GPU kernels: in Triton, which comes with torch's CUDA build; decode products in CUDA C++.

`kernels/` is what runs on the GPU in Triton, imported when a layer first needs it; `src/` is what
NVRTC compiles (`nvrtc`) and the driver launches (`driver`). The other modules call them on tensors.
A row's result does not depend on the rows computed beside it: the tiles of a product change with
the number of rows, the order in which its summands are added does not.

With `TRITON_INTERPRET=1` the kernels run on the CPU, slowly, in Triton's interpreter: so they are
tested where there is no GPU.
"""
