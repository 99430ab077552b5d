"""Activation functions by the names that config.json files have for them."""

from __future__ import annotations

from qllm.errors import UserError
from qllm.ops.reference import ACTIVATIONS

# Names that config.json files use for the same functions.
SAME_ACTIVATION = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}


def find_activation(name: str) -> str:
    """The name that ops have for an activation function.

    Raises:
        UserError: for one that is not known.
    """
    found = SAME_ACTIVATION.get(name, name)
    if found not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *SAME_ACTIVATION])
        raise UserError(f"activation function {name!r} is unknown; known: {known}")
    return found
