"""What is measured once and kept in a file: a model's table of losses, and this machine's speed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from qllm import folders, ops
from qllm.cgroups import usable_cpus
from qllm.checkpoint.writer import write_json
from qllm.config import QuantSpec
from qllm.errors import UserError, WritingError
from qllm.evaluate import provenance
from qllm.memory import available_bytes
from qllm.plan.candidates import key
from qllm.plan.cluster_file import read_cluster
from qllm.plan.devices import Device
from qllm.plan.measure import Job, measure
from qllm.plan.network import measure_hops, measure_stages
from qllm.plan.probe import FORMAT, probe
from qllm.plan.resume import PartialTable
from qllm.plan.sensitivity import Sensitivity, write
from qllm.progress import Meter, Note


def load_or_measure(
    job: Job, table: Path | None, meter: Meter, note: Note, note_linear: Note
) -> Sensitivity:
    """A model's table of losses: of a file, or measured, and kept there.

    Args:
        table: of the file; None: one in QLLM's folder, named after all that decides the figures.
        note: called with where the table is kept, once it is measured.
        note_linear: called with a line for each linear that is measured.

    Raises:
        UserError: the file's table is of something else; or as `measure`.
    """
    about = json.loads(json.dumps(job.about(), default=str))
    named = table is not None
    if table is None:
        table = folders.home_path(f"plan/{_digest(about)}.json", note, "`table`")
    partial = PartialTable(table, about, note)
    if table.exists():
        found = Sensitivity.from_file(table)
        if found.about != about:
            raise UserError(
                f"{table} was measured of another model, text or candidates, or with another "
                "choice of `lm_head` and `embedding`; name another `table`"
            )
        partial.remove()
        return found
    table.parent.mkdir(parents=True, exist_ok=True)
    found = measure(job, meter, note_linear, partial)
    try:
        write(table, found)
    except WritingError as error:
        if named:
            raise
        note(f"the losses are not kept, and will be measured again: {error} with `table`")
    else:
        note(f"the losses are kept in {table}")
        partial.remove()
    return found


def describe_machine(
    specs: Sequence[QuantSpec],
    dtype: torch.dtype | None,
    device: str,
    progress: Callable[[list], Iterable],
) -> dict[str, object]:
    """This machine, measured, as the only device of a cluster, for `read_cluster`.

    The network is what joins two of this machine's processes; stages share its CPU, of which
    nothing is measured where the device is another one.

    Args:
        specs: whose products are measured.
        dtype: of activations; None is float16.
        progress: what loops go through, to be seen.
    """
    ops.prepare(torch.device(device).type)
    dtype = dtype or torch.float16
    speed = probe(specs, dtype, device, progress)
    threads = torch.get_num_threads()
    entry: dict[str, object] = {
        "name": f"{platform.node()} {device}, {threads} threads",
        "host": platform.node(),
        "memory": available_bytes(device),
    }
    if device == "cpu":
        network, beside = measure_stages(threads, dtype, speed)
        entry |= {"threads": threads, "processors": usable_cpus(), **beside}
    else:
        network = measure_hops(threads)
    entry["measured"] = speed.to_json()
    return {"devices": [entry], "network": network}


def this_machine(
    specs: Sequence[QuantSpec],
    dtype: torch.dtype | None,
    device: str,
    progress: Callable[[list], Iterable],
    note: Note,
) -> Device:
    """This machine as `describe_machine` has it: measured once, and kept in QLLM's folder."""
    about = [FORMAT, provenance.machine(), provenance.versions(), torch.get_num_threads()]
    about += [device, [key(spec) for spec in specs], dtype]
    path = folders.home_path(f"plan/probe-{_digest(about)}.json", note)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        note(f"measuring this machine, once; it is kept in {path}")
        write_json(path, describe_machine(specs, dtype, device, progress))
    return read_cluster(path).devices[0]


def _digest(about: object) -> str:
    """A name for what depends on these facts."""
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
