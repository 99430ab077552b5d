"""Quantize a checkpoint once, and save it: RTN, GPTQ, AWQ and SmoothQuant, 1 to 8 bits.

    python3 qllm_quant.py --model-name llama --model-size tiny --bitwidth 4 --save out
    python3 qllm_quant.py --model-size tiny --bitwidth 3 --algorithm gptq --dataset FILE --save out
    python3 qllm_quant.py --model-path DIR --config rules.json --save out

A run that was killed goes on where it was when it is started again. DIR may hold an ONNX decoder
with past, exported by optimum or by qllm_export.py.
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
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qllm import cli
from qllm.bitwidths import make_plan
from qllm.config import ALGORITHMS, DEFAULT_ALGORITHM, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.files import readable
from qllm.onnx import is_onnx

if TYPE_CHECKING:
    from qllm.config import ModelConfig
    from qllm.hub import ModelFolder
    from qllm.quant.algorithm import QuantizeOptions
    from qllm.quantizer.layer import LinearReport

DEFAULT_BITWIDTH = "4"
DATASET, SAMPLES, TOKENS = "wikitext2", 128, 2048
FORMAT, SHARD_GIGABYTES = "auto", 5.0
# What means nothing for an ONNX model, which is one file of packed layers.
NOT_FOR_ONNX = {
    "fake": False,
    "format": FORMAT,
    "shard_size": SHARD_GIGABYTES,
    "smooth_alpha": None,
    "true_sequential": None,
}


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_quant_options(parser, bitwidth=DEFAULT_BITWIDTH)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="rules by module name, or a Neural Compressor configuration",
    )
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default=DEFAULT_ALGORITHM, help="(%(default)s)"
    )
    window = f"{TOKENS}, or the model's window"
    cli.add_calibration_options(parser, f"{DATASET}, where it takes text", str(SAMPLES), window)
    add_algorithm_options(parser)
    cli.add_run_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--save", "--output-dir", metavar="DIR", required=True, help="where to")
    group.add_argument(
        "--fake",
        action="store_true",
        help="save the dequantized values as a 16-bit checkpoint, for any tool to evaluate",
    )
    group.add_argument(
        "--format",
        choices=("auto", "compressed-tensors"),
        default=FORMAT,
        help="auto: GPTQ where all layers have 2, 3, 4 or 8 bits, else compressed-tensors",
    )
    group.add_argument(
        "--shard-size",
        type=float,
        default=SHARD_GIGABYTES,
        metavar="GB",
        help="of a file (%(default)s)",
    )
    cli.add_accuracy_option(group)
    group.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def add_algorithm_options(parser: argparse.ArgumentParser) -> None:
    """How the algorithms go about it."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("algorithms")
    group.add_argument(
        "--clip", action=flag, help="search the clipping range (AWQ: yes; RTN, GPTQ: no)"
    )
    group.add_argument(
        "--damp", type=float, metavar="SHARE", help="GPTQ: of the mean diagonal, added to it (0.01)"
    )
    group.add_argument(
        "--block-size", type=cli.whole_number(1), metavar="N", help="GPTQ: columns per block (128)"
    )
    group.add_argument(
        "--act-order", action=flag, help="GPTQ: channels with the largest inputs first (yes)"
    )
    group.add_argument(
        "--static-groups", action=flag, help="GPTQ: scales before any error is handed on (yes)"
    )
    group.add_argument(
        "--true-sequential",
        action=flag,
        help="GPTQ: inputs from the quantized linears in front, inside a layer too (yes)",
    )
    group.add_argument(
        "--smooth-alpha",
        type=float,
        metavar="SHARE",
        help="SmoothQuant: of the difficulty that moves into the weights, 0 to 1 (0.5)",
    )


def read_options(args: argparse.Namespace) -> QuantizeOptions:
    """The algorithms' settings; what is not given is at its default."""
    from dataclasses import replace

    from qllm.quant.algorithm import QuantizeOptions

    given = {
        key: value
        for key in ("clip", "true_sequential", "smooth_alpha")
        if (value := getattr(args, key)) is not None
    }
    gptq = {
        key: value
        for key in ("damp", "block_size", "act_order", "static_groups")
        if (value := getattr(args, key)) is not None
    }
    if not 0 <= gptq.get("damp", 0) < math.inf:
        raise UserError(f"--damp {args.damp} cannot be; give a share such as 0.01")
    if not 0 <= given.get("smooth_alpha", 0) <= 1:
        raise UserError(f"--smooth-alpha {args.smooth_alpha} cannot be; give 0 to 1")
    options = QuantizeOptions(**given)
    return replace(options, gptq=replace(options.gptq, **gptq))


def read_plan(args: argparse.Namespace) -> QuantPlan:
    """The rules of --config, or the plan of --bitwidth."""
    default = QuantSpec(group_size=args.group_size, scheme=args.scheme, algorithm=args.algorithm)
    if args.config is None:
        args.bitwidth = DEFAULT_BITWIDTH if args.bitwidth is None else args.bitwidth
        return cli.read_plan(args, args.algorithm)
    if args.bitwidth is not None:
        raise UserError("--config and --bitwidth both say how many bits; give one of them")
    return make_plan(Path(args.config), default, args.lm_head_bits)


def check_options(args: argparse.Namespace, plan: QuantPlan) -> None:
    """Refuse options that no layer of the plan would follow.

    Raises:
        UserError: naming the first of them.
    """
    specs = [spec for _, spec in plan.rules]
    gptq = any(spec.algorithm == "gptq" for spec in specs)
    int8 = any(spec.kind.startswith("w8a8") for spec in specs)
    inputs = int8 or any(spec.algorithm != "rtn" for spec in specs)
    weight_only = any(spec.kind == "weight_only" for spec in specs)
    has_text = args.dataset is not None or needs_text(plan)
    for option, used, who in (
        ("damp", gptq, "--algorithm gptq"),
        ("block_size", gptq, "--algorithm gptq"),
        ("act_order", gptq, "--algorithm gptq"),
        ("static_groups", gptq, "--algorithm gptq"),
        ("true_sequential", gptq, "--algorithm gptq"),
        ("clip", weight_only, "1 to 8 bits"),
        ("smooth_alpha", int8, "8:tc-li or 8:tc"),
        ("dataset", inputs, "--algorithm gptq or awq, 8:tc-li or 8:tc"),
        ("nsamples", inputs, "calibration"),
        ("seqlen", inputs, "calibration"),
    ):
        given = getattr(args, option) is not None
        name = "--" + option.replace("_", "-")
        if given and not used:
            raise UserError(f"{name} does nothing here; it goes with {who}")
        if given and option in ("nsamples", "seqlen", "smooth_alpha") and not has_text:
            raise UserError(f"{name} needs text to calibrate on; name one with --dataset")
    if args.algorithm != "rtn" and args.config is None and not weight_only:
        raise UserError(f"--algorithm {args.algorithm} goes with 1 to 8 bits, not {args.bitwidth}")
    if args.fake and args.format != FORMAT:
        raise UserError("--fake saves 16-bit weights, --format says how packed ones are written")
    if not 0 < args.shard_size < math.inf:
        raise UserError(f"--shard-size {args.shard_size} cannot be; give gigabytes")


def needs_text(plan: QuantPlan) -> bool:
    """Whether some layer cannot do without calibration."""
    return any(s.algorithm != "rtn" or s.kind == "w8a8_static" for _, s in plan.rules)


def read_samples(
    args: argparse.Namespace, plan: QuantPlan, folder: ModelFolder, config: ModelConfig
) -> tuple[list[list[int]] | None, dict[str, str]]:
    """The calibration samples, None where none are asked for; and what to say of them."""
    dataset = args.dataset
    if dataset is None:
        if not needs_text(plan):
            return None, {}
        dataset = DATASET
    from qllm.data import load_text, sample_windows
    from qllm.tokenizer import Tokenizer

    window = config.max_positions or TOKENS
    count, length = args.nsamples or SAMPLES, args.seqlen or min(TOKENS, window)
    if config.max_positions is not None and length > window:
        raise UserError(f"--seqlen {length} exceeds the model's window of {window}")
    ids = Tokenizer.load(folder.path, config.vocab_size).encode(load_text(dataset))
    if args.dataset is None:
        cli.note(f"calibrating on {dataset}; --dataset names another text")
    about = {
        "dataset": readable(Path(dataset).name),
        "samples": f"{count} of {length} tokens, seed {args.seed}",
    }
    return sample_windows(ids, count, length, args.seed), about


def main() -> None:
    args = parse_args()
    plan = read_plan(args)
    check_options(args, plan)
    folder = cli.resolve_model(args)
    onnx = is_onnx(folder.path)
    if onnx:
        cli.refuse_for_onnx(args, folder, **NOT_FOR_ONNX)
    elif args.accuracy_level is not None:
        raise UserError("--accuracy-level is for ONNX models, and this is a checkpoint")
    device = cli.resolve_device(args)

    from qllm import report
    from qllm.checkpoint.reader import read_raw_config
    from qllm.memory import peak_resident_bytes
    from qllm.models import read_config

    config = read_config(read_raw_config(folder.path))
    samples, about = read_samples(args, plan, folder, config)
    target = Path(args.save)
    start = time.perf_counter()
    if onnx:
        reports = quantize_onnx_model(args, plan, folder, samples, target)
    else:
        reports = quantize(args, plan, folder, device, samples, about, target)
    note_inputs(reports, args.damp)
    result = {
        "model": folder.name,
        "saved": str(target),
        "bytes": sum(
            path.stat().st_size for path in target.glob("model*") if path.suffix != ".json"
        ),
        "seconds": time.perf_counter() - start,
        "peak_memory": peak_resident_bytes(),
        "linears": [linear_row(entry) for entry in reports],
    }
    if args.json:
        report.print_json(result)
        return
    worst = max(reports, key=lambda entry: entry.error)
    print(
        f"{folder.name}: {len(reports)} linears quantized in {result['seconds']:.1f} s, "
        f"{report.megabytes(result['bytes'])} written to {target}"
    )
    what = "outputs" if worst.of_output else "weights"
    print(f"largest relative error: {worst.error:.2%} of the {what} of {worst.name}")


def quantize(
    args: argparse.Namespace,
    plan: QuantPlan,
    folder: ModelFolder,
    device: str,
    samples: list[list[int]] | None,
    about: dict[str, str],
    target: Path,
) -> list[LinearReport]:
    """Write the quantized checkpoint; returns what became of each linear."""
    from qllm.quantizer.checkpoint import Job, quantize_checkpoint

    job = Job(
        folder.path,
        plan,
        read_options(args),
        samples,
        dtype=cli.resolve_dtype(args),
        device=device,
        fake=args.fake,
        compressed=args.format == "compressed-tensors",
        shard_bytes=int(args.shard_size * 1e9),
        origin=folder.origin,
        about={"model": folder.name, **about},
    )
    if samples is None and any(spec.kind.startswith("w8a8") for _, spec in plan.rules):
        cli.note("without --dataset, int8 layers are not smoothed")
    try:
        return quantize_checkpoint(job, target, cli.meter("quantizing"), cli.note_above)
    except (OSError, KeyboardInterrupt):
        cli.note(f"what is finished is kept beside {target}; the same command goes on with it")
        raise


def quantize_onnx_model(
    args: argparse.Namespace,
    plan: QuantPlan,
    folder: ModelFolder,
    samples: list[list[int]] | None,
    target: Path,
) -> list[LinearReport]:
    """The same for a folder that holds an ONNX model, and becomes another."""
    from qllm.onnx.quantize import OnnxJob, quantize_onnx

    given = {} if args.accuracy_level is None else {"accuracy_level": args.accuracy_level}
    job = OnnxJob(folder.path, plan, read_options(args), samples, **given)
    return quantize_onnx(job, target, cli.progress("quantizing"))


def note_inputs(reports: list[LinearReport], damp: float | None) -> None:
    """Say where calibration did not reach, and where GPTQ needed more dampening."""
    from qllm.quant.algorithm import GPTQOptions

    nothing = [entry.name for entry in reports if entry.dead == entry.channels]
    some = [entry for entry in reports if 0 < entry.dead < entry.channels]
    if nothing:
        cli.note(
            f"the input of {', '.join(nothing)} was zero in all of the calibration; such a layer "
            "is rounded to nearest"
        )
    if some:
        most = max(some, key=lambda entry: entry.dead / entry.channels)
        cli.note(
            f"{len(some)} linears have input channels that were zero in all of the calibration "
            f"(most: {most.dead} of {most.channels} of {most.name}); those are rounded to nearest"
        )
    for entry in reports:
        if entry.damp > (GPTQOptions().damp if damp is None else damp):
            cli.note(f"{entry.name}: its Hessian is singular and took dampening of {entry.damp:g}")


def linear_row(entry: LinearReport) -> dict:
    """An entry of the JSON object's `linears`."""
    return {
        "name": entry.name,
        **entry.spec.to_json(),
        "algorithm": entry.spec.algorithm,
        "error": entry.error,
        "of": "outputs" if entry.of_output else "weights",
        "damp": entry.damp,
        "dead_channels": entry.dead,
    }


if __name__ == "__main__":
    cli.run(main)
