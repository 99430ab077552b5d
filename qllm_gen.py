"""Greedy generation with a quantized model.

python3 qllm_gen.py --model-name bloom --model-size 560m --bitwidth 4 --num-shards 3
python3 qllm_gen.py --model-name bloom --model-size tiny --bitwidth 4 --compare
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qllm import cli
from qllm.config import DEFAULT_ACTIVATION_BITS

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from qllm.config import QuantPlan
    from qllm.generate import GenerationConfig
    from qllm.hub import ModelFolder
    from qllm.models import Decoder
    from qllm.onnx.runner import OnnxDecoder
    from qllm.tokenizer import Tokenizer


SHARDS = 2


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_quant_options(parser)
    cli.add_activation_option(parser)
    parser.add_argument(
        "--calib", metavar="FILE", help="activation statistics for 8:tc-li and 8:tc"
    )
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    parser.add_argument(
        "--num-shards",
        type=cli.whole_number(1),
        default=SHARDS,
        metavar="N",
        help="contiguous layer ranges, run one after the other (%(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="run the reference too, and show where they differ"
    )
    parser.add_argument(
        "--explain", action="store_true", help="show which kernel each layer uses, and why"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print text as it comes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    plan = cli.read_plan(args)
    prompts = cli.read_prompts(args)
    folder = cli.resolve_model(args)
    refused = ("--calib", "--num-shards", "--compare", "--explain", "--activation-bits")
    defaults = {"num_shards": SHARDS, "activation_bits": DEFAULT_ACTIVATION_BITS}
    onnx = cli.holds_onnx(args, folder, *refused, **defaults)
    device = cli.resolve_device(args)

    from qllm import report
    from qllm.checkpoint.reader import read_raw_config
    from qllm.checkpoint.weights import check_readable_by_transformers
    from qllm.generate import check_prompts, read_generation_config
    from qllm.models import read_config
    from qllm.tokenizer import Tokenizer

    raw_config = read_raw_config(folder.path)
    if args.compare:
        check_readable_by_transformers(raw_config)
    config = read_config(raw_config)
    tokenizer = Tokenizer.load(folder.path, config.vocab_size)
    ids = cli.tokenize(tokenizer, prompts, args.max_prompt_length)
    generation = replace(
        read_generation_config(folder.path, config, cli.note),
        max_new_tokens=args.max_gen_tokens,
    )
    check_prompts(config, ids, generation)
    start = time.perf_counter()
    shape = (len(ids), max(map(len, ids)) + args.max_gen_tokens)
    model = load_onnx(folder) if onnx else load(args, folder, plan, device, shape)
    loaded = time.perf_counter() - start
    result = {
        "model": folder.name,
        "bitwidth": model.bitwidth if onnx else args.bitwidth or report.bitwidth(model),
        "results": [],
        "shards": [] if onnx else report.shard_rows(model),
    }
    if args.explain:
        result["kernels"] = report.kernel_rows(model)
    if not args.json:
        dtype = str(model.dtype).removeprefix("torch.")
        print(
            f"{folder.name} at bitwidth {result['bitwidth']}, {dtype} on {model.device}"
            f"{' in onnxruntime' if onnx else ''}, loaded in {loaded:.2f} s"
        )
        report.print_shards(result["shards"])
        report.print_kernels(result.get("kernels", ()))

    tokens, result["seconds"] = run_prompts(args, model, tokenizer, prompts, ids, generation)
    texts = [tokenizer.continuation(*pair) for pair in zip(ids, tokens, strict=True)]
    result["results"] = report.result_rows(prompts, texts, tokens)
    if args.compare:
        dtype, device = model.dtype, str(model.device)
        del model  # the two need not fit into memory together
        result["compare"] = compare(args, folder.path, tokenizer, prompts, tokens, dtype, device)
    if args.json:
        report.print_json(result)
        return
    report.print_speed(result["results"], result["seconds"])
    if args.compare or not args.stream:
        report.print_results(result["results"], result.get("compare", ()))


def load(
    args: argparse.Namespace,
    folder: ModelFolder,
    plan: QuantPlan,
    device: str,
    cache_shape: tuple[int, int],
) -> Decoder:
    """Our model of a checkpoint."""
    from qllm.checkpoint.convert import find_source
    from qllm.checkpoint.load import load_model

    return load_model(
        find_source(folder, cli.note),
        plan,
        dtype=cli.resolve_dtype(args),
        device=device,
        num_shards=args.num_shards,
        calibration=cli.find_calibration(args, folder, plan),
        cache_shape=cache_shape,
        activation_bits=args.activation_bits,
        progress=cli.progress("loading"),
    )


def load_onnx(folder: ModelFolder) -> OnnxDecoder:
    """The ONNX model of a folder in onnxruntime."""
    from qllm.onnx.runner import OnnxDecoder

    return OnnxDecoder(folder.path)


def run_prompts(
    args: argparse.Namespace,
    model: Decoder | OnnxDecoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    ids: list[list[int]],
    generation: GenerationConfig,
) -> tuple[list[list[int]], float]:
    """New tokens of each prompt and the seconds they took; with --stream, printed as they come."""
    from qllm.generate import TextStream, generate

    start = time.perf_counter()
    if not args.stream:
        return generate(model, ids, generation), time.perf_counter() - start
    write = partial(print, end="", flush=True)
    stream = TextStream(tokenizer, ids, lambda row: write(f"\n{prompts[row]}"), write)
    tokens = generate(model, ids, generation, stream.add)
    seconds = time.perf_counter() - start
    print("\n")
    return tokens, seconds


def compare(
    args: argparse.Namespace,
    folder: Path,
    tokenizer: Tokenizer,
    prompts: list[str],
    tokens: list[list[int]],
    dtype: torch.dtype,
    device: str,
) -> list[dict]:
    """How the reference, in the same type on the same device, agrees with our tokens."""
    from qllm import report
    from qllm.huggingface import reference_generate

    reference = reference_generate(
        folder,
        prompts,
        max_prompt_length=args.max_prompt_length,
        max_new_tokens=args.max_gen_tokens,
        dtype=dtype,
        device=device,
    )
    return report.comparison_rows(tokenizer, tokens, reference.tokens, reference.texts)


if __name__ == "__main__":
    cli.run(main)
