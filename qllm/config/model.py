"""A model's shape, as its config.json gives it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and the scalings of its frequencies.

    The fields that a kind does not use are at their defaults.

    Attributes:
        kind: "default", "linear" (Chen et al. 2023), "dynamic", "llama3", "yarn" (Peng et al.
            2023), "longrope" (Ding et al. 2024), or "proportional", where not all pairs rotate.
        rotary_dim: how many channels of a head rotate, from its first one on; None: all.
        attention_factor: multiplies cosines and sines.
        original_max_positions: the length that a model was trained on before it was stretched.
        beta_fast, beta_slow, truncate: ends of YaRN's ramp in turns over that length, and whether
            they are rounded to whole pairs.
        short_factor, long_factor: what divides each pair's frequency up to that length, and beyond.
        rereads: a text that grows beyond that length is read anew, with the long factors (Phi-3).
        rotated_pairs: how many pairs rotate, of the kind of which not all do.
        query_beta, query_span: a query at position p is multiplied by 1 + query_beta
            log(1 + floor(p / query_span)) (Ministral 3).
    """

    theta: float = 10000.0
    kind: str = "default"
    rotary_dim: int | None = None
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rereads: bool = False
    rotated_pairs: int = 0
    query_beta: float = 0.0
    query_span: int = 0

    @property
    def reread_length(self) -> int | None:
        """Tokens of the longest text whose keys stay as they are; None: those of all do."""
        return self.original_max_positions if self.rereads else None


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts (Shazeer et al. 2017): MLPs of which each token takes a few.

    Attributes:
        count: experts of a layer.
        top_k: how many of them a token takes.
        intermediate_size: inner channels of each.
        normalizes: the weights of those that a token takes are divided by their sum.
        layers: which layers have experts; the others have an MLP.
        shared_size: inner channels of one that all tokens take beside them; 0: there is none.
        router_bias: of the matrix that chooses.
        apart: that one has no gate; it, the others and the router have norms of their own, and each
            of the others a factor (Gemma 4).
    """

    count: int
    top_k: int
    intermediate_size: int
    normalizes: bool
    layers: tuple[bool, ...]
    shared_size: int = 0
    router_bias: bool = False
    apart: bool = False


@dataclass(frozen=True)
class LayerShape:
    """What a layer has in the place of `ModelConfig`'s, where layers are not alike."""

    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    values_are_keys: bool = False
    kv_layer: int | None = None
    shares_kv: bool = False


@dataclass(frozen=True)
class DeltaNetConfig:
    """Layers with a gated delta rule (Yang et al. 2024) in the place of attention.

    Attributes:
        key_heads, value_heads: heads of queries and keys, and of values, each of which has a
            memory; value_heads / key_heads in a row share queries and keys.
        key_dim, value_dim: channels of a head.
        kernel: tokens that the convolution in front of it sees.
        layers: which layers have it; the others have attention.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    layers: tuple[bool, ...]

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of any family, in one vocabulary. Sizes count elements.

    Attributes:
        embed_size: width of the token embedding; OPT-350m's differs from `hidden_size` and is
            projected.
        max_positions: the longest sequence; None where the position encoding sets no limit.
        trained_positions: the length that dynamic RoPE scaling starts from.
        position: "learned" (OPT), "alibi" (BLOOM) or "rope" (Llama).
        position_offset: rows of the table of learned positions that no position uses.
        norm: "layernorm" or "rmsnorm".
        norm_affine, norm_bias: norms have a weight, and a layernorm a bias as well.
        norm_offset: what an RMS norm adds to its weight (Gemma's 1).
        qk_norm: each head's query and key have a norm of their own, in front of the positions.
        wide_qk_norm: all queries of a token have one norm together, and all keys (OLMo 2).
        value_norm: each head's value is normed as well, by no weight (Gemma 4).
        values_are_keys: values are the keys in front of their norm, and have no matrix.
        kv_layer: a layer in front, whose keys and values a layer takes that has none.
        shares_kv: layers behind take the keys and values of this one.
        pre_norm: norms before attention and MLP (False: after, as in OPT-350m).
        input_norms: there are norms in front of attention and MLP, where `pre_norm` has them.
        output_norms: what attention and MLP give is normed as well, in front of the sum.
        residual_after_norm: the residual branches off behind the norm (a BLOOM option).
        parallel_blocks: attention and MLP take the same input, and both are added to it.
        shared_norm: of parallel blocks, one norm is in front of both.
        embed_scale: multiplies the embeddings.
        embed_scale_rounds: to the type of the embeddings, before it does (Gemma).
        output_scale: multiplies what attention and MLP give, in front of the sum.
        logit_divisor, logit_factor: divides the logits, and multiplies them.
        layer_scales: a number of each layer's own multiplies what it puts out (Gemma 4).
        logit_cap: logits are cap tanh(logits / cap); None: as they are.
        score_scale: multiplies attention's scores; None: 1 / sqrt(head_dim).
        scale_by_layer: it is divided by the number of the layer, from 1 on.
        score_cap: of attention's scores, as of logits.
        attention_gate: attention's output is multiplied by the logistic function of as many rows
            of its first matrix, behind those of values (Qwen3-Next).
        delta_net: what some layers have in the place of attention; None: no layer has.
        sinks: each head has a score of its own that joins its softmax (gpt-oss).
        windows: how many tokens those of each layer see, themselves included, 0 being all before
            them; empty: all layers see all.
        window_rope: of layers with a window; None: they have that of the others.
        rope_layers: which layers rotate queries and keys at all; empty: all do.
        gated_mlp: the MLP is `down(act(gate(x)) * up(x))`.
        clamped_swiglu: of a gated MLP, in the place of `activation` (gpt-oss).
        experts: what some layers have in the place of an MLP; None: no layer has.
        attention_bias, output_bias: of the matrices in front of attention and behind it.
        head_bias: of the LM head, where it is not tied (Phi).
        shapes: of each layer, where they differ: fields above are then the largest; empty: all
            layers have the same.
        layer_inputs: channels that each layer takes of each token beside what is in front of it
            (Gemma 4); 0: none.
        layer_input_rows: of the table of these.
        init_std: standard deviation of a fresh weight.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    embed_size: int
    max_positions: int | None
    position: str
    norm: str
    norm_eps: float
    activation: str
    trained_positions: int = 0
    position_offset: int = 0
    rope: RopeConfig | None = None
    norm_offset: float = 0.0
    norm_affine: bool = True
    norm_bias: bool = True
    qk_norm: bool = False
    wide_qk_norm: bool = False
    value_norm: bool = False
    values_are_keys: bool = False
    kv_layer: int | None = None
    shares_kv: bool = False
    pre_norm: bool = True
    final_norm: bool = True
    embed_norm: bool = False
    input_norms: bool = True
    output_norms: bool = False
    residual_after_norm: bool = False
    parallel_blocks: bool = False
    shared_norm: bool = False
    embed_scale: float = 1.0
    embed_scale_rounds: bool = False
    output_scale: float = 1.0
    layer_scales: bool = False
    logit_divisor: float = 1.0
    logit_factor: float = 1.0
    logit_cap: float | None = None
    score_scale: float | None = None
    scale_by_layer: bool = False
    score_cap: float | None = None
    attention_gate: bool = False
    delta_net: DeltaNetConfig | None = None
    sinks: bool = False
    windows: tuple[int, ...] = ()
    window_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()
    gated_mlp: bool = False
    clamped_swiglu: bool = False
    experts: ExpertsConfig | None = None
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    tied_head: bool = True
    dtype: str | None = None
    layer_inputs: int = 0
    layer_input_rows: int = 0
    init_std: float = 0.02
    eos_token_ids: tuple[int, ...] = ()
    shapes: tuple[LayerShape, ...] = ()

    def of_layer(self, index: int) -> ModelConfig:
        """The same with the sizes of a layer, as if all had them."""
        return replace(self, shapes=(), **vars(self.shapes[index])) if self.shapes else self

    @property
    def qkv_parts(self) -> tuple[int, ...]:
        """Heads of what a layer's first matrix puts out: of queries, keys, and values if its own.

        Of a model whose layers are alike, or `of_layer`.
        """
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if self.kv_layer is not None:
            return heads[:1]
        return heads[:2] if self.values_are_keys else heads

    @property
    def has_ties(self) -> bool:
        """Whether layers take more than the states that the one in front puts out."""
        return bool(self.layer_inputs) or any(shape.shares_kv for shape in self.shapes)

    @property
    def unchanged_length(self) -> int | None:
        """Tokens of the longest text whose length its keys do not depend on; None: none do."""
        kind = self.rope.kind if self.rope is not None else None
        if kind == "dynamic":
            return self.trained_positions
        return self.rope.original_max_positions if self.rope and kind == "longrope" else None
