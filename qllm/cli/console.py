"""The parser, what a script prints besides its result, and how errors end a run."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from qllm import __version__, cgroups, launch
from qllm.cli.options import name_options
from qllm.errors import UserError
from qllm.start import ending

# What a run says that a signal ends; its status is 128 and the signal's number, as a shell has it.
SIGNALS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "ended with its terminal",
}
# Seconds in which no second signal disturbs what the first one set off: temporary files go.
CLEARING = 3.0
# Characters of a line on standard error: of a longer one, the beginning and the end.
LONGEST_LINE, LINE_END = 1200, 400
# What a terminal would obey: all control characters but tab and line feed.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, doc: str) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

        self.color = False  # Python 3.14's, which would be escaped
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def format_help(self) -> str:
        """The help, whose usage names what has to be given: all options are told of below it."""
        needed = ""
        for action in self._actions:
            if action.required:
                value = action.metavar or f"{{{','.join(map(str, action.choices or ()))}}}"
                needed += f" {action.option_strings[0]} {value}"
        self.usage = f"%(prog)s{needed} [options]"
        return super().format_help()

    def parse_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        """What was given; --threads counts from here on, for torch and all that looks there."""
        args = super().parse_args(*given)
        if threads := getattr(args, "threads", None):
            os.environ["OMP_NUM_THREADS"] = str(threads)
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(threads)
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(self.prog, f"{message} (--help lists the options)", 2))


class Terminal(io.TextIOWrapper):
    """Standard output where it is a terminal: control characters in a text are shown, not obeyed.

    What a model generates, and what files say, may hold escape sequences. A pipe or a file gets
    the text as it is.
    """

    def write(self, text: str) -> int:
        super().write(CONTROL.sub(_escape, text))
        return len(text)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: a user's mistake is one line and status 2, Ctrl-C is status 130."""
    program = Path(sys.argv[0]).name
    # torch, not yet imported, will ask for huge pages: a fault for each 2 MB, not for each 4 KB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    cgroups.limit_threads()
    _open_streams()
    handler = Interrupt()
    for number in SIGNALS:
        # nohup means that the terminal's end is not the run's.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which a script held back
        status = main() or 0
        print(end="", flush=True)
    except UserError as error:
        status = _fail(program, str(error), 2)
    except KeyboardInterrupt as error:
        for number in SIGNALS:  # a second one must not interrupt the exit
            signal.signal(number, signal.SIG_IGN)
        status = _end(program, error.args[0] if error.args else signal.SIGINT)
    except BrokenPipeError:
        status = 141  # the reader has what it wanted
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "qllm"):
            raise
        what = "is missing" if isinstance(error, ModuleNotFoundError) else f"is broken ({error})"
        line = f"the package {package} {what}; pip install -r requirements.txt installs it"
        status = _fail(program, line, 2)
    except OSError as error:
        line = str(error) if _is_open() else f"standard output cannot be written ({error.strerror})"
        status = _fail(program, line, getattr(error, "status", 2))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        detail = f" ({error})" if str(error) else ""
        status = _fail(program, f"out of memory; take fewer bits or a smaller model{detail}", 1)
    if not _is_open():  # Python would complain once more while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    ending.status = status
    sys.exit(status)


def _is_open() -> bool:
    """Whether standard output takes what was printed so far."""
    try:
        print(end="", flush=True)
    except OSError:
        return False
    return True


def _open_streams() -> None:
    """Give the process the standard streams that it was started without, and a safe output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It takes the number that is free, so that no file of the run's does.
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):  # whoever reads a line says what is wrong with it
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a character of the text
        sys.stdout.reconfigure(errors="backslashreplace")
        if sys.stdout.isatty():
            encoding = sys.stdout.encoding
            sys.stdout = Terminal(sys.stdout.buffer, encoding, "backslashreplace", None, True)


class Interrupt:
    """What a signal that ends the run does: KeyboardInterrupt in the main thread, with its number.

    An import that runs C code may drop the exception, so that one ends the process at once.
    """

    def __init__(self) -> None:
        self.last = -CLEARING

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if now - self.last < CLEARING:
            return
        self.last = now
        specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
        if any(getattr(spec, "_initializing", False) for spec in specs):
            os._exit(_end(Path(sys.argv[0]).name, number))
        raise KeyboardInterrupt(number)


def rearm() -> None:
    """Let the next signal interrupt at once, in a run that goes on behind one that it handled."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Interrupt):
        handler.last = -CLEARING


def _end(program: str, number: int) -> int:
    """Say that a signal ended the run; of several ranks one does, and names a rank that is gone."""
    if launch.claim():
        line = SIGNALS[number]
        # torchrun ends the others where one has died.
        if number == signal.SIGTERM and (lost := launch.lost()):
            line = f"error: {lost}; the run ends"
        _print(f"{program}: {line}")
    return 128 + number


def _fail(program: str, message: str, status: int) -> int:
    if launch.claim():
        rank = ""
        with suppress(UserError):  # the environment may be what is wrong
            own = launch.Launch.of_environment()
            if own.world > 1 and not message.startswith("rank "):
                rank = f"rank {own.rank}: "
        _print(f"{program}: error: {rank}{message}")
    return status


def one_line(text: str) -> str:
    """Text from anywhere as one line of bearable length, which a terminal prints and nothing else.

    White space is one space each; what is not printable is escaped, the middle of a long text
    left out.
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else _escape(c) for c in line)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE - LINE_END]} … {line[-LINE_END:]}"


def _escape(character: str | re.Match) -> str:
    """As JSON and Python write it."""
    code = ord(character if isinstance(character, str) else character[0])
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _print(line: str) -> None:
    """A line on standard error, whose end, such as a closed terminal, is not the run's."""
    with suppress(OSError):
        print(one_line(name_options(line)), file=sys.stderr)


def print_json(value: object) -> None:
    """One JSON object on standard output, escaped where that does not take every character."""
    encoding = sys.stdout.encoding or "ascii"
    print(json.dumps(value, ensure_ascii=codecs.lookup(encoding).name != "utf-8"))


def print_lines(lines: Iterable[str]) -> None:
    """Lines of a report on standard output."""
    for line in lines:
        print(line)


def note(line: str) -> None:
    """Say something on standard error."""
    _print(f"note: {line}")


def error(line: str) -> None:
    """Say on standard error what did not work, in a run that goes on."""
    _print(f"{Path(sys.argv[0]).name}: error: {line}")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of `minimum` or more, up to `maximum` if there is one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {minimum} or more")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is too large; give {maximum} or less")
        return value

    return parse
