"""Changes to the files of a checkpoint: what bad luck does to them, and what bad people do."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

# What is in a folder: bytes, or what makes something else at a path.
Content = bytes | Callable[[Path], None]
Files = dict[str, Content]

# Values that a JSON file may have anywhere, as they are written.
MONSTERS = (
    *("null", "true", "false", "[]", "{}", "0", "-1", "1", "3", "16", "-0.0", "0.5", "1.0"),
    *("2147483647", "2147483648", "9223372036854775807", "18446744073709551616"),
    *("1e308", "-1e308", "1e400", "1e-300", "1e300", "NaN", "Infinity", "-Infinity"),
    *('""', '"x"', '"4"', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"Linear"', '"float64"'),
    *('["opt"]', "[1, 2]", "[[]]", '[null, "x", 7]', '{"a": 1}', '{"": {"": []}}', "[1e999]"),
    *('"lm_head"', '"re:(.+)+(.+)+(.+)+(?<=!)"', '"(([a-z_0-9])+\\\\.?)+$X"', '"re:("'),
    *("1" * 5000, "-" + "9" * 4000, '"' + "a" * 100_000 + '"', '"\\u001b[31m"'),
    *("[" * 100_000, "[" * 400 + "]" * 400, '{"a":' * 400 + "1" + "}" * 400),
    *("[" + "0," * 20_000 + "0]", "{" + ",".join(f'"{i}": {i}' for i in range(5000)) + "}"),
)
KEYS = (".*", "", "(\\w+\\.?)+!", "re:.*", "-:.*", "lm_head", "model_type", "group_size", "bits")
NUMBERS = (0, 1, -1, 2, 3, 7, 31, 33, 64, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63))
# Of a tensor that is written anew.
MAX_BYTES = 1 << 24
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U32": 4}
TYPES = (*SIZES, "I8", "U8", "BOOL", "F8_E4M3", "C64", "Q")


def mutate(files: Files, random: Random) -> list[str]:
    """Make one to three changes; returns what they are."""
    done = []
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(sorted(files))
        content = files[name]
        kinds = [_bytes, _bytes, _place] if random.random() < 0.3 else _kinds(name)
        change = random.choice(kinds)
        if isinstance(content, bytes):
            try:
                files[name] = change(content, random)
            except Exception:  # an earlier change left what this one cannot read
                files[name] = _bytes(content, random)
            done.append(f"{name}{change.__name__}")
    return done


def _kinds(name: str) -> list[Callable[[bytes, Random], Content]]:
    if name.endswith(".json"):
        return [_json]
    if name.endswith(".safetensors"):
        return [_header, _tensors, _tensors]
    if name.endswith(".bin"):
        return [_torch, _archive, _bytes]
    if name.endswith(".gguf"):
        return [_gguf]
    if name.endswith(".onnx"):
        return [_onnx]
    return [_bytes]


def _gguf(data: bytes, random: Random) -> bytes:
    """Another number in a GGUF file's header: a count, or a length, type or value beside a name."""
    changed, at = bytearray(data), random.choice((4, 8, 16))
    names = list(re.finditer(rb"(?:general|llama|tokenizer|blk|token_embd|output)[.\w]+", data))
    if names and random.random() < 0.9:
        name = random.choice(names)
        at = random.choice((name.start() - 8, *(name.end() + i for i in (0, 4, 8, 12, 20, 24))))
    size = random.choice((1, 4, 8))
    changed[at : at + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    return bytes(changed)


def _bytes(data: bytes, random: Random) -> bytes:
    """Bytes that are other ones, missing, or too many."""
    changed = bytearray(data)
    place = random.randrange(len(data) + 1)
    kind = random.randrange(5)
    if kind == 0:
        return bytes(changed[:place])
    if kind == 1:
        return bytes(changed + random.randbytes(random.choice((1, 8, 4096))))
    if kind == 2:
        changed[place : place + 16] = random.randbytes(random.randrange(16))
    for _ in range(random.randrange(1, 8)):
        # Most of what is checked stands at one of the ends.
        place = random.choice((random.randrange(len(data) + 1), random.randrange(300), -1))
        if changed and place < len(changed):
            changed[place] ^= 1 << random.randrange(8) if kind == 3 else random.randrange(256)
    return bytes(changed)


def _place(data: bytes, random: Random) -> Content:
    """Something else than a file."""
    return random.choice(
        (
            b"",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            lambda path: path.mkdir(),
            os.mkfifo,
            lambda path: path.symlink_to("/dev/zero"),
            lambda path: path.symlink_to("/dev/tty"),
            lambda path: path.symlink_to(path.name),
            lambda path: path.symlink_to("missing"),
            lambda path: (path.write_bytes(data), path.chmod(0)),
            lambda path: None,
        )
    )


def _json(data: bytes, random: Random) -> bytes:
    """A value anywhere that is another one, missing, or there twice."""
    value = json.loads(data)
    places: list[tuple[list | dict, object]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        keys = inner.keys() if isinstance(inner, dict) else range(min(len(inner), 50))
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                waiting.append(inner[key])
    if not places:
        return random.choice(MONSTERS).encode()
    # Places near the top are more likely: a tokenizer's vocabulary would drown the rest.
    inner, key = random.choice(places[: random.choice((5, 20, 50, len(places)))])
    mark = "a value to put in"
    kind = random.randrange(6)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict):
        inner[random.choice(KEYS)] = mark
    elif kind == 2 and isinstance(inner[key], int | float) and abs(inner[key]) < 2**62:
        inner[key] = random.choice((inner[key] * 2, inner[key] + 1, -inner[key], inner[key] / 3))
    else:
        inner[key] = mark
    text = json.dumps(value)
    monster = random.choice(MONSTERS)
    if kind == 5 and isinstance(inner, dict):  # the key a second time
        text = text.replace(f'"{mark}"', f"1, {json.dumps(key)}: {monster}")
    return text.replace(f'"{mark}"', monster).encode()


def _split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _header(data: bytes, random: Random) -> bytes:
    """A safetensors header that says something else."""
    header, rest = _split(data)
    name = random.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = random.randrange(8)
    if kind == 0:
        return _join(header, rest, random.choice(NUMBERS) % 2**64)
    if kind == 1:
        return _join(_json(json.dumps(header).encode(), random), rest)
    if kind == 2:
        entry["shape"] = [*entry["shape"], random.choice(NUMBERS)]
    elif kind == 3:
        entry["shape"][random.randrange(len(entry["shape"]))] = random.choice(NUMBERS)
    elif kind == 4:
        entry["dtype"] = random.choice(TYPES)
    elif kind == 5:
        entry["data_offsets"][random.randrange(2)] = random.choice((*NUMBERS, len(rest)))
    elif kind == 6:
        entry["data_offsets"] = header[random.choice(list(header)[1:])]["data_offsets"]
    else:
        header[random.choice((name + "x", "", "\0", "model.layers.0.", name * 500))] = entry
    return _join(header, rest)


def _tensors(data: bytes, random: Random) -> bytes:
    """A whole safetensors file with a tensor that does not belong there."""
    header, rest = _split(data)
    about = header.pop("__metadata__", {"format": "pt"})
    parts = {
        name: [entry["dtype"], list(entry["shape"]), rest[slice(*entry["data_offsets"])]]
        for name, entry in header.items()
    }
    name = random.choice(list(parts))
    dtype, shape, values = parts[name]
    kind = random.randrange(9)
    if kind == 0:
        del parts[name]
    elif kind == 1:
        parts[random.choice((name + "_g_idx", "lm_head.weight", "x", name.upper()))] = parts[name]
    elif kind == 2:
        parts[name][1] = random.choice((shape[::-1], [1, *shape], [*shape, 1], [len(values)], []))
    elif kind == 3:
        fit = [other for other in SIZES if SIZES[other] == SIZES.get(dtype)] or ["I8", "U8", "BOOL"]
        parts[name][0] = random.choice(fit)
    elif kind == 4:
        parts[name] = [dtype, [0, *shape[1:]], b""]
    elif kind == 5:
        rows = random.choice((1, 2, shape[0] + 1)) if shape else 1
        row = len(values) // max(shape[0], 1) if shape else len(values)
        parts[name] = [dtype, [rows, *shape[1:]], (values * 2)[: rows * row]]
    elif kind == 6:
        parts[name][2] = bytes([random.choice((0, 0x7F, 0x80, 0xFF))]) * len(values)
    elif kind == 7:
        parts[name][2] = random.randbytes(len(values))
    else:
        other = random.choice(list(parts))
        parts[name], parts[other] = parts[other], parts[name]
    header, end = {"__metadata__": about}, 0
    for key, (dtype, shape, values) in parts.items():
        size = math.prod(shape) * SIZES.get(dtype, 1)
        if size > MAX_BYTES:  # a change before this one made it so large
            return data
        parts[key][2] = values[:size].ljust(size, b"\0")
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return _join(header, b"".join(part[2] for part in parts.values()))


def _torch(data: bytes, random: Random) -> bytes:
    """A torch file with something else than a dense tensor of the right size."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    name = random.choice(list(state))
    tensor = state[name]
    state[name] = random.choice(
        (
            lambda: torch.zeros(1, dtype=tensor.dtype).expand(2**31 - 1, 2**20),
            lambda: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape),
            tensor.to_sparse,
            tensor.double,
            lambda: tensor.to(torch.complex64),
            tensor.int,
            lambda: tensor[None],
            lambda: tensor.t() if tensor.dim() == 2 else tensor[:1],
            lambda: tensor.to("meta"),
            lambda: torch.nn.Parameter(tensor),
            lambda: torch.full_like(tensor, float("nan")),
            tensor.bool,
            lambda: {"a": tensor},
            lambda: bytearray(64),
            lambda: [tensor] * 1000,
            lambda: 7,
        )
    )()
    if random.random() < 0.2:
        state[random.choice(("lm_head.weight", "x", 7, ""))] = tensor
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=data[:2] == b"PK")
    return file.getvalue()


def _archive(data: bytes, random: Random) -> bytes:
    """A torch file's archive packed anew: compressed, larger, or with a part that is another."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        odd = random.choice(old.infolist())
        for record in old.infolist():
            content, compression = old.read(record), zipfile.ZIP_STORED
            if record is odd:
                kind = random.randrange(4)
                if kind == 0:
                    content, compression = content + bytes(1 << 20), zipfile.ZIP_DEFLATED
                elif kind == 1:
                    content = _bytes(content, random)
                elif kind == 2:
                    compression = zipfile.ZIP_DEFLATED
                else:
                    continue
            new.writestr(record.filename, content, compression)
    return file.getvalue()


def _onnx(data: bytes, random: Random) -> bytes:  # noqa: PLR0912 - a change to a branch
    """A graph with something missing, renamed or of another size."""
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's class is nothing narrower
        raise ValueError from error
    graph = model.graph
    node = random.choice(graph.node)
    tensor = random.choice(graph.initializer)
    values = [*graph.input, *graph.output]
    kind = random.randrange(12)
    if kind == 0 and node.attribute:
        del node.attribute[random.randrange(len(node.attribute))]
    elif kind == 1 and node.attribute:
        attribute = random.choice(node.attribute)
        attribute.i = max(-(2**63), min(random.choice(NUMBERS), 2**63 - 1))
        attribute.name = random.choice((attribute.name, attribute.name, "x"))
    elif kind == 2 and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(("", "x", tensor.name))
    elif kind == 3 and node.input:
        del node.input[-1]
    elif kind == 4:
        node.op_type = random.choice(("MatMul", "Gather", "Loop", "x", "MatMulNBits", "Gemm"))
        node.domain = random.choice(("", "com.microsoft", "x"))
    elif kind == 5:
        tensor.dims[:] = [
            max(-(2**63), min(random.choice((*NUMBERS, size)), 2**63 - 1)) for size in tensor.dims
        ]
    elif kind == 6:
        tensor.data_type = random.choice((0, 1, 2, 7, 10, 16, 21, 22, 99, -1))
    elif kind == 7 and tensor.external_data:
        entry = random.choice(tensor.external_data)
        entry.value = random.choice(("", "../x", "config.json", "-1", "x", *map(str, NUMBERS)))
    elif kind == 8:
        graph.initializer.remove(tensor)
    elif kind == 9:
        del values[0], (graph.input if random.random() < 0.5 else graph.output)[-1]
    elif kind == 10:
        dims = random.choice(values).type.tensor_type.shape.dim
        if dims:
            random.choice(dims).dim_value = min(random.choice(NUMBERS), 2**63 - 1)
    else:
        model.opset_import[0].version = min(random.choice(NUMBERS), 2**63 - 1)
    return model.SerializeToString()
