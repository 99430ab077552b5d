"""AutoRound's checkpoints, whose modules are GPTQ's or AWQ's; QLLM reads them."""

from __future__ import annotations

import re

from qllm.checkpoint.formats.awq import AWQ
from qllm.checkpoint.formats.awq import BITS as AWQ_BITS
from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.gptq import GPTQ
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test, has_any
from qllm.config import DEFAULT_GROUP_SIZE, LM_HEAD, QuantSpec

# GPTQModel lays 5 to 7 bits out otherwise; AutoRound's are the same stream as all others.
BITS = (2, 3, 4, 5, 6, 7, 8)
# A module of as many is left as it is.
DENSE_BITS = 16
# `packing_format`, and how modules are packed.
V1, V2, AWQ_GEMM = "GPTQ v1", "GPTQ v2", "AWQ"
PACKINGS = {
    **{"auto_round:auto_gptq": V1, "auto_round:gptq": V1, "auto": V1},
    **{"auto_round": V2, "auto_round:gptqmodel": V2},
    **{"auto_round:auto_awq": AWQ_GEMM, "auto_round:awq": AWQ_GEMM},
}
# What would change the result: of a module, and of all.
OF_MODULES = ("super_bits", "super_group_size", "rotation_config")
OF_ALL = (
    *("static_kv_dtype", "static_attention_dtype", "spinquant_config"),
    *("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert"),
)
# No regular expression, or one whose dots are dots.
PLAIN = re.compile(r"[\w.]+")


def parse(fields: Fields) -> QuantizationConfig:
    """https://github.com/intel/auto-round: `extra_config` has the settings that differ.

    They are by a module's name, or by a regular expression that is found in names. Where modules
    are looked for (`block_name_to_quantize`) makes no difference: what the file has at 16 bits is
    at 16 bits.
    """
    fields.unset(*OF_ALL)
    packing = _packing(fields)
    named: list[tuple[Test, Format | None]] = []
    found: list[tuple[Test, Format | None]] = []
    for key, override in fields.objects("extra_config").items():
        module = _module(Fields(fields.value | override.value, override.where), packing)
        named.append((key.__eq__, module))
        # A plan of AutoScheme's names each linear: looking for a text is quicker.
        search = has_any([key]) if PLAIN.fullmatch(key) else fields.search(key)
        found.append((search, module))
    head: tuple[Test, None] = (LM_HEAD.__eq__, None)
    return QuantizationConfig((*named, *found, head), _module(fields, packing))


def _packing(fields: Fields) -> str:
    """How modules are packed; before there was `packing_format`, `backend` said it."""
    text = fields.text("packing_format", default="").lower()
    if not text:
        backend = fields.text("backend", default="")
        text = next((f"auto_round:{name}" for name in ("awq", "gptq") if name in backend), "auto")
        if text == "auto" and not fields.flag("sym", True):
            raise fields.error("no packing_format", "QLLM reads asymmetric integers with one")
    fields.one_of("packing_format", text, tuple(PACKINGS))
    return PACKINGS[text]


def _module(fields: Fields, packing: str) -> Format | None:
    bits = fields.number("bits")
    if bits == DENSE_BITS:
        return None
    fields.unset(*OF_MODULES)
    fields.one_of("data_type", fields.text("data_type", default="int"), ("int",))
    fields.one_of("act_bits", fields.number("act_bits", default=DENSE_BITS), (DENSE_BITS,))
    fields.one_of("bits", bits, (AWQ_BITS,) if packing == AWQ_GEMM else BITS)
    group_size = fields.group_size("group_size", default=DEFAULT_GROUP_SIZE)
    scheme = "sym" if fields.flag("sym", True) else "asym"
    spec = QuantSpec(bits, group_size, scheme, "weight_only")
    return AWQ(spec) if packing == AWQ_GEMM else GPTQ(spec, v1=packing == V1)
