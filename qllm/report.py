"""What the scripts print, in lines: a model's shards and kernels, its text, how it compares."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch

from qllm import ops
from qllm.checkpoint.load import shard_bytes
from qllm.config import DEFAULT_KV_BITS, EMBEDDING, LM_HEAD, QuantSpec
from qllm.layers import Linear
from qllm.layers.base import describe
from qllm.memory import resident_bytes
from qllm.models import Decoder
from qllm.models.delta_net import ALWAYS_FLOAT
from qllm.models.mlp import EXPERTS
from qllm.ops.gpu import attention
from qllm.tokenizer import Tokenizer

OUTER_BITS = ("embedding_bits", "lm_head_bits")  # of `outer_bits`, and keys of rows


def finite(value: object) -> object:
    """A value as JSON can say it: numbers that are none, or infinite, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its columns aligned."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for cells in (columns, ["-" * width for width in widths], *rows):
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def megabytes(count: int) -> str:
    """Bytes as text: "12.34 MB"."""
    return f"{count / 1e6:.2f} MB"


def bitwidth(model: Decoder) -> str:
    """The bitwidth of a model's layers: one, or each once in the order in which they come."""
    return ",".join(dict.fromkeys(linear.spec.bitwidth for linear in quantizable(model)))


def formats(model: Decoder) -> str:
    """How a model's layers are held, each way once: "4 bits, group 128, asym"."""
    return "; ".join(dict.fromkeys(describe(linear.spec) for linear in quantizable(model)))


def quantizable(model: Decoder) -> Iterator[Linear]:
    """The linears of the layers that a bitwidth is for, of those that this process has."""
    for name, module in model.layers.named_modules():
        if isinstance(module, Linear) and not name.removesuffix(".linear").endswith(ALWAYS_FLOAT):
            yield module


def outer_bits(model: Decoder) -> dict[str, str]:
    """Bitwidths of the embedding and of the LM head, of those that this process has."""
    found = {}
    for name, module in zip(OUTER_BITS, (model.embed, model.lm_head), strict=True):
        linear = getattr(module, "linear", module)
        if isinstance(linear, Linear):
            found[name] = linear.spec.bitwidth
        elif not isinstance(linear, torch.nn.Identity):
            found[name] = QuantSpec().bitwidth
    return found


def label(row: Mapping, key: str = "bitwidth") -> str:
    """What a table calls a model: its bitwidth or "format", an embedding, a head and activations
    that are packed, and a KV cache of fewer than 16 bits."""
    dense = QuantSpec().bitwidth
    outer = {"embedding": row.get("embedding_bits"), "LM head": row.get("lm_head_bits")}
    packed = "".join(f", {name} {of}" for name, of in outer.items() if of and of != dense)
    bits = row.get("kv_bits") or DEFAULT_KV_BITS
    activations = ", activations 8" if row.get("activation_bits") == 8 else ""
    return row[key] + packed + activations + (f", KV {bits}" if bits != DEFAULT_KV_BITS else "")


def shard_rows(model: Decoder) -> list[dict]:
    """The `shards` of the JSON object: layers, bytes as held in memory, and where."""
    return [
        {"layers": list(layers), "bytes": size, "device": str(device)}
        for (layers, device), size in zip(model.device_map.items(), shard_bytes(model), strict=True)
    ]


def shard_lines(shards: Sequence[dict]) -> list[str]:
    """A line per shard, which says where it is unless all are in one place."""
    apart, lines = len({shard["device"] for shard in shards}) > 1, []
    for number, shard in enumerate(shards):
        layers, place = index_ranges(shard["layers"]), f" on {shard['device']}" if apart else ""
        lines.append(f"shard {number}: layers {layers}, {megabytes(shard['bytes'])}{place}")
    return lines


def rank_row(model: Decoder) -> dict:
    """What this process has of a model: layers, bytes, and bytes of its memory in use."""
    halves = [
        index + half / 2
        for layers in model.device_map
        for index in layers
        for half, here in enumerate(
            (model.layers[index].has_attention, model.layers[index].has_mlp)
        )
        if here
    ]
    tensors = {t.data_ptr(): t.nbytes for t in model.buffers() if not t.is_meta and t.numel()}
    return {
        "layers": [halves[0], halves[-1] + 0.5],
        "bytes": sum(tensors.values()),
        "resident": resident_bytes(),
    }


def rank_lines(ranks: Sequence[dict]) -> list[str]:
    """A line per rank."""
    return [
        f"rank {number}: {layer_range(*rank['layers'])}, {megabytes(rank['bytes'])}"
        for number, rank in enumerate(ranks)
    ]


def layer_range(begin: float, end: float) -> str:
    """What lies from `begin` up to `end`, x.5 being the MLP of layer x: "layers 0-2"."""
    first, last = math.ceil(begin), math.floor(end)
    parts = [f"MLP of layer {math.floor(begin)}"] if first > begin else []
    if last > first:
        parts.append(f"layers {index_ranges(range(first, last))}")
    return ", ".join(parts + ([f"attention of layer {last}"] if end > last else []))


def index_ranges(indices: Sequence[int]) -> str:
    """Sorted indices as text: "0-3, 7"."""
    runs = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)


def kernel_rows(model: Decoder) -> list[dict]:
    """What each linear layer is, which kernel it runs, and why; equal layers share a row."""
    rows: dict[tuple[str, ...], dict[int, list[int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not any(t.is_meta for t in module.buffers()):
            path = name.removesuffix(".linear")  # of a layer that several ranks share
            inside = path.startswith("layers.")
            index, inner = path.split(".", 2)[1:] if inside else ("-1", path)
            expert = -1
            if inner.startswith(EXPERTS):
                number, _, linear = inner.removeprefix(EXPERTS).partition(".")
                expert, inner = int(number), f"{EXPERTS}{{}}.{linear}"
            kernel, why = module.choice.kernel.name, module.choice.reason
            if path == EMBEDDING:
                if module is getattr(model.lm_head, "linear", model.lm_head):
                    inner = f"{LM_HEAD}, {EMBEDDING}"
                else:
                    why = "no product: rows are dequantized as tokens ask for them"
            key = (inner, describe(module.spec), kernel, why)
            rows.setdefault(key, {}).setdefault(int(index), []).append(expert)
    found = []
    for (inner, form, kernel, why), layers in rows.items():
        alike: dict[tuple[int, ...], list[int]] = {}  # layers, by which experts they have here
        for index, experts in layers.items():
            alike.setdefault(tuple(experts), []).append(index)
        for experts_here, indices in alike.items():
            name = inner.format(f"{{{index_ranges(experts_here)}}}") if EXPERTS in inner else inner
            where = "" if indices == [-1] else f"layers.{{{index_ranges(indices)}}}."
            found.append({"layer": where + name, "format": form, "kernel": kernel, "why": why})
    return found


def attention_rows(model: Decoder) -> list[dict]:
    """The same of attention, where a GPU's kernels have several ways of it."""
    request = ops.Request(0, 0, 16, -1, "asym", model.device.type)
    choice = ops.select("prefill_attention", request)
    if choice.kernel.name != "triton":
        return []
    form = f"{model.kv_bits}-bit keys and values"
    why = f"{choice.reason}{attention.about(model.kv_bits, model.device)}"
    return [{"layer": "attention", "format": form, "kernel": choice.kernel.name, "why": why}]


def kernel_lines(rows: Sequence[dict]) -> list[str]:
    """`kernel_rows` and `attention_rows` as a table."""
    columns = ("layer", "format", "kernel")
    widths = {key: max((len(row[key]) for row in rows), default=0) for key in columns}
    return [
        "  ".join([*(f"{row[key]:<{width}}" for key, width in widths.items()), row["why"]])
        for row in rows
    ]


def cache_row(model: Decoder, rows: int, capacity: int) -> dict[str, int]:
    """The `kv_cache` of the JSON object: of so many sequences and tokens, this process's part."""
    size = model.cache_bytes(rows, capacity)
    return {"bits": model.kv_bits, "sequences": rows, "tokens": capacity, "bytes": size}


def cache_line(row: Mapping[str, int]) -> str:
    """A line of `cache_row`."""
    return (
        f"KV cache: {row['bits']} bits, {megabytes(row['bytes'])} for {row['sequences']} x "
        f"{row['tokens']} tokens"
    )


def graph_break_line(reason: str | None) -> str:
    """Whether decode steps are replayed, or why not."""
    return (
        "decode step: captured, then replayed"
        if reason is None
        else f"decode step: run in Python, because {reason}"
    )


def result_rows(
    prompts: Sequence[str], texts: Sequence[str], tokens: Sequence[Sequence[int]]
) -> list[dict]:
    """The `results` of the JSON object."""
    return [
        {"prompt": prompt, "text": text, "tokens": list(ids), "new_tokens": len(ids)}
        for prompt, text, ids in zip(prompts, texts, tokens, strict=True)
    ]


def result_lines(results: Sequence[dict], comparison: Sequence[dict] = ()) -> list[str]:
    """Prompt, text and number of new tokens of each result, and how it compares."""
    lines = []
    for number, result in enumerate(results):
        rows = [("prompt", result["prompt"]), ("text", result["text"])]
        if comparison:
            rows.append(("reference", comparison[number]["text"]))
            rows.append(("agreement", comparison[number]["summary"]))
        rows.append(("new tokens", str(result["new_tokens"])))
        lines += ["", *(f"{label + ':':<12}{value}" for label, value in rows)]
    return lines


def speed_line(results: Sequence[dict], seconds: float) -> str:
    """The time that generation took."""
    count = sum(result["new_tokens"] for result in results)
    rate = count / max(seconds, 1e-9)
    prompts = "1 prompt" if len(results) == 1 else f"{len(results)} prompts"
    return f"{prompts}, {count} new tokens in {seconds:.2f} s ({rate:.1f} tokens/s)"


def comparison_rows(
    tokenizer: Tokenizer,
    tokens: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    texts: Sequence[str],
) -> list[dict]:
    """How each result agrees with the reference.

    Returns:
        per prompt, `agree`: places that hold the same token; `of`: tokens of the longer one;
        `first_difference`: index of the first place that does not, None without one; the
        reference's `tokens` and `text`; `summary`: the same in words.
    """
    rows = []
    for ours, theirs, text in zip(tokens, reference, texts, strict=True):
        of = max(len(ours), len(theirs))
        agree = sum(a == b for a, b in zip(ours, theirs, strict=False))
        first = first_difference(ours, theirs)
        summary = f"{agree} of {of} tokens"
        if first is not None:
            pair = [
                token_text(tokenizer, ids[first]) if first < len(ids) else "the end"
                for ids in (ours, theirs)
            ]
            summary += f"; first difference at token {first + 1}: {pair[0]}, reference {pair[1]}"
        rows.append(
            {
                "agree": agree,
                "of": of,
                "first_difference": first,
                "tokens": list(theirs),
                "text": text,
                "summary": summary,
            }
        )
    return rows


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text in quotes; with its id where nobody could see it."""
    text = tokenizer.decode([token])
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if text.strip("\ufffd").strip() else f"{quoted} (id {token})"


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first index at which two token lists differ, or one has ended; None for equal ones."""
    for index, (ours, theirs) in enumerate(zip(tokens, reference, strict=False)):
        if ours != theirs:
            return index
    shorter = min(len(tokens), len(reference))
    return None if len(tokens) == len(reference) else shorter
