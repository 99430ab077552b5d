"""Models that a device does not hold: their first shards stay there, the others go to the CPU.

"cpu:0" stands in for a GPU: torch takes it for the CPU, and we for another device.
"""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, tiny

from qllm.checkpoint import device_map as module
from qllm.checkpoint.device_map import CPU, infer_device_map
from qllm.checkpoint.load import load_model, shard_bytes
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.generate import generate
from qllm.generation_config import GenerationConfig

OTHER = torch.device("cpu:0")
PROMPTS = [[5, 6, 7, 8], [9, 10], [11]]


@pytest.fixture
def memory(monkeypatch):
    """Sets how many bytes are free on the other device, and on the CPU."""

    def give(other: int, cpu: int = 1 << 40) -> None:
        def free(device: torch.device) -> int:
            return cpu if device == CPU else other

        monkeypatch.setattr(module, "available_bytes", free)
        monkeypatch.setattr("qllm.memory.available_bytes", free)

    return give


@pytest.mark.parametrize(
    ("free", "kept"), [(1000, 4), (65, 4), (64, 3), (45, 2), (44, 1), (25, 1), (24, 0), (0, 0)]
)
def test_the_first_shards_stay(free, kept, memory):
    memory(free)
    devices = infer_device_map([20, 20, 10, 10], 5, OTHER, "the model")
    assert devices == [OTHER] * kept + [CPU] * (4 - kept)


def test_a_large_shard_takes_those_behind_it_along(memory):
    memory(50)
    assert infer_device_map([10, 100, 10], 5, OTHER, "the model") == [OTHER, CPU, CPU]


def test_one_shard_is_refused_with_the_numbers(memory):
    memory(10**9)
    with pytest.raises(
        UserError, match=r"needs 2.50 GB .* 1.00 GB are free on cpu:0; .*num_shards"
    ):
        infer_device_map([2 * 10**9], 5 * 10**8, OTHER, "the model")


def test_too_much_for_both_is_refused_with_the_numbers(memory):
    memory(10**9, 10**9)
    message = r"beside 0.90 GB on cpu:0, needs 2.70 GB of memory and 1.00 GB are free on cpu"
    with pytest.raises(UserError, match=message):
        infer_device_map([9 * 10**8, 2 * 10**9, 7 * 10**8], 0, OTHER, "the model")


def test_the_cpu_alone_has_no_other_place(memory):
    memory(0, 10)
    with pytest.raises(UserError, match="take a smaller model or fewer bits"):
        infer_device_map([10, 10], 0, CPU, "the model")


@pytest.mark.covering(1)
@pytest.mark.parametrize("bitwidth", ["4", "8:tc-li", "16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_two_places_finds_the_same(family, bitwidth, memory, one_thread):
    plan = QuantPlan.parse(bitwidth)
    whole = load_model(tiny(family), plan, num_shards=3)
    memory(sum(shard_bytes(whole)) + whole.embed.weight.nbytes - 1)
    model = load_model(tiny(family), plan, num_shards=3, device="cpu:0")
    assert {*model.device_map.values()} == {OTHER, CPU}
    config = GenerationConfig(max_new_tokens=6)
    assert generate(model, PROMPTS, config) == generate(whole, PROMPTS, config)
    with torch.inference_mode():
        assert torch.equal(model.prefill(PROMPTS), whole.prefill(PROMPTS))
