"""A model over processes, and a layer by itself.

torchrun --nproc-per-node 2 -m examples.sharded
"""

from __future__ import annotations

import torch

from qllm import LLM
from qllm.config import QuantSpec
from qllm.layers import linear_class
from qllm.parallel import Sharding, shard_linear
from qllm.parallel.session import ParallelConfig, session


def main() -> None:
    with session(ParallelConfig(tp=2)) as ranks:
        # Each rank reads its shards of the checkpoint, and no more.
        llm = LLM.from_pretrained("opt-tiny", bitwidth=4, parallel=ranks.context())
        (completion,) = llm.generate("He is working on", max_new_tokens=20)
        # A layer of one's own: 3 bits, its 128 output channels shared by the ranks.
        spec, draw = QuantSpec.parse(3, 64), torch.Generator().manual_seed(0)
        weight = torch.randn(128, 256, generator=draw)
        whole = linear_class(spec).from_float(weight, None, spec, input_range=None)
        sharded = shard_linear(whole, ranks.tp, Sharding.evenly(0, 128, ranks.tp.size))
        whole.process_weights_after_loading()  # gives it the layout of its kernel
        x = torch.randn(5, 256, generator=draw)
        same = torch.equal(sharded(x), whole(x))
        if ranks.rank == 0:
            print(f"{completion.prompt}{completion.text}")
            print(f"{sharded.linear.nbytes()} of {whole.nbytes()} bytes are here; same: {same}")


if __name__ == "__main__":
    main()
