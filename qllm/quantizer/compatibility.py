"""Which other libraries load a quantized checkpoint that is written here, and what they need."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qllm.config import QuantSpec

# What transformers needs besides itself, by quant_method.
PACKAGES = {"gptq": "optimum gptqmodel", "compressed-tensors": "compressed-tensors"}
VLLM_GPTQ_BITS = (4, 8)
# Rules of GPTQ's `dynamic` for linears in layers; optimum leaves others alone anyway.
_OF_LAYERS = re.compile(r"\\\.\(\?:\d")


def find_ragged(specs: Mapping[str, QuantSpec], shapes: Mapping[str, Sequence[int]]) -> str | None:
    """A line on the first linear whose last group is shorter than the others, if there is one.

    Args:
        specs: of each linear, by our name.
        shapes: of each tensor of the model.
    """
    for name, spec in specs.items():
        _, columns = shapes.get(f"{name}.weight") or shapes["embed.weight"]  # a tied head
        if spec.kind == "weight_only" and spec.group_size != -1 and columns % spec.group_size:
            return (
                f"groups of {spec.group_size} do not divide the {columns} inputs of {name}, as "
                f"groups of {math.gcd(spec.group_size, columns)} would"
            )
    return None


@dataclass(frozen=True)
class Loading:
    """Where a checkpoint loads.

    Attributes:
        quantization: its quantization_config.
        ragged: a line on a linear whose last group is shorter than the others; None: there is none.
        transposed: the family's matrices lie in its files as (inputs, outputs).
        experts: it is a mixture of experts.
    """

    quantization: Mapping
    ragged: str | None
    transposed: bool = False
    experts: bool = False

    def refusals(self) -> dict[str, str]:
        """Why "transformers" or "vLLM" refuses it; one that loads it has no entry."""
        gptq = self.quantization["quant_method"] == "gptq"
        refuse = ("vLLM",) if gptq else ("transformers", "vLLM")
        if self.experts:
            untried = "nobody has tried packed experts there"
            one = "it has all experts of a layer in one tensor, which is not packed"
            return {"transformers": untried if gptq else one, "vLLM": untried}
        found = {} if self.ragged is None else dict.fromkeys(refuse, self.ragged)
        if gptq:
            rules = self.quantization.get("dynamic", {})
            whole = self.quantization
            entries = [whole, *({**whole, **rule} for rule in rules.values())]
            if not all(entry["sym"] and entry["bits"] in VLLM_GPTQ_BITS for entry in entries):
                found.setdefault("vLLM", "it takes GPTQ of 4 and 8 bits, with `scheme` sym")
            if self.transposed:
                found["transformers"] = (
                    "its Conv1D families draw weights that packed layers have not"
                )
            elif any(_OF_LAYERS.search(rule) for rule in rules):
                found["transformers"] = (
                    "optimum takes all layers for those of the first spec, as GPTQModel.load does "
                    "not"
                )
            elif self.quantization["lm_head"]:
                found["transformers"] = (
                    "optimum draws a packed head at random, as GPTQModel.load does not"
                )
            return found
        if self.transposed:
            found.setdefault(
                "transformers", "this family's layers are Conv1D there, which stay dense"
            )
        if any(target.startswith("re:") for target in _targets(self.quantization)):
            tables = {
                "transformers": "it loads no packed embeddings",
                "vLLM": "few of its models take packed embeddings, tied ones none",
            }
            for name, reason in tables.items():
                # Beside the other reason: without that one it would not load either.
                found[name] = f"{found[name]}, and {reason}" if name in found else reason
        weights = [group["weights"] for group in self.quantization["config_groups"].values()]
        if len(weights) > 1 and not all(entry["symmetric"] for entry in weights):
            found.setdefault("transformers", "where layers differ it takes `scheme` sym")
        if any(entry.get("actorder") == "group" for entry in weights):
            reason = (
                "newer versions of compressed-tensors refuse groups by importance: `static_groups`"
            )
            found = {name: found.get(name, reason) for name in ("transformers", "vLLM")}
        if any(entry["num_bits"] == 1 for entry in weights):
            found.setdefault("vLLM", "it takes 2 to 8 bits")
        return found

    def summary(self) -> str:
        """One line on where it loads."""
        method = self.quantization["quant_method"]
        packages = PACKAGES[method]
        if method == "gptq" and self.ragged:
            packages += ' and its backend "torch"'
        refused = self.refusals()
        loads = {"QLLM": "QLLM", "transformers": f"transformers (with {packages})", "vLLM": "vLLM"}
        taken = ", ".join(text for name, text in loads.items() if name not in refused)
        left = "".join(f"; not in {name}: {reason}" for name, reason in refused.items())
        return f"loads in {taken}{left}"

    def snippet(self) -> list[str]:
        """Lines of Markdown: what loads it in transformers."""
        method = self.quantization["quant_method"]
        options, names = 'device_map="auto"', "AutoModelForCausalLM, AutoTokenizer"
        if method == "gptq" and self.ragged:
            # The other kernels of GPTQModel want groups of one size.
            options += (
                f', quantization_config=GPTQConfig({self.quantization["bits"]}, backend="torch")'
            )
            names += ", GPTQConfig"
        return [
            "```python",
            f"# pip install transformers accelerate {PACKAGES[method]}",
            f"from transformers import {names}",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("DIR", {options})',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
            "```",
        ]


def _targets(quantization: Mapping) -> Iterator[str]:
    """All targets of compressed-tensors' groups; only those of embeddings are patterns here."""
    return (
        target for group in quantization["config_groups"].values() for target in group["targets"]
    )
