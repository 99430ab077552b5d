"""Refuses a checkpoint whose tensors are not those that its config.json implies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qllm.checkpoint.formats import FORMATS, Format
from qllm.checkpoint.names import TensorNames
from qllm.checkpoint.reader import QUANTIZATION_FILES, QUANTIZATION_KEY
from qllm.config import EMBEDDING, LM_HEAD
from qllm.errors import UserError

# Ends of names of tensors that change no result without what else they are for: scales of a
# quantized cache, masks and frequencies that are computed anew.
UNUSED = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".rotary_emb.inv_freq", ".masked_bias")
# Parts of names of an adapter's tensors.
ADAPTER = (".lora_", ".adapter", ".ia3_")


def check_counts(names: TensorNames) -> None:
    """Refuse counts of config.json that the tensors do not bear out.

    Nothing is made of such a count before, nor repeated so often.

    Raises:
        UserError: for more layers, or another size of the vocabulary, than there are.
    """
    checkpoint, count = names.checkpoint, names.config.num_layers
    found = {
        name.removeprefix(names.layers).partition(".")[0]
        for name in checkpoint.tensors
        if name.startswith(names.layers)
    }
    if count > len(found):
        raise UserError(
            f"{checkpoint.folder} holds {len(found)} layers, its config.json implies {count}"
        )
    experts = names.config.experts
    if experts is not None and experts.count * sum(experts.layers) > len(checkpoint.tensors):
        raise UserError(
            f"{checkpoint.folder} holds {len(checkpoint.tensors)} tensors, its config.json implies "
            f"{sum(experts.layers)} layers of {experts.count} experts"
        )
    (embed,) = names.sources("embed.weight")
    parts, size = names.packed(EMBEDDING), names.config.vocab_size
    if not parts:
        _check_shape(names, embed, (size, names.config.embed_size))
    # Its other sizes are checked where it is read, and nothing is made of them before.
    elif not any(size in checkpoint.tensors[part].shape for part in parts):
        raise UserError(
            f"{checkpoint.folder}: none of {', '.join(parts)} has {size} rows, which "
            "config.json implies"
        )


def check_tensors(names: TensorNames, formats: Mapping[str, Format]) -> tuple[str, ...]:
    """Refuse tensors that are not there, have another shape, or that no such model has.

    Args:
        formats: how each quantized module is stored, by our name.

    Returns:
        names of tensors that are not used, and change nothing.

    Raises:
        UserError: for the first of the others.
    """
    expected = set()
    for name, shape in names.shapes.items():
        parts = names.sources(name)
        module = name.rpartition(".")[0]
        rows = names.row_counts(module, len(parts))
        if name.endswith(".weight") and module in formats:
            expected |= _check_quantized(names, module, formats[module])
            continue
        turn = -1 if names.is_transposed(name) else 1
        for part, count in zip(parts, rows, strict=True):
            expected.add(part)
            _check_shape(names, part, (count, *shape[1:])[::turn])
    if names.config.tied_head:
        expected.add(f"{names.head}.weight")
    return _check_unused(names, (n for n in names.checkpoint.tensors if n not in expected))


def _check_shape(names: TensorNames, part: str, shape: tuple[int, ...]) -> None:
    info = names.checkpoint.tensors.get(part)
    if info is None:
        raise _lacks(names, part)
    if info.shape != shape:
        raise UserError(
            f"{names.checkpoint.path(part)}: {names.checkpoint.file_names[part]} has the shape "
            f"{list(info.shape)}, config.json implies {list(shape)}"
        )


def _check_quantized(names: TensorNames, module: str, storage: Format) -> set[str]:
    """Refuse a quantized linear whose tensors are not there; returns their names."""
    checkpoint, expected = names.checkpoint, set()
    for part in names.sources(f"{module}.weight"):
        stem = part.removesuffix("weight")
        for key in storage.tensors:
            if stem + key not in checkpoint.tensors:
                there = [name for name in checkpoint.tensors if name.startswith(stem)]
                raise UserError(
                    f"{checkpoint.folder} lacks {stem + key}, which the {QUANTIZATION_KEY} of its "
                    "config.json implies; it holds "
                    f"{', '.join(there[:4]) or 'nothing of that module'}"
                )
        expected |= {stem + key for key in (*storage.tensors, *storage.optional)}
    return expected


def _check_unused(names: TensorNames, others: Iterable[str]) -> tuple[str, ...]:
    """Refuse tensors that no model of the config.json has where they would change the result.

    Returns:
        Names of the others, but for those that the family's older checkpoints have.
    """
    checkpoint, family = names.checkpoint, names.family
    outer = [names.sources(f"{name}.weight")[0] for name in (*family.outer, LM_HEAD)]
    inside = (names.layers, *(part.removesuffix("weight") for part in outer))
    without_use = tuple(names.prefix + part for part in family.without_use(names.config))
    dropped = []
    for name in others:
        if name.endswith(family.ignored) or name.startswith(without_use):
            continue
        unused = name.endswith(UNUSED) or any(part in name for part in ADAPTER)
        if name.startswith(inside) and not unused:
            where = f"{checkpoint.path(name)} holds {checkpoint.file_names[name]}"
            if not name.endswith(".bias"):
                raise UserError(f"{where}, which no {family.name} of its config.json has")
            if checkpoint.read_any(name).count_nonzero():
                raise UserError(
                    f"{where}, which is not 0, and no {family.name} of its config.json has this "
                    "bias"
                )
        dropped.append(name)
    return tuple(dropped)


def _lacks(names: TensorNames, part: str) -> UserError:
    """The error for a float tensor that is not there, and what is there in its place."""
    checkpoint, stem = names.checkpoint, part.removesuffix("weight")
    values = checkpoint.raw_config.values
    lacks = f"{checkpoint.folder} lacks {checkpoint.file_names.expected(part)}"
    keys = dict.fromkeys(key for format in FORMATS.values() for key in format.tensors)
    there = [stem + key for key in keys if stem + key in checkpoint.tensors]
    if part.endswith("weight") and there:
        listed = f"{lacks} and holds {', '.join(there)}: it is quantized, but "
        if QUANTIZATION_KEY in values:
            return UserError(
                f"{listed}the {QUANTIZATION_KEY} of its config.json leaves that module out"
            )
        return UserError(
            f"{listed}config.json has no {QUANTIZATION_KEY}, and beside it there is no "
            f"{' or '.join(QUANTIZATION_FILES)}"
        )
    others = [name for name in checkpoint.tensors if name.startswith(stem)]
    others = [name for name in others if not name.endswith(".bias")]
    if part.endswith("weight") and others:
        more = " …" if len(others) > 4 else ""
        return UserError(
            f"{lacks} and holds {', '.join(others[:4])}{more} in its place, a format that QLLM "
            "does not read"
        )
    if part == f"{names.head}.weight":
        key, family = "tie_word_embeddings", names.family.name
        said = f"config.json has no {key}, which is false for {family}"
        if values.get(key) is not None:
            said = f"{key} is false in its config.json"
        return UserError(
            f"{lacks}, and {said}: transformers would draw a head at random; set {key} to true "
            "if the embedding is the head"
        )
    return UserError(f"{lacks}, which its config.json implies")
