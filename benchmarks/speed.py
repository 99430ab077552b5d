"""Tokens per second in prefill and decode, beside transformers in the same run.

    python3 -m benchmarks.speed --repository facebook/opt-125m

Lays out a checkpoint of the published configuration with random weights. The bandwidth column
says what the machine allows: bytes of the model that a decoded token reads, over the time it took,
beside the rate at which torch sums a large array. Prints one JSON line last.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.quality import reference_model
from qllm import cli
from qllm.checkpoint.load import load_model, module_bytes
from qllm.config import QuantPlan
from qllm.models import Decoder
from tools.random_checkpoint import PUBLISHED, write_checkpoint

READ_BYTES = 1 << 30  # far more than any cache holds


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second at which torch reads memory."""
    array = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / median_seconds(array.sum, 5)


def decode_ours(model: Decoder, prompt: list[int], count: int) -> float:
    """Seconds per decoded token."""
    cache = model.new_cache(1, len(prompt) + count)
    model.prefill([prompt], cache)
    token = torch.tensor([7])
    start = time.perf_counter()
    for _ in range(count):
        token = model.decode(token, cache).argmax(-1)
    return (time.perf_counter() - start) / count


@torch.inference_mode()
def decode_reference(model: torch.nn.Module, prompt: list[int], count: int) -> float:
    """The same with transformers' model and its own cache."""
    past = model(torch.tensor([prompt]), use_cache=True).past_key_values
    token = torch.tensor([[7]])
    start = time.perf_counter()
    for _ in range(count):
        out = model(token, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / count


@torch.inference_mode()
def measure(
    name: str, model: Decoder | torch.nn.Module, args: object, vocab: int
) -> dict[str, object]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab, (args.prompt,), generator=generator).tolist()
    if isinstance(model, Decoder):
        size, decode = module_bytes(model), decode_ours

        def prefill() -> object:
            return model.prefill([prompt])
    else:
        size, decode = model.get_memory_footprint(), decode_reference

        def prefill() -> object:
            return model(torch.tensor([prompt]), logits_to_keep=1)

    prefill_seconds = median_seconds(prefill, 3)
    decode(model, prompt, 2)
    token_seconds = decode(model, prompt, args.tokens)
    return {
        "name": name,
        "bytes": size,
        "prefill": args.prompt / prefill_seconds,
        "decode": 1 / token_seconds,
        "read": size / token_seconds,
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--repository", choices=list(PUBLISHED), default="facebook/opt-125m")
    parser.add_argument("--bitwidths", nargs="+", default=["16", "8:tc-li", "8", "4", "3"])
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    number = cli.whole_number(1)
    parser.add_argument("--prompt", type=number, default=128, help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=number, default=32, help="to decode (%(default)s)")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    config = PUBLISHED[args.repository]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, config)
        models: list[tuple[str, Callable[[], object]]] = [
            ("transformers", lambda: reference_model(folder, dtype))
        ]
        for bitwidth in args.bitwidths:
            plan = QuantPlan.parse(bitwidth)
            models.append((bitwidth, lambda plan=plan: load_model(folder, plan, dtype=dtype)))
        rows = [measure(name, make(), args, config["vocab_size"]) for name, make in models]
    bandwidth = read_bandwidth()
    print(f"{args.repository}, {args.dtype}, {torch.get_num_threads()} threads, ", end="")
    print(f"memory read at {bandwidth / 1e9:.1f} GB/s\n")
    print(f"| bitwidth | MB | prefill of {args.prompt}, tokens/s | decode, tokens/s | GB/s |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['bytes'] / 1e6:.0f} | {row['prefill']:.0f} "
            f"| {row['decode']:.1f} | {row['read'] / 1e9:.1f} |"
        )
    print(json.dumps({"settings": vars(args), "bandwidth": bandwidth, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
