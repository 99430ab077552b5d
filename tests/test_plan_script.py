"""qllm_plan.py, and the scripts that take what it writes: as they are run."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from types import SimpleNamespace

import processes
import pytest
from conftest import ROOT, assert_user_error, run_json, tiny
from inside import call, call_json
from upcycling import upcycled

from qllm.errors import UserError, WritingError
from qllm.folders import writing
from qllm.plan import cached, ranks, stages, verify
from qllm.plan.candidates import key as label
from qllm.plan.devices import STAGE_PASSES, MeasuredSpeed
from qllm.plan.probe import ROUNDS
from qllm.plan.sensitivity import Sensitivity

Process = processes.Forked | subprocess.Popen
PLAN, QUANT, GEN = "qllm_plan.py", "qllm_quant.py", "qllm_gen.py"
STORY = "Once upon a time there was a man who lived by the sea, and he was not a happy man. "
# Bits per weight of 3 in groups of 64, with a scale of 16 bits and a zero of 8 each.
UNIFORM_3 = 3 + 24 / 64
CHOICES = ("--bits", "2,3,4", "--group-size", 64, "--nsamples", 4, "--seqlen", 32)


def linears_times(linears: dict, factor: float) -> dict:
    """Tables of what products take, as on a machine that is slower."""
    return {
        bits: {rows: tuple(factor * each for each in times) for rows, times in table.items()}
        for bits, table in linears.items()
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a plan, with a table of losses that was measured."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "text.txt").write_text(STORY * 400)
    args = ("--model-path", tiny("llama"), "--dataset", folder / "text.txt", *CHOICES)
    args += ("--table", folder / "table.json")
    plan = folder / "plan.json"
    found = run_json(PLAN, *args, "--avg-bits", UNIFORM_3, "-o", plan, "--verify")
    return folder, args, found


def test_a_plan_does_better_than_uniform_bits_and_as_predicted(given):
    folder, args, found = given
    predicted, measured = found["plan"]["predicted"], found["measured"]
    assert predicted["bits_per_weight"] <= UNIFORM_3
    assert measured["bytes"] == predicted["bytes"]
    # Four samples say little: what is held to is the order of magnitude.
    assert 1 / 3 < measured["divergence"] / predicted["divergence"] < 3
    front = call_json(PLAN, *args, "--pareto")["front"]
    uniform = {row["name"]: row for row in front}["uniform 3"]
    assert predicted["bytes"] <= uniform["bytes"]
    assert measured["divergence"] < uniform["divergence"]
    planned = [row["divergence"] for row in front if row["name"] == "planned"]
    assert planned == sorted(planned, reverse=True)
    assert json.loads((folder / "plan.json").read_text()) == found["plan"]


# What is padded in memory, what is int8, a tied head that may stay as it is, and last groups of one
# channel, some of which need scales in float32.
LAYOUTS = {
    "groups of 16": ("llama", "--bits", "4,8", "--group-size", 16, "--avg-bits", 7, "--embedding"),
    "int8": ("bloom", "--bits", "3,8:tc-li", "--group-size=-1", "--avg-bits", 5, "--lm-head"),
    "small scales": ("llama", "--bits", "4,8", "--group-size", 85, "--avg-bits", 7, "--embedding"),
    "a head of 16 bits": ("opt", "--bits", "8,16", "--avg-bits", 16, "--lm-head"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_bytes_are_those_that_loading_has(case, given, tmp_path):
    family, *options = LAYOUTS[case]
    args = ("--model-path", tiny(family), "--dataset", given[0] / "text.txt", "--algorithm", "rtn")
    args += ("--nsamples", 1, "--seqlen", 16, "--table", tmp_path / "table.json", "--verify")
    found = call_json(PLAN, *args, *options, "-o", tmp_path / "plan.json")
    assert found["measured"]["bytes"] == found["plan"]["predicted"]["bytes"]


def test_the_fewest_bytes_for_a_divergence(given):
    _, args, found = given
    kl = found["plan"]["predicted"]["divergence"]
    best = call_json(PLAN, *args, "--max-kl", kl * 1.001)["plan"]["predicted"]
    assert best["divergence"] <= kl * 1.001
    assert best["bytes"] <= found["plan"]["predicted"]["bytes"]


def test_a_time_limit_that_is_as_good_as_none_ends_in_a_plan(given):
    _, args, found = given
    shown = call(PLAN, *args, "--avg-bits", UNIFORM_3, "--time-limit", 1e-9)
    assert "how much better another one could be was not found out" in shown.stdout
    quick = call_json(PLAN, *args, "--avg-bits", UNIFORM_3, "--time-limit", 1e-9)["plan"]
    best = found["plan"]["predicted"]
    assert quick["predicted"]["bits_per_weight"] <= UNIFORM_3 and quick["predicted"]["gap"] == 1
    assert quick["predicted"]["divergence"] <= best["divergence"] * 1.05


def test_limits_that_exclude_each_other_are_said_with_the_least_divergence(given):
    _, args, found = given
    kl = found["plan"]["predicted"]["divergence"]
    refused = call(PLAN, *args, "--max-kl", kl, "--avg-bits", 2.6)
    assert_user_error(refused, f"no plan keeps to --max-kl {kl:.3g} and --avg-bits: the least")
    least = refused.stderr.partition("the least divergence is ")[2].split()[0]
    best = call_json(PLAN, *args, "--max-kl", least, "--avg-bits", 2.6)["plan"]["predicted"]
    assert best["divergence"] <= float(least) <= best["divergence"] * 1.02


def test_the_least_loss_of_some_bytes(given):
    _, args, found = given
    size = found["plan"]["predicted"]["bytes"]
    best = call_json(PLAN, *args, "--size", size)["plan"]["predicted"]
    assert best["bytes"] <= size
    assert best["divergence"] <= found["plan"]["predicted"]["divergence"]


def test_others_take_the_plan(given):
    folder, _, found = given
    plan = ("--model-path", tiny("llama"), "--bitwidth", folder / "plan.json")
    generated = call_json(GEN, *plan, "--max-gen-tokens", 2)
    held = sum(shard["bytes"] for shard in generated["shards"])
    assert held == found["plan"]["predicted"]["bytes"]
    other = call(GEN, "--model-path", tiny("opt"), "--bitwidth", folder / "plan.json")
    assert_user_error(other, "was made for another model: its family is llama, not opt")
    text = ("--dataset", folder / "text.txt", "--nsamples", 2, "--seqlen", 16)
    saved = call_json(
        *(QUANT, "--model-path", tiny("llama"), "--config", folder / "plan.json"),
        *("--algorithm", "gptq", *text, "--save", folder / "out"),
    )
    assert {row["algorithm"] for row in saved["linears"]} == {"gptq"}


def test_devices_and_stages(given, tmp_path):
    _, args, found = given
    half = found["plan"]["predicted"]["bytes"] * 0.6
    device = {"memory": half, "bandwidth": 1e10, "flops": 1e11}
    cluster = {"devices": [device | {"name": "a"}, device | {"name": "b", "bandwidth": 3e10}]}
    (tmp_path / "cluster.json").write_text(json.dumps(cluster))
    work = ("--prompt", 16, "--gen", 8, "--batch", 2)
    args = (*args, "--cluster", tmp_path / "cluster.json", *work)
    plan = call_json(PLAN, *args, "--objective", "throughput", "--avg-bits", UNIFORM_3)["plan"]
    assert sorted(plan["devices"]) == ["a", "b"]
    assert all(each <= half for each in plan["predicted"]["bytes_by_device"])
    assert 0 < float(plan["stages"]) < 6
    shown = call(PLAN, *args, "--objective", "latency")
    assert "a plan is to be as good" not in shown.stdout
    assert "is to be as good as uniform 4 bits" in shown.stderr
    assert "layers 0 to" in shown.stdout


def test_a_mixture_of_experts_is_planned_quantized_and_run(tmp_path):
    folder, text = upcycled("mixtral", tmp_path / "mixtral"), tmp_path / "text.txt"
    text.write_text(STORY * 400)
    args = ("--model-path", folder, "--dataset", text, *CHOICES, "--table", tmp_path / "table.json")
    work = ("--prompt", 16, "--gen", 8, "--batch", 2, "--objective", "throughput")
    small = call_json(PLAN, *args, "--avg-bits", 2.6)["plan"]["predicted"]["bytes"]
    device = {"memory": small * 0.8, "bandwidth": 1e10, "flops": 1e11}
    cluster = {"devices": [device | {"name": "a"}, device | {"name": "b", "bandwidth": 3e10}]}
    (tmp_path / "cluster.json").write_text(json.dumps(cluster))
    plan = tmp_path / "plan.json"
    on_two = ("--cluster", tmp_path / "cluster.json", *work, "--avg-bits", UNIFORM_3, "-o", plan)
    found = call_json(PLAN, *args, *on_two, "--fixed", r"layers\.0\..*experts=3")["plan"]
    assert found["stages"] and sorted(found["devices"]) == ["a", "b"]
    up = r"^layers\.0\.mlp\.experts\.\d+\.up$"
    assert found["rules"][up] == {"bits": 3, "group_size": 64, "scheme": "asym"}
    front = call_json(PLAN, *args, "--pareto")["front"]
    planned = [row["divergence"] for row in front if row["name"] == "planned"]
    assert len(planned) > 2 and planned == sorted(planned, reverse=True)
    given = ("--algorithm", "gptq", "--dataset", text, "--nsamples", 2, "--seqlen", 16)
    quantizing = ("--model-path", folder, "--config", plan, *given, "--save", tmp_path / "out")
    saved = {row["name"]: row["bits"] for row in call_json(QUANT, *quantizing)["linears"]}
    assert {bits for name, bits in saved.items() if name.startswith("layers.0.mlp.experts.")} == {3}
    shards = [
        call_json(GEN, "--model-path", *each, "--max-gen-tokens", 2)["shards"]
        for each in ((folder, "--bitwidth", plan), (tmp_path / "out",))
    ]
    held = [sum(shard["bytes"] for shard in each) for each in shards]
    assert held == [found["predicted"]["bytes"]] * 2


# What a stage's process does, once: on a machine that does little else, it goes on for seconds.
STAGE = """
import sys
from qllm.plan import stages
stages.SECONDS, stages.REPEATS = 0, 2
stages.main()
"""


def forked(command: list[str], *, env: dict[str, str], **streams) -> Process:
    """One of `run_ranks`' processes as a fork, which has imported torch."""
    *_, module, told = command
    assert module == stages.__name__
    environment = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{STAGE}"
    return processes.start(["-c", program, told], environment)


RANK = """
import json, os, sys
from pathlib import Path
import qllm.plan.ranks
told = json.loads(sys.argv[1])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
found = [os.environ[name] for name in names]
found += [name for name in os.environ if name.startswith("TORCHELASTIC_")]
Path(told["folder"], found[0]).write_text(" ".join(found))
print("rank", found[0])
if found[0] == told["fails"]:
    sys.exit("some lines\\nnothing works")
"""


def test_ranks_are_processes(tmp_path, monkeypatch):
    (tmp_path / "module_of_ranks.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # which holds for this one alone
    told = {"folder": str(tmp_path), "fails": "none"}
    assert ranks.run_ranks("module_of_ranks", told, [1, 3], "they") == "rank 0\n"
    found = [(tmp_path / name).read_text() for name in "01"]
    assert found == ["0 0 2 2 1", "1 1 2 2 3"]
    with pytest.raises(UserError, match="they could not be run here: nothing works"):
        ranks.run_ranks("module_of_ranks", told | {"fails": "1"}, [1, 1], "they")


def test_stages_of_this_machine_are_run_by_processes_of_their_own(given, tmp_path, monkeypatch):
    _, args, found = given
    half = found["plan"]["predicted"]["bytes"] * 0.6
    linear = {"1": (1e-6, 0.0, *[1e-10] * 4), "32": (1e-5, 0.0, *[1e-9] * 4)}
    linears = {f"{bits}:g64:asym": linear for bits in (2, 3, 4)} | {"16": linear}
    halves = dict.fromkeys(("decode", "prefill"), (1e-6, 0.0, 0.0, 0.0, 0.0))
    speed = {"linears": dict.fromkeys(("decode", "prefill"), linears), "halves": halves}
    speed |= {
        "passes": dict.fromkeys(("decode", "prefill"), (1e-6, 0.0, 0.0)),
        "cache": (0.0, 0.0, 0.0),
    }
    speed |= {"working_sets": (1e5, 1e6, 1e7, 1e8), "among_others": {"decode": 0.0, "prefill": 0.0}}
    device = {"host": platform.node(), "threads": 1, "memory": half, "measured": speed}
    devices = [device | {"name": "a"}, device | {"name": "b"}]
    (tmp_path / "cluster.json").write_text(json.dumps({"devices": devices}))
    args = (*args, "--cluster", tmp_path / "cluster.json", "--prompt", 8, "--gen", 4)
    three_times = linears_times(linears, 3)
    asked: list[int] = []

    class Slower(verify.Probe):
        def __init__(self, specs, dtype, device, threads, matrices):
            used = {label(spec) for spec in specs} | {"16"}
            self.tables = {bits: each for bits, each in three_times.items() if bits in used}
            asked.append(threads)

        def measure(self):
            asked.append(0)

        def speed(self):
            tables = dict.fromkeys(("decode", "prefill"), self.tables)
            return MeasuredSpeed(**speed | {"linears": tables})

    monkeypatch.setattr(verify, "Probe", Slower)
    monkeypatch.setattr(verify, "Matrices", lambda *_: None)  # of the size of the caches
    seconds = dict.fromkeys(STAGE_PASSES, 0.0) | {"decode": 3e-6, "busy_decode": 3e-6}
    beside = {"stage_passes": seconds, "crowding": dict.fromkeys(seconds, 0.0), "contention": 0.1}
    monkeypatch.setattr(
        ranks, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": forked})
    )
    monkeypatch.setattr(verify, "measure_stages", lambda threads, dtype, speed: ({}, beside))
    both = call_json(PLAN, *args, "--avg-bits", UNIFORM_3, "--verify")
    predicted, measured = both["plan"]["predicted"], both["measured"]
    # Of a machine that is three times as slow as the one that was probed for the plan.
    assert asked == [1] + [0] * ROUNDS and set(both["probed"]) == {
        "prefill_seconds",
        "decode_seconds",
    }
    for key, seconds in both["probed"].items():
        assert 1.5 * predicted[key] < seconds < 3 * predicted[key]
    assert measured["bytes"] == predicted["bytes"]
    assert both["plan"]["stages"] and measured["divergence"] > 0
    assert measured["decode_seconds"] > 0 and measured["prefill_seconds"] > 0


def test_a_plan_that_is_verified_without_room_for_it(given, tmp_path, monkeypatch):
    _, args, _ = given

    def refuse(job, target):
        with writing(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(verify, "quantize_checkpoint", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown = call(PLAN, *args, "--avg-bits", UNIFORM_3, "--verify", "--json")
    assert_user_error(shown, "free some, or name another place with TMPDIR")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["-o", "--table"])
def test_a_file_that_cannot_be_written_is_found_before_anything_is_measured(
    option, given, monkeypatch
):
    folder, args, _ = given
    monkeypatch.setattr(cached, "measure", lambda *_: pytest.fail("it is measured"))
    shown = call(PLAN, *args, "--avg-bits", UNIFORM_3, option, "/proc/x.json")
    assert_user_error(shown, "/proc/x.json cannot be written")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_plan_is_made_where_its_losses_cannot_be_kept(given, tmp_path, monkeypatch):
    folder, args, found = given

    def refuse(path, sensitivity):
        raise WritingError(f"{path} cannot be written; name another place")

    monkeypatch.setenv("QLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cached, "write", refuse)
    table = Sensitivity.from_file(folder / "table.json")
    monkeypatch.setattr(cached, "measure", lambda *_: table)
    shown = call(PLAN, *args[:-2], "--avg-bits", UNIFORM_3, "--json")
    assert json.loads(shown.stdout)["plan"]["rules"] == found["plan"]["rules"]
    assert "the losses are not kept" in shown.stderr
    assert "name another place with --table" in shown.stderr


def test_a_plan_and_a_probe_are_of_one_process(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("MASTER_PORT", 29500)):
        monkeypatch.setenv(name, str(value))
    for options in (("--probe", "-o", tmp_path / "here.json"), ("--avg-bits", 3)):
        said = "there are 2 processes, and this script takes one: start it without torchrun"
        assert_user_error(call(PLAN, *options), said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "nothing limits the plan"),
        (("--avg-bits", -1), "--avg-bits -1.0 cannot be"),
        (("--avg-bits", 1.5), "below the fewest of --bits"),
        (("--avg-bits", 3, "--objective", "latency"), "--objective latency needs devices"),
        # Before anything is read, or measured.
        (("--avg-bits", 3, "--fixed", "attention", "--cluster", "no.json"), "is no REGEX=BITS"),
        (("--avg-bits", 3, "--fixed", "attention=8"), "8 is not among --bits"),
        (("--avg-bits", 3, "--bits", "2,3", "--fixed", "nothing=3"), "matches no linear"),
        (("--cluster", "no.json"), "no.json: there is no such file"),
        (("--avg-bits", 3, "--bits", "2,3"), "was measured of another model"),
        (("--avg-bits", 2.5, "--fixed", "attention=4"), "the fewest of --bits and --fixed, 2."),
        (("--max-kl", 1e-9), "--max-kl 1e-09 is below what the most bits of --bits leave, "),
        (("--pareto", "--verify"), "--verify runs one plan"),
        (("--pareto", "--max-kl", 1e-9), "give that or more, or name more bits in --bits"),
        (("--avg-bits", 3, "-o", ROOT), "is a folder; name a file"),
        (("--memory", "1KB", "--cluster", "x"), "give one of them"),
        (("--size", "1KB", "--memory", "1GB"), "give one of them"),
        (("--size", "1kb"), "are missing"),
        (("--size", "much"), "--size 'much' is no size"),
        (("--avg-bits", 3, "--plot", "x.png"), "--plot draws the front"),
        (("--probe",), "name it with -o"),
        (("--probe", "-o", "x.json"), "--model-path does nothing with --probe"),
        (("--avg-bits", 3, "--batch", 1), "--batch needs devices; give --memory for this machine"),
        (("--size", "5MB", "--gen", 8), "--gen needs devices; give --memory for this machine"),
        (
            ("--memory", "1GB", "--prompt", 500),
            "--prompt 500 and --gen 128 exceed the model's window",
        ),
        (("--avg-bits", 3, "-o", "no/plan.json"), "no/plan.json: there is no folder no"),
    ],
)
def test_mistakes_are_one_line(given, options, said):
    _, args, _ = given
    assert_user_error(call(PLAN, *args, *options), said)


def test_what_does_not_fit_is_said_with_what_would_do(given, tmp_path):
    _, args, _ = given
    table = tmp_path / "none.json"
    args = [*args[:-1], table]
    too_many = ("--cluster", ROOT / "examples" / "cluster.json", "--batch", 100_000_000)
    assert_user_error(
        call(PLAN, *args, *too_many, "--gen", 1),
        "are missing; what would do: more devices or memory in --cluster, or a smaller --batch or "
        "--prompt",
    )
    assert_user_error(call(PLAN, *args, "--size", "1KB"), "are missing; what would do: --size 5.")
    assert not table.exists()  # nothing was measured for it
