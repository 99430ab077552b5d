"""Shared by all tests: the bundled models, scripts as processes, and a machine of one's own."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from covering import mark_slow_but_covering
from hypothesis import HealthCheck, settings

pytest_plugins = ["building"]  # whose fixtures several modules take

# What is imported and collected stays: to look among it for garbage takes a third of the time.
gc.disable()

# The same examples on every run and machine, and no folder of past failures beside the tests. How
# long an example takes depends on what else the machine does, and says nothing.
settings.register_profile(
    "qllm",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# Fresh examples each time, and many more: HYPOTHESIS_PROFILE=nightly. A failure prints what
# makes it anew.
settings.register_profile(
    "nightly", settings.get_profile("qllm"), derandomize=False, max_examples=2000, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "qllm"))

# Tests run beside each other, and beside the processes they start: threads that spin while they
# wait take the processor from those that work. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests go through every path that this machine has, and their processes share one library.
os.environ.setdefault("QLLM_CPU_PATH", "amx,avx512bf16,avx512,avxvnni,avx2,scalar")
# No test asks for the network. Read once too, when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Triton decides when it is imported, which torch may do, whether it interprets; and no process that
# a test starts is to do so.
if importlib.util.find_spec("triton"):
    import torch

    if not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            import interpreter

            interpreter.make_quicker()

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("opt", "bloom", "llama")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before those that are marked slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow_but_covering(items)


def pytest_collection_finish() -> None:
    """The garbage collector need not walk what stays."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def walked_once():
    """What is there behind a module, such as what it imported, stays too, once garbage is gone."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """No test, and no process it starts, sees this machine's caches."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLLM_HOME", str(home / "qllm"))
        patch.setenv("HF_HOME", str(home / "hf"))
        patch.delenv("HF_TOKEN", raising=False)
        yield home


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """The machine does not lose its power here: who waits for the disk finds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def one_thread():
    """For models so small that handing work to threads takes longer than doing it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cpu_kernels():
    """Skips where there are none: the sums of plain torch ops depend on their shapes."""
    from cpu_paths import paths

    paths()


@pytest.fixture
def gpu(monkeypatch):
    """The device that runs the GPU kernels here: a GPU, or the CPU in Triton's interpreter."""
    import torch

    from qllm import ops

    if torch.cuda.is_available():
        yield "cuda"
        return
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops.kernels_on.cache_clear()
    yield "cpu"
    ops.kernels_on.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    """Everything runs on the CPU: several ranks would take a GPU each, and there may be one."""
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that a test starts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def hopper_emulation(tmp_path_factory):
    """A driver whose GPU, of compute capability 9.0, is emulated."""
    from gpu_kernels import build_emulation

    return build_emulation("emulated_prefill.cpp", tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def own_hopper(request, monkeypatch):
    """The GPU, or where there is none the emulation, of which this is the driver.

    Tests whose module's KERNELS cannot run on the GPU are skipped.
    """
    import torch
    from gpu_kernels import hopper_binary

    from qllm.ops.gpu import device, driver, hopper, nvrtc

    if torch.cuda.is_available():
        if reason := request.module.KERNELS.unsupported_reason(torch.device("cuda", 0)):
            pytest.skip(reason)
        yield None
        return
    library = request.getfixturevalue("hopper_emulation")
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setattr(nvrtc, "compile_cached", hopper_binary)
    monkeypatch.setattr(device, "architecture", lambda device: ("9.0", 132))
    hopper.kernel.cache_clear()
    yield library
    hopper.kernel.cache_clear()


@pytest.fixture(scope="session")
def decode_emulation(tmp_path_factory):
    """A driver whose GPU is emulated, for products of steps."""
    from gpu_kernels import build_emulation

    return build_emulation("emulated_decode.cpp", tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def own_gpu(request, monkeypatch):
    """The GPU, or where there is none the emulation of steps, of which this is the driver."""
    import torch
    from gpu_kernels import decode_binary

    from qllm.ops.gpu import cuda, decode, device, driver, nvrtc

    if torch.cuda.is_available():
        if reason := decode.unsupported_reason(torch.device("cuda", 0)):
            pytest.fail(reason)
        yield None
        return
    library = request.getfixturevalue("decode_emulation")
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setattr(nvrtc, "compile_cached", decode_binary)
    monkeypatch.setattr(device, "architecture", lambda device: ("9.0", 4))
    monkeypatch.setattr(decode, "late_reason", lambda device: None)
    cuda.kernel.cache_clear()
    yield library
    cuda.kernel.cache_clear()


def examples(count: int) -> settings:
    """For a hypothesis test whose examples cost more, or less, than most: here, and nightly."""
    nightly = settings.get_current_profile_name() == "nightly"
    return settings(max_examples=20 * count if nightly else count)


def tiny(family: str) -> Path:
    """The bundled checkpoint of a family."""
    return ROOT / "tiny_models" / f"{family}-tiny"


def run(script: str, *args: object, **options) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does, and wait for it."""
    options.setdefault("env", os.environ.copy())
    options.setdefault("timeout", 300)
    return processes.run([str(ROOT / script), *map(str, args)], **options)


def run_json(script: str, *args: object, **options) -> dict:
    """Run a script with --json and return the one object it prints."""
    done = run(script, *args, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_user_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """One line on standard error that says these words, status 2, nothing on standard output."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The folder of one of `quantizing.MODELS`, made once. Do not change it."""
    import torch
    from quantizing import saved

    made: dict[tuple, Path] = {}

    def source(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = saved(name, tmp_path_factory.mktemp("source") / "model", dtype)
        return made[name, dtype]

    return source


@pytest.fixture(scope="session")
def shallow_of(tmp_path_factory):
    """The folder of a family's bundled model with few layers, made once. Do not change it."""
    from shallow_models import shallow

    made: dict[tuple, Path] = {}

    def source(family: str, layers: int = 2) -> Path:
        if (family, layers) not in made:
            folder = tmp_path_factory.mktemp("shallow") / family
            made[family, layers] = shallow(family, folder, layers=layers)
        return made[family, layers]

    return source


@pytest.fixture(scope="session")
def onnx_of_opt(shallow_of, tmp_path_factory) -> Path:
    """The folder of OPT's ONNX model with few layers, made once. Do not change it."""
    from qllm.onnx.export import export

    folder = tmp_path_factory.mktemp("whole") / "model"
    export(shallow_of("opt"), folder)
    return folder
