"""Real processes over gloo: results, mistakes and faults.

torchrun starts them where it has a part in what is looked at, and for the sample; else they are
forks, which have imported torch, with the environment that it gives its ranks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
from pathlib import Path

import processes
import psutil
import pytest
import readme
from building import until
from checkpoints import copy_of, rewritten, state_of
from conftest import ROOT, assert_user_error, run, tiny
from inside import call_json

from qllm import LLM
from qllm.parallel.session import explain

pytestmark = pytest.mark.usefixtures("no_gpu")

GEN = "qllm_gen.py"
TORCHRUN = "from torch.distributed.run import main; main()"
LONG = ("--max-gen-tokens", 480, "--max-prompt-length", 20)
TIMEOUT = 8  # seconds without a word of a rank after which a run ends


Process = processes.Forked | subprocess.Popen


def start(count: int, *args: object, script: str | Path = GEN, logs: Path) -> Process:
    """Start a script on so many ranks of this host, whose output is in files in `logs`, too."""
    launch = ["--nproc-per-node", str(count), "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", "--log-dir", str(logs), "--tee", "1"]
    words = ["-c", TORCHRUN, *launch, str(ROOT / script), *map(str, args)]
    return processes.start(words, os.environ)


def finish(process: Process, timeout: float = 120) -> tuple[str, str]:
    """Standard output, and our own lines of standard error."""
    out, error = process.communicate(timeout=timeout)
    return out, "\n".join(line for line in error.splitlines() if re.match("qllm.*: ", line))


def forked(
    world: int, *args: object, script: str | Path = GEN, errors: Path | None = None
) -> list[tuple[int, str, str]]:
    """A script on so many ranks of this host, which are forks: status, output, our own lines."""
    first = script if script == "-c" else str(ROOT / script)
    ranks = processes.start_ranks(world, [first, *map(str, args)], errors)
    said = [finish(rank) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def on_ranks(world: int, *args: object) -> str:
    """What qllm_gen.py prints on so many ranks of this host, of which the first alone does."""
    found = forked(world, *args)
    assert [status for status, *_ in found] == [0] * world
    first, *others = (out for _, out, _ in found)
    assert not any(others)
    return first


def ranks_of(process: Process) -> dict[int, int]:
    """The process of each rank, once they run."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RANK" in (environment := child.environ()):
            found[int(environment["RANK"])] = child.pid
    return found


def assert_gone(pids) -> None:
    """No process of these is left, but for what its parent has not looked after yet."""
    for pid in pids:
        path = Path(f"/proc/{pid}/stat")
        assert not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_sample_shards_a_model_and_a_layer():
    (line,) = (line for line in readme.TORCHRUN if GEN not in line)
    _, _, count, _, module = shlex.split(line)
    program = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
    program += f"runpy.run_module({module!r}, run_name='__main__')"
    (_, printed, _), (*_, nothing) = forked(int(count), program, script="-c")
    (one,) = LLM.from_pretrained("opt-tiny", bitwidth=4).generate(
        "He is working on", max_new_tokens=20
    )
    # 3 bits for each weight, and a scale and a zero for every 64: half of them here.
    nbytes = 128 * 256 * 3 // 8 + 128 * 4 * 3
    expected = f"{nbytes // 2} of {nbytes} bytes are here; same: True"
    assert printed.split("\n") == [*f"{one.prompt}{one.text}".split("\n"), expected, ""]
    assert not nothing


@pytest.mark.parametrize("line", [line for line in readme.TORCHRUN if GEN in line])
def test_ranks_print_what_one_process_does(line):
    torchrun, _, count, script, *options = shlex.split(line)
    assert (torchrun, script) == ("torchrun", GEN)
    alone = options[: options.index("--tp")]
    more = ("--explain", *(("--batch-size", 2) if "--pp" in options else ()))  # of three prompts
    one = call_json(GEN, *alone, *more)
    many = json.loads(on_ranks(int(count), *options, *more, "--json"))
    assert many["results"] == one["results"]
    assert many["kv_cache"] == one["kv_cache"]
    linears = [{row["layer"].rpartition("}.")[2] for row in r["kernels"]} for r in (one, many)]
    assert linears[0] == linears[1] and "lm_head" in linears[0]
    layers = [rank["layers"] for rank in many["ranks"]]
    if "--pp" not in options:
        assert layers == [[0, 6]] * 2
        return
    assert layers[0] == layers[1] == [0, layers[2][0]] and layers[2] == layers[3]
    assert layers[3][1] == 6


def test_messages_of_all_sizes_over_gloo(tmp_path):
    """Long prompts in large batches go through torch.distributed's own collectives."""
    prompts = tmp_path / "prompts.txt"
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join([line for line in lines if len(line) > 90][:24]), encoding="utf-8")
    options = ("--model-size", "tiny", "--bitwidth", "4", "--json", "--dtype", "float32")
    options += ("--prompt-file", str(prompts), "--max-prompt-length", "60")
    one = call_json(GEN, *(option for option in options if option != "--json"))
    out = on_ranks(2, *options, "--tp", 2, "--tp-mode", "fast")
    assert json.loads(out)["results"] == one["results"]


@pytest.mark.parametrize(
    ("args", "world", "words"),
    [
        (("--tp-mode", "fast"), 1, "--tp-mode says how the ranks of --tp share"),
        (("--stages", "3"), 1, "--stages says where the stages of --pp begin"),
        (("--pp", 2, "--num-shards", 3), 2, "--num-shards are ranges of one process"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_options_that_would_do_nothing_are_refused(args, world, words):
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    env["MASTER_PORT"] = "29500"
    assert_user_error(run(GEN, "--model-size", "tiny", *args, env=env), words)


def test_a_wrong_number_of_processes_is_one_line():
    args = ("--model-size", "tiny", "--tp", 2, "--pp", 2)
    assert_user_error(run(GEN, *args), "--tp 2 x --pp 2 takes 4 processes", "--nproc-per-node 4")
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    assert_user_error(run(GEN, *args, env=env), "WORLD_SIZE is 3 and there is no MASTER_PORT")
    env["MASTER_PORT"] = "29500"
    assert_user_error(run(GEN, *args, env=env), "takes 4 processes, and there are 3")
    others = run(GEN, *args, env={**env, "RANK": "1", "LOCAL_RANK": "1"})
    assert (others.returncode, others.stderr) == (2, "")


def test_a_mistake_is_one_line_of_all_ranks(tmp_path):
    options = ("--model-path", tmp_path / "none", "--tp", 2)
    found = forked(2, *options, errors=tmp_path)
    assert [(status, out) for status, out, _ in found] == [(2, "")] * 2
    (line,) = "".join(lines for *_, lines in found).splitlines()
    assert "none" in line


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_ends_the_run(how, tmp_path):
    options = ("--model-size", "tiny", *LONG, "--tp", 2, "--timeout", TIMEOUT, "--stream")
    process = start(2, *options, logs=tmp_path)
    # An empty line comes before its text.
    until(lambda: any("\n\n" in log.read_text() for log in tmp_path.rglob("0/stdout.log")))
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    _, lines = finish(process)
    assert process.returncode == 1
    assert len(lines.splitlines()) == 1
    reason = "its process has died" if how == "killed" else "has not been heard of"
    assert re.search(rf"rank 1 \(host .*process {ranks[1]}\): .*{reason}", lines)
    assert_gone(ranks.values())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(32, "Broken pipe"), "standard output was closed"),
        (ValueError("two\nlines"), "two lines"),
        (ValueError(), "ValueError"),
        (SystemExit(2), "2"),
        (SystemExit(0), None),
        (KeyboardInterrupt(), None),
    ],
    ids=repr,
)
def test_what_is_said_of_an_error(error, said):
    assert explain(error) == said


# What one rank does before the others know of it, and what is said of it.
BEFORE = {
    "stopped": (0, "os.kill(os.getpid(), signal.SIGSTOP)", r"did not start within 2 s.* stopped"),
    "killed": (
        1,
        "import qllm.parallel.session as s\n"
        "s._store = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        "its process has died",
    ),
    "options": (1, "sys.argv.append('--bits')", "unrecognized arguments: --bits"),
    "a package": (
        1,
        "import qllm.cli\n"
        "def failing(*_): raise ModuleNotFoundError('none', name='torchao')\n"
        "qllm.cli.session = failing",
        "the package torchao is missing",
    ),
}


SELDOM = ("killed", "stopped", "a package")  # which end a run as the others do


@pytest.mark.parametrize(
    ("rank", "deed", "words"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SELDOM))
        for name, case in BEFORE.items()
    ],
)
def test_a_rank_that_fails_before_it_has_joined(rank, deed, words, tmp_path):
    first = f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    lines = "\n".join(f"    {line}" for line in deed.splitlines())
    own = f"if os.environ['RANK'] == '{rank}':\n{lines}\n"
    last = f"sys.argv[0] = {GEN!r}\nrunpy.run_path({str(ROOT / GEN)!r}, run_name='__main__')\n"
    file = tmp_path / "start.py"
    file.write_text(first + own + last)
    options = ("--model-size", "tiny", "--tp", 2, "--timeout", 3)
    if "signal.SIG" in deed:  # what becomes of a process, torchrun says
        process = start(2, *options, script=file, logs=tmp_path / "logs")
        _, lines = finish(process, timeout=60)  # it ends a stopped process after 30 s itself
        assert process.returncode == 1
    else:
        found = forked(2, *options, script=file, errors=tmp_path)
        lines = "".join(lines for *_, lines in found)
    (line,) = lines.splitlines()
    assert re.search(rf"error: rank {rank}: .*{words}", line)


PER_RANK = """
import os, runpy, sys
sys.path.insert(0, {root!r})
sys.argv = [{script!r}, *sys.argv[1:], *({others} if os.environ["RANK"] == "1" else {first})]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("what", ["model", "sampling"])
def test_a_rank_that_was_started_otherwise_ends_the_run(what, tmp_path):
    first, others = [], ["--temperature", "1"]
    if what == "model":
        state = state_of("opt")
        state["model.decoder.layers.3.fc1.weight"][:] = 0.5
        changed = rewritten("opt", tmp_path / "changed", "safetensors", state)
        first, others = (
            ["--model-path", str(p)] for p in (copy_of("opt", tmp_path / "m"), changed)
        )
    program = PER_RANK.format(root=str(ROOT), script=str(ROOT / GEN), first=first, others=others)
    file = tmp_path / "start.py"
    file.write_text(program)
    size = () if what == "model" else ("--model-size", "tiny")
    options = (*size, "--tp", 2, "--timeout", TIMEOUT)
    found = forked(2, *options, script=file, errors=tmp_path)
    assert all(status in (1, 2) for status, *_ in found)
    (line,) = "".join(lines for *_, lines in found).splitlines()
    assert "rank 1" in line
    said = "model is" if what == "model" else "--temperature is 1.0, that of rank 0 is None"
    assert f"its {said}" in line


def test_a_rank_that_does_not_come_is_named():
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = run(GEN, "--model-size", "tiny", "--tp", 2, "--timeout", 2, env=env, timeout=120)
    assert done.returncode == 1
    assert "rank 1: it did not start within 2 s" in done.stderr and tiny("opt").exists()
