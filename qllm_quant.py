"""Quantize a checkpoint once, and save it: RTN, GPTQ, AWQ, SignRound, SmoothQuant; 1 to 8 bits.

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
from qllm.config import ALGORITHMS, DEFAULT_ALGORITHM, EMBEDDING, QuantPlan, QuantSpec
from qllm.data import DATASET, SAMPLES, TOKENS, CalibrationText
from qllm.errors import UserError

if TYPE_CHECKING:
    from qllm.quant.algorithm import QuantizeOptions
    from qllm.quantizer.layer import LinearReport

DEFAULT_BITWIDTH = "4"
FORMAT, SHARD_GIGABYTES = "auto", 5.0
# What says how text is read.
OF_TEXT = ("nsamples", "seqlen", "seed", "dtype", "smooth_alpha")
# What means nothing for an ONNX model, which is one file of packed layers.
NOT_FOR_ONNX = {
    "fake": False,
    "format": FORMAT,
    "shard_size": SHARD_GIGABYTES,
    "smooth_alpha": None,
    "true_sequential": None,
    "refine": None,
    "refine_steps": None,
    "refine_batch": None,
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
        "--algorithm",
        choices=ALGORITHMS,
        default=cli.DefaultName(DEFAULT_ALGORITHM),
        help="how the integers are chosen (%(default)s)",
    )
    window = f"{TOKENS}, or the model's window"
    cli.add_calibration_options(parser, f"{DATASET}, where it takes text", str(SAMPLES), window)
    add_algorithm_options(parser)
    cli.add_run_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--save", "--output-dir", metavar="DIR", required=True, help="the folder to write"
    )
    group.add_argument(
        "--fake",
        action="store_true",
        help="save the dequantized values as a 16-bit checkpoint, for any tool to evaluate",
    )
    group.add_argument(
        "--format",
        choices=("auto", "compressed-tensors"),
        default=FORMAT,
        help="auto: GPTQ where all layers have 2, 3, 4, 8 or 16 bits, else compressed-tensors",
    )
    group.add_argument(
        "--shard-size",
        type=float,
        default=SHARD_GIGABYTES,
        metavar="GB",
        help="of a file of weights, at most (%(default)s)",
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
    group.add_argument(
        "--refine",
        action="store_true",
        default=None,
        help="GPTQ: then tune the roundings of each layer together, as signround does",
    )
    group.add_argument(
        "--refine-steps",
        type=cli.whole_number(1),
        metavar="N",
        help="steps of tuning, for each layer (200)",
    )
    group.add_argument(
        "--refine-batch",
        type=cli.whole_number(1),
        metavar="N",
        help="calibration samples per step of tuning (those of 2048 tokens, or two per channel)",
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
    tune = {
        key: value
        for key in ("steps", "batch")
        if (value := getattr(args, f"refine_{key}")) is not None
    }
    if not 0 <= gptq.get("damp", 0) < math.inf:
        raise UserError(f"--damp {args.damp} cannot be; give a share such as 0.01")
    if not 0 <= given.get("smooth_alpha", 0) <= 1:
        raise UserError(f"--smooth-alpha {args.smooth_alpha} cannot be; give 0 to 1")
    options = QuantizeOptions(**given, refine=bool(args.refine))
    tuned = replace(options.tune, seed=args.seed, **tune)
    scales = replace(options.distill, steps=-(-tuned.steps // 2), batch=tuned.batch, seed=args.seed)
    return replace(options, gptq=replace(options.gptq, **gptq), tune=tuned, distill=scales)


def read_plan(args: argparse.Namespace) -> QuantPlan:
    """The rules of --config, or the plan of --bitwidth."""
    default = QuantSpec(group_size=args.group_size, scheme=args.scheme, algorithm=args.algorithm)
    if args.config is None:
        args.bitwidth = DEFAULT_BITWIDTH if args.bitwidth is None else args.bitwidth
        return cli.read_plan(args, args.algorithm)
    if args.bitwidth is not None:
        raise UserError("--config and --bitwidth both say how many bits; give one of them")
    return make_plan(Path(args.config), default, args.lm_head_bits, args.embedding_bits)


def check_options(args: argparse.Namespace, plan: QuantPlan) -> None:
    """Refuse options that no layer of the plan would follow.

    Raises:
        UserError: naming the first of them.
    """
    from qllm.quant.algorithms import ALGORITHMS as CLASSES
    from qllm.quantize_model import needs_text

    cli.check_rounding(args, [plan])
    specs = [spec for _, spec in plan.rules]
    named = {spec.algorithm for spec in specs}
    int8 = any(spec.kind.startswith("w8a8") for spec in specs)
    inputs = int8 or any(CLASSES[name].calibrates for name in named)
    weight_only = any(spec.kind == "weight_only" for spec in specs)
    tuned = "signround" in named or (args.refine and "gptq" in named)
    has_text = args.dataset is not None or needs_text(plan)
    for option, used, who in (
        *(
            (setting, name in named, f"--algorithm {name}")
            for name, algorithm in CLASSES.items()
            for setting in algorithm.settings
        ),
        ("refine_steps", tuned, "--refine or --algorithm signround"),
        ("refine_batch", tuned, "--refine or --algorithm signround"),
        ("clip", weight_only, "1 to 8 bits"),
        ("smooth_alpha", int8, "8:tc-li or 8:tc"),
        ("dataset", inputs, "--algorithm gptq, awq or signround, 8:tc-li or 8:tc"),
        ("nsamples", inputs, "calibration"),
        ("seqlen", inputs, "calibration"),
        ("seed", inputs, "calibration"),
        ("dtype", inputs, "calibration"),
    ):
        value = getattr(args, option)
        given = value is False or cli.is_given(value)  # which --no-clip and its like are
        name = "--" + option.replace("_", "-")
        if given and not used:
            raise UserError(f"{name} does nothing here; it goes with {who}")
        if given and option in OF_TEXT and not has_text:
            raise UserError(f"{name} needs text to calibrate on; name one with --dataset")
    followed = {spec.algorithm for spec in specs if spec.kind == "weight_only"}
    if cli.is_given(args.algorithm) and args.algorithm not in (followed or {DEFAULT_ALGORITHM}):
        if args.config is None:
            what = f"goes with 1 to 8 bits, not {args.bitwidth}"
        else:
            what = f"does nothing here: no rule of {args.config} takes it; leave it out"
        raise UserError(f"--algorithm {args.algorithm} {what}")
    if args.fake and args.format != FORMAT:
        raise UserError("--fake saves 16-bit weights, --format says how packed ones are written")
    if not 0 < args.shard_size < math.inf:
        raise UserError(f"--shard-size {args.shard_size} cannot be; give gigabytes")


def main() -> None:
    args = parse_args()
    plan = read_plan(args)
    check_options(args, plan)
    folder = cli.resolve_model(args)
    if folder.holds_onnx:
        cli.refuse_for_onnx(args, folder, **NOT_FOR_ONNX)

    from qllm import report
    from qllm.memory import peak_resident_bytes
    from qllm.quantize_model import quantize

    target = Path(args.save)
    start = time.perf_counter()
    reports = quantize(
        folder,
        plan,
        save=target,
        dataset=CalibrationText(args.dataset, args.nsamples, args.seqlen, args.seed),
        options=read_options(args),
        dtype=cli.resolve_dtype(args),
        device=cli.resolve_device(args),
        fake=args.fake,
        compressed=args.format == "compressed-tensors",
        shard_bytes=int(args.shard_size * 1e9),
        accuracy_level=args.accuracy_level,
        meter=cli.meter("quantizing"),
        progress=cli.progress("quantizing"),
        note=cli.note_above,
    )
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
        cli.print_json(result)
        return
    worst = max(reports, key=lambda entry: entry.error)
    linears = sum(entry.name != EMBEDDING for entry in reports)
    what = [f"{linears} linear{'s' * (linears != 1)}"] if linears else []
    what += ["the embedding"] if linears < len(reports) else []
    print(
        f"{folder.name}: {' and '.join(what)} quantized in {result['seconds']:.1f} s, "
        f"{report.megabytes(result['bytes'])} written to {target}"
    )
    what = "outputs" if worst.of_output else "weights"
    print(f"largest relative error: {worst.error:.2%} of the {what} of {worst.name}")


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
