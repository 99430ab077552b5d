"""Options of a model that many processes share, and how they come together."""

from __future__ import annotations

import argparse
import hashlib
import json
from contextlib import nullcontext
from typing import TYPE_CHECKING

from qllm.cli.console import whole_number
from qllm.cli.lengths import Default, is_given
from qllm.cli.models import resolve_device
from qllm.cli.options import name_options
from qllm.errors import UserError
from qllm.launch import Launch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from qllm.calibration import Calibration
    from qllm.config import QuantPlan
    from qllm.generation_config import GenerationConfig
    from qllm.parallel.pipeline import ParallelContext
    from qllm.parallel.session import Session
    from qllm.pretrained import Pretrained

TP_MODES = ("exact", "fast")
# Options that only rank 0 heeds, or that may differ between hosts.
NOT_COMPARED = {
    *("prompt", "prompt_file", "stdin", "model_path", "calib", "device"),
    *("compare", "reference", "json", "stream", "timeout", "threads"),
}


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """--tp, --tp-mode, --pp, --stages, --timeout."""
    group = parser.add_argument_group("processes, started by torchrun")
    number = whole_number(1)
    group.add_argument(
        *("--tp", "--tensor-parallel-size"),
        type=number,
        default=1,
        metavar="N",
        help="ranks that share each layer (1)",
    )
    group.add_argument(
        "--tp-mode",
        choices=TP_MODES,
        default=TP_MODES[0],
        help="exact: the bits of one process; fast: fewer exchanges, sums split (%(default)s)",
    )
    group.add_argument(
        *("--pp", "--pipeline-parallel-size"),
        type=number,
        default=1,
        metavar="N",
        help="stages that share the layers (1)",
    )
    group.add_argument(
        "--stages",
        metavar="LIST",
        help="layers with which stages 2, 3, … begin, 3.5 being the MLP of layer 3 (balanced)",
    )
    group.add_argument(
        "--timeout",
        type=whole_number(2),
        default=Default(60),
        metavar="SECONDS",
        help="within which a run ends that a rank keeps from going on (%(default)s)",
    )


def check_processes(args: argparse.Namespace) -> None:
    """Refuse a number of processes that the options do not ask for."""
    world = Launch.of_environment().world
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
    if is_given(args.timeout) and world == 1:
        raise UserError("--timeout is for ranks that wait for each other; give --tp or --pp, too")


def session(args: argparse.Namespace) -> AbstractContextManager[Session]:
    """This process among those that torchrun started."""
    from qllm.parallel.session import ParallelConfig, explain, session

    def failed(error: BaseException) -> str | None:
        reason = explain(error)
        return reason and name_options(reason)

    device = resolve_device(args, local=True)
    config = ParallelConfig(args.tp, args.pp, args.tp_mode)
    return session(config, timeout=args.timeout, device=device, failed=failed)


def unbounded(session: Session | None) -> AbstractContextManager[None]:
    """What takes as long as people or a download do, which other ranks wait for."""
    return nullcontext() if session is None else session.unbounded()


def join(
    args: argparse.Namespace,
    session: Session,
    pretrained: Pretrained,
    plan: QuantPlan,
    calibration: Calibration | None,
    generation: GenerationConfig,
    ids: list[list[int]],
) -> ParallelContext:
    """This process's part of a model, after all were found to be about to do the same.

    Args:
        ids: tokens of the prompts, which each rank finds by its own tokenizer.
    """
    from qllm.parallel.pipeline import parse_cuts

    layers = pretrained.config.num_layers
    cuts = parse_cuts(args.stages, layers, args.pp) if args.stages else None
    options = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    session.compare(
        {
            **{f"--{key.replace('_', '-')}": value for key, value in options.items()},
            **pretrained.facts(plan, calibration, generation),
            "tokenization": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
        }
    )
    return session.context(cuts)
