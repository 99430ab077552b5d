"""The decoder of every family as an ONNX graph of standard operators, weights streamed into it.

Inside, activations are (N, C) for the N = B T tokens of a batch; attention alone sees (B, H, T, D).
S is how many tokens there are with those of the past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from qllm.checkpoint.formats import Int8Weight
from qllm.checkpoint.weights import Weights
from qllm.config import EMBEDDING, LM_HEAD
from qllm.errors import UserError
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.activations import find_activation
from qllm.models.attention import scores_of_layer
from qllm.models.positions import RotaryPositions, alibi_slopes
from qllm.onnx.graph import TYPES, Graph
from qllm.onnx.nbits import NBits, block_size
from qllm.quant.packing import PackedWeight

LOGITS = "logits"


class DecoderGraph:
    """Builds the graph of a checkpoint's model, in one pass over its tensors."""

    def __init__(
        self, weights: Weights, graph: Graph, dtype: torch.dtype, accuracy_level: int
    ) -> None:
        """
        Args:
            dtype: of activations and dense weights, float32 or float16.
            accuracy_level: of MatMulNBits.

        Raises:
            UserError: for a quantized linear that onnxruntime has no operator for.
        """
        self.weights, self.graph, self.dtype = weights, graph, dtype
        self.level = accuracy_level
        self.config = weights.config
        self.numpy = torch.empty(0, dtype=dtype).numpy().dtype
        # There is no operator for a packed embedding, nor for integers with offsets.
        specs = {n: each.spec for n, each in weights.stored.items() if n != EMBEDDING}
        self.packed = {n: spec for n, spec in specs.items() if spec.scheme != "offset"}
        for name, spec in self.packed.items():
            block_size(spec, name)

    def build(self, progress: Callable[[list], Iterable] = iter) -> onnx.ModelProto:
        """The model; every weight is in the graph's data file."""
        g, config = self.graph, self.config
        self.shape = g.op("Shape", "input_ids")  # [B, T]
        span = g.op("Shape", "attention_mask", start=1)
        self.span = span  # [S]
        length = g.op("Shape", "input_ids", start=1)
        self.past = g.op("Sub", span, length)  # [P]
        tokens = g.op("Reshape", "input_ids", g.constant([-1]))
        self.embedding = g.weight(
            "embed.weight", self._converted("embed.weight", self._matrix(EMBEDDING))
        )
        x = g.op("Gather", self.embedding, tokens)
        if config.embed_scale != 1:
            x = g.op("Mul", x, g.constant(config.embed_scale, self.numpy))
        if config.embed_norm:
            x = self._norm(x, "embed_norm")
        if config.embed_size != config.hidden_size:
            x = self._linear(x, "project_in")
        g.scope = "positions"
        x = self._positions(x)
        for index in progress(list(range(config.num_layers))):
            x = self._layer(x, index)
        g.scope = ""
        if config.final_norm:
            x = self._norm(x, "final_norm")
        if config.embed_size != config.hidden_size:
            x = self._linear(x, "project_out")
        x = self._head(x)
        if config.logit_divisor != 1:
            x = g.op("Div", x, g.constant(config.logit_divisor, self.numpy))
        if config.logit_factor != 1:
            x = g.op("Mul", x, g.constant(config.logit_factor, self.numpy))
        x = self._capped(x, config.logit_cap)
        shape = g.op("Concat", self.shape, g.constant([config.vocab_size]), axis=0)
        g.op("Reshape", x, shape, output=LOGITS)
        return g.model(*self._ends())

    def _ends(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """Inputs and outputs, by the names that optimum and onnxruntime-genai have for them."""
        config, kind = self.config, TYPES[self.dtype]
        ids, batch, length = onnx.TensorProto.INT64, "batch_size", "sequence_length"
        inputs = [
            helper.make_tensor_value_info("input_ids", ids, [batch, length]),
            helper.make_tensor_value_info("attention_mask", ids, [batch, "total_sequence_length"]),
        ]
        if config.position == "rope":
            inputs.append(helper.make_tensor_value_info("position_ids", ids, [batch, length]))
        shape: list[str | int] = [batch, length, config.vocab_size]
        outputs = [helper.make_tensor_value_info(LOGITS, kind, shape)]
        for index in range(config.num_layers):
            for what in ("key", "value"):
                for ends, prefix, tokens in (
                    (inputs, "past_key_values", "past_sequence_length"),
                    (outputs, "present", "total_sequence_length"),
                ):
                    shape = [batch, config.num_kv_heads, tokens, config.head_dim]
                    name = f"{prefix}.{index}.{what}"
                    ends.append(helper.make_tensor_value_info(name, kind, shape))
        return inputs, outputs

    def _read(self, name: str) -> Tensor:
        return self._converted(name, self.weights.read(name))

    def _matrix(self, module: str) -> Tensor:
        """A matrix as numbers, of integers those that they stand for."""
        storage, name = self.weights.stored.get(module), f"{module}.weight"
        if storage is None:
            return self.weights.read(name)
        packed, columns = self.weights.read_quantized(module), self.weights.shapes[name][1]
        assert isinstance(packed, PackedWeight)  # as of all that are not multiplied with int8
        return WeightOnlyLinear.from_packed(packed, None, storage.spec, columns).dequantize()

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the model's type, which must hold its values."""
        converted = tensor.to(self.dtype)
        # The extremes are infinite where any element is, and need no second tensor.
        if converted.numel() and not torch.stack(converted.aminmax()).isfinite().all():
            raise UserError(f"{name} holds values beyond {self.dtype}; use `dtype` float32")
        return converted

    def _weight(self, name: str) -> str:
        return self.graph.weight(name, self._read(name))

    def _linear(self, x: str, name: str) -> str:
        """x (N, K) times a linear's weight, and its bias: (N, M)."""
        g = self.graph
        g.scope = name
        bias = f"{name}.bias" if f"{name}.bias" in self.weights.shapes else ""
        if bias:
            bias = self._weight(bias)
        if name in self.packed:
            packed = self.weights.read_quantized(name)
            assert not isinstance(packed, Int8Weight)  # refused at the start
            columns = self.weights.shapes[f"{name}.weight"][1]
            matrix = NBits.of(packed, self.packed[name], columns, self.dtype, name)
            return g.matmul_nbits(x, name, matrix, bias, level=self.level)
        weight = self._converted(f"{name}.weight", self._matrix(name))
        x = g.op("MatMul", x, g.weight(f"{name}.weight", weight.t()))
        return g.op("Add", x, bias) if bias else x

    def _head(self, x: str) -> str:
        """x (N, C) to logits (N, V)."""
        if not self.config.tied_head:
            return self._linear(x, LM_HEAD)
        self.graph.scope = LM_HEAD
        # Not a transposed copy: the embedding, in the file and in memory, is there once.
        return self.graph.op("Gemm", x, self.embedding, transB=1)

    def _norm(self, x: str, name: str) -> str:
        g, config = self.graph, self.config
        g.scope = name
        affine = f"{name}.weight" in self.weights.shapes
        if affine:
            scale = self._norm_weight(f"{name}.weight")
        else:
            scale = g.constant(np.ones(config.hidden_size), self.numpy)
        if config.norm == "layernorm":
            bias = [self._weight(f"{name}.bias")] if f"{name}.bias" in self.weights.shapes else []
            return g.op("LayerNormalization", x, scale, *bias, epsilon=config.norm_eps)
        return g.op("Mul", self._root_mean_square(x), scale)

    def _norm_weight(self, name: str) -> str:
        return self.graph.weight(name, self._read(name) + self.config.norm_offset)

    def _root_mean_square(self, x: str) -> str:
        """Each row of x to a root mean square of 1."""
        g, config = self.graph, self.config
        wide = self._cast(x, torch.float32)
        mean = g.op("Pow", wide, g.constant(2, np.float32))
        mean = g.op("ReduceMean", mean, g.constant([-1]), keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, g.constant(config.norm_eps, np.float32)))
        return self._cast(g.op("Div", wide, root), self.dtype)

    def _capped(self, x: str, cap: float | None) -> str:
        """cap tanh(x / cap), where there is a cap."""
        if not cap:
            return x
        g, value = self.graph, self.graph.constant(cap, self.numpy)
        return g.op("Mul", g.op("Tanh", g.op("Div", x, value)), value)

    def _cast(self, x: str, dtype: torch.dtype) -> str:
        """x, computed in the model's type or in float32, in another."""
        if self.dtype == torch.float32:
            return x
        return self.graph.op("Cast", x, to=TYPES[dtype])

    def _positions(self, x: str) -> str:
        """What all layers share: the mask, with ALiBi's slopes in it, and RoPE's cosines and sines.

        Returns:
            x (N, C), with learned positions added.
        """
        g, config = self.graph, self.config
        causal = g.op("Unsqueeze", self._range(self.past), g.constant([1]))  # (T, 1)
        keys, query = self._range(g.constant([0])), causal
        causal = g.op("LessOrEqual", keys, query)  # (T, S)
        mask = g.op("Cast", "attention_mask", to=onnx.TensorProto.BOOL)
        mask = g.op("And", g.op("Unsqueeze", mask, g.constant([1, 2])), causal)  # (B, 1, T, S)
        added = g.constant(0, self.numpy)
        if config.position == "rope":
            self.rotary = RotaryPositions(config, torch.float32)
            self.cos_sin = [self._cos_sin(encoding) for encoding in self.rotary.kinds]
            self.query_factors = self._query_factors(self.rotary)
        else:
            positions = g.op("CumSum", "attention_mask", g.constant(1))
            positions = g.op(
                "Mul", g.op("Sub", positions, g.constant(1)), "attention_mask"
            )  # (B, S)
            new = g.op("Slice", positions, self.past, self.span, g.constant([1]))  # (B, T)
        if config.position == "alibi":
            added = self._alibi(positions, new)
        if config.position == "learned":
            index = g.op("Reshape", new, g.constant([-1]))
            index = g.op("Add", index, g.constant(config.position_offset))
            x = g.op("Add", x, g.op("Gather", self._weight("positions.weight"), index))
        # Not -inf: where a row is all pads its softmax would be NaN.
        lowest = g.constant(np.finfo(self.numpy).min, self.numpy)
        self.masks = {0: g.op("Where", mask, added, lowest)}
        for window in set(config.windows) - {0}:
            near = g.op("Greater", keys, g.op("Sub", query, g.constant(window)))
            self.masks[window] = g.op("Where", g.op("And", mask, near), added, lowest)
        return x

    def _range(self, start: str) -> str:
        """start, start + 1, … up to S."""
        g = self.graph
        ends = [g.op("Squeeze", end) for end in (start, self.span)]
        return g.op("Range", *ends, g.constant(1))

    def _alibi(self, positions: str, new: str) -> str:
        """How much the score of each key falls with its distance: (B, H, T, S)."""
        g = self.graph
        keys = g.op("Unsqueeze", positions, g.constant([1, 2]))
        queries = g.op("Unsqueeze", new, g.constant([1, 3]))
        distance = g.op("Cast", g.op("Sub", keys, queries), to=onnx.TensorProto.FLOAT)
        slopes = alibi_slopes(self.config.num_heads)[:, None, None].numpy()
        return self._cast(g.op("Mul", distance, g.constant(slopes, np.float32)), self.dtype)

    def _cos_sin(self, encoding: RotaryPositions) -> tuple[str, str]:
        """Cosines and sines (B, 1, T, D) for `position_ids`."""
        g, config, rope = self.graph, self.config, encoding.rope
        frequencies = g.constant(encoding.frequencies(1), np.float32)
        # As `RotaryPositions.frequencies`, for a length that is known when the graph runs.
        length = ""
        if rope.kind in ("dynamic", "longrope"):
            length = g.op("ReduceMax", "position_ids", g.constant([1]), keepdims=1)
            length = g.op("Add", length, g.constant(1))
            length = g.op("Unsqueeze", length, g.constant([2, 3]))  # (B, 1, 1, 1)
        if rope.kind == "longrope":
            original = rope.original_max_positions
            slower = g.constant(encoding.frequencies(original + 1), np.float32)
            beyond = g.op("Greater", length, g.constant(original))
            frequencies = g.op("Where", beyond, slower, frequencies)
        if rope.kind == "dynamic":
            trained, dim = config.trained_positions, encoding.rotary_dim
            length = g.op("Cast", g.op("Max", length, g.constant(trained)), to=1)
            stretch = g.op("Mul", length, g.constant(rope.factor / trained, np.float32))
            stretch = g.op("Sub", stretch, g.constant(rope.factor - 1, np.float32))
            exponents = np.zeros(config.head_dim // 2)
            exponents[: -(-dim // 2)] = -np.arange(0, dim, 2) / (dim - 2)
            powers = g.op("Pow", stretch, g.constant(exponents, np.float32))
            frequencies = g.op("Mul", frequencies, powers)
        positions = g.op("Cast", "position_ids", to=onnx.TensorProto.FLOAT)
        positions = g.op("Unsqueeze", positions, g.constant([1, 3]))  # (B, 1, T, 1)
        angles = g.op("Mul", positions, frequencies)
        angles = g.op("Concat", angles, angles, axis=-1)
        parts = [g.op(kind, angles) for kind in ("Cos", "Sin")]
        if rope.attention_factor != 1:
            factor = g.constant(encoding.factors.repeat(2), np.float32)
            parts = [g.op("Mul", part, factor) for part in parts]
        cos, sin = (self._cast(part, self.dtype) for part in parts)
        return cos, sin

    def _query_factors(self, encoding: RotaryPositions) -> str | None:
        """As `RotaryPositions.query_factors`, (B, 1, T, 1); None: queries stay as they are."""
        g, rope = self.graph, encoding.rope
        if not rope.query_beta:
            return None
        spans = g.op("Div", "position_ids", g.constant(rope.query_span))  # of integers: floored
        spans = g.op("Cast", spans, to=onnx.TensorProto.FLOAT)
        factors = g.op("Log", g.op("Add", spans, g.constant(1, np.float32)))
        factors = g.op("Mul", factors, g.constant(rope.query_beta, np.float32))
        factors = g.op("Add", factors, g.constant(1, np.float32))
        return self._cast(g.op("Unsqueeze", factors, g.constant([1, 3])), self.dtype)

    def _layer(self, x: str, index: int) -> str:
        """As the layer classes of `qllm.models.layer`: both halves with their norms."""
        config, name = self.config, f"layers.{index}"
        if config.parallel_blocks:
            normed = self._norm(x, f"{name}.attention_norm")
            z = self._attention(normed, index)
            if not config.shared_norm:
                normed = self._norm(x, f"{name}.mlp_norm")
            z = self.graph.op("Add", self._mlp(normed, index), z)
            return self.graph.op("Add", z, x)
        for half, norm in ((self._attention, "attention_norm"), (self._mlp, "mlp_norm")):
            inner = x
            if config.pre_norm and config.input_norms:
                inner = self._norm(x, f"{name}.{norm}")
            residual = inner if config.residual_after_norm else x
            added = half(inner, index)
            if config.output_norms:
                added = self._norm(added, f"{name}.{norm.replace('_norm', '_output_norm')}")
            if config.output_scale != 1:
                scale = self.graph.constant(config.output_scale, self.numpy)
                added = self.graph.op("Mul", added, scale)
            x = self.graph.op("Add", residual, added)
            if not config.pre_norm:
                x = self._norm(x, f"{name}.{norm}")
        return x

    def _mlp(self, x: str, index: int) -> str:
        g, config, name = self.graph, self.config, f"layers.{index}.mlp"
        x = self._linear(x, f"{name}.up")
        if config.gated_mlp:
            gate, up = g.ops("Split", x, outputs=["", ""], axis=-1, num_outputs=2)
            x = g.op("Mul", self._activation(gate), up)
        else:
            x = self._activation(x)
        return self._linear(x, f"{name}.down")

    def _activation(self, x: str) -> str:
        g, name = self.graph, find_activation(self.config.activation)
        if name == "relu":
            return g.op("Relu", x)
        if name == "relu2":
            x = g.op("Relu", x)
            return g.op("Mul", x, x)
        if name == "silu":
            return g.op("Mul", x, g.op("Sigmoid", x))
        return g.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")

    def _attention(self, x: str, index: int) -> str:
        """Attention of x (N, C) to itself and the past: (N, C)."""
        g, config, name = self.graph, self.config, f"layers.{index}.attention"
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self._linear(x, f"{name}.qkv")
        if config.wide_qk_norm:
            qkv = self._norm_all_heads(qkv, f"{name}.qk_norm")
        shape = g.op("Concat", self.shape, g.constant([heads + 2 * kv_heads, dim]), axis=0)
        qkv = g.op("Transpose", g.op("Reshape", qkv, shape), perm=[0, 2, 1, 3])
        if config.qk_norm and not config.wide_qk_norm:
            qkv = self._norm_heads(qkv, f"{name}.qk_norm")
        scores_of = scores_of_layer(config, index)
        kind = self.rotary.kind(index) if config.position == "rope" else None
        if kind is not None:  # queries and keys are rotated at once
            parts = g.constant([heads + kv_heads, kv_heads])
            qk, v = g.ops("Split", qkv, parts, outputs=["", ""], axis=1)
            parts = g.constant([heads, kv_heads])
            q, k = g.ops("Split", self._rotate(qk, kind), parts, outputs=["", ""], axis=1)
            if self.query_factors is not None:
                q = g.op("Mul", q, self.query_factors)
        else:
            parts = g.constant([heads, kv_heads, kv_heads])
            q, k, v = g.ops("Split", qkv, parts, outputs=["", "", ""], axis=1)
        keys, values = (
            g.op(
                "Concat",
                f"past_key_values.{index}.{what}",
                new,
                axis=2,
                output=f"present.{index}.{what}",
            )
            for what, new in (("key", k), ("value", v))
        )
        q = g.op("Mul", q, g.constant(scores_of.factor(dim), self.numpy))
        # The heads that share a key head are rows of one product: (B, H_kv, H / H_kv T, D).
        scores = g.op("MatMul", self._grouped(q, dim), g.op("Transpose", keys, perm=[0, 1, 3, 2]))
        shape = g.op("Concat", g.constant([0, heads, -1]), self.span, axis=0)
        scores = self._capped(self._reshaped(scores, shape), scores_of.cap)
        scores = g.op("Add", scores, self.masks[scores_of.window])
        weights = g.op("Softmax", scores, axis=-1)
        shape = g.op("Concat", g.constant([0, kv_heads, -1]), self.span, axis=0)
        x = g.op("MatMul", self._reshaped(weights, shape), values)
        x = self._reshaped(x, g.constant([0, heads, -1, dim]))
        x = g.op("Transpose", x, perm=[0, 2, 1, 3])
        x = g.op("Reshape", x, g.constant([-1, heads * dim]))
        return self._linear(x, f"{name}.out")

    def _norm_heads(self, qkv: str, name: str) -> str:
        """Norms of queries and keys among the heads of qkv (B, heads, T, D), each by itself."""
        g, config = self.graph, self.config
        parts = g.constant([config.num_heads + config.num_kv_heads, config.num_kv_heads])
        qk, v = g.ops("Split", qkv, parts, outputs=["", ""], axis=1)
        counts = torch.tensor([config.num_heads, config.num_kv_heads])
        weight = (self._read(f"{name}.weight") + config.norm_offset).view(2, 1, -1)
        scale = g.weight(f"{name}.weight", weight.repeat_interleave(counts, dim=0))
        return g.op("Concat", g.op("Mul", self._root_mean_square(qk), scale), v, axis=1)

    def _norm_all_heads(self, qkv: str, name: str) -> str:
        """Norms of queries and keys of qkv (N, C), each of all heads together."""
        g, config = self.graph, self.config
        counts = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads)]
        parts = g.constant([*counts, counts[1]])
        q, k, v = g.ops("Split", qkv, parts, outputs=["", "", ""], axis=1)
        weights = (self._read(f"{name}.weight") + config.norm_offset).split(counts)
        normed = [
            g.op("Mul", self._root_mean_square(x), g.weight(f"{name}.{which}", each))
            for x, which, each in zip((q, k), "qk", weights, strict=True)
        ]
        return g.op("Concat", *normed, v, axis=1)

    def _grouped(self, q: str, dim: int) -> str:
        return self._reshaped(q, self.graph.constant([0, self.config.num_kv_heads, -1, dim]))

    def _reshaped(self, x: str, shape: str) -> str:
        """x in another shape where heads share keys; else it has that shape."""
        if self.config.num_heads == self.config.num_kv_heads:
            return x
        return self.graph.op("Reshape", x, shape)

    def _rotate(self, x: str, kind: int) -> str:
        """Turn the heads of a layer, x (B, H, T, D), by a kind of RoPE: pairs are D / 2 apart."""
        g = self.graph
        cos, sin = self.cos_sin[kind]
        a, b = g.ops("Split", x, outputs=["", ""], axis=-1, num_outputs=2)
        rotated = g.op("Concat", g.op("Neg", b), a, axis=-1)
        return g.op("Add", g.op("Mul", x, cos), g.op("Mul", rotated, sin))
