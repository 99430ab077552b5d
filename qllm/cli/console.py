"""The parser, what a script prints besides its result, and how errors end a run."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from qllm.errors import UserError


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
