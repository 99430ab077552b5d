"""Generation with a quantized model.

python3 qllm_gen.py --model-name bloom --model-size 560m --bitwidth 4 --num-shards 3
python3 qllm_gen.py --model-name bloom --model-size tiny --bitwidth 4 --compare
python3 qllm_gen.py --model-size tiny --temperature 0.8 --top-p 0.95 --seed 1
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qllm import cli
from qllm.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from qllm.generation_config import GenerationConfig
    from qllm.llm import Pretrained
    from qllm.models import Decoder
    from qllm.onnx.runner import OnnxDecoder
    from qllm.parallel.session import Session
    from qllm.tokenizer import Tokenizer


SHARDS = 2
# Options that mean nothing with an ONNX model, and what they are where they are not given.
NOT_FOR_ONNX = {
    "num_shards": SHARDS,
    "tp": 1,
    "pp": 1,
    "compare": False,
    "explain": False,
}


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_quant_options(parser)
    cli.add_activation_options(parser)
    cli.add_kv_options(parser)
    cli.add_prompt_options(parser)
    cli.add_sampling_options(parser)
    cli.add_run_options(parser)
    parser.add_argument(
        "--batch-size",
        type=cli.whole_number(1),
        metavar="N",
        help="prompts that are generated at once (all; fewer take less memory)",
    )
    parser.add_argument(
        "--num-shards",
        type=cli.whole_number(1),
        default=cli.Default(SHARDS),
        metavar="N",
        help="contiguous layer ranges, run one after the other (%(default)s)",
    )
    cli.add_parallel_options(parser)
    parser.add_argument(
        "--compare", action="store_true", help="run the reference too, and show where they differ"
    )
    parser.add_argument(
        "--reference",
        metavar="DIR_OR_REPO",
        help="for --compare, the 16-bit checkpoint (the one that the model says it was made from, "
        "else itself)",
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
    cli.check_processes(args)
    if args.pp > 1 and not isinstance(args.num_shards, cli.Default):
        raise UserError(
            "--num-shards are ranges of one process; --pp says how many stages it takes"
        )
    if args.tp * args.pp == 1:
        generate_text(args, None)
        return
    with cli.session(args) as session:
        generate_text(args, session)


def generate_text(args: argparse.Namespace, session: Session | None) -> None:
    """Load a model and print what it generates; of several processes, the first one prints."""
    plan = cli.read_plan(args)
    talks = session is None or session.rank == 0
    note = cli.note if talks else cli.silent
    with cli.unbounded(session):
        prompts = cli.read_prompts(args) if talks else []
        folder = cli.resolve_model(args, note=note)
    if session is not None:
        prompts = session.broadcast(prompts)
    onnx = cli.holds_onnx(args, folder, **NOT_FOR_ONNX)
    cli.check_rounding(args, [plan])
    device = cli.resolve_device(args)

    from qllm import report
    from qllm.generate import check_prompts
    from qllm.llm import LLM, Pretrained
    from qllm.stopping import check_stops, cut

    pretrained = Pretrained.open(folder, note=note)
    config, tokenizer = pretrained.config, pretrained.tokenizer
    reference = find_reference(args, pretrained, note)
    cli.fit_defaults(args, config, prompts != list(cli.DEFAULT_PROMPTS))
    ids = cli.tokenize(tokenizer, prompts, args.max_prompt_length, note)
    generation = read_generation(args, pretrained, session)
    check_prompts(config, ids, generation)
    stops = args.stop or []
    check_stops(tokenizer, stops)
    calibration = cli.find_calibration(args, folder, plan, note)
    parallel = session and cli.join(args, session, pretrained, plan, calibration, generation, ids)
    batch_size = min(args.batch_size or len(ids), len(ids))
    cache_shape = (batch_size, max(map(len, ids)) + args.max_gen_tokens)
    start = time.perf_counter()
    model = LLM.load(
        pretrained,
        plan,
        dtype=cli.resolve_dtype(args),
        device=device,
        num_shards=args.num_shards,
        calibration=calibration,
        cache_shape=cache_shape,
        prompt_lengths=[*map(len, ids[:batch_size])],
        activation_bits=args.activation_bits,
        kv_bits=args.kv_bits,
        meter=cli.meter("loading") if session is None else session.meter,
        parallel=parallel,
        note=note,
    ).model
    result = describe(args, folder.name, model, session, onnx, cache_shape)
    if not args.json and talks:
        show(args, result, model, time.perf_counter() - start, onnx)
    stream = args.stream and talks
    tokens, result["seconds"] = run_prompts(
        stream, model, tokenizer, prompts, ids, generation, stops, batch_size
    )
    if not talks:
        return
    if generation.sampling is not None:
        result["seed"] = generation.sampling.seed
    texts = [cut(tokenizer.continuation(*pair), stops) for pair in zip(ids, tokens, strict=True)]
    result["results"] = report.result_rows(prompts, texts, tokens)
    if args.compare:
        dtype, device = model.dtype, str(model.device)
        del model  # the two need not fit into memory together
        result["compare"] = compare(args, reference, tokenizer, prompts, tokens, dtype, device)
    if args.json:
        cli.print_json(result)
        return
    print(report.speed_line(result["results"], result["seconds"]))
    if args.compare or not args.stream:
        cli.print_lines(report.result_lines(result["results"], result.get("compare", ())))


def read_generation(
    args: argparse.Namespace, pretrained: Pretrained, session: Session | None
) -> GenerationConfig:
    """The checkpoint's settings, with those that the options give; a seed is all processes'.

    Raises:
        UserError: for settings that cannot be, or that --compare's reference does not have.
    """
    settings = cli.read_sampling_options(args)
    given = [key for key, value in {**settings, "stop": args.stop}.items() if value is not None]
    if args.compare and given:
        option = given[0].replace("_", "-")
        raise UserError(f"--compare shows greedy search; leave --{option} out")
    generation = pretrained.generation_with(max_new_tokens=args.max_gen_tokens, **settings)
    sampling = generation.sampling and generation.sampling.with_seed()
    if session is not None:  # where ranks were started unlike, too, all exchange the same
        seed = session.broadcast(sampling and sampling.seed)
        sampling = sampling and replace(sampling, seed=seed)
    return replace(generation, sampling=sampling)


def find_reference(
    args: argparse.Namespace, pretrained: Pretrained, note: Callable[[str], None]
) -> Path:
    """The folder that --compare gives to transformers.

    Raises:
        UserError: transformers cannot read it, or it is another model.
    """
    from qllm.checkpoint import origin

    if not args.compare:
        if args.reference:
            raise UserError("--reference does nothing without --compare")
        return pretrained.folder.path
    found = origin.find_reference(pretrained.folder, args.reference, note)
    origin.check_reference(found, pretrained.folder, pretrained.config)
    return found.path


def describe(
    args: argparse.Namespace,
    name: str,
    model: Decoder | OnnxDecoder,
    session: Session | None,
    onnx: bool,
    cache_shape: tuple[int, int],
) -> dict[str, object]:
    """What the JSON object says of a model; of several processes each tells the others its part."""
    from qllm import report

    result: dict[str, object] = {
        "model": name,
        "bitwidth": model.bitwidth if onnx else args.bitwidth or report.bitwidth(model),
        "results": [],
    }
    gather = (lambda value: [value]) if session is None else session.all_gather_object
    if session is None:
        result["shards"] = [] if onnx else report.shard_rows(model)
    else:
        result["ranks"] = gather(report.rank_row(model))
    if not onnx:
        cache = report.cache_row(model, *cache_shape)
        result["kv_cache"] = cache | {"bytes": sum(gather(cache["bytes"]))}
        # Of 16 bits it says nothing, as the object of ref_gen.py.
        outer = report.outer_bits(model)
        result |= {name: bits for name, bits in outer.items() if bits != "16"}
    if args.explain:
        kernels = report.kernel_rows(model)
        if not onnx:
            kernels += report.attention_rows(model)
            result["graph_break"] = model.graph_break()
        each: list[dict] = []
        for rows in gather(kernels):
            each += [row for row in rows if row not in each]  # ranks of a stage have the same
        result["kernels"] = each
    return result


def show(
    args: argparse.Namespace,
    result: dict,
    model: Decoder | OnnxDecoder,
    seconds: float,
    onnx: bool,
) -> None:
    """Print what `describe` found; shards where they were asked for, or are in several places."""
    from qllm import report

    given = not isinstance(args.num_shards, cli.Default)

    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{result['model']} at bitwidth {report.label(result)}, {dtype} on {model.device}"
        f"{' in onnxruntime' if onnx else ''}, loaded in {seconds:.2f} s"
    )
    if "ranks" in result:
        cli.print_lines(report.rank_lines(result["ranks"]))
    elif given or len({shard["device"] for shard in result["shards"]}) > 1:
        cli.print_lines(report.shard_lines(result["shards"]))
    if "kv_cache" in result:
        print(report.cache_line(result["kv_cache"]))
    cli.print_lines(report.kernel_lines(result.get("kernels", ())))
    if "graph_break" in result:
        print(report.graph_break_line(result["graph_break"]))


def run_prompts(
    streamed: bool,
    model: Decoder | OnnxDecoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    ids: list[list[int]],
    generation: GenerationConfig,
    stops: list[str],
    batch_size: int,
) -> tuple[list[list[int]], float]:
    """New tokens of each prompt and the seconds they took; if `streamed`, printed as they come."""
    from qllm.generate import generate
    from qllm.stopping import StopStrings
    from qllm.stream import TextStream

    stop = StopStrings(tokenizer, ids, stops) if stops else None
    start = time.perf_counter()
    more = {"stop": stop, "batch_size": batch_size}
    if not streamed:
        return generate(model, ids, generation, **more), time.perf_counter() - start
    write = partial(print, end="", flush=True)
    stream = TextStream(tokenizer, ids, lambda row: write(f"\n{prompts[row]}"), write, stops)
    tokens = generate(model, ids, generation, stream.add, **more)
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
