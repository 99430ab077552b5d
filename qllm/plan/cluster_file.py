"""A cluster's file: devices by their published figures, or as `qllm_plan.py --probe` wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qllm.errors import UserError
from qllm.files import parse_json, read_bytes
from qllm.plan.devices import (
    PHASES,
    STAGE_PASSES,
    Cluster,
    DescribedSpeed,
    Device,
    MeasuredSpeed,
    Speed,
    no_seconds,
)

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
BESIDE = ("stage_passes", "crowding")
DESCRIBED = ("memory", "bandwidth", "flops", "int8_flops", "overhead")


def read_cluster(path: Path) -> Cluster:
    """The cluster of a JSON file.

    `{"devices": [{"name": "v100", "count": 3, "memory": "32GB", "bandwidth": "900GB",
    "flops": 1.12e14}, …], "network": {"bandwidth": 1e11, "latency": 2e-5}}`: memory in bytes,
    bandwidth of memory in bytes and of the network in bits per second, `flops` of 16-bit
    products (`int8_flops` twice that where it is left out), latency in seconds. A device of
    `qllm_plan.py --probe` has "measured" in place of the figures, and names its "host", whose
    "processors" all devices share that name it; see `Device`.

    Raises:
        UserError: for a file that is none, naming what is wrong.
    """
    try:
        value = parse_json(read_bytes(path), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    if not isinstance(value, dict) or set(value) - {"devices", "network"}:
        raise UserError(f'{path}: a cluster is {{"devices": […], "network": {{…}}}}')
    entries = value.get("devices")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: it names no devices")
    devices = [each for entry in entries for each in _devices(entry, str(path))]
    network = value.get("network", {})
    if not isinstance(network, dict) or set(network) - {"bandwidth", "latency"}:
        raise UserError(f"{path}: a network has bandwidth and latency, not {network!r}")
    where = f"{path}: network"
    bandwidth = _number(network, "bandwidth", where, Cluster.bandwidth)
    latency = _number(network, "latency", where, Cluster.latency, minimum=0.0)
    return Cluster(tuple(devices), bandwidth, latency)


def parse_bytes(text: object, where: str) -> float:
    """ "6GB", or a number of bytes.

    Raises:
        UserError: for what is neither.
    """
    if isinstance(text, str):
        unit = next((unit for unit in UNITS if text.strip().upper().endswith(unit)), "")
        number = text.strip()[: -len(unit)] if unit else text
        try:
            value = float(number) * UNITS.get(unit, 1.0)
        except ValueError:
            value = math.nan
    else:
        value = float(text) if isinstance(text, int | float) and text is not True else math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{where} {text!r} is no size; give one such as 6GB")
    return value


def _number(
    value: Mapping[str, object], key: str, where: str, default: float | None, minimum: float = 1e-30
) -> float:
    given = value.get(key, default)
    if isinstance(given, str):
        return parse_bytes(given, f"{where}: {key}")
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise UserError(f"{where}: {key} is {given!r}; give a number")
    if not minimum <= given < math.inf:
        raise UserError(f"{where}: {key} {given!r} cannot be; give a positive number")
    return float(given)


def _devices(entry: object, path: str) -> list[Device]:
    """The devices of one entry, `count` of them."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{path}: a device is an object with a name, not {entry!r}")
    where = f"{path}: device {entry['name']!r}"
    keys: tuple[str, ...] = ("name", "count", "measured", "host", "threads", "processors", *BESIDE)
    keys += ("contention", *DESCRIBED)
    unknown = set(entry) - set(keys)
    if unknown:
        known = ", ".join(keys)
        again = "; of a probe of before, measure again: `describe_machine`"
        again = again if "measured" in entry else ""
        raise UserError(f"{where}: {sorted(unknown)[0]!r} is unknown; known: {known}{again}")
    if "memory" not in entry:
        raise UserError(f"{where} has no memory; give its bytes, such as 24GB")
    memory = parse_bytes(entry["memory"], f"{where}: memory")
    count = entry.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"{where}: count {count!r} is no number of devices")
    host = entry.get("host")
    threads, processors = (_count(entry, key, where) for key in ("threads", "processors"))
    stage_passes, crowding = (_of_passes(entry, key, where) for key in BESIDE)
    contention = _number(entry, "contention", where, 0.0, minimum=0.0)
    speed: Speed
    if "measured" in entry:
        speed = _measured(entry["measured"], where)
    else:
        flops = _number(entry, "flops", where, None)
        speed = DescribedSpeed(
            _number(entry, "bandwidth", where, None),
            flops,
            _number(entry, "int8_flops", where, 2 * flops),
            _number(entry, "overhead", where, DescribedSpeed.overhead, minimum=0.0),
        )
    names = [entry["name"]] if count == 1 else [f"{entry['name']}.{i}" for i in range(count)]
    about = (speed, entry["name"], host, threads, processors, stage_passes)
    beside = crowding or no_seconds(), contention
    return [Device(name, memory, *about, *beside) for name in names]


def _count(entry: Mapping[str, object], key: str, where: str) -> int | None:
    given = entry.get(key)
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given
    raise UserError(f"{where}: {key} {given!r} is no number of {key}")


def _of_passes(entry: Mapping[str, object], key: str, where: str) -> dict[str, float] | None:
    """Seconds of each of STAGE_PASSES; None: they are not given."""
    given = entry.get(key)
    if given is None:
        return None
    if not isinstance(given, dict) or set(given) - set(STAGE_PASSES):
        raise UserError(f"{where}: {key} is seconds of {', '.join(STAGE_PASSES)}, not {given!r}")
    return {p: _number(given, p, f"{where}: {key}", 0.0, minimum=0.0) for p in STAGE_PASSES}


def _measured(value: Any, where: str) -> MeasuredSpeed:
    try:
        sets = _numbers(value["working_sets"], len(value["working_sets"]))
        if len(sets) < 4 or sets[0] <= 0 or list(sets) != sorted(set(sets)):
            raise ValueError
        linears = {
            phase: {
                bits: {
                    str(int(rows)): _numbers(times, 2 + len(sets)) for rows, times in table.items()
                }
                for bits, table in value["linears"][phase].items()
            }
            for phase in PHASES
        }
        halves = {phase: _five(value["halves"][phase]) for phase in PHASES}
        among = {phase: _numbers([value["among_others"][phase]], 1)[0] for phase in PHASES}
        passes = {phase: _three(value["passes"][phase]) for phase in PHASES}
        # Probes from before experts were measured do not speak of them.
        expert, of_value = _numbers(value.get("of_experts", (0.0, 0.0)), 2)
        given = linears, halves, _three(value["cache"]), passes, sets, among
        found = MeasuredSpeed(*given, (expert, of_value))
        found.farness(sets[0])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{where}: measured is not what qllm_plan.py --probe writes; measure again"
        ) from None
    return found


def _three(times: Any) -> tuple[float, float, float]:
    first, second, third = _numbers(times, 3)
    return first, second, third


def _five(times: Any) -> tuple[float, float, float, float, float]:
    first, second, third, fourth, fifth = _numbers(times, 5)
    return first, second, third, fourth, fifth


def _numbers(times: Any, count: int) -> tuple[float, ...]:
    found = tuple(map(float, times))
    if len(found) != count or not all(math.isfinite(t) and t >= 0 for t in found):
        raise ValueError
    return found
