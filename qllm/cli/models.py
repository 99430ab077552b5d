"""Options of a model: which one, how it is quantized, and where it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qllm import hub
from qllm.bitwidths import make_plan
from qllm.cli.console import note, whole_number
from qllm.cli.lengths import Default, DefaultName, is_given
from qllm.config import (
    ACTIVATION_BITS,
    BITWIDTHS,
    DEFAULT_ACTIVATION_BITS,
    DEFAULT_ALGORITHM,
    DEFAULT_GROUP_SIZE,
    DEFAULT_KV_BITS,
    DEFAULT_SCHEME,
    KV_BITS,
    MAX_SEED,
    SCHEMES,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.launch import Launch
from qllm.onnx import ACCURACY_LEVELS, DEFAULT_ACCURACY_LEVEL, check_installed
from qllm.progress import Note

if TYPE_CHECKING:
    import torch

    from qllm.calibration import Calibration
    from qllm.hub import ModelFolder

DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--model-name, --model-size, --model-path.

    Args:
        several: --model-path may name more than one; see `resolve_models`.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-name",
        choices=list(hub.REPOSITORIES),
        default=DefaultName("opt"),
        help="family of models (%(default)s)",
    )
    group.add_argument(
        "--model-size",
        metavar="SIZE",
        help="published size, or the bundled 'tiny' of opt, bloom and llama (the smallest "
        "published one; an unknown one lists them)",
    )
    group.add_argument(
        "--model-path",
        "--model",
        metavar="DIR_OR_REPO",
        nargs="+" if several else None,
        help="any checkpoint of one of these families instead: a folder, a GGUF or ONNX file or a "
        "Hub repository" + (" (several: a row of the table each)" if several else ""),
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --device, --threads."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of activations and unquantized weights (auto: the checkpoint's)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, or auto: a GPU where there is one (%(default)s)",
    )
    add_threads_option(group)


def add_threads_option(group: argparse._ArgumentGroup) -> None:
    """--threads."""
    group.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads, as OMP_NUM_THREADS (one per core)",
    )


def add_quant_options(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    bitwidth: str = "16, or what the checkpoint has",
) -> None:
    """--bitwidth, --group-size, --scheme, --lm-head-bits, --embedding-bits.

    Args:
        several: commas separate models, not layers; see `read_plans`.
        bitwidth: where none is given, for the help.
    """
    group = parser.add_argument_group("quantization")
    known = ", ".join(BITWIDTHS)
    group.add_argument(
        "--bitwidth",
        metavar="BITS",
        help=(
            f"bits per weight: {known} or JSON plans, one or several, as 16,8,4: a row of the "
            "table each"
            if several
            else f"bits per weight: {known}; or one per layer, as 4,4,8,…; or a JSON plan"
        )
        + f" ({bitwidth})",
    )
    group.add_argument(
        "--group-size",
        type=int,
        default=Default(DEFAULT_GROUP_SIZE),
        metavar="N",
        help="input channels per scale, -1 for all of them (%(default)s)",
    )
    group.add_argument(
        "--scheme",
        choices=SCHEMES,
        default=DefaultName(DEFAULT_SCHEME),
        help="sym: ranges are as wide below zero as above; asym: with zero points (%(default)s)",
    )
    group.add_argument("--lm-head-bits", metavar="BITS", help="bits of the LM head (16)")
    group.add_argument(
        "--embedding-bits",
        metavar="BITS",
        help="bits of the token embedding, and of an LM head that is tied to it (16)",
    )


def add_accuracy_option(group: argparse._ArgumentGroup) -> None:
    """--accuracy-level."""
    group.add_argument(
        "--accuracy-level",
        type=int,
        choices=ACCURACY_LEVELS,
        help="ONNX: what packed layers may round activations to: 0 and 1 to nothing less than "
        f"float32, 2 float16, 3 bfloat16, 4 int8 ({DEFAULT_ACCURACY_LEVEL})",
    )


def holds_onnx(args: argparse.Namespace, model: ModelFolder, **others: object) -> bool:
    """Whether a folder holds an ONNX model, which is run as it is.

    Args:
        others: see `refuse_for_onnx`; the options of quantization are refused besides.

    Raises:
        UserError: an option was given that then means nothing; or onnxruntime is missing.
    """
    if not model.holds_onnx:
        return False
    quantization: dict[str, object] = {
        "bitwidth": None,
        "lm_head_bits": None,
        "embedding_bits": None,
        "group_size": DEFAULT_GROUP_SIZE,
        "scheme": DEFAULT_SCHEME,
        "activation_bits": DEFAULT_ACTIVATION_BITS,
        "calib": None,
    }
    if getattr(args, "kv_bits", None) is not None:
        quantization["kv_bits"] = (
            (DEFAULT_KV_BITS,) if isinstance(args.kv_bits, tuple) else DEFAULT_KV_BITS
        )
    refuse_for_onnx(args, model, **quantization, **others)
    return True


def refuse_for_onnx(args: argparse.Namespace, model: ModelFolder, **options: object) -> None:
    """Refuse options that mean nothing with an ONNX model.

    Args:
        options: what each is where it is not given; --dtype and a --device besides the CPU are
            refused as well.

    Raises:
        UserError: naming the first of them that was given; or where onnxruntime is missing.
    """
    for name, default in {**options, "dtype": "auto"}.items():
        if getattr(args, name) != default:
            raise UserError(
                f"--{name.replace('_', '-')} does nothing here, leave it out: {model.path} holds "
                "an ONNX model, whose types and layers are as they are"
            )
    if args.device not in ("auto", "cpu"):
        raise UserError(f"--device {args.device}: ONNX models are run on the CPU; give cpu")
    check_installed()


def add_kv_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--kv-bits, of which several may be given with commas between them."""
    known = ", ".join(map(str, KV_BITS))

    def parse(text: str) -> int | tuple[int, ...]:
        found = [part.strip() for part in text.split(",")] if several else [text]
        if wrong := [part for part in found if part not in map(str, KV_BITS)]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {known}")
        bits = tuple(dict.fromkeys(map(int, found)))
        return bits if several else bits[0]

    parser.add_argument_group("KV cache").add_argument(
        "--kv-bits",
        type=parse,
        default=(DEFAULT_KV_BITS,) if several else DEFAULT_KV_BITS,
        metavar="BITS,…" if several else "BITS",
        help=f"bits of keys and values: {known}; 16 is the type of the activations "
        f"({DEFAULT_KV_BITS})",
    )


def add_activation_options(parser: argparse.ArgumentParser) -> None:
    """--activation-bits, --calib."""
    group = parser.add_argument_group("quantization of activations")
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=ACTIVATION_BITS,
        default=DEFAULT_ACTIVATION_BITS,
        help="in layers of 1 to 8 bits: 8 rounds activations to int8, which is faster for prompts "
        "and batches, and less exact (%(default)s)",
    )
    group.add_argument(
        "--calib",
        metavar="FILE",
        help="activation statistics for 8:tc-li and 8:tc (what fake_calib_gen.py kept for it)",
    )


def read_plan(args: argparse.Namespace, algorithm: str = DEFAULT_ALGORITHM) -> QuantPlan:
    """The plan that the quantization options name; without --bitwidth, all at 16 bits."""
    default = QuantSpec(group_size=args.group_size, scheme=args.scheme, algorithm=algorithm)
    plan = make_plan(args.bitwidth, default, args.lm_head_bits, args.embedding_bits)
    if plan.stages and getattr(args, "pp", 1) > 1 and not args.stages:
        wanted = plan.stages.count(",") + 2
        if args.pp != wanted:
            raise UserError(
                f"{plan.text} has {wanted} stages, --pp is {args.pp}; give --pp {wanted}, or "
                "--stages to cut the layers otherwise"
            )
        args.stages = plan.stages
    return plan


def read_plans(args: argparse.Namespace) -> list[QuantPlan]:
    """The plans of a --bitwidth that names several models; without it, the one of `read_plan`."""
    default = QuantSpec(group_size=args.group_size, scheme=args.scheme)
    values = [None] if args.bitwidth is None else args.bitwidth.split(",")
    for value in values:
        if values.count(value) > 1:
            raise UserError(
                f"--bitwidth names {value} more than once; here commas separate models, and a "
                "JSON plan gives layers bits of their own"
            )
    return [make_plan(value, default, args.lm_head_bits, args.embedding_bits) for value in values]


def add_calibration_options(
    parser: argparse.ArgumentParser, dataset: str, nsamples: str, seqlen: str
) -> argparse._ArgumentGroup:
    """--dataset, --nsamples, --seqlen, --seed; the texts say what is taken without them."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--dataset",
        metavar="FILE_OR_NAME",
        help=f"a text or JSON-lines file, or wikitext2, c4, ptb, pile-10k ({dataset})",
    )
    number = whole_number(1)
    group.add_argument("--nsamples", type=number, metavar="N", help=f"samples of it ({nsamples})")
    group.add_argument("--seqlen", type=number, metavar="N", help=f"tokens of a sample ({seqlen})")
    group.add_argument(
        "--seed",
        type=whole_number(0, MAX_SEED),
        default=Default(0),
        metavar="N",
        help="of the draw of samples (%(default)s)",
    )
    return group


def check_alone() -> None:
    """Refuse more than one process, each of which would do, and write, the same.

    Raises:
        UserError: torchrun started several.
    """
    world = Launch.of_environment().world
    if world > 1:
        raise UserError(
            f"there are {world} processes, and this script takes one: start it without torchrun"
        )


def resolve_model(
    args: argparse.Namespace, *, weights: bool = True, note: Note = note
) -> ModelFolder:
    """The folder that the model options name.

    Raises:
        UserError: see `check_alone`, of a script that cannot share a model.
    """
    if "tp" not in args:
        check_alone()
    for option, value in (("--model-size", args.model_size), ("--model-name", args.model_name)):
        if args.model_path and is_given(value):
            raise UserError(f"--model-path and {option} name two models; give one of them")
    return hub.resolve(
        args.model_name, args.model_size, args.model_path, weights=weights, note=note
    )


def resolve_models(args: argparse.Namespace) -> list[ModelFolder]:
    """The folders that the model options name, where there may be several."""
    paths = args.model_path or [None]
    given = vars(args)
    return [resolve_model(argparse.Namespace(**{**given, "model_path": path})) for path in paths]


def resolve_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type that --dtype names; None for the checkpoint's."""
    import torch

    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def find_calibration(
    args: argparse.Namespace,
    model: ModelFolder,
    plan: QuantPlan,
    note: Note = note,
) -> Calibration | None:
    """The activation statistics for a plan's W8A8 layers: --calib, else what lies ready."""
    from qllm import calibration

    return calibration.find_calibration(args.calib, model, plan, note)


def resolve_device(args: argparse.Namespace, *, local: bool = False) -> str:
    """The device that --device names, checked to be there.

    Args:
        local: of several processes on a host, each takes a GPU of its own.
    """
    from qllm import memory

    if local:
        args.device = memory.local_device(args.device)
    return memory.resolve_device(args.device)
