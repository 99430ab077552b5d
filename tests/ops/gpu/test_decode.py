"""The decode product in CUDA C++: on a GPU, or on one that is emulated lane by lane."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import gpu_kernels
import pytest
import torch
from cpu_paths import STORED_SCHEMES, normal, pattern, random_weight, weight_of
from fences import mappings, run_in
from gpu_kernels import assert_same, decode_binary, multiply_between_fences, packed
from product_cases import assert_close
from torch import Tensor

from qllm.ops import phase, reference
from qllm.ops.gpu import cuda, decode, decode_int8, driver, linear, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.quant.packing import BITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((1, 1), (13, 67), (33, 390), (20, 1160))  # (N, K)
GROUPS = (-1, 16, 32, 48, 64, 100, 128, 200)
ROWS = (1, 3, 8, 13, 17, 40)


def multiply(weight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    with phase.decode():
        return gpu_kernels.multiply(weight, x, bias, DEVICE, decode.weight_only_linear)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_twice_the_reference_s(bits, own_gpu, monkeypatch):
    schemes = STORED_SCHEMES if bits > 1 else ("asym", "offset")
    cases = list(itertools.product(GROUPS, schemes, cuda.DTYPES))
    for i, (group_size, scheme, dtype) in enumerate(cases):
        if DEVICE == "cpu" and i % 4 != bits % 4:  # each at some number of bits
            continue
        shape, count = SHAPES[(i + i // 4) % len(SHAPES)], ROWS[i // 2 % len(ROWS)]
        wide = torch.float32 if i % 3 == 0 else torch.float16
        weight = random_weight(shape, bits, group_size, scheme, scales_dtype=wide)
        x = normal(count, shape[1] + 3, dtype=dtype)[:, : shape[1]]
        bias = normal(shape[0], dtype=dtype) if i % 8 < 4 else None
        assert_close(weight, x, bias, multiply(weight, x, bias))


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_a_row_is_the_same_whatever_is_beside_it(dtype, own_gpu):
    weight = random_weight((20, 1160), 4, 128)
    x = normal(40, 1160, dtype=dtype)
    whole = multiply(weight, x)
    for first, count in ((0, 1), (3, 8), (5, 16), (39, 1)):
        some = slice(first, first + count)
        assert torch.equal(multiply(weight, x[some]), whole[some])


@pytest.mark.parametrize("warps", cuda.WARPS)
@pytest.mark.parametrize(
    ("panels", "parts", "x_ahead"), [(1, 1, 0), (2, 2, 1), (4, 1, 1), (4, 4, 0)]
)
def test_any_number_of_warps_shares_some_panels(
    warps, panels, parts, x_ahead, own_gpu, monkeypatch
):
    """Which of them are one block of threads, and when x is asked for, changes no bit."""
    tall = 1 if warps * panels // parts > 48 else 2
    weight = random_weight((40, 1160), 8, 32)  # of three panels
    x = torch.randint(
        -8, 9, (8 * tall, 1160), generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    found = []
    for others in ((panels, parts, bool(x_ahead)), (1,)):
        cut = cuda.Cut(warps, 2, tall, *others)
        monkeypatch.setattr(cuda, "cut", lambda *asked, cut=cut: cut)
        found.append(multiply(weight, x))
    assert torch.allclose(found[0].double(), weight.exact(x), rtol=2**-8, atol=2e-3)
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_every_value_meets_every_zero_wherever_it_lies(bits, dtype, own_gpu):
    """One input after the other is all of x: its row of the weight is what comes out."""
    top = 2**bits
    zeros = torch.arange(top)[:, None] * (top // min(top, 32))  # of up to 32 outputs
    zeros = zeros[: min(top, 32)] + torch.arange(2) % (top // min(top, 32) + 1)
    zeros = zeros.clamp(max=top - 1)
    q = (
        torch.arange(256)[None, :] * (7 if bits > 3 else 1) + torch.arange(len(zeros))[:, None]
    ) % top
    scales = torch.ones(len(zeros), 2).half()
    weight = weight_of(q.numpy(), zeros.numpy(), scales, bits, 128)
    for first in range(0, 128, 32):
        x = torch.eye(256)[first : first + 32].to(dtype)
        assert torch.equal(multiply(weight, x).double(), weight.exact(x))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_gives_what_the_reference_gives(special, own_gpu):
    weight = random_weight((20, 256), 4, 128, "asym" if special > 0 else "offset")
    x = normal(3, 256, dtype=torch.bfloat16)
    x[1, 130] = special
    assert torch.equal(pattern(multiply(weight, x)), pattern(weight.reference(x)))


def run_between_fences(library: str) -> None:
    """On the emulation, all tensors fenced: those that it is given and the one that it makes."""
    driver.library = lambda: ctypes.CDLL(library)
    nvrtc.compile_cached = decode_binary
    device_of.architecture = lambda device: ("9.0", 4)
    decode.late_reason = lambda device: None
    cut = cuda.cut
    cuda.cut = lambda *asked: cut(*asked)._replace(prefetched=64)

    def multiply(*given):
        with phase.decode():
            return decode.weight_only_linear(*given)

    for fence, outputs, inputs, count in multiply_between_fences(multiply):
        x = reference.quantize_rows(normal(count, -(-inputs // 16) * 16).bfloat16(), None)
        x = reference.Int8Rows(fence(x.values), fence(x.scales), x.dtype)
        q = fence(torch.ones(outputs, x.values.shape[1], dtype=torch.int8))
        assert decode_int8.takes(x, q)
        with phase.decode():
            decode_int8.int8_linear(x, q, fence(torch.ones(outputs)), fence(torch.ones(outputs)))
        mappings.clear()


def test_nothing_outside_is_touched(decode_emulation):
    done = run_in(Path(__file__), f"run_between_fences({decode_emulation._name!r})")
    assert done.returncode == 0, done.stderr


def test_the_self_test_finds_what_is_wrong(own_gpu, monkeypatch, capsys):
    for offsets in (False, True):
        device = torch.device(DEVICE, 0) if own_gpu is None else "cpu"
        assert decode._self_test(device, offsets) is None
    if own_gpu is None:
        return
    assert decode._test_of_order(torch.device("cpu"), 64, 2) is None
    right = decode.weight_only_linear
    monkeypatch.setattr(
        decode, "weight_only_linear", lambda *given, **how: right(*given, **how) + 1
    )
    assert "found other sums" in decode._self_test("cpu")
    assert "did not wait" in decode._test_of_order(torch.device("cpu"), 64, 2)
    assert own_gpu is not None and ctypes.c_int.in_dll(own_gpu, "launches_that_began_early").value


INT8_SHAPES = ((1, 16), (13, 80), (33, 384), (20, 1168))  # (N, K)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_int8_is_the_reference_to_the_bit(dtype, static, own_gpu, monkeypatch):
    monkeypatch.setattr(decode_int8, "unsupported_reason", lambda device: None)
    for i, ((outputs, inputs), count) in enumerate(zip(INT8_SHAPES, (1, 3, 17, 9), strict=True)):
        tall = -(-count // 8) if count < 17 else 4
        own = cuda.Cut(cuda.WARPS[i % 3], 1 + i % 3, tall, 1 + i % 2)
        monkeypatch.setattr(cuda, "cut", lambda *asked, own=own: own)
        x = normal(count, inputs, dtype=dtype)
        x[0] *= 100
        x = reference.quantize_rows(x, torch.tensor(0.03) if static else None)
        q = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        scales = normal(outputs).abs().to(torch.float16 if i % 2 else torch.float32)
        bias = normal(outputs, dtype=dtype) if i < 3 else None
        given = (x, q, scales, bias, None)
        assert decode_int8.takes(x, q)
        there = [
            reference.Int8Rows(x.values.to(DEVICE), x.scales.to(DEVICE), dtype),
            *(part if part is None else part.to(DEVICE) for part in given[1:]),
        ]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        with phase.decode():
            got = linear.int8_linear(*there, outputs).cpu()
        assert_same(got, reference.int8_linear(*given, outputs))


def test_weights_are_read_early_in_steps_alone(own_gpu, monkeypatch):
    """In front of anything else may be what writes them."""
    monkeypatch.setattr(decode_int8, "unsupported_reason", lambda device: None)
    asked: list[bool] = []
    launch = driver.launch
    monkeypatch.setattr(
        driver,
        "launch",
        lambda *given, early, **how: asked.append(early) or launch(*given, early=early, **how),
    )
    weight, x = random_weight((20, 256), 4, 128), normal(3, 256, dtype=torch.bfloat16).to(DEVICE)
    tensors = packed(weight, DEVICE)[:3]
    q, scales = (torch.ones(20, *shape, device=DEVICE) for shape in ((256,), ()))

    def products():
        decode.weight_only_linear(x, *tensors, None, 20, 4, 128)
        linear.int8_linear(
            reference.quantize_rows(x, None), q.to(torch.int8), scales, None, None, 20
        )

    products()
    with phase.decode():
        products()
    can = decode.late_reason(torch.device(DEVICE, 0)) is None
    assert asked == [False, False, can, can]


@pytest.mark.parametrize(("warps", "depth", "panels"), [(4, 1, 2), (8, 2, 1)])
def test_steps_ask_for_what_comes_behind_the_first_blocks(
    warps, depth, panels, own_gpu, monkeypatch
):
    """Into the L2, up to so many KB of a panel, and once whatever the number of rows."""
    if own_gpu is None:
        pytest.skip("what is asked for shows in the emulation alone")
    monkeypatch.setattr(decode_int8, "unsupported_reason", lambda device: None)
    weight, x = random_weight((40, 2560), 4, 128), normal(17, 2560, dtype=torch.bfloat16)
    rows, q = reference.quantize_rows(x, None), torch.ones(40, 2560, dtype=torch.int8)
    asked = ctypes.c_int64.in_dll(own_gpu, "prefetched_bytes")
    products = [
        lambda: decode.weight_only_linear(x, *packed(weight, DEVICE)[:3], None, 40, 4, 128),
        lambda: linear.int8_linear(rows, q, torch.ones(40), None, None, 40),
    ]
    for prefetched in (0, 16, 128):
        cut = cuda.Cut(warps, depth, 4, panels, prefetched=prefetched)
        monkeypatch.setattr(cuda, "cut", lambda *given, cut=cut: cut)
        for multiply, bits in zip(products, (4, 8), strict=True):
            panel, first = (16 * inputs * bits // 8 for inputs in (2560, 128 * warps * depth))
            # The int8 weight has no outputs behind the last one.
            expected = max(0, min(panel, prefetched << 10) - first) * (3 if bits == 4 else 2.5)
            asked.value = 0
            prompt = multiply()
            assert asked.value == 0
            with phase.decode():
                assert torch.equal(multiply(), prompt)
            assert asked.value == expected


def test_int8_that_it_does_not_take():
    q = torch.ones(4, 32, dtype=torch.int8)

    def rows(count: int, inputs: int = 32, dtype: torch.dtype = torch.bfloat16):
        values = torch.ones(count, inputs + 32, dtype=torch.int8)[:, :inputs].contiguous()
        return reference.Int8Rows(values, torch.ones(count, 1), dtype)

    assert decode_int8.takes(rows(1), q) and decode_int8.takes(rows(32), q)
    assert not decode_int8.takes(rows(0), q) and not decode_int8.takes(rows(33), q)
    assert not decode_int8.takes(rows(1, dtype=torch.float32), q)
    assert not decode_int8.takes(rows(1, 24), q[:, :24].contiguous())
    assert not decode_int8.takes(rows(1, 16), q[:, :16])
    assert not decode_int8.takes(rows(1, 16), q.view(-1)[8:72].view(4, 16))


def test_the_int8_self_test_finds_what_is_wrong(own_gpu, monkeypatch):
    assert decode_int8._self_test(torch.device(DEVICE)) is None
    right = decode_int8.int8_linear
    monkeypatch.setattr(decode_int8, "int8_linear", lambda *given: -right(*given))
    assert "found other sums" in decode_int8._self_test(torch.device(DEVICE))


def test_a_kernel_may_begin_early_where_it_can(monkeypatch):
    monkeypatch.delenv("QLLM_PDL", raising=False)
    for architecture, reason in (("8.6", "compute capability 8.6 is below 9.0"), ("9.0", None)):
        monkeypatch.setattr(device_of, "architecture", lambda device, own=architecture: (own, 4))
        assert cuda.late_reason(torch.device("cuda", 0)) == reason
    monkeypatch.setenv("QLLM_PDL", "0")
    assert cuda.late_reason(torch.device("cuda", 0)) == "QLLM_PDL=0"


def test_a_decode_step_takes_it_and_a_prompt_does_not(own_gpu, gpu, monkeypatch):
    weight, x = random_weight((20, 256), 4, 128), normal(3, 256, dtype=torch.bfloat16)
    asked, tensors = [], packed(weight, DEVICE)[:3]

    def noted(x, *given, run=decode.weight_only_linear):
        asked.append(len(x))
        return run(x, *given)

    monkeypatch.setattr(decode, "weight_only_linear", noted)
    monkeypatch.setattr(decode, "unsupported_reason", lambda device, offsets: None)
    for rows, dtype in ((3, torch.bfloat16), (2, torch.float16), (1, torch.float32)):
        given = (x[:rows].to(DEVICE, dtype), *tensors, None, 20, 4, 128)
        prompt = linear.weight_only_linear(*given)
        with phase.decode():
            step = linear.weight_only_linear(*given)
        assert not phase.decoding()
        assert torch.allclose(prompt.float(), step.float(), atol=0.1, rtol=0.02)
    assert asked == [3, 2]  # float32 is Triton's


def test_where_it_cannot_run_a_note_and_the_explanation_say_so(monkeypatch, capsys):
    decode.unsupported_reason.cache_clear()
    try:
        place = torch.device("cuda", 7)
        for error in (nvrtc.Unavailable("NVRTC is not installed"), RuntimeError("CUDA error 1\nx")):
            decode.unsupported_reason.cache_clear()

            def fail(device: torch.device, offsets: bool, error=error) -> None:
                raise error

            monkeypatch.setattr(decode, "_self_test", fail)
            monkeypatch.setattr(nvrtc.disk_cache, "test_name", lambda name, device: "gpu-tested")
            # As if it had not passed before.
            monkeypatch.setattr(nvrtc.disk_cache, "read", lambda name: None)
            monkeypatch.setattr(nvrtc.disk_cache, "write", lambda *given: None)
            monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
            reason = str(error).splitlines()[0]
            assert decode.unsupported_reason(place) == reason
            assert decode.about(place).endswith(f"not in CUDA C++: {reason}")
            said = capsys.readouterr().err
            assert said == f"note: {reason}; decode steps take Triton's product, a slower one\n"
    finally:
        decode.unsupported_reason.cache_clear()


def test_what_is_compiled_is_kept(monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setenv("QLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile", lambda *given: made.append(given) or b"binary")
    device_of.say_that_it_compiles.cache_clear()
    for options in (["-DBITS=4"], ["-DBITS=4"], ["-DBITS=3"]):
        assert nvrtc.compile_cached("source", options, "decode") == b"binary"
    assert [options for _, options, _ in made] == [["-DBITS=4"], ["-DBITS=3"]]
    assert capsys.readouterr().err.count("note: compiling GPU kernels") == 1
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-1])  # as after a crash
    assert nvrtc.compile_cached("source", ["-DBITS=4"], "decode") == b"binary" and len(made) == 3


def test_few_panels_keep_every_multiprocessor_busy():
    for panels, blocks, expected in ((256, 86, 8), (512, 64, 4), (1376, 32, 4), (48, 6, 4)):
        assert cuda.warps(16, panels, blocks, 132) == expected
    assert cuda.warps(16, 64, 32, 132) == 16


@pytest.mark.parametrize("kind", ["decode-int8", *(f"decode-{bits}" for bits in BITS)])
def test_rows_decide_on_no_sum_and_all_sums_have_room(kind):
    for panels, blocks in itertools.product(
        (3, 48, 192, 256, 512, 768, 1376, 9000), (1, 6, 32, 86)
    ):
        cuts = [cuda.cut(kind, "9.0", rows, panels, blocks, 132) for rows in range(1, 300)]
        assert len({cut.warps for cut in cuts}) == 1
        assert all(cut.shared_bytes <= cuda.MAX_SHARED_BYTES for cut in cuts)
        assert all(1 <= cut.depth <= 4 and cut.panels in (1, 2, 4) for cut in cuts)
        assert all(cut.tiles * cut.panels % cut.parts == 0 for cut in cuts)
        assert all(cut.resident * cut.threads <= 1024 for cut in cuts)
