"""What the options of `qllm_plan.py` ask for, and which of them go together."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qllm.cli.lengths import is_given
from qllm.cli.models import check_alone
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.folders import check_writable

if TYPE_CHECKING:
    from qllm.plan.devices import Cluster

# What devices are asked for, which nothing but their memory and times follows.
WORKLOAD = ("prompt", "gen", "batch")
# What --probe heeds.
PROBED = {
    *("probe", "output", "json", "bits", "group_size", "scheme", "dtype", "device", "threads"),
}


def check_options(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself.

    Raises:
        UserError: naming the option.
    """
    check_alone()
    for name in ("avg_bits", "max_kl", "time_limit"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{_option(name)} {value} cannot be; give more than 0")
    _check_files(args)
    if args.probe:
        _check_probe(args)
        return
    if args.memory and args.cluster:
        raise UserError("--memory is this machine's and --cluster names others; give one of them")
    if args.size and (args.memory or args.cluster):
        raise UserError(
            "--size is of weights alone, and the memory of --memory and --cluster holds more than "
            "those; give one of them"
        )
    limits = (args.avg_bits, args.max_kl, args.size, args.memory, args.cluster)
    if not args.pareto and all(limit is None for limit in limits):
        raise UserError(
            "nothing limits the plan; give --avg-bits, --max-kl, --size, --memory, --cluster or "
            "--pareto"
        )
    if not (args.memory or args.cluster):
        timed = args.objective in ("latency", "throughput")
        given = [f"--objective {args.objective}"] if timed else []
        given += [_option(name) for name in WORKLOAD if is_given(getattr(args, name))]
        if given:
            raise UserError(
                f"{given[0]} needs devices; give --memory for this machine, or --cluster"
            )
    if args.pareto and args.verify:
        raise UserError("--verify runs one plan, and --pareto makes many; give one of them")
    if args.plot and not args.pareto:
        raise UserError("--plot draws the front; give --pareto")


def _check_files(args: argparse.Namespace) -> None:
    """Refuse what cannot be written, before anything is measured.

    Raises:
        UserError: naming the file.
    """
    for name in filter(None, (args.output, args.table)):
        if not Path(name).absolute().parent.is_dir():
            raise UserError(f"{name}: there is no folder {Path(name).parent}")
        if Path(name).is_dir():
            raise UserError(f"{name} is a folder; name a file")
        if name == args.output or not Path(name).exists():
            check_writable(Path(name))
    if args.plot:
        from qllm.evaluate import plots

        plots.check("--plot", Path(args.plot), plots.SUFFIXES)


def _check_probe(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UserError("--probe measures this machine for a file; name it with -o")
    for name, value in vars(args).items():
        if is_given(value) and name not in PROBED:
            raise UserError(
                f"{_option(name)} does nothing with --probe, which measures this machine; leave it "
                "out"
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_candidates(args: argparse.Namespace) -> tuple[QuantSpec, ...]:
    """The specs that --bits names."""
    from qllm.plan.candidates import parse_candidates

    default = QuantSpec(algorithm=args.algorithm)
    return parse_candidates(args.bits, args.group_size, args.scheme, default)


def read_fixed(args: argparse.Namespace) -> dict[str, str]:
    """Regular expression to bitwidth, of --fixed."""
    found = {}
    for text in args.fixed:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern:
            raise UserError(f"--fixed {text!r} is no REGEX=BITS, such as 'attention=8'")
        found[pattern] = bits
    return found


def memory_option(args: argparse.Namespace) -> str:
    """The option that says how much memory there is, for errors."""
    from qllm.plan.possible import CLUSTER, MEMORY, SIZE

    return CLUSTER if args.cluster else MEMORY if args.memory else SIZE


def read_devices(args: argparse.Namespace) -> Cluster | None:
    """The devices of --cluster, or one with --memory, whose speed is not known yet."""
    from qllm.plan.cluster_file import parse_bytes, read_cluster
    from qllm.plan.devices import Cluster
    from qllm.plan.planner import ANYWHERE

    if args.cluster:
        return read_cluster(Path(args.cluster))
    if not args.memory:
        return None
    return Cluster((replace(ANYWHERE, memory=parse_bytes(args.memory, "--memory")),))
