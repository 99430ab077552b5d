"""Products of the GPU kernels: near the exact ones, and the same whatever the other rows."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from covering import each, slow_but
from cpu_paths import DTYPES, STORED_SCHEMES, normal, pattern, random_weight, weight_of
from gpu_kernels import assert_same, multiply, packed
from product_cases import assert_close, rms
from torch import Tensor

from qllm.ops import phase, reference
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu import linear, rows, tiles
from qllm.ops.reference import Int8Rows
from qllm.quant.packing import BITS

SHAPES = ((1, 1), (13, 67), (70, 300), (66, 390))  # (N, K)
GROUPS = (-1, 16, 20, 32, 100, 128, 200)
ROWS = (1, 3, 16, 17, 40)
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    slow_but([*each(BITS, DTYPES), *each(BITS, DTYPES[1:])], BITS, DTYPES),
    ids=str,
)
def test_the_error_is_at_most_twice_the_reference_s(bits, dtype, gpu):
    cases = list(product(SHAPES, GROUPS, STORED_SCHEMES))
    for i, (shape, group_size, scheme) in enumerate(cases):
        if i % 8 != bits % 8:  # each at some number of bits: the interpreter is slow
            continue
        # In the interpreter, numbers of all types come about in one way.
        if gpu == "cpu" and i // 8 % 3 != DTYPES.index(dtype):
            continue
        weight = random_weight(shape, bits, group_size, scheme)
        count = ROWS[i % len(ROWS)]
        x = normal(count, shape[1] + 3, dtype=dtype)[:, : shape[1]]
        bias = normal(shape[0], dtype=dtype) if i % 16 < 8 else None
        assert_close(weight, x, bias, multiply(weight, x, bias, gpu))


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers whose products with up to 8 bits are summed exactly in a block, in any order."""
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=draw).to(dtype)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    slow_but([(3, torch.bfloat16)], (3, 8), (torch.float32, torch.bfloat16)),
    ids=str,
)
def test_a_row_is_the_same_whatever_is_beside_it(bits, dtype, gpu):
    # Of sums of blocks the order counts: of 3 parts of K, which one row's programs share.
    weight = random_weight((70, 768), bits, 128)
    x = integers(90, 768, dtype=dtype)
    architecture = device_of.architecture(torch.device(gpu))
    plans = [tiles.plan(f"packed-{bits}", count, 70, 6, *architecture) for count in (1, 90)]
    assert plans[0].parallel and plans[0].split_k == plans[1].split_k > 1
    whole = multiply(weight, x, None, gpu)
    for first, count in ((0, 1), (20, 17), (5, 40)):
        some = slice(first, first + count)
        assert torch.equal(multiply(weight, x[some], None, gpu), whole[some])


def emulated(builder: object, asm: str, constraints: str, values: list, *rest: object) -> object:
    """What the kernels' inline assembly computes, on numpy's arrays."""
    words = [value.data.astype(np.uint32) for value in values]
    words = np.broadcast_arrays(*words)
    if asm == "lop3.b32 $0, $1, $2, $3, 0xEA;":
        found = words[0] & words[1] | words[2]
    elif asm == "shf.r.wrap.b32 $0, $1, $1, $2;":
        found = words[0] >> words[1] | words[0] << (32 - words[1]) % 32
    else:
        kind = {"fma.rn.f16x2": torch.float16, "fma.rn.bf16x2": torch.bfloat16}[
            asm.split(maxsplit=1)[0]
        ]
        halves = (np.ascontiguousarray(word).view(np.int16) for word in words)
        a, b, c = (torch.from_numpy(half).view(kind).double() for half in halves)
        found = (a * b + c).to(kind).view(torch.int16).numpy().view(np.uint32)
    handle = type(values[0])(found.view(np.int32), values[0].dtype)
    return SimpleNamespace(get_result=lambda index: handle)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    # 8 bits fill bfloat16's significand, and 1 bit has no field beside it.
    slow_but([*product((1, 8), HALVES), *each((3, 4), HALVES)], BITS, HALVES),
    ids=str,
)
def test_bits_become_numbers_as_a_gpu_makes_them(bits, dtype, gpu, monkeypatch):
    """The instructions that a GPU gets, one by one, where the interpreter takes others."""
    if gpu == "cuda":
        pytest.skip("a GPU takes them in all tests")
    from triton.runtime import interpreter

    from qllm.ops.gpu.kernels import matmul

    # Every value meets every zero: a row has one zero, and all values.
    top = 2**bits
    q = np.tile(np.arange(256) % top, (top, 1))
    weight = weight_of(q, np.arange(top)[:, None], torch.ones(top, 1).half(), bits, -1)
    # A row of x takes one column: all values, and all places in a block of 128.
    x = torch.eye(256)[: max(top, 128)].to(dtype)
    expected = multiply(weight, x, None, gpu)
    assert torch.equal(expected.double(), weight.exact(x))
    asked = []

    def emulate(builder: object, asm: str, *rest: object) -> object:
        asked.append(asm)
        return emulated(builder, asm, *rest)

    monkeypatch.setattr(matmul, "INTERPRETED", False)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", emulate)
    assert torch.equal(multiply(weight, x, None, gpu), expected)
    assert len({asm.split()[0] for asm in asked}) == 3


def test_splitting_changes_no_bit(gpu, monkeypatch):
    weight = random_weight((200, 1280), 4, 128)
    x, dense = integers(5, 1280, dtype=torch.float32), integers(200, 1280, dtype=torch.float32)
    dense *= 0.1
    plan, found = tiles.plan, {}
    for parallel in (True, False):
        monkeypatch.setattr(tiles, "plan", lambda *a, p=parallel: plan(*a)._replace(parallel=p))
        whole = linear.dense_linear(x.to(gpu), dense.to(gpu), None).cpu()
        found[parallel] = (multiply(weight, x, None, gpu), whole)
    assert all(map(torch.equal, found[True], found[False]))


@pytest.mark.parametrize("bits", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_unpacking_in_front_changes_no_bit(bits, gpu, monkeypatch):
    for group_size, scheme, dtype in ((32, "asym", DTYPES[0]), (200, "sym", DTYPES[2])):
        weight = random_weight((70, 390), bits, group_size, scheme)
        x = normal(20, 390, dtype=dtype)
        bias = normal(70, dtype=dtype)
        expected = multiply(weight, x, bias, gpu)
        with monkeypatch.context() as patch:
            patch.setattr(linear, "MANY_ROWS", 20)
            assert torch.equal(multiply(weight, x, bias, gpu), expected)


def test_counters_are_left_as_they_were(gpu):
    weight = random_weight((70, 1280), 4, 128)
    x = normal(2, 1280)
    first = multiply(weight, x, None, gpu)
    assert not device_of.counters(torch.device(gpu)).any()
    assert torch.equal(multiply(weight, x, None, gpu), first)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_gives_what_the_reference_gives(special, gpu):
    weight = random_weight((40, 256), 4, 128, "asym" if special > 0 else "offset")
    x = normal(3, 256, dtype=torch.bfloat16)
    x[1, 130] = special
    got = multiply(weight, x, None, gpu)
    assert torch.equal(pattern(got), pattern(weight.reference(x)))
    q, scales = torch.full((40, 256), 3, dtype=torch.int8), torch.ones(40)
    for scale in (None, torch.tensor(0.03)):
        want = reference.int8_linear(x, q, scales, None, scale, 40)
        tensors = (part if part is None else part.to(gpu) for part in (x, q, scales, None, scale))
        assert_same(linear.int8_linear(*tensors, 40).cpu(), want)


def test_the_self_test_of_offsets_finds_what_is_wrong(gpu, monkeypatch):
    assert linear._self_test(torch.device(gpu)) is None
    right = linear.weight_only_linear
    monkeypatch.setattr(linear, "weight_only_linear", lambda *given: right(*given) + 1)
    assert "found other sums" in linear._self_test(torch.device(gpu))


def test_no_rows(gpu):
    weight = random_weight((40, 256), 4, 128)
    assert multiply(weight, normal(0, 256), None, gpu).shape == (0, 40)


def test_scales_in_float32(gpu):
    weight = random_weight((40, 256), 4, 128, scales_dtype=torch.float32)
    assert packed(weight, gpu).scales.dtype == torch.float32
    x = normal(3, 256)
    assert torch.allclose(multiply(weight, x, None, gpu).double(), weight.exact(x), atol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("static", "dtype"), slow_but(each((False, True), DTYPES), (False, True), DTYPES), ids=str
)
def test_int8_is_exact(static, dtype, gpu):
    for (outputs, inputs), count in zip(SHAPES, (40, 1, 17, 130), strict=True):
        x = normal(count, inputs + 2, dtype=dtype)[:, :inputs]
        x[0] *= 100
        q = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        scales, bias = normal(outputs).abs().half(), normal(outputs, dtype=dtype)
        scale = torch.tensor(0.03) if static else None
        expected = reference.int8_linear(x, q, scales, bias, scale, outputs)
        x, q, scales, bias = (tensor.to(gpu) for tensor in (x, q, scales, bias))
        scale = None if scale is None else scale.to(gpu)
        got = linear.int8_linear(x, q, scales, bias, scale, outputs)
        assert got.dtype == dtype and torch.equal(got.cpu(), expected)
        # The same from rows that are int8 already, as a norm makes them.
        made = rows.quantize(x, scale)
        assert isinstance(made, Int8Rows) and made.dtype == dtype
        assert torch.equal(linear.int8_linear(made, q, scales, bias, scale, outputs), got)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_long_rows_to_int8_are_the_reference_to_the_bit(dtype, gpu, monkeypatch):
    if gpu == "cpu":
        monkeypatch.setattr(rows, "LONG", 100)
        monkeypatch.setattr(rows, "CHUNK", 128)
    columns = rows.LONG + 200
    x = normal(30, columns + 8, dtype=dtype)[:, :columns]
    x[0], x[1, 3], x[2, 4], x[3, 5] = 0, torch.inf, torch.nan, -torch.inf
    sizes = torch.finfo(dtype)
    x[4] *= sizes.tiny * 2**20
    x[5, 7] = sizes.max
    # Where a step's inverse, or a multiply that is not corrected, finds another integer.
    x[6] = 0.7734375 if dtype == torch.bfloat16 else 0.3408203125
    x[6, 0] = 1.0546875 if dtype == torch.bfloat16 else 1.0224609375
    wanted = reference.quantize_rows(x, None)

    def found() -> None:
        made = rows.quantize(x.to(gpu), None)
        assert torch.equal(made.values.cpu(), wanted.values)
        assert_same(made.scales.cpu(), wanted.scales)

    found()
    if gpu == "cpu":  # as on a GPU, whose fused operation the interpreter does not have
        interpreter = pytest.importorskip("triton.runtime.interpreter")

        def fused(self, x, y, z):
            exact = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
        monkeypatch.setattr(device_of, "interpreting", lambda: False)
        found()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations(name, dtype, gpu):
    x = normal(5, 2600, dtype=dtype) * 4
    for op in ("activation", "gated_activation"):
        run, plain = getattr(rows, op), getattr(reference, op)
        exact = plain(x.double(), name)
        got = run(x.to(gpu), name).cpu()
        assert got.dtype == dtype and got.shape == exact.shape
        assert rms(got.double() - exact) <= 2 * rms(plain(x, name).double() - exact)
        assert run(x[:0].to(gpu), name).shape == (0, exact.shape[1])
        special = torch.tensor([[torch.nan, 1.0, 0.0, 1.0]], dtype=dtype)
        assert torch.equal(pattern(run(special.to(gpu), name).cpu()), pattern(plain(special, name)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_their_norms(dtype, gpu):
    x, z = normal(2, 5, 300, dtype=dtype)
    weight, bias = normal(2, 300, dtype=dtype)
    parameters = {"layer_norm": (weight, bias, 1e-5), "rms_norm": (weight, 1e-5)}
    for name, given in parameters.items():
        there = [part.to(gpu) if isinstance(part, Tensor) else part for part in given]
        total, normed = rows.ADD_NORM[name](x.to(gpu), z.to(gpu), *there)
        assert torch.equal(total.cpu(), x + z)
        norm = getattr(reference, name)
        doubled = [part.double() if isinstance(part, Tensor) else part for part in given]
        exact = norm((x + z).double(), *doubled)
        allowed = 2 * rms(norm(x + z, *given).double() - exact)
        assert rms(normed.cpu().double() - exact) <= allowed
        # As int8, to the bit what becomes of the norm itself.
        again, quantized = rows.ADD_NORM[f"{name}_int8"](x.to(gpu), z.to(gpu), *there, None)
        wanted = reference.quantize_rows(normed.cpu(), None)
        assert torch.equal(again, total) and torch.equal(quantized.values.cpu(), wanted.values)
        assert torch.equal(quantized.scales.cpu(), wanted.scales)


def test_int8_sums_that_float32_cannot_hold(gpu):
    # Above 2^24 there are no odd numbers: of ones that are added there, one by one, all are lost.
    x = torch.cat([torch.full((1, 2048), 127.0), torch.ones(1, 64)], dim=1)
    q = x.to(torch.int8).repeat(3, 1)
    one = torch.ones(3)
    arguments = (x, q, one, None, torch.ones(()))
    got = linear.int8_linear(*(part if part is None else part.to(gpu) for part in arguments), 3)
    assert got.tolist() == [[127.0 * 127 * 2048 + 64] * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_rows_are_the_same_whatever_is_beside_them(dtype, gpu):
    weight = integers(70, 640, dtype=dtype) * 0.5
    x = integers(200, 640, dtype=dtype)
    bias = integers(70, dtype=dtype).to(gpu)
    whole = linear.dense_linear(x.to(gpu), weight.to(gpu), bias).cpu()
    exact = (x.double() @ weight.double().t() + bias.cpu().double()).to(dtype)
    assert torch.equal(whole, exact)
    for some in (slice(0, 1), slice(3, 20), slice(100, 180)):
        assert torch.equal(
            linear.dense_linear(x[some].to(gpu), weight.to(gpu), bias).cpu(), whole[some]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_step_are_never_a_library_s_work(dtype, gpu, monkeypatch):
    """Its sums depend on how many rows there are, which those of a prompt's last token must not."""
    asked = []

    def dense(x: Tensor, *given: Tensor | None) -> Tensor:
        asked.append(len(x))
        return reference.dense_linear(x, *given)

    monkeypatch.setattr(linear, "FEW_ROWS", 20)
    monkeypatch.setattr(linear, "dense_reference", dense)
    monkeypatch.setattr(linear.prefill, "takes_dense", lambda *_: False)
    # Of whole numbers, whose sums are exact: numpy, by which the interpreter multiplies float32,
    # sums others as their number has it.
    x, weight = (integers(count, 200, dtype=dtype).to(gpu) for count in (40, 70))
    with phase.decode():
        whole = linear.dense_linear(x, weight, None)
        for some in (slice(0, 1), slice(3, 20), slice(5, 38)):
            assert torch.equal(linear.dense_linear(x[some], weight, None), whole[some])
    assert asked == []
    linear.dense_linear(x, weight, None)
    assert asked == [40]
