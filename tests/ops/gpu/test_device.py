"""Where the GPU kernels run, and what they say where they do not."""

from __future__ import annotations

import importlib.util
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from qllm import ops
from qllm.ops import reference
from qllm.ops.gpu import (
    attention,
    cuda,
    decode,
    decode_int8,
    device,
    disk_cache,
    driver,
    hopper,
    hopper_int8,
    linear,
    nvrtc,
    prefill,
    quantized_prefill,
    rows,
)

A_GPU = SimpleNamespace(name="A GPU", uuid="1", multi_processor_count=4)
# What is found once of the GPU at hand, which is not to be found of another one.
MODULES = (
    *(attention, decode, decode_int8, device, hopper, hopper_int8),
    *(linear, prefill, quantized_prefill),
)
FOUND_ONCE = [
    each for module in MODULES for each in vars(module).values() if isinstance(each, device.once)
]
REQUEST = ops.Request(256, 64, 4, 128, "asym", "cuda")


@pytest.fixture
def no_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("QLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device._unfit.cache_clear()


@pytest.fixture
def a_gpu(no_interpreter, monkeypatch):
    """Makes torch say that there is a GPU of a compute capability."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    architecture = device.architecture

    def clear() -> None:
        for each in (*FOUND_ONCE, architecture, cuda.kernel):
            each.cache_clear()

    def make(*capability: int) -> None:
        clear()
        A_GPU.major, A_GPU.minor = capability
        monkeypatch.setattr(device, "_self_test", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: A_GPU)
    yield make
    clear()


def test_they_are_for_gpus(no_interpreter):
    assert (
        device.unsupported_reason("cpu")
        == device.unsupported_reason("meta")
        == "it is for CUDA devices"
    )
    if not torch.cuda.is_available():
        assert "no CUDA device" in device.unsupported_reason("cuda")
        choice = ops.select("weight_only_linear", REQUEST)
        assert choice.kernel.name == "reference" and "not triton: torch finds no" in choice.reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 1)])
def test_a_gpu_that_is_new_enough(capability, a_gpu):
    a_gpu(*capability)
    choice = ops.select("weight_only_linear", REQUEST)
    assert choice.kernel.name == "triton"
    assert f"compute capability {'.'.join(map(str, capability))}" in choice.reason
    assert ("is below 9.0" in choice.reason) == (capability < (9, 0))
    assert ops.select("int8_linear", REQUEST).kernel.takes_rows


@pytest.mark.parametrize("op", ["weight_only_linear", "int8_linear", "decode_attention"])
def test_a_gpu_that_is_too_old_takes_the_reference(op, a_gpu, capsys):
    a_gpu(7, 5)
    reason = "A GPU is of compute capability 7.5, below 8.0"
    for _ in range(2):  # said once
        choice = ops.select(op, REQUEST)
        assert choice.kernel.name == "reference" and reason in choice.reason
    said = capsys.readouterr().err
    assert said == f"note: {reason}; running plain torch ops, which are slow\n"


def test_a_triton_that_cannot_run_takes_the_reference(a_gpu, monkeypatch):
    def fail(x: torch.Tensor, scale: None) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    self_test = device._self_test
    a_gpu(9, 0)
    monkeypatch.setattr(device, "_self_test", self_test)
    monkeypatch.setattr(torch, "tensor", lambda values, device: torch.Tensor(values))
    monkeypatch.setattr(rows, "quantize", fail)
    assert device.unsupported_reason("cuda") == "Triton cannot run here: Failed to find C compiler."
    device._unfit.cache_clear()
    wrong = reference.Int8Rows(torch.zeros(1, 3), torch.ones(1, 1), torch.float32)
    monkeypatch.setattr(rows, "quantize", lambda x, scale: wrong)
    assert device.unsupported_reason("cuda") == "Triton's self-test here found [[0.0, 0.0, 0.0]]"
    device._unfit.cache_clear()
    monkeypatch.setattr(rows, "quantize", reference.quantize_rows)
    assert device.unsupported_reason("cuda") is None


def test_that_a_self_test_has_passed_is_kept(a_gpu, monkeypatch, capsys):
    """Not that it failed, nor what another GPU, driver, compiler or source passed."""
    made, place = [], torch.device("cuda", 0)

    def run(found: str | None = None, name: str = "test", depends: object = str) -> str | None:
        test = lambda: made.append(name) or found  # noqa: E731
        return device.failure(name, place, test, "it is slow", depends)

    for _ in range(2):
        assert run("broken") == "broken"
    for _ in range(2):
        assert run() is None
    assert len(made) == 3 and capsys.readouterr().err == "note: broken; it is slow\n" * 2
    changes = (
        lambda: monkeypatch.setattr(A_GPU, "uuid", "2"),
        lambda: monkeypatch.setattr(torch.version, "cuda", "99.0"),
        lambda: monkeypatch.setattr(disk_cache, "sources", lambda: "others"),
    )
    for change in changes:
        change()
        disk_cache._compilers.cache_clear()
        for _ in range(2):
            assert run() is None
    assert len(made) == 6
    run(depends=lambda: 12)
    run(name="another")
    assert len(made) == 8

    def missing() -> None:
        raise RuntimeError("there is no compiler")

    assert run(depends=missing) == "there is no compiler"
    disk_cache._compilers.cache_clear()


def test_threads_wait_for_one_that_tests(capsys):
    """A test takes seconds, and a note is said once."""
    begun = threading.Event()

    @device.once
    def tested(name: str) -> str:
        assert not begun.is_set()
        begun.set()
        time.sleep(0.05)
        return name

    found = []
    threads = [threading.Thread(target=lambda: found.append(tested("a"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a"] * 3


def test_kernels_are_compiled_together_but_in_the_interpreter(monkeypatch):
    meet = threading.Barrier(3, timeout=10)
    calls = [lambda i=i: meet.wait() * 0 + i for i in range(3)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert device.together(calls) == [0, 1, 2]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device.together([threading.current_thread] * 2) == [threading.main_thread()] * 2


def test_a_note_says_that_triton_compiles(monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    device.watch_triton.cache_clear()
    device.watch_triton()
    device.say_that_it_compiles.cache_clear()
    said = []
    for cache_hit in (True, False, False):
        given = {"src": None, "metadata": {}, "metadata_group": {}, "times": None}
        triton.knobs.compilation.listener(**given, cache_hit=cache_hit)
        said.append(capsys.readouterr().err)
    note = "note: compiling GPU kernels, which are kept for the next time ...\n"
    assert said == ["", note, ""]


def test_another_maker_s_gpu_takes_the_reference(a_gpu, monkeypatch):
    a_gpu(9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert (
        device.unsupported_reason("cuda") == "the GPU kernels are for NVIDIA's GPUs, not for A GPU"
    )


def test_without_triton_the_reference_runs(a_gpu, monkeypatch):
    a_gpu(9, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = ops.select("weight_only_linear", REQUEST)
    assert choice.kernel.name == "reference" and "Triton is not installed" in choice.reason


def test_the_interpreter_goes_before_the_cpu_s_kernels(gpu):
    if gpu == "cuda":
        pytest.skip("there is a GPU")
    choice = ops.select("weight_only_linear", ops.Request(256, 64, 4, 128, "asym", "cpu"))
    assert choice.kernel.name == "triton" and "interpreter" in choice.reason
    assert "not cpu: TRITON_INTERPRET=1 asks for the GPU kernels" in choice.reason


class Driver:
    """CUDA's driver, of which each thread has a context, or none; that of a device is its number.

    Attributes:
        loaded: the contexts in which modules were loaded.
        asked: how many times one was made another thread's own.
    """

    def __init__(self) -> None:
        self.own = threading.local()
        self.loaded: list[int | None] = []
        self.asked = 0

    @staticmethod
    def _number(context) -> int | None:
        return getattr(context, "value", context)

    def cuCtxGetCurrent(self, found) -> int:  # noqa: N802
        found._obj.value = getattr(self.own, "context", None)
        return 0

    def cuCtxSetCurrent(self, context) -> int:  # noqa: N802
        self.own.context = self._number(context)
        self.asked += 1
        return 0

    def cuDevicePrimaryCtxRetain(self, found, number: int) -> int:  # noqa: N802
        found._obj.value = 100 + number
        return 0

    def cuModuleLoadData(self, found, binary) -> int:  # noqa: N802
        self.loaded.append(getattr(self.own, "context", None))
        return 0

    def cuModuleGetFunction(self, *given) -> int:  # noqa: N802
        return 0


def test_each_device_s_kernels_are_loaded_in_its_own_context(monkeypatch):
    made = Driver()
    monkeypatch.setattr(driver, "library", lambda: made)
    driver._primary_context.cache_clear()

    def load(*numbers: int) -> None:
        for number in numbers:
            driver.load(b"", torch.device("cuda", number), "decode")

    def load_anew() -> None:  # in a thread that has none, as torch's are at first
        load(1, 1, 0)

    try:
        made.own.context = 100  # as torch.cuda.set_device(0) has it
        load(0)
        assert made.asked == 0
        load(1, 0, 1)
        assert made.loaded == [100, 101, 100, 101]
        assert made.own.context == 100  # which is torch's current device
        made.loaded.clear()
        thread = threading.Thread(target=load_anew)
        thread.start()
        thread.join()
        assert made.loaded == [101, 101, 100]
    finally:
        driver._primary_context.cache_clear()


@pytest.mark.parametrize("failing", ["nvrtcCreateProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"])
def test_what_nvrtc_cannot_do_is_said(failing, monkeypatch):
    named: list[bytes] = []

    class Compiler:
        def __getattr__(self, name: str):
            def call(*given: object) -> int:
                if name == "nvrtcCreateProgram":
                    named.append(given[2])
                return 5 if name == failing else 0

            return call

    monkeypatch.setattr(nvrtc, "library", Compiler)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    with pytest.raises(nvrtc.Unavailable, match=f"^{failing} of NVRTC 13.0 failed: error 5$"):
        nvrtc.compile("source", [], "prefill")
    assert named == [b"prefill.cu"]
