"""Of every op: what layers may ask of it, arguments, and the exact result."""

from __future__ import annotations

from functools import partial

import exact
import numpy as np
import torch
from recurrent_examples import RECURRENT

from qllm.config import SCHEMES
from qllm.ops import SIMPLE, Request, reference
from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.rounding import Rounding
from qllm.quant.packing import BITS, pack

SHAPES = ((64, 32), (67, 13), (1, 1), (256, 40))  # (K, N)
EXACT = (
    *("int8_linear", "embedding", "add", "scale", "scale_rows", "gather", "join"),
    "descend_block",
)
IN_FLOAT32 = ("descend_block", "route")
TO_INT8 = ("layer_norm_int8", "rms_norm_int8")


def requests(op: str) -> list[Request]:
    """What layers may ask of an op on a CPU."""
    if op == "dense_linear":
        return [Request(*shape, 16, 128, "asym", "cpu") for shape in SHAPES]
    if op == "int8_linear":
        return [Request(*shape, 8, -1, "sym", "cpu") for shape in SHAPES]
    if op in SIMPLE:
        return [Request(*shape, 16, -1, "asym", "cpu") for shape in SHAPES]
    return [
        Request(*shape, bits, group_size, scheme, "cpu")
        for shape in SHAPES
        for bits in BITS
        for group_size in (-1, 7, 32, 128)
        for scheme in SCHEMES
    ]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(x: torch.Tensor, weight: np.ndarray, bias: torch.Tensor) -> tuple[np.ndarray, float]:
    """x W^T + b in float64, and the largest sum of absolute values in it."""
    x, bias = exact.numpy(x), exact.numpy(bias)
    size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    return x @ weight.T + bias, size.max()


def dense_example(request: Request, rows: int, dtype: torch.dtype):
    x = normal(rows, request.in_features).to(dtype)
    weight = normal(request.out_features, request.in_features).to(dtype)
    bias = normal(request.out_features).to(dtype)
    arguments = {"x": x, "weight": weight, "bias": bias}
    return arguments, *product(x, exact.numpy(weight), bias)


def weight_only_example(request: Request, rows: int, dtype: torch.dtype):
    columns, outputs, bits = request.in_features, request.out_features, request.bits
    step = columns if request.group_size == -1 else request.group_size
    random = np.random.default_rng(columns * bits)
    q = random.integers(0, 2**bits, (outputs, columns), dtype=np.uint8)
    zeros = random.integers(0, 2**bits, (outputs, -(-columns // step)), dtype=np.uint8)
    scales = random.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    index = np.arange(columns) // step
    symmetric = request.scheme == "sym"
    zero = 2 ** (bits - 1) if symmetric else zeros[:, index].astype(np.int64)
    matrix = (q.astype(np.int64) - zero) * scales.astype(np.float64)[:, index]
    x, bias = normal(rows, columns).to(dtype), normal(outputs).to(dtype)
    qzeros = torch.from_numpy(zeros)
    arguments = {
        "x": x,
        "qweight": pack(torch.from_numpy(q), bits),
        "scales": torch.from_numpy(scales),
        "qzeros": qzeros.new_empty(0) if symmetric else qzeros,
        "bias": bias,
        "out_features": outputs,
        "bits": bits,
        "group_size": request.group_size,
    }
    return arguments, *product(x, matrix, bias)


def weight_only_int8_example(request: Request, rows: int, dtype: torch.dtype):
    arguments, *_ = weight_only_example(request, rows, dtype)
    matrix = reference.dequantize(
        *(arguments[name] for name in ("qweight", "scales", "qzeros", "bits", "group_size")),
        request.in_features,
        torch.float64,
    )
    rounded = torch.from_numpy(exact.int8_blocks(arguments["x"], request.group_size))
    return arguments, *product(rounded, matrix.numpy(), arguments["bias"])


def int8_example(request: Request, rows: int, dtype: torch.dtype, *, static: bool):
    random = np.random.default_rng(rows)
    x = normal(rows, request.in_features).to(dtype)
    x[0] *= 100  # outside of the static range
    x[rows // 2] = 0
    weight = random.integers(-128, 128, (request.out_features, request.in_features), dtype=np.int8)
    scales = random.uniform(0.001, 0.01, request.out_features).astype(np.float16)
    bias = normal(request.out_features).to(dtype)
    values = x.float().numpy()
    x_scales = np.float32(0.02)
    if not static:
        x_scales = np.abs(values).max(axis=1, keepdims=True) * np.float32(2) / np.float32(255)
        x_scales[x_scales == 0] = 1
    q = np.clip(np.rint(values / x_scales), -128, 127).astype(np.int64)
    total = (q @ weight.T.astype(np.int64)).astype(np.float32)
    # Three roundings to float32 and one to the type: the specification says to the bit what comes.
    y = total * x_scales * scales.astype(np.float32) + bias.float().numpy()
    arguments = {
        "x": x,
        "qweight": torch.from_numpy(weight),
        "scales": torch.from_numpy(scales),
        "bias": bias,
        "input_scale": torch.tensor(x_scales) if static else None,
        "out_features": request.out_features,
    }
    return arguments, exact.numpy(torch.from_numpy(y).to(dtype)), 0.0


def embedding_example(request: Request, rows: int, dtype: torch.dtype):
    table = normal(request.out_features + 2, request.in_features).to(dtype)
    index = torch.arange(rows) % request.out_features
    arguments = {"index": index, "table": table, "offset": 2}
    return arguments, exact.numpy(table[index + 2]), 0.0


def norm_example(
    request: Request,
    rows: int,
    dtype: torch.dtype,
    *,
    centered: bool,
    affine: bool,
    offset: float = 0.0,
):
    x = (normal(rows, request.in_features) * 3 + 1).to(dtype)
    weight, bias = normal(2, request.in_features).to(dtype) if affine else (None, None)
    arguments = {"x": x, "weight": weight, **({"bias": bias} if centered else {}), "eps": 1e-5}
    if offset:
        arguments["offset"], weight = offset, weight.double() + offset
    bias = bias if centered else None
    y, size = exact.norm(x, weight, bias, 1e-5, centered=centered)
    return arguments, y, size.max()


def qk_norm_example(
    request: Request, rows: int, dtype: torch.dtype, *, offset: float, values: bool = False
):
    dim, heads, kv_heads = request.in_features, 3, 2
    qkv = (normal(rows, heads + 2 * kv_heads, dim) * 3 + 1).to(dtype)
    weight = normal(2, dim).to(dtype)
    want, sizes = exact.numpy(qkv).copy(), [0.0]
    last = heads + kv_heads
    parts = [(slice(heads), weight[0]), (slice(heads, last), weight[1])]
    parts += [(slice(last, None), None)] * values
    for part, each in parts:
        found = qkv[:, part].flatten(0, 1)
        whole = None if each is None else each.double() + offset
        y, size = exact.norm(found, whole, None, 1e-5, centered=False)
        want[:, part] = y.reshape(qkv[:, part].shape)
        sizes.append(size.max())
    arguments = {"qkv": qkv.flatten(1), "weight": weight.flatten(), "heads": heads}
    arguments |= {"kv_heads": kv_heads, "eps": 1e-5, "offset": offset, "values": values}
    return arguments, want.reshape(rows, -1), max(sizes)


def wide_qk_norm_example(request: Request, rows: int, dtype: torch.dtype, *, offset: float):
    queries, keys, values = 2 * request.in_features, request.in_features, 5
    qkv = (normal(rows, queries + keys + values) * 3 + 1).to(dtype)
    weight = normal(queries + keys).to(dtype)
    want, sizes = exact.numpy(qkv).copy(), [0.0]
    for part in (slice(queries), slice(queries, queries + keys)):
        each = weight[part].double() + offset
        want[:, part], size = exact.norm(qkv[:, part], each, None, 1e-5, centered=False)
        sizes.append(size.max())
    arguments = {"qkv": qkv, "weight": weight, "queries": queries, "keys": keys}
    return arguments | {"eps": 1e-5, "offset": offset}, want, max(sizes)


def norm_int8_example(
    request: Request,
    rows: int,
    dtype: torch.dtype,
    *,
    centered: bool,
    affine: bool,
    scale: float | None,
    offset: float = 0.0,
):
    options = {"centered": centered, "affine": affine, "offset": offset}
    arguments, y, size = norm_example(request, rows, dtype, **options)
    arguments["input_scale"] = None if scale is None else torch.tensor(scale)
    return arguments, y if scale is None else y.clip(-128 * scale, 127 * scale), size


def activation_example(request: Request, rows: int, dtype: torch.dtype, *, name: str, gated: bool):
    spread = 6 if name == reference.SWIGLU_OAI else 3  # that one clamps
    x = (normal(rows, request.in_features * (2 if gated else 1)) * spread).to(dtype)
    gate, up = np.split(exact.numpy(x), 2, axis=1) if gated else (exact.numpy(x), 1)
    if name == reference.SWIGLU_OAI:
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        y = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        return {"x": x, "name": name}, y, np.abs(gate * (np.abs(up) + 1)).max()
    y = exact.ACTIVATIONS[name](gate) * up
    return {"x": x, "name": name}, y, max(np.abs(gate * up).max(), np.abs(y).max())  # of a square


def scale_rows_example(request: Request, rows: int, dtype: torch.dtype):
    x, factors = normal(rows, request.in_features).to(dtype), normal(rows).to(dtype)
    columns = request.in_features * 2 // 3
    want = x.double()
    want[:, :columns] *= factors.double()[:, None]
    arguments = {"x": x, "factors": factors, "columns": columns}
    return arguments, exact.numpy(want.to(dtype)), 0.0


def gather_example(request: Request, rows: int, dtype: torch.dtype):
    x, index = normal(rows, request.in_features).to(dtype), torch.arange(request.out_features)
    index = index * 7 % request.in_features
    return {"x": x, "index": index}, exact.numpy(x)[:, index.numpy()], 0.0


def join_example(request: Request, rows: int, dtype: torch.dtype):
    x, z = (normal(rows, n).to(dtype) for n in (request.in_features, request.out_features))
    columns = -(-request.out_features // 3)
    want = np.concatenate([exact.numpy(x), exact.numpy(z)[:, -columns:]], axis=1)
    return {"x": x, "z": z, "columns": columns}, want, 0.0


def route_example(
    request: Request, rows: int, dtype: torch.dtype, *, normalizes: bool, gated: bool
):
    """As many experts as a request has inputs, of which a token takes a third or so."""
    count = request.in_features
    top_k, logits = -(-count // 3), normal(rows, count).to(dtype)
    gate = normal(rows, 1).to(dtype) if gated else None
    arguments = {"logits": logits, "gate": gate, "top_k": top_k, "normalizes": normalizes}
    weights, chosen = exact.route(exact.numpy(logits), top_k, normalizes)
    want = np.zeros((rows, count + 1))
    np.put_along_axis(want, chosen, weights, axis=1)
    if gate is not None:
        want[:, -1:] = 1 / (1 + np.exp(-exact.numpy(gate)))
    return arguments, want, 1.0


def routed(weights: torch.Tensor, chosen: torch.Tensor, arguments: dict) -> torch.Tensor:
    """What each expert counts for each token: (N, E + 1), the last column of the shared one."""
    rows, count = arguments["logits"].shape
    return torch.zeros(rows, count + 1).scatter_(1, chosen.cpu(), weights.cpu())


def one_tensor(op: str, result: object, arguments: dict) -> torch.Tensor:
    """What an op returns."""
    return routed(*result, arguments) if op == "route" else result


def add_example(request: Request, rows: int, dtype: torch.dtype):
    x, z = normal(2, rows, request.in_features).to(dtype)
    return {"x": x, "z": z}, exact.numpy((x.double() + z.double()).to(dtype)), 0.0


def scale_example(request: Request, rows: int, dtype: torch.dtype):
    x, factor = normal(rows, request.in_features).to(dtype), 55.5
    return {"x": x, "factor": factor}, exact.numpy((x.double() * factor).to(dtype)), 0.0


CAPACITY = 70  # of the cache


def attention_example(
    request: Request,
    rows: int,
    dtype: torch.dtype,
    *,
    prompt: bool,
    rotated: bool,
    share: int,
    scores: Scores = PLAIN,
):
    """Rows of a prompt that see each other, or new tokens that have a cache each."""
    dim, kv_heads = request.in_features + request.in_features % 2, 2
    heads, at = kv_heads * share, torch.arange(rows) * (1 if prompt else 7) % CAPACITY
    qkv = normal(rows, (heads + 2 * kv_heads) * dim).to(dtype)
    keys, values = normal(2, 1 if prompt else rows, kv_heads, CAPACITY, dim).to(dtype)
    angle = normal(rows, dim // 2).repeat(1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if rotated else None
    slopes = None if rotated else torch.linspace(0.01, 0.5, heads)
    lengths, pasts = ([rows], [0]) if prompt else ([1] * rows, at.tolist())
    batch = Batch.of(lengths, "cpu", pasts=pasts)
    arguments = {"qkv": qkv, "kv": KV(keys, values), "batch": batch}
    arguments |= {"cos_sin": angles, "slopes": slopes, "scores": scores}
    parts = exact.numpy(qkv).reshape(rows, -1, dim)
    q, k, v = np.split(parts, [heads, heads + kv_heads], axis=1)
    q, k = exact.rotate(q, angles), exact.rotate(k, angles)
    caches = [exact.numpy(part).copy() for part in (keys, values)]
    found = []
    for row, position in enumerate(at.tolist()):
        own = [cache[0 if prompt else row] for cache in caches]
        own[0][:, position], own[1][:, position] = k[row], v[row]
        begin = max(0, position + 1 - scores.window) if scores.window else 0
        seen = (cache[:, begin : position + 1] for cache in own)
        sloped = None if rotated else exact.numpy(slopes)
        found.append(exact.attention(q[row], *seen, sloped, scores))
    y, size = (np.stack(parts) for parts in zip(*found, strict=True))
    return arguments, y.reshape(rows, -1), size.max()


def step_rounding_example(request: Request, rows: int, dtype: torch.dtype):
    """A matrix (rows, K) of 3 bits in groups of 16, of which some weights are out of range."""
    columns, group, qmax = request.in_features, 16, 7
    random = np.random.default_rng(columns + rows)
    shape = (rows, -(-columns // group), group)
    zeros, scales = random.integers(0, 8, shape[:2]), random.uniform(0.5, 2, shape[:2])
    exact_state = {
        "ideal": (
            random.integers(-2, 10, shape) + random.uniform(-0.4, 0.4, shape) - zeros[..., None]
        )
        * scales[..., None],
        "low": -zeros * scales,
        "high": (qmax - zeros) * scales,
        "factors": random.uniform(0.8, 1.1, (2, *shape[:2])),
        "ideal_exp_avg": random.normal(size=shape),
        "factor_exp_avg": random.normal(size=(2, *shape[:2])),
    }
    flat = exact_state["ideal"].reshape(rows, -1)
    flat[:, columns:] = 0
    tensors = {name: torch.from_numpy(value).float() for name, value in exact_state.items()}
    state = Rounding(
        **tensors, perm=None, columns=columns, bits=3, symmetric=False, dtype=torch.float32
    )
    gradients = normal(2, rows, columns).to(dtype)
    want = exact.step_rounding(
        *map(exact.numpy, tensors.values()), exact.numpy(gradients).sum(0), qmax, 0.05, 0.02
    )
    arguments = {"state": state, "gradients": gradients, "rate": 0.05, "range_rate": 0.02}
    arguments["matrix"] = torch.empty(rows, columns, dtype=dtype)
    return arguments, want, np.abs(want).max()


def descend_block_example(request: Request, rows: int, dtype: torch.dtype):
    """Channels whose best integers are far enough apart for any arithmetic to agree on."""
    channels = request.in_features
    random = np.random.default_rng(channels + rows)
    shape = (channels, rows)
    products = random.integers(-8, 9, (channels, channels)) / 64
    values = random.integers(-3, 5, shape)
    gradient, scales = random.integers(-64, 65, shape) / 16, 2.0 ** random.integers(-2, 2, shape)
    low = np.full(shape, -3.0)
    given = {
        "products": products, "values": values, "gradient": gradient, "scales": scales, "low": low,
        "step_sizes": np.full(shape, 0.4375),
    }  # fmt: skip
    arguments = {name: torch.from_numpy(value).float() for name, value in given.items()}
    want = exact.descend_block(**given, qmax=7)
    return arguments | {"qmax": 7}, want, 0.0


# Of each op, for a request: arguments, the exact result, and the size of what it sums, which is
# what rounding errors are in proportion to. An op that is not here fails the walk.
EXAMPLES = {
    "dense_linear": (dense_example,),
    "weight_only_linear": (weight_only_example,),
    "weight_only_linear_int8": (weight_only_int8_example,),
    "int8_linear": (partial(int8_example, static=False), partial(int8_example, static=True)),
    "embedding": (embedding_example,),
    "layer_norm": tuple(
        partial(norm_example, centered=True, affine=affine) for affine in (True, False)
    ),
    "rms_norm": tuple(
        partial(norm_example, centered=False, affine=affine, offset=offset)
        for affine, offset in ((True, 0.0), (False, 0.0), (True, 1.0))
    ),
    "qk_norm": (
        *(partial(qk_norm_example, offset=offset) for offset in (0.0, 1.0)),
        partial(qk_norm_example, offset=0.0, values=True),
    ),
    "wide_qk_norm": tuple(partial(wide_qk_norm_example, offset=offset) for offset in (0.0, 1.0)),
    **{
        op: tuple(
            partial(norm_int8_example, centered=op == "layer_norm_int8", affine=affine, scale=scale)
            for affine, scale in ((True, None), (False, None), (True, 0.05))
        )
        for op in TO_INT8
    },
    "rms_norm_int8": tuple(
        partial(norm_int8_example, centered=False, affine=affine, scale=scale, offset=offset)
        for affine, scale, offset in (
            *((True, None, 0.0), (False, None, 0.0)),
            *((True, 0.05, 0.0), (True, None, 1.0)),
        )
    ),
    "activation": tuple(
        partial(activation_example, name=name, gated=False) for name in exact.ACTIVATIONS
    ),
    "gated_activation": tuple(
        partial(activation_example, name=name, gated=True)
        for name in (*exact.ACTIVATIONS, reference.SWIGLU_OAI)
    ),
    "add": (add_example,),
    "scale": (scale_example,),
    "scale_rows": (scale_rows_example,),
    "route": tuple(
        partial(route_example, normalizes=normalizes, gated=gated)
        for normalizes, gated in ((False, False), (True, True))
    ),
    "gather": (gather_example,),
    "join": (join_example,),
    **RECURRENT,
    "step_rounding": (step_rounding_example,),
    "descend_block": (descend_block_example,),
    **{
        f"{how}_attention": tuple(
            partial(attention_example, prompt=prompt, rotated=rotated, share=share, scores=scores)
            for rotated, share, scores in (
                *((True, 3, PLAIN), (False, 1, PLAIN), (True, 2, Scores(0.3, 2.0, 5))),
                (True, 3, Scores(sinks=torch.linspace(-1, 2, 6))),
            )
        )
        for how, prompt in (("decode", False), ("prefill", True), ("differentiable", True))
    },
}
