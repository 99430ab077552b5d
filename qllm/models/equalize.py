"""Where the input of a linear can be divided, channel by channel, for nothing.

SmoothQuant and AWQ divide input channel j of a linear by s_j and multiply column j of its weight by
it. What stands in front takes the division into its own weights: a norm, or a linear with nothing
but a product or a ReLU in between.
"""

from __future__ import annotations

from torch import Tensor

from qllm.config import ModelConfig
from qllm.layers.fp16 import DenseLinear
from qllm.models.layer import PreNormLayer
from qllm.models.mlp import is_of_expert
from qllm.models.norms import Norm

# A linear of a layer, and the norm in front of it.
NORMS = {"attention.qkv": "attention_norm", "mlp.up": "mlp_norm"}


def can_divide(config: ModelConfig, linear: str) -> bool:
    """Whether the input of a layer's linear ("attention.qkv", …) can be divided.

    A norm whose output is the residual as well (OPT-350m), or that has no weights, cannot take
    it, nor can a linear behind which a GELU comes, or what clamps (gpt-oss), or a norm of values
    (Gemma 4), or what has no norm in front (OLMo 2), or one that is not for it alone (an expert,
    and Cohere's attention and MLP); nor can attention's where gates are among the rows of QKV, or
    beside it, as a delta net has them, which norms what it puts out.
    """
    if config.attention_gate and linear.startswith("attention."):
        return False
    if is_of_expert(linear) and linear.endswith(".up"):
        return False  # the router and all experts share the norm in front of them
    if linear in NORMS:
        normed = config.pre_norm and config.input_norms and not config.shared_norm
        return normed and not config.residual_after_norm and config.norm_affine
    if linear == "attention.out":
        return not config.value_norm
    return not config.clamped_swiglu if config.gated_mlp else config.activation == "relu"


def shared_channels(config: ModelConfig, linear: str, values: Tensor) -> Tensor:
    """`values` (K,) of a linear's input channels, made equal where their scales have to be.

    Query heads that read one value head give the output matrix one channel many times: each of
    them takes the largest.
    """
    if linear != "attention.out" or config.num_heads == config.num_kv_heads:
        return values
    heads = values.view(config.num_kv_heads, -1, config.head_dim)
    return heads.amax(dim=1, keepdim=True).expand_as(heads).flatten()


def divide_input(layer: PreNormLayer, config: ModelConfig, linear: str, scales: Tensor) -> None:
    """Divide the input of a dense linear by `scales` (K,), and multiply its weight by them."""
    dense_linear(layer, linear).weight.mul_(scales)
    if linear in NORMS:
        norm = layer.get_submodule(NORMS[linear])
        assert isinstance(norm, Norm)
        norm.divide(scales)
    elif linear == "attention.out":
        values = scales.view(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()
        divide_rows(dense_linear(layer, "attention.qkv"), slice(-len(values), None), values)
    else:  # the rows of up stand behind those of gate, where there are any
        up = linear.removesuffix("down") + "up"
        divide_rows(dense_linear(layer, up), slice(-len(scales), None), scales)


def dense_linear(layer: PreNormLayer, name: str) -> DenseLinear:
    """A linear of a layer, which nobody has quantized or sharded yet."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, DenseLinear)
    return linear


def divide_rows(linear: DenseLinear, rows: slice, scales: Tensor) -> None:
    """Divide some rows of a linear's weight and bias, in place."""
    linear.weight[rows] /= scales[:, None]
    if linear.bias is not None:
        linear.bias[rows] /= scales
