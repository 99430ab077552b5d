"""vLLM's engine on the CPU: bfloat16, int8 with a scale per token, and GPTQ of 4 bits.

The int8 and GPTQ checkpoints are what QLLM rounds to nearest, in compressed-tensors and GPTQ's
format. A step is one of the engine's, with its scheduler and its choice of a token, and a prompt's
prefill is the generation of one token. The engine runs in this process, without its cache of
prefixes. What vLLM's guide for CPUs wants preloaded (tcmalloc and Intel's OpenMP) is up to whoever
runs this, by LD_PRELOAD; a format that has no kernel on the machine at hand is left out.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.rivals.common import PREFILL_RUNS, Model, checkpoint, random_prompts
from qllm import cli, quantize
from qllm.ops.cpu.limits import median_seconds

if TYPE_CHECKING:
    from vllm import LLM

    from benchmarks.rivals.interleaved import Settings

# Bits, a name, and how a checkpoint of them is made.
FORMATS = (
    ("16", "bfloat16", None),
    ("8:tc-li", "int8", {"bitwidth": "8:tc-li"}),
    ("4", "GPTQ, group 128", {"bitwidth": 4, "algorithm": "rtn", "scheme": "sym"}),
)
GIGABYTES = "1"  # of a KV cache


def models(repository: str, settings: Settings, folder: Path, stack: ExitStack) -> Iterator[Model]:
    """One for each format that vLLM runs here.

    Args:
        folder: for the checkpoints, which stay.
        stack: has nothing to free.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": GIGABYTES,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    source = checkpoint(folder, repository, settings)
    for bits, name, how in FORMATS:
        if not settings.wants(bits):
            continue
        if bits == "4" and not _has_packed_products():
            cli.note(f"vLLM's {name} is left out: it has no kernel for this processor")
            continue
        path = source
        if how is not None:
            path = folder / f"{source.name}-{bits.partition(':')[0]}"
            if not path.exists():
                quantize(source, save=path, **how)
        yield _model(f"vLLM {name}", bits, path, _engine(path, settings), settings)


def _has_packed_products() -> bool:
    from vllm import _custom_ops  # which loads what is compiled for the processor

    return hasattr(_custom_ops.torch.ops._C, "cpu_gemm_wna16")


def _engine(path: Path, settings: Settings) -> LLM:
    from vllm import LLM

    longest = max(settings.prompt, settings.context + settings.steps + 2)
    return LLM(
        model=str(path),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=longest + 1,
        max_num_seqs=max(settings.batches),
        max_num_batched_tokens=max(longest + 1, settings.context * max(settings.batches)),
    )


def _model(name: str, bits: str, path: Path, llm: LLM, settings: Settings) -> Model:
    from vllm import SamplingParams

    engine, numbers = llm.llm_engine, itertools.count()
    vocab = llm.model_config.get_vocab_size()

    def generate(prompts: np.ndarray, count: int) -> list[float]:
        """Seconds of each step of the engine, which a token of each prompt comes with."""
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for prompt in prompts.tolist():
            engine.add_request(str(next(numbers)), {"prompt_token_ids": prompt}, how)
        times = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        return times

    def prefill(tokens: int) -> float:
        prompt = random_prompts(1, tokens, vocab)
        return median_seconds(lambda: generate(prompt, 1), PREFILL_RUNS)

    def decode(batch: int, context: int, steps: int) -> float:
        # The last step may be one that only ends; the first ones read the prompts.
        times = generate(random_prompts(batch, context, vocab), steps + 2)
        return statistics.median(times[-steps - 1 : -1])

    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Model(name, bits, size, prefill, decode)
