"""llama.cpp through llama-cpp-python's low-level interface, on GGUF files of random bytes.

Llama and BLOOM have their architectures; OPT, which llama.cpp lacks, is GPT-2 of the same sizes: it
differs in the activation alone (GELU for ReLU). Types are as llama-quantize picks them: all
matrices of one type (which for 3 bits is its Q3_K_S) and the LM head, which is the embedding too
where the two are tied, in 6 bits unless the others have 8. Blocks are random but for their scales:
speed does not depend on the values, and logits stay finite. x is always rounded to int8, in blocks
of 32 (Q4_0, Q8_0) or 256 (Q3_K, Q6_K). Everything else is llama.cpp's default: Q4_0 is repacked for
the CPU when it is loaded, attention is fused where llama.cpp finds that good. The KV cache is
float16; one of 8 or 4 bits is Q8_0 or Q4_0, for which attention has to be fused ("flash").
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from benchmarks.rivals.common import DEVIATION, PREFILL_RUNS, Model, published, random_prompts
from qllm.gguf.file import read_gguf
from qllm.gguf.metadata import Metadata
from qllm.ops.cpu.limits import median_seconds

if TYPE_CHECKING:
    from benchmarks.rivals.interleaved import Settings

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """A quantized type: so many values in so many bytes, of which two are a float16 factor.

    Attributes:
        factor_at: where in a block the factor is.
        spread: deviation of the values of random bytes, where the factor is 1.
    """

    kind: GGMLQuantizationType
    values: int
    bytes: int
    factor_at: int
    spread: float

    def random(self, shape: Shape, draw: np.random.Generator) -> np.ndarray:
        """(N, K) weights as (N, bytes of a row)."""
        n, k = shape
        if k % self.values:
            raise ValueError(f"{k} input channels are not whole {self.kind.name} blocks")
        data = draw.integers(256, size=(n, k // self.values, self.bytes), dtype=np.uint8)
        factor = np.float16(DEVIATION / self.spread)
        data[..., self.factor_at : self.factor_at + 2] = np.frombuffer(factor.tobytes(), np.uint8)
        return data.reshape(n, -1)


def _uniform(bits: int) -> float:
    """Deviation of whole numbers of so many bits."""
    return 2**bits / 12**0.5


# The K types hold a scale per 16 values besides, of 6 bits (Q3_K) or 8 (Q6_K).
Q4_0 = Blocks(GGMLQuantizationType.Q4_0, 32, 18, 0, _uniform(4))
Q8_0 = Blocks(GGMLQuantizationType.Q8_0, 32, 34, 0, _uniform(8))
Q3_K = Blocks(GGMLQuantizationType.Q3_K, 256, 110, 108, _uniform(3) * _uniform(6))
Q6_K = Blocks(GGMLQuantizationType.Q6_K, 256, 210, 208, _uniform(6) * _uniform(8))

# Bits, a file's name, its matrices, its LM head.
FORMATS = (
    ("4", "Q4_0", Q4_0, Q6_K),
    ("8", "Q8_0", Q8_0, Q8_0),
    ("3", "Q3_K_S", Q3_K, Q6_K),
)
KV_TYPES = {
    16: GGMLQuantizationType.F16,
    8: GGMLQuantizationType.Q8_0,
    4: GGMLQuantizationType.Q4_0,
}


def models(
    repository: str, settings: Settings, folder: Path, stack: contextlib.ExitStack
) -> Iterator[Model]:
    """One for each format, or that of a GGUF file.

    Args:
        folder: for the file, which is deleted as soon as it is loaded.
        stack: frees the models.
    """
    kv = KV_TYPES[settings.kv_bits]
    kv_name = "" if kv == GGMLQuantizationType.F16 else f", KV {kv.name}"
    if repository.endswith(".gguf"):
        path = Path(repository)
        runner = Runner(stack.enter_context(_loaded(path)), settings.threads, kv)
        yield Model(f"llama.cpp{kv_name}", "file", _read_bytes(path), runner.prefill, runner.decode)
        return
    path = folder / "model.gguf"
    for bits, name, blocks, head in FORMATS:
        if not settings.wants(bits):
            continue
        write_gguf(path, published(repository, settings), blocks, head)
        size = path.stat().st_size
        runner = Runner(stack.enter_context(_loaded(path)), settings.threads, kv)
        path.unlink()
        yield Model(f"llama.cpp {name}{kv_name}", bits, size, runner.prefill, runner.decode)


def write_gguf(path: Path, config: dict, blocks: Blocks, head: Blocks) -> None:
    """A model of a published config.json's sizes, with token ids and no vocabulary."""
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    draw = np.random.default_rng(0)
    for name, shape in FAMILIES[config["model_type"]](writer, config):
        if len(shape) == 1:
            ones = "norm" in name and name.endswith(".weight")
            writer.add_tensor(name, np.full(shape, float(ones), np.float32))
        elif name == "position_embd.weight":
            values = draw.standard_normal(shape, np.float32) * np.float32(DEVIATION)
            writer.add_tensor(name, values)
        else:
            form = head if name == head_name(config) else blocks
            writer.add_tensor(name, form.random(shape, draw), raw_dtype=form.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head_name(config: dict) -> str:
    """The tensor that makes logits: OPT's and BLOOM's is the embedding."""
    return "output.weight" if config["model_type"] == "llama" else "token_embd.weight"


def llama_tensors(writer: GGUFWriter, config: dict) -> Iterator[tuple[str, Shape]]:
    """Fields of a Llama, and its tensors' names and shapes."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    narrow = hidden // heads * kv_heads
    _sizes(writer, hidden, inner, config["num_hidden_layers"], heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    yield "token_embd.weight", (config["vocab_size"], hidden)
    yield "output.weight", (config["vocab_size"], hidden)
    yield "output_norm.weight", (hidden,)
    for index in range(config["num_hidden_layers"]):
        layer = f"blk.{index}."
        yield f"{layer}attn_norm.weight", (hidden,)
        yield f"{layer}attn_q.weight", (hidden, hidden)
        yield f"{layer}attn_k.weight", (narrow, hidden)
        yield f"{layer}attn_v.weight", (narrow, hidden)
        yield f"{layer}attn_output.weight", (hidden, hidden)
        yield f"{layer}ffn_norm.weight", (hidden,)
        yield f"{layer}ffn_gate.weight", (inner, hidden)
        yield f"{layer}ffn_up.weight", (inner, hidden)
        yield f"{layer}ffn_down.weight", (hidden, inner)


def opt_tensors(writer: GGUFWriter, config: dict) -> Iterator[tuple[str, Shape]]:
    """The same of a GPT-2 with an OPT's sizes."""
    hidden = config["hidden_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    _sizes(writer, hidden, config["ffn_dim"], layers, heads)
    writer.add_layer_norm_eps(1e-5)
    yield "position_embd.weight", (config["max_position_embeddings"], hidden)
    yield from _decoder(config["vocab_size"], hidden, config["ffn_dim"], layers)


def bloom_tensors(writer: GGUFWriter, config: dict) -> Iterator[tuple[str, Shape]]:
    """The same of a BLOOM."""
    hidden, layers = config["n_embed"], config["n_layer"]
    _sizes(writer, hidden, 4 * hidden, layers, config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    yield from _affine("token_embd_norm", hidden)
    yield from _decoder(config["vocab_size"], hidden, 4 * hidden, layers)


def _sizes(writer: GGUFWriter, hidden: int, inner: int, layers: int, heads: int) -> None:
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)


def _decoder(vocab: int, hidden: int, inner: int, layers: int) -> Iterator[tuple[str, Shape]]:
    """What GPT-2 and BLOOM share."""
    yield "token_embd.weight", (vocab, hidden)
    yield from _affine("output_norm", hidden)
    for index in range(layers):
        layer = f"blk.{index}."
        yield from _affine(f"{layer}attn_norm", hidden)
        yield from _affine(f"{layer}attn_qkv", 3 * hidden, hidden)
        yield from _affine(f"{layer}attn_output", hidden, hidden)
        yield from _affine(f"{layer}ffn_norm", hidden)
        yield from _affine(f"{layer}ffn_up", inner, hidden)
        yield from _affine(f"{layer}ffn_down", hidden, inner)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


ARCHITECTURES = {"llama": "llama", "opt": "gpt2", "bloom": "bloom"}
FAMILIES: dict[str, Callable[[GGUFWriter, dict], Iterator[tuple[str, Shape]]]] = {
    "llama": llama_tensors,
    "opt": opt_tensors,
    "bloom": bloom_tensors,
}


def _read_bytes(path: Path) -> int:
    """Bytes of a file that a step of one sequence reads: of experts, those that a token takes."""
    found = read_gguf(path)
    own = Metadata(found).own
    counts = (found.metadata.get(own(key), 1) for key in ("expert_used_count", "expert_count"))
    used, count = counts
    assert isinstance(used, int) and isinstance(count, int)
    stacked = sum(t.nbytes for name, t in found.tensors.items() if "_exps." in name)
    return path.stat().st_size - stacked * (count - used) // max(count, 1)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Takes llama.cpp's log."""


@contextlib.contextmanager
def _loaded(path: Path) -> Iterator[int]:
    """A handle of the model in a file."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise ValueError(f"llama.cpp does not load {path.name}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@dataclass(frozen=True)
class Runner:
    """Measures a loaded model, in a fresh context each time."""

    model: int
    threads: int
    kv: GGMLQuantizationType

    @property
    def vocab(self) -> int:
        """Tokens that the model knows."""
        return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    @contextlib.contextmanager
    def context(self, sequences: int, length: int) -> Iterator[int]:
        """A handle of a context with a cache of `length` tokens for each sequence."""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * length
        settings.n_seq_max = sequences
        settings.n_batch = max(sequences, length)
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = self.kv
        if self.kv != GGMLQuantizationType.F16:
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama_cpp.llama_init_from_model(self.model, settings)
        if not context:
            raise ValueError(f"llama.cpp makes no context of {sequences} x {length} tokens")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def prefill(self, tokens: int) -> float:
        """See Model."""
        prompt = random_prompts(1, tokens, self.vocab)[0]
        rows = [(token, at, 0) for at, token in enumerate(prompt)]
        with self.context(1, tokens) as context, _batch(tokens) as batch:

            def run() -> None:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
                self.forward(context, batch, rows, wanted=1)

            return median_seconds(run, PREFILL_RUNS)

    def decode(self, batch: int, context: int, steps: int) -> float:
        """See Model."""
        prompt = random_prompts(1, context, self.vocab)[0]
        length = context + steps + 1
        with self.context(batch, length) as handle, _batch(max(batch, context)) as memory:
            rows = [(token, at, 0) for at, token in enumerate(prompt)]
            tokens = self.forward(handle, memory, rows, wanted=1) * batch
            cache = llama_cpp.llama_get_memory(handle)
            for row in range(1, batch):  # Each is a copy, for the sequences' caches are apart.
                llama_cpp.llama_memory_seq_cp(cache, 0, row, -1, -1)
            position = context

            def step() -> None:
                nonlocal tokens, position
                rows = [(token, position, row) for row, token in enumerate(tokens)]
                tokens = self.forward(handle, memory, rows, wanted=batch)
                position += 1

            return median_seconds(step, steps)

    def forward(
        self,
        context: int,
        batch: llama_cpp.llama_batch,
        rows: list[tuple[int, int, int]],
        *,
        wanted: int,
    ) -> list[int]:
        """The greatest logits' tokens behind the last `wanted` rows of (token, position, sequence).

        Raises:
            RuntimeError: with llama.cpp's status.
        """
        batch.n_tokens = len(rows)
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index >= len(rows) - wanted
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} tokens")
        found = []
        for index in range(len(rows) - wanted, len(rows)):
            logits = llama_cpp.llama_get_logits_ith(context, index)
            found.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
        return found


@contextlib.contextmanager
def _batch(rows: int) -> Iterator[llama_cpp.llama_batch]:
    batch = llama_cpp.llama_batch_init(rows, 0, 1)
    try:
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)
