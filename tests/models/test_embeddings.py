"""Packed embeddings, and heads that are tied to them, against transformers with their numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES, tiny
from covering import each, slow_but
from oracle import assert_logits_close, bundled, draw_prompts, load, prefill_logits

from qllm.bench.runners import read_bytes
from qllm.checkpoint.load import module_bytes
from qllm.config import BITWIDTHS, EMBEDDING, LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = ("1", "2", "3", "4", "8")


def plan_of(**bits: str) -> QuantPlan:
    """A plan for what is outside the layers, in groups of 64."""
    rules = ((f"^{name}$", QuantSpec.parse(width, 64)) for name, width in bits.items())
    return QuantPlan(tuple(rules), text="the plan")


def loaded(family: str, **bits: str) -> Decoder:
    return load(tiny(family), plan=plan_of(**bits))


@pytest.mark.parametrize(("family", "bits"), slow_but(each(FAMILIES, BITS), FAMILIES, BITS))
def test_an_embedding_stands_for_its_numbers(family, bits):
    model = loaded(family, **{EMBEDDING: bits})
    theirs = copy.deepcopy(bundled(family))
    table = theirs.get_input_embeddings().weight  # which is the head's, where they are tied
    packed = WeightOnlyLinear.from_float(table.detach(), None, QuantSpec.parse(bits, 64))
    with torch.no_grad():
        table.copy_(packed.dequantize())
    prompts = draw_prompts((3, 17, 1), 4096)
    with torch.inference_mode():
        assert_logits_close(model.prefill(prompts, last=False), prefill_logits(theirs, prompts))
    assert model.graph_break() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_is_held_once_where_the_head_is_tied_to_it(family):
    plain, packed = loaded(family), loaded(family, **{EMBEDDING: "8"})
    tied = plain.config.tied_head
    assert (packed.lm_head is packed.embed.linear) == tied
    rows, columns = plain.embed.weight.shape
    table = rows * columns + rows * columns // 64 * 3  # integers, and scales and zeros of groups
    assert module_bytes(packed) == module_bytes(plain) - 4 * rows * columns + table
    # A step reads all of a head, and of what is only looked up a row.
    head = table if tied else 4 * rows * columns
    assert read_bytes(packed) == module_bytes(packed.layers) + head + module_bytes(
        packed.final_norm
    ) + module_bytes(packed.positions) + module_bytes(packed.embed_norm)


def test_a_tied_head_of_other_bits_is_a_matrix_of_its_own():
    same = loaded("opt", **{EMBEDDING: "4", LM_HEAD: "4"})
    other = loaded("opt", **{EMBEDDING: "4", LM_HEAD: "8"})
    assert same.lm_head is same.embed.linear
    assert other.lm_head is not other.embed.linear
    assert (other.lm_head.spec.bits, other.embed.linear.spec.bits) == (8, 4)
    prompts = draw_prompts((5, 2), 4096)
    whole = loaded("opt", **{EMBEDDING: "4"}).prefill(prompts)
    assert torch.equal(same.prefill(prompts), whole)
    assert not torch.equal(other.prefill(prompts), whole)


@pytest.mark.parametrize("bits", [bits for bits in BITWIDTHS if ":" in bits])
def test_there_is_nothing_to_round_for_a_table(bits):
    with pytest.raises(UserError, match="an embedding has 1 to 8 bits or 16, not 8:tc"):
        loaded("opt", **{EMBEDDING: bits})
