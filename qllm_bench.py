"""How fast and how small a quantized model is: throughput, latency, memory, the module tree.

    python3 qllm_bench.py --model-size tiny --bitwidth 16,4 -p 128 -n 64 -b 1,8 -r 5
    python3 qllm_bench.py --model-path DIR --benchmark 1024 --max-length 64 --check
    python3 qllm_bench.py --model-name llama --model-size tiny --bitwidth 3 --tree

Without -p, -n, --benchmark, --tree or --tp-model: a prompt of 512 tokens, and 128 new ones.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from qllm import cli
from qllm.config import DEFAULT_ACTIVATION_BITS, DEFAULT_KV_BITS
from qllm.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from qllm.bench.runners import ModelRunner
    from qllm.bench.speed import Case
    from qllm.config import ModelConfig, QuantPlan
    from qllm.llm import Pretrained

# As llama-bench has them.
PROMPT, NEW, RUNS = (512,), (128,), 5


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    cli.add_model_options(parser)
    cli.add_quant_options(parser, several=True)
    cli.add_activation_options(parser)
    cli.add_kv_options(parser)
    cli.add_run_options(parser)
    group = parser.add_argument_group("throughput, as llama-bench has it")
    group.add_argument("-p", type=whole_numbers(0), metavar="N", help="tokens of a prompt (512)")
    group.add_argument("-n", type=whole_numbers(0), metavar="N", help="new tokens (128)")
    group.add_argument("-b", type=whole_numbers(1), metavar="N", help="sequences at once (1)")
    group.add_argument("-r", type=number, metavar="N", help="runs of each (5)")
    group.add_argument("--compare", choices=("hf",), help="run transformers beside it, in turn")
    group.add_argument(
        "--reference",
        metavar="DIR_OR_REPO",
        help="for --compare, the 16-bit checkpoint (the one that the model says it was made from, "
        "else itself)",
    )
    group = parser.add_argument_group("latency")
    group.add_argument("--benchmark", type=number, metavar="N", help="decode N tokens one by one")
    group.add_argument(
        "--max-length", type=number, metavar="N", help="tokens of a sequence (all, one sequence)"
    )
    group.add_argument(
        "--check", action="store_true", help="the perplexity of those tokens, by decode and prefill"
    )
    group.add_argument(
        "--dataset",
        metavar="FILE_OR_NAME",
        help="the tokens' text: a file, or wikitext2, c4, ptb, pile-10k (random tokens)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--tree", action="store_true", help="the model's modules, from the files' headers alone"
    )
    group.add_argument(
        "--tp-model",
        action="store_true",
        help="time per token on 1, 8 and 64 ranks, as far as there are heads for them, calculated "
        "from the same headers",
    )
    group.add_argument(
        "--output",
        choices=("md", "csv", "json"),
        default="md",
        help="how results are printed (%(default)s)",
    )
    group.add_argument(
        "--json",
        action="store_const",
        dest="output",
        const="json",
        help="the same as --output json",
    )
    return parser.parse_args()


def whole_numbers(minimum: int) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers of `minimum` or more, separated by commas."""
    parse = cli.whole_number(minimum)
    return lambda text: tuple(dict.fromkeys(parse(part) for part in text.split(",")))


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming the first of them.
    """
    for option, given in (
        ("--check", args.check),
        ("--max-length", args.max_length),
        ("--dataset", args.dataset),
    ):
        if given and not args.benchmark:
            raise UserError(f"{option} does nothing without --benchmark")
    if args.reference and not args.compare:
        raise UserError("--reference does nothing without --compare")
    throughput = wants_throughput(args)
    for option in ("b", "r", "compare"):
        if getattr(args, option) is not None and not throughput:
            name = f"-{option}" if len(option) == 1 else f"--{option}"
            raise UserError(f"{name} does nothing without -p or -n")
    if not (throughput or args.benchmark):
        for option, given in (
            ("--activation-bits", args.activation_bits != DEFAULT_ACTIVATION_BITS),
            ("--calib", args.calib),
            ("--kv-bits", args.kv_bits != DEFAULT_KV_BITS),
        ):
            if given:
                raise UserError(f"{option} does nothing without -p, -n or --benchmark")
    if args.p and args.n and not any((*args.p, *args.n)):
        raise UserError("-p 0 and -n 0 leave nothing to measure; give one of them 1 or more")
    if args.output == "csv" and (args.tree or args.tp_model or args.benchmark):
        raise UserError("csv is for the table of -p and -n; take --output json")


def wants_throughput(args: argparse.Namespace) -> bool:
    """Whether there is a table: what is asked for, or nothing else is."""
    return bool(args.p or args.n) or not (args.benchmark or args.tree or args.tp_model)


def read_tokens(args: argparse.Namespace, pretrained: Pretrained) -> list[int]:
    """What --benchmark decodes."""
    if args.dataset is None:
        from qllm.bench.latency import random_tokens

        return random_tokens(pretrained.config, args.benchmark)
    from qllm.data import load_text

    ids = pretrained.tokenizer.encode(load_text(args.dataset, "evaluation"))
    if len(ids) < args.benchmark:
        raise UserError(f"--dataset {args.dataset} has {len(ids)} tokens, not {args.benchmark}")
    return ids[: args.benchmark]


def throughput_cases(args: argparse.Namespace, config: ModelConfig) -> list[Case]:
    """What -p, -n and -b ask for."""
    from qllm.bench.speed import Case, cases, context

    if not wants_throughput(args):
        return []
    prompts, news = args.p, args.n
    longest = math.inf if config.max_positions is None else config.max_positions
    # As in llama-bench, a length of 0 stands for no test, and leaves the other at its default.
    if args.p is None and not any(args.n or ()):
        prompts = [min(count, longest) for count in PROMPT]
    if args.n is None and not any(args.p or ()):
        longest -= context(Case("tg", 0, 1))
        news = [max(0, min(count, longest)) for count in NEW]
    return cases(config, prompts or (), news or (), args.b or (1,))


def main() -> None:
    args = parse_args()
    check_options(args)
    plans = cli.read_plans(args)
    folder = cli.resolve_model(args)
    onnx = cli.holds_onnx(args, folder, compare=None, tree=False, tp_model=False)
    cli.check_rounding(args, plans)
    device = "cpu" if onnx else cli.resolve_device(args)

    import torch

    from qllm import report
    from qllm.bench.ranks import predict
    from qllm.bench.table import bench_lines
    from qllm.llm import Pretrained

    pretrained = Pretrained.open(folder, texts=False)
    dtype = cli.resolve_dtype(args)
    ranks = predict(folder.path, plans, pretrained.config, dtype) if args.tp_model else []
    result = {
        "model": folder.name,
        "device": device,
        "threads": torch.get_num_threads(),
        "trees": trees(args, folder.path, plans) if args.tree else [],
        "tp_models": ranks,
        "benchmarks": [],
        "rows": [],
    }
    measure(args, pretrained, plans, result)
    if args.output == "json":
        from qllm.evaluate import provenance

        about = {"versions": provenance.versions(), "machine": provenance.machine()}
        result["trees"] = [entry | {"tree": entry["tree"].to_json()} for entry in result["trees"]]
        cli.print_json(report.finite(result | about | {"settings": vars(args)}))
    else:
        cli.print_lines(bench_lines(result, csv=args.output == "csv"))


def trees(args: argparse.Namespace, folder: Path, plans: list[QuantPlan]) -> list[dict]:
    """The module tree of each plan's model."""
    from qllm.bench.tree import tree
    from qllm.checkpoint.load import outline

    dtype = cli.resolve_dtype(args)
    return [
        {"bitwidth": args.bitwidth and plan.text, "tree": tree(outline(folder, plan, dtype))}
        for plan in plans
    ]


def measure(
    args: argparse.Namespace, pretrained: Pretrained, plans: list[QuantPlan], result: dict
) -> None:
    """Load each plan's model, and add to the result what is asked of it."""
    from qllm import report
    from qllm.bench import latency
    from qllm.bench.runners import ReferenceRunner
    from qllm.bench.speed import context
    from qllm.bench.speed import measure as measure_case
    from qllm.memory import peak_bytes, reset_peak_memory

    config, device = pretrained.config, result["device"]
    wanted = throughput_cases(args, config)
    longest = min(args.max_length or args.benchmark, args.benchmark) if args.benchmark else 0
    latency.check_length(config, longest)
    if not (wanted or longest):
        return
    tokens = read_tokens(args, pretrained) if longest else []
    shapes = [(case.batch, context(case)) for case in wanted] + [(1, longest)]
    load = loader(args, pretrained, plans, device, max(shapes, key=math.prod))
    reference = None
    if args.compare:
        from qllm.checkpoint import origin
        from qllm.huggingface import HuggingFaceModel

        reference_folder = origin.find_reference(pretrained.folder, args.reference, cli.note)
        origin.check_reference(reference_folder, pretrained.folder, config)
        dtype = cli.resolve_dtype(args)
        reference = HuggingFaceModel.load(reference_folder.path, dtype=dtype, device=device)
    for plan in plans:
        reset_peak_memory(device)
        runner, about = load(plan)
        result["dtype"] = str(runner.model.dtype).removeprefix("torch.")
        rows = [(about, runner)]
        if reference is not None:
            other = {"bitwidth": "transformers", "activation_bits": None, "kv_bits": None}
            other |= dict.fromkeys(report.OUTER_BITS)
            rows.append((other, ReferenceRunner(reference, runner)))
        for case in cli.progress(f"measuring {about['bitwidth']}")(wanted):
            # Without a name for the list, which would hold this model while the next is loaded.
            found = measure_case([of for _, of in rows], case, args.r or RUNS, config, device)
            result["rows"] += [of | row for (of, _), row in zip(rows, found, strict=True)]
        if longest:
            bar = cli.progress("decoding")
            found = latency.latency(runner, tokens, longest, check=args.check, progress=bar)
            about = about | {"bytes": runner.nbytes}
            result["benchmarks"].append(about | found | {"peak_memory": peak_bytes(device)})
        del runner, rows  # the next one has their place


def loader(
    args: argparse.Namespace,
    pretrained: Pretrained,
    plans: list[QuantPlan],
    device: str,
    cache_shape: tuple[int, int],
) -> Callable[[QuantPlan], tuple[ModelRunner, dict]]:
    """What loads the model of a plan, and says its bits, and those of its activations."""
    from qllm import report
    from qllm.bench.runners import ModelRunner
    from qllm.checkpoint.load import activation_bits
    from qllm.llm import LLM

    folder, onnx = pretrained.folder, pretrained.onnx
    bits = [] if onnx else activation_bits(folder.path, plans, args.activation_bits)

    def load(plan: QuantPlan) -> tuple[ModelRunner, dict]:
        if onnx:
            model = LLM.load(pretrained, plan).model
            about = {"bitwidth": model.bitwidth, "activation_bits": None, "kv_bits": None}
            about |= dict.fromkeys(report.OUTER_BITS)
            return ModelRunner(model, model.nbytes, model.read_bytes, model.multiplied), about
        about = {"activation_bits": bits[plans.index(plan)], "kv_bits": args.kv_bits}
        model = LLM.load(
            pretrained,
            plan,
            dtype=cli.resolve_dtype(args),
            device=device,
            calibration=cli.find_calibration(args, folder, plan),
            cache_shape=cache_shape,
            meter=cli.meter("loading"),
            note=cli.note if plan is plans[0] else cli.silent,
            **about,
        ).model
        about["bitwidth"] = report.bitwidth(model) if args.bitwidth is None else plan.text
        about |= report.outer_bits(model)
        return ModelRunner.of_decoder(model), about

    return load


if __name__ == "__main__":
    cli.run(main)
