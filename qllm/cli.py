"""What the scripts share: option groups, prompts, printing, and how errors end a run.

Nothing heavy is imported until it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qllm import hub
from qllm.config import (
    ACTIVATION_BITS,
    BITWIDTHS,
    DEFAULT_ACTIVATION_BITS,
    DEFAULT_ALGORITHM,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCHEME,
    LM_HEAD,
    SCHEMES,
    W8A8,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.onnx import ACCURACY_LEVELS, DEFAULT_ACCURACY_LEVEL, check_installed, is_onnx

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from qllm.config import ModelConfig
    from qllm.hub import ModelFolder
    from qllm.parallel.pipeline import Place
    from qllm.parallel.session import Session
    from qllm.quant.calibrate import Calibration
    from qllm.tokenizer import Tokenizer

DEFAULT_PROMPTS = ("He is working on", "He has a", "Everyone is happy and I can")
# Between two notes of progress, where there is no terminal for a bar.
NOTE_SECONDS = 30.0
TP_MODES = ("exact", "fast")
# Options that only rank 0 heeds, or that may differ between hosts.
NOT_COMPARED = {
    *("prompt", "prompt_file", "stdin", "model_path", "calib", "device"),
    *("compare", "json", "stream", "timeout"),
}
DTYPES = ("auto", "float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, doc: str) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        line = f"{self.prog}: error: {message} (--help lists the options)\n"
        self.exit(2, line if _speaks() else None)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: a user's mistake is one line and status 2, Ctrl-C is status 130."""
    program = Path(sys.argv[0]).name
    # torch, not yet imported, will ask for huge pages: a fault for each 2 MB, not for each 4 KB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGINT, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a character of the text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        print(end="", flush=True)
    except UserError as error:
        status = _fail(program, str(error), 2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not interrupt the exit
        status = _fail(program, "interrupted", 130)
    except BrokenPipeError:
        # The reader has what it wanted; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "qllm"):
            raise
        line = f"the package {package} is missing; pip install -r requirements.txt installs it"
        status = _fail(program, line, 2)
    except OSError as error:
        status = _fail(program, str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        status = _fail(program, f"out of memory; take fewer bits or a smaller model ({error})", 1)
    sys.exit(status)


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C. An import that runs C code may drop the exception, so that one ends at once."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    if any(getattr(spec, "_initializing", False) for spec in specs):
        _fail(Path(sys.argv[0]).name, "interrupted", 130)
        os._exit(130)
    raise KeyboardInterrupt


def _speaks() -> bool:
    """Whether this process is the first on its host of those that torchrun started, or alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _fail(program: str, message: str, status: int) -> int:
    line = " ".join(message.split())
    if _speaks():
        print(f"{program}: {'error: ' if status != 130 else ''}{line}", file=sys.stderr)
    return status


def note(line: str) -> None:
    """Say something on standard error."""
    print(f"note: {line}", file=sys.stderr)


def silent(line: str) -> None:
    """Say nothing: of several processes, one speaks."""


def progress(what: str) -> Callable[[list], Iterable]:
    """A tqdm bar on standard error where that is a terminal; else a note every half minute."""

    def wrap(items: list) -> Iterable:
        from tqdm import tqdm

        bar = tqdm(items, desc=what, leave=False, disable=None)
        return noted(what, items) if bar.disable else bar

    return wrap


def noted(what: str, items: list, every: float = NOTE_SECONDS) -> Iterator:
    """The items, and while they are worked through a note of how far it is and what is left."""
    start = last = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - last >= every:
            each, last = (now - start) / number, now
            left = each * (len(items) - number) / 60
            note(f"{what}: {number} of {len(items)}, {each:.1f} s each, about {left:.0f} min left")
        yield item


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of `least` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {least} or more")
        return value

    return parse


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model-name, --model-size, --model-path."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-name", choices=list(hub.REPOSITORIES), default="opt", help="family (%(default)s)"
    )
    listed = "; ".join(f"{family}: {' '.join(hub.sizes(family))}" for family in hub.REPOSITORIES)
    group.add_argument(
        "--model-size",
        metavar="SIZE",
        help=f"published size, or the bundled 'tiny' (the smallest published one; {listed})",
    )
    group.add_argument(
        "--model-path",
        metavar="DIR_OR_REPO",
        help="any OPT, BLOOM or Llama checkpoint instead: a folder or a Hub repository",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --device."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of activations and unquantized weights (auto: the checkpoint's)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (%(default)s)")


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """--tp, --tp-mode, --pp, --stages, --timeout."""
    group = parser.add_argument_group("processes, started by torchrun")
    number = whole_number(1)
    group.add_argument(
        "--tp", type=number, default=1, metavar="N", help="ranks that share each layer (1)"
    )
    group.add_argument(
        "--tp-mode",
        choices=TP_MODES,
        default=TP_MODES[0],
        help="exact: the bits of one process; fast: fewer exchanges, sums split (%(default)s)",
    )
    group.add_argument(
        "--pp", type=number, default=1, metavar="N", help="stages that share the layers (1)"
    )
    group.add_argument(
        "--stages",
        metavar="LIST",
        help="layers with which stages 2, 3, … begin, 3.5 being the MLP of layer 3 (balanced)",
    )
    group.add_argument(
        "--timeout",
        type=whole_number(2),
        default=60,
        metavar="SECONDS",
        help="within which a run ends that a rank keeps from going on (%(default)s)",
    )


def check_processes(args: argparse.Namespace) -> None:
    """Refuse a number of processes that the options do not ask for."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = args.tp * args.pp
    if world != wanted:
        found = "this is one" if world == 1 else f"there are {world}"
        raise UserError(
            f"--tp {args.tp} x --pp {args.pp} takes {wanted} "
            f"process{'es' if wanted > 1 else ''}, and {found}; start "
            + (f"torchrun --nproc-per-node {wanted}" if wanted > 1 else "it without torchrun")
        )
    if args.stages and args.pp == 1:
        raise UserError("--stages says where the stages of --pp begin; give --pp 2 or more")
    if args.tp_mode != TP_MODES[0] and args.tp == 1:
        raise UserError("--tp-mode says how the ranks of --tp share layers; give --tp 2 or more")


def session(args: argparse.Namespace) -> AbstractContextManager[Session]:
    """This process among those that torchrun started."""
    from qllm.parallel.session import Layout, session

    device = resolve_device(args, local=True)
    layout = Layout(args.tp, args.pp, args.tp_mode)
    return session(layout, timeout=args.timeout, device=device, failed=_explain)


def join(
    args: argparse.Namespace,
    session: Session,
    folder: ModelFolder,
    config: ModelConfig,
    calibration: Calibration | None,
) -> Place:
    """This process's part of a model, after all were found to be about to load the same."""
    import torch

    from qllm import __version__
    from qllm.checkpoint.fingerprint import fingerprint
    from qllm.ops.cpu import library
    from qllm.parallel.pipeline import Place, parse_cuts

    cuts = parse_cuts(args.stages, config.num_layers, args.pp) if args.stages else None
    with session.unbounded():  # they may have to be compiled first
        kernels = library.unavailable() or library.library().path
    options = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    facts = {
        "QLLM version": __version__,
        "torch version": torch.__version__,
        "model": fingerprint(folder.path),
        "calibration": calibration.digest() if calibration else None,
        **{f"--{key.replace('_', '-')}": value for key, value in options.items()},
    }
    if args.tp_mode == "exact":
        facts["kernel path"] = kernels
    session.compare(facts)
    session.watch.start()
    return Place(session.tp, args.tp_mode, session.pp, cuts)


def _explain(error: BaseException) -> str | None:
    """What ended this rank, in a line for the others; None for a normal end."""
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code):
        return None
    return " ".join(str(error).split())[:500] or type(error).__name__


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompt-file, --stdin, --max-prompt-length, --max-gen-tokens."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="may be given repeatedly")
    group.add_argument("--prompt-file", metavar="FILE", help="one prompt per line")
    group.add_argument("--stdin", action="store_true", help="prompts from standard input, likewise")
    group.add_argument(
        "--max-prompt-length",
        type=whole_number(1),
        default=20,
        metavar="N",
        help="a prompt of more tokens loses its beginning (%(default)s)",
    )
    group.add_argument(
        "--max-gen-tokens",
        type=whole_number(1),
        default=10,
        metavar="N",
        help="tokens to generate (%(default)s)",
    )


def add_quant_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--bitwidth, --group-size, --scheme, --lm-head-bits.

    Args:
        several: commas separate models, not layers; see `read_plans`.
    """
    group = parser.add_argument_group("quantization")
    known = ", ".join(BITWIDTHS)
    group.add_argument(
        "--bitwidth",
        metavar="BITS",
        help=f"of {known} or JSON plans, one or several (16,8,4): a row of the table each"
        if several
        else f"one of {known}; or one per layer (4,4,8,…); or a JSON plan",
    )
    group.add_argument(
        "--group-size",
        type=int,
        default=DEFAULT_GROUP_SIZE,
        metavar="N",
        help="input channels per scale, -1 for all of them (%(default)s)",
    )
    group.add_argument("--scheme", choices=SCHEMES, default=DEFAULT_SCHEME, help="(%(default)s)")
    group.add_argument("--lm-head-bits", metavar="BITS", help="quantize the LM head, too (16)")


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
    if not is_onnx(model.path):
        return False
    quantization = {
        "bitwidth": None,
        "lm_head_bits": None,
        "group_size": DEFAULT_GROUP_SIZE,
        "scheme": DEFAULT_SCHEME,
        "activation_bits": DEFAULT_ACTIVATION_BITS,
        "calib": None,
    }
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


def add_activation_options(parser: argparse.ArgumentParser) -> None:
    """--activation-bits, --calib."""
    group = parser.add_argument_group("quantization of activations")
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=ACTIVATION_BITS,
        default=DEFAULT_ACTIVATION_BITS,
        help="of layers of 1 to 8 bits: 8 rounds activations to int8, which is faster for prompts "
        "and batches, and less exact (%(default)s)",
    )
    group.add_argument("--calib", metavar="FILE", help="their statistics for 8:tc-li and 8:tc")


def read_plan(args: argparse.Namespace, algorithm: str = DEFAULT_ALGORITHM) -> QuantPlan:
    """The plan that the quantization options name; without --bitwidth, all at 16 bits."""
    default = QuantSpec(group_size=args.group_size, scheme=args.scheme, algorithm=algorithm)
    bitwidth = "16" if args.bitwidth is None else args.bitwidth
    return with_head(args, QuantPlan.parse(bitwidth, default), default)


def read_plans(args: argparse.Namespace) -> list[QuantPlan]:
    """The plans of a --bitwidth that names several models; without it, the one of `read_plan`."""
    default = QuantSpec(group_size=args.group_size, scheme=args.scheme)
    values = ["16"] if args.bitwidth is None else args.bitwidth.split(",")
    for value in values:
        if values.count(value) > 1:
            raise UserError(
                f"--bitwidth names {value} more than once; here commas separate models, and a "
                "JSON plan gives layers bits of their own"
            )
    return [with_head(args, QuantPlan.parse(value, default), default) for value in values]


def with_head(args: argparse.Namespace, plan: QuantPlan, default: QuantSpec) -> QuantPlan:
    """A plan and what --lm-head-bits adds to it."""
    if args.lm_head_bits is None:
        return plan
    return plan.with_rule(f"^{LM_HEAD}$", QuantSpec.from_json(args.lm_head_bits, default))


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
    group.add_argument("--nsamples", type=number, metavar="N", help=f"samples ({nsamples})")
    group.add_argument("--seqlen", type=number, metavar="N", help=f"tokens each ({seqlen})")
    group.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    return group


def resolve_model(
    args: argparse.Namespace, *, weights: bool = True, note: Callable[[str], None] = note
) -> ModelFolder:
    """The folder that the model options name."""
    if args.model_path and args.model_size:
        raise UserError("--model-path and --model-size name two models; give one of them")
    return hub.resolve(
        args.model_name, args.model_size, args.model_path, weights=weights, note=note
    )


def resolve_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type that --dtype names; None for the checkpoint's."""
    import torch

    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def find_calibration(
    args: argparse.Namespace,
    model: ModelFolder,
    plan: QuantPlan,
    note: Callable[[str], None] = note,
) -> Calibration | None:
    """The activation statistics for a plan's W8A8 layers: --calib, else what lies ready."""
    from qllm.calibration import default_path
    from qllm.quant.calibrate import Calibration

    if not any(spec.kind in W8A8.values() for _, spec in plan.rules):
        if args.calib:
            note(f"--calib {args.calib} is not used: only 8:tc-li and 8:tc quantize activations")
        return None
    path = Path(args.calib) if args.calib else default_path(model)
    if not path.exists():
        if args.calib:
            raise UserError(f"--calib {path}: there is no such file; fake_calib_gen.py makes one")
        return None
    calibration = Calibration.load(path)
    note(f"activation statistics of {calibration.about.get('source', 'unknown source')}: {path}")
    return calibration


def resolve_device(args: argparse.Namespace, *, local: bool = False) -> str:
    """The device that --device names, checked to be there.

    Args:
        local: of several processes on a host, each takes a GPU of its own.
    """
    import torch

    found = torch.cuda.is_available()
    if local and found and args.device in ("auto", "cuda"):
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(args.device)
    if args.device == "auto":
        return "cuda" if found else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device!r} is unknown; give cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not found or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "give cpu"
        )
    return "cpu" if device.type == "cpu" else args.device


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the options give, or the default ones."""
    prompts = list(args.prompt or ())
    try:
        if args.prompt_file:
            prompts += _lines(Path(args.prompt_file).read_bytes())
        if args.stdin:
            prompts += _lines(sys.stdin.buffer.read())
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError("prompts are UTF-8 text, and what was given is not") from None
    if not prompts:
        if args.prompt_file or args.stdin:
            raise UserError("there is no prompt: no line of what was given has text")
        return list(DEFAULT_PROMPTS)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty; give it some text")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"prompt {number} is not UTF-8 text")
    return prompts


def _lines(data: bytes) -> list[str]:
    lines = data.decode("utf-8").split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


def tokenize(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    limit: int,
    note: Callable[[str], None] = note,
) -> list[list[int]]:
    """Token ids of prompts; one of more than `limit` tokens loses its beginning, with a note."""
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids = tokenizer.encode(prompt)
        if len(ids) > limit:
            note(
                f"prompt {number} has {len(ids)} tokens and loses its beginning; "
                f"--max-prompt-length is {limit}"
            )
            ids = tokenizer.encode(prompt, limit)
        encoded.append(ids)
    return encoded
