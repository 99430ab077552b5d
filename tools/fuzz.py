"""Load checkpoints that were damaged or made to do harm, and look at what becomes of it.

    python3 -m tools.fuzz --seed 1 --number 1000
    python3 -m tools.fuzz --seed 1 --start 417 --number 1 --save DIR

Each load is of a tiny checkpoint of one of the kinds that QLLM reads, with one to three changes,
drawn from the seed and the load's number. It has to end with a model, which then generates, or with
a UserError of one line; within SECONDS; and without more memory than the files have bytes and
EXTRA_BYTES. Anything else is a fault: it is printed with the number that gives it again, each kind
once, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from qllm import cli
from qllm.bitwidths import make_plan
from qllm.calibration import Calibration
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.generate import generate
from qllm.generation_config import GenerationConfig, read_generation_config
from qllm.memory import peak_resident_bytes, reset_peak_memory
from qllm.onnx_files import is_onnx
from qllm.tokenizer import Tokenizer
from tools.mutations import Files, mutate
from tools.tiny_checkpoints import CALIBRATION, PLAN, checkpoints

# Of the processor; on a busy machine, a load may take longer.
SECONDS, HANGING_SECONDS = 5, 60
EXTRA_BYTES = 100 << 20
# What no load needs: what runs away ends with a MemoryError, not with the machine's memory.
MAX_BYTES = 32 << 30
COSTS = ("slow", "large")
PROMPT = [2, 5, 6]


class Overdue(BaseException):
    """A load does not end; no `except Exception` is to take it for a broken file."""


@dataclass
class Result:
    """What became of some loads.

    Attributes:
        ended: how many "loaded", were "refused", or "broke".
        faults: each kind, with the number of the first load that showed it, and what it says.
        counts: how often each kind was seen.
    """

    ended: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def load(folder: Path) -> None:
    """All that a run reads of a folder, and a few tokens.

    Raises:
        UserError: as it should be for a broken one.
    """
    if (folder / "model.gguf").exists():
        folder /= "model.gguf"
    if is_onnx(folder):
        from qllm.onnx.runner import OnnxDecoder

        model = OnnxDecoder(folder)
    else:
        plan, calibration = QuantPlan.uniform(QuantSpec()), None
        if (folder / CALIBRATION).exists():
            plan, calibration = QuantPlan.parse("8:tc"), Calibration.load(folder / CALIBRATION)
        elif (folder / PLAN).exists():
            plan = make_plan(folder / PLAN)
        model = load_model(folder, plan, calibration=calibration)
    tokenizer = Tokenizer.load(folder, model.config.vocab_size)
    settings = read_generation_config(folder, model.config)
    prompts = [PROMPT, tokenizer.encode("the quick fox", max_length=8) or PROMPT]
    limits = GenerationConfig(
        max_new_tokens=3,
        eos_token_ids=settings.eos_token_ids,
        repetition_penalty=settings.repetition_penalty,
    )
    for row in generate(model, prompts, limits):
        tokenizer.decode(row)


def fuzz(bases: dict[str, Files], seed: int, numbers: range, save: Path | None = None) -> Result:
    """Load one changed checkpoint per number.

    Args:
        save: a folder to keep the files of the first load of each kind of fault in.
    """
    result = Result()
    signal.signal(signal.SIGALRM, _overdue)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as tmp_dir:
        for name, files in bases.items():
            # Unchanged: each is loaded, and what is imported late is not counted with a later one.
            write(Path(tmp_dir) / name, files)
            load(Path(tmp_dir) / name)
        gc.freeze()  # a torch file is closed by a collection, which need not look at all of torch
        for number in cli.progress("loads")(list(numbers)) if len(numbers) > 100 else numbers:
            random = Random(f"{seed} {number}")
            base = random.choice(sorted(bases))
            files: Files = dict(bases[base])
            changes = mutate(files, random)
            folder = Path(tmp_dir) / str(number)
            write(folder, files)
            ended, kind, fault = _judge(folder)
            if kind in COSTS:  # what the first load of its kind imports, a second does not
                ended, kind, fault = _judge(folder)
            result.ended[ended] += 1
            if kind is not None:
                result.counts[kind] += 1
                if kind not in result.faults:
                    about = f"{base}, {', '.join(changes)}: {fault}"
                    result.faults[kind] = number, about
                    print(f"load {number} of seed {seed}: {about}", flush=True)
                    if save is not None:
                        write(save / f"{seed}-{number}", files)  # no pipe can be copied
            shutil.rmtree(folder)
        gc.unfreeze()
    return result


def _overdue(*_: object) -> None:
    raise Overdue


def write(folder: Path, files: Files) -> None:
    """Make a folder of these files."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)


def _judge(folder: Path) -> tuple[str, str | None, str]:
    """Load a folder: how it ended, the kind of fault if it is one, and what there is to say."""
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    ended, kind, about = "loaded", None, ""
    reset_peak_memory()
    before, start = peak_resident_bytes(), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGING_SECONDS)
    try:
        load(folder)
    except UserError as error:
        ended = "refused"
        if len(str(error).splitlines()) != 1:
            kind, about = "lines", f"the message has several lines: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # pyo3's panics are no Exception, nor is Overdue
        ended, kind = "broke", _where(error)
        about = "".join(traceback.format_exception(error)[-6:])[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, grown = time.process_time() - start, peak_resident_bytes() - before
    if kind is None and seconds > SECONDS:
        kind, about = COSTS[0], f"it took {seconds:.1f} s"
    if kind is None and grown > size + EXTRA_BYTES:
        kind, about = COSTS[1], f"{size >> 10} KB of files took {grown >> 20} MB"
    return ended, kind, about


def _where(error: BaseException) -> str:
    """What tells a fault from others: its class, and where in QLLM it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/qllm/" in frame.filename]
    last = own[-1] if own else frames[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.name}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the first load's number")
    parser.add_argument("--number", type=int, default=1000, metavar="N", help="of loads")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds with it in their names")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep the files of faults there")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, resource.RLIM_INFINITY))
    bases = {name: files for name, files in checkpoints().items() if args.only in name}
    start = time.monotonic()
    numbers = range(args.start, args.start + args.number)
    result = fuzz(bases, args.seed, numbers, args.save)
    seconds = time.monotonic() - start
    for kind, count in result.counts.most_common():
        print(f"{count} x {kind}, first in load {result.faults[kind][0]}")
    ended = ", ".join(f"{count} {how}" for how, count in result.ended.most_common())
    faults = f"{sum(result.counts.values())} faults of {len(result.faults)} kinds"
    print(f"{args.number} loads in {seconds:.0f} s: {ended}; {faults}")
    raise SystemExit(1 if result.faults else 0)


if __name__ == "__main__":
    os.environ["RUST_BACKTRACE"] = "0"
    main()
