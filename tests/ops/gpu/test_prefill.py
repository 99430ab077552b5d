"""Products of prompts whose weights are rounded first: in registers, and in memory."""

from __future__ import annotations

from functools import partial
from itertools import product

import gpu_kernels
import pytest
import torch
from cpu_paths import STORED_SCHEMES, normal, pattern, random_weight
from gpu_kernels import packed
from product_cases import assert_close
from torch import Tensor

from qllm.ops import phase
from qllm.ops.gpu import cuda, disk_cache, hopper, linear, prefill
from qllm.ops.gpu import device as device_of
from qllm.ops.reference import dequantize
from qllm.quant.packing import BITS

SHAPES = ((1, 1), (13, 67), (140, 200), (66, 390))  # (N, K)
GROUPS = (-1, 16, 20, 32, 64, 100, 128, 200)


@pytest.fixture
def device(gpu, monkeypatch) -> str:
    if gpu == "cuda" and (reason := prefill.unsupported_reason(torch.device("cuda", 0))):
        pytest.skip(reason)
    # Tiles that the interpreter gets through, of which there are several.
    if gpu == "cpu":
        monkeypatch.setattr(prefill, "ROWS", (32, 16))
        monkeypatch.setattr(device_of, "architecture", lambda device: ("9.0", 2))
    return gpu


@pytest.fixture
def whole_numbers(device, monkeypatch) -> None:
    """What is drawn has but one sum in the interpreter, whose library goes by the tile."""

    def drawn(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    if device == "cpu":
        monkeypatch.setattr(torch, "randn", drawn)


def multiply(weight, x: Tensor, bias: Tensor | None, device: str, tile: int) -> Tensor:
    return gpu_kernels.multiply(weight, x, bias, device, prefill.weight_only_linear, tile=tile)


@pytest.mark.parametrize("bits", BITS)
def test_both_ways_are_near_the_exact_one_and_on_a_gpu_the_same(bits, device):
    schemes = STORED_SCHEMES if bits > 1 else ("asym", "offset")
    for i, (group, scheme, dtype) in enumerate(product(GROUPS, schemes, cuda.DTYPES)):
        if i % 8 != bits % 8:  # each at some number of bits: a GPU has to compile them all
            continue
        shape, count = SHAPES[i // 8 % len(SHAPES)], (1, 17, 40)[i // 8 % 3]
        wide = torch.float32 if i // 8 % 3 == 0 else torch.float16
        weight = random_weight(shape, bits, group, scheme, scales_dtype=wide)
        x = normal(count, shape[1] + 3, dtype=dtype)[:, : shape[1]]
        bias = normal(shape[0], dtype=dtype) if i % 2 else None
        # The interpreter is slow: there each number of bits meets every tile, but no case two.
        tiles = prefill.ROWS if device == "cuda" else prefill.ROWS[i // 8 % 2 :][:1]
        few, *many = (multiply(weight, x, bias, device, tile) for tile in (0, *tiles))
        # The interpreter leaves the order of a step's sums to a library, which goes by the tile.
        assert device == "cpu" or all(torch.equal(few, found) for found in many)
        for found in (few, *many):
            assert_close(weight, x, bias, found)


@pytest.mark.parametrize(("bits", "scheme"), [(3, "sym"), (4, "offset"), (8, "asym")])
def test_weights_are_rounded_as_the_reference_s(bits, scheme, device):
    weight = random_weight((66, 256), bits, 64, scheme)
    asked = weight.request
    for dtype in cuda.DTYPES:
        wanted = dequantize(*weight.stored[:3], bits, asked.group_size, asked.in_features, dtype)
        one = torch.eye(256, dtype=dtype)
        for tile in (0, prefill.ROWS[0]):
            found = multiply(weight, one, None, device, tile)
            assert torch.equal(found, wanted.t())


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_gives_what_the_reference_gives(special, device):
    weight = random_weight((20, 256), 4, 128, "asym" if special > 0 else "offset")
    x = normal(3, 256, dtype=torch.bfloat16)
    x[1, 130] = special
    for tile in (0, prefill.ROWS[0]):
        found = multiply(weight, x, None, device, tile)
        assert torch.equal(pattern(found), pattern(weight.reference(x)))


def test_a_prompt_takes_it_and_a_step_does_not(device, monkeypatch):
    asked = []

    def noted(x, *given, run=prefill.weight_only_linear):
        asked.append(len(x))
        return run(x, *given)

    monkeypatch.setattr(prefill, "weight_only_linear", noted)
    monkeypatch.setattr(prefill, "unsupported_reason", lambda place: None)
    weight = random_weight((20, 256), 4, 128)
    tensors = packed(weight, device)[:3]
    for rows, dtype in ((3, torch.bfloat16), (2, torch.float16), (1, torch.float32)):
        x = normal(rows, 256, dtype=dtype).to(device)
        given = (x, *tensors, None, 20, 4, 128)
        prompt = linear.weight_only_linear(*given)
        with phase.decode():
            step = linear.weight_only_linear(*given)
        assert torch.allclose(prompt.float(), step.float(), atol=0.1, rtol=0.02)
    assert asked == [3, 2]  # float32 is the former product's
    assert not linear.weight_only_linear(x[:0].bfloat16(), *given[1:]).numel()


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_dense_layers(dtype, device, monkeypatch):
    monkeypatch.setattr(prefill, "dense_unsupported_reason", lambda place: None)
    for (outputs, inputs), count in zip(((1, 8), (140, 200), (66, 392)), (1, 17, 300), strict=True):
        weight, x = (normal(rows, inputs, dtype=dtype) for rows in (outputs, count))
        bias = normal(outputs, dtype=dtype) if count > 1 else None
        given = [part if part is None else part.to(device) for part in (x, weight, bias)]
        assert prefill.takes_dense(*given[:2])
        found = linear.dense_linear(*given).cpu()
        exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        assert torch.allclose(found.double(), exact, rtol=2**-7, atol=0.01)
        one = linear.dense_linear(given[0][-1:], *given[1:]).cpu()
        assert device == "cpu" or torch.equal(one, found[-1:])
    assert not prefill.takes_dense(x, weight[:, 1:]) and not prefill.takes_dense(x, weight.float())
    assert not prefill.takes_dense(x[:, :4], weight[:, :4].contiguous())
    assert not linear.dense_linear(given[0][:0], *given[1:]).numel()


def test_the_dense_self_test_finds_what_is_wrong(device, whole_numbers, monkeypatch):
    place = torch.device(device)
    assert prefill._dense_self_test(place) is None
    right = prefill.dense_linear

    def wrong(x, *given, tile):
        return right(x, *given, tile=tile) + (tile is None)

    monkeypatch.setattr(prefill, "dense_linear", wrong)
    assert "few rows and many" in prefill._dense_self_test(place)
    monkeypatch.setattr(prefill, "dense_linear", lambda *given, tile: -right(*given, tile=tile))
    assert "other sums" in prefill._dense_self_test(place)


def test_the_self_test_finds_what_is_wrong(device, whole_numbers, monkeypatch, capsys):
    place = torch.device(device)
    cases = [(*case[:3], ((7, 0), (35, 0), (35, prefill.ROWS[1]))) for case in prefill.CASES]
    monkeypatch.setattr(prefill, "CASES", cases)
    assert prefill._self_test(place) is None
    monkeypatch.setattr(disk_cache, "test_name", lambda name, device: "gpu-tested")
    monkeypatch.setattr(disk_cache, "read", lambda name: None)  # that it passed before
    monkeypatch.setattr(disk_cache, "write", lambda *given: None)
    monkeypatch.setattr(device_of, "architecture", lambda device: ("9.0", 4))

    def wrong(x, weight, bias, y, *given, run):
        run(x, weight, bias, y, *given)
        y *= 1.01

    monkeypatch.setattr(prefill, "_few", partial(wrong, run=prefill._few))
    assert "few rows of a prompt and many" in prefill._self_test(place)
    monkeypatch.setattr(prefill, "_many", partial(wrong, run=prefill._many))
    self_test = prefill._self_test
    monkeypatch.setattr(prefill, "_self_test", lambda _: self_test(place))
    prefill.unsupported_reason.cache_clear()
    monkeypatch.setattr(hopper, "unsupported_reason", lambda device: "it is tested elsewhere")
    there = torch.device("cuda", 7)
    reason = "the self-test of prompts' products here found other sums"
    assert prefill.unsupported_reason(there) == reason and reason in capsys.readouterr().err
    assert prefill.about(there) == f"prompts: sums are scaled: {reason}"
    prefill.unsupported_reason.cache_clear()
    monkeypatch.setattr(device_of, "architecture", lambda device: ("8.6", 4))
    assert prefill.unsupported_reason(there) == "compute capability 8.6 is below 9.0"
    prefill.unsupported_reason.cache_clear()
