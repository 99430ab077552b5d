"""Where the shards of a model go: on one device, or on a GPU as far as it holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qllm.memory import available_bytes, check_fits, gigabytes

CPU = torch.device("cpu")


def infer_device_map(
    sizes: Sequence[int], spare: int, device: torch.device | str, what: str
) -> list[torch.device]:
    """The device of each shard, in the order in which they run.

    Args:
        sizes: bytes of each, with what its layers keep of a text.
        spare: bytes that loading takes besides, on each device.
        device: gets all shards, or where they do not fit the first ones; the CPU then the others.
        what: that needs the memory, for messages.

    Raises:
        UserError: they do not fit, with the numbers.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    needed, free = sum(sizes) + spare, available_bytes(device)
    if device == CPU or needed <= free:
        check_fits(needed, device, what)
        return [device] * len(sizes)
    if len(sizes) == 1:
        advice = "`num_shards` 2 or more leaves some to the CPU; or take fewer bits"
        check_fits(needed, device, what, advice)
    kept, left = 0, free - spare
    while kept < len(sizes) and sizes[kept] <= left:
        left -= sizes[kept]
        kept += 1
    rest = sum(sizes[kept:])
    beside = f"{what}, beside {gigabytes(sum(sizes[:kept]))} on {device},"
    check_fits(rest + spare, CPU, beside)
    return [device] * kept + [CPU] * (len(sizes) - kept)
