"""What a model is made of: its modules as a tree, equal siblings merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from qllm.layers import Linear
from qllm.layers.base import describe
from qllm.models import Decoder


@dataclass(frozen=True)
class Node:
    """A module, or several equal ones.

    Attributes:
        name: its own name; of several, "0-31".
        count: how many there are.
        kind: its class.
        about: what a linear is: "4096 -> 12288, 4 bits, group 128, asym".
        bits, group_size: of a quantized linear, else None.
        tensors: its own, by name: type and shape.
        parameters: of all of them, tensors below included; packed weights count one by one.
        quantized: of these, those in quantized linears.
        nbytes: as a checkpoint has them.
        tied: it is another module's matrix, and counts there.
    """

    name: str
    count: int
    kind: str
    about: str
    bits: int | None
    group_size: int | None
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    parameters: int
    quantized: int
    nbytes: int
    tied: bool
    children: tuple[Node, ...]

    def signature(self) -> tuple:
        """What equal siblings have in common."""
        below = tuple(child.name + repr(child.signature()) for child in self.children)
        return (self.kind, self.about, self.tensors, self.tied, below)

    def to_json(self) -> dict[str, Any]:
        """The node and those below as one object."""
        return {
            "name": self.name,
            "count": self.count,
            "class": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "tensors": {
                name: {"dtype": dtype, "shape": list(shape)} for name, dtype, shape in self.tensors
            },
            "parameters": self.parameters,
            "quantized": self.quantized,
            "bytes": self.nbytes,
            "tied": self.tied,
            "children": [child.to_json() for child in self.children],
        }


def tree(model: Decoder) -> Node:
    """The tree of a model, which may lie on the meta device."""
    return _node("model", model, model.config.tied_head)


def _node(name: str, module: nn.Module, tied_head: bool) -> Node:
    if isinstance(module, Linear):
        return _linear(name, module, tied_head and name == "lm_head")
    children = tuple(
        _merged(
            _node(child, below, tied_head)
            for child, below in module.named_children()
            if not isinstance(below, nn.Identity)
        )
    )
    own = dict(module.named_buffers(recurse=False))
    size = sum(tensor.numel() for tensor in own.values())
    return Node(
        name=name,
        count=1,
        kind=type(module).__name__,
        about="",
        bits=None,
        group_size=None,
        tensors=_tensors(own),
        parameters=size + sum(child.parameters for child in children),
        quantized=sum(child.quantized for child in children),
        nbytes=sum(t.nbytes for t in own.values()) + sum(child.nbytes for child in children),
        tied=False,
        children=children,
    )


def _linear(name: str, module: Linear, tied: bool) -> Node:
    quantized = module.spec.kind != "dense"
    weights = 0 if tied else module.in_features * module.out_features
    bias = 0 if module.bias is None else module.bias.numel()
    shape = f"{module.in_features} -> {module.out_features}, {describe(module.spec)}"
    return Node(
        name=name,
        count=1,
        kind=type(module).__name__,
        about=shape,
        bits=module.spec.bits if quantized else None,
        group_size=module.spec.group_size if quantized else None,
        tensors=_tensors(dict(module.named_buffers(recurse=False))),
        parameters=weights + bias,
        quantized=weights if quantized else 0,
        nbytes=0 if tied else module.nbytes(),
        tied=tied,
        children=(),
    )


def _tensors(buffers: dict) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    return tuple(
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in buffers.items()
        if tensor.numel()
    )


def _merged(nodes: Iterator[Node]) -> Iterator[Node]:
    """Runs of equal siblings as one node each; only numbered ones are merged."""
    run: list[Node] = []
    for node in [*nodes, None]:
        equal = (
            node is not None
            and run
            and node.name.isdecimal()
            and node.signature() == run[0].signature()
        )
        if run and not equal:
            yield _several(run)
            run = []
        if node is not None:
            run.append(node)


def _several(run: list[Node]) -> Node:
    first, count = run[0], len(run)
    if count == 1:
        return first
    return Node(
        **{
            **vars(first),
            "name": f"{first.name}-{run[-1].name}",
            "count": count,
            "parameters": count * first.parameters,
            "quantized": count * first.quantized,
            "nbytes": count * first.nbytes,
        }
    )


def lines(node: Node) -> list[str]:
    """The tree as text: names and classes, parameters, megabytes, what each module holds."""
    rows = [*_rows(node, "", "")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    text = [
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {mb:>{widths[2]}}  {about}".rstrip()
        for name, size, mb, about in rows
    ]
    share = node.quantized / node.parameters if node.parameters else 0.0
    return [
        *text,
        f"{node.parameters:,} parameters, {node.nbytes / 1e6:,.2f} MB; {share:.1%} of them "
        "quantized",
    ]


def _rows(node: Node, prefix: str, below: str) -> Iterator[tuple[str, str, str, str]]:
    times = f" x {node.count}" if node.count > 1 else ""
    tensors = ", ".join(
        f"{name} {dtype}[{','.join(map(str, shape))}]" for name, dtype, shape in node.tensors
    )
    about = "; ".join(part for part in (node.about, "tied" if node.tied else tensors) if part)
    name = f"{prefix}{node.name} ({node.kind}){times}"
    yield name, f"{node.parameters:,}", f"{node.nbytes / 1e6:,.2f} MB", about
    for number, child in enumerate(node.children):
        last = number == len(node.children) - 1
        branch, rest = ("└── ", "    ") if last else ("├── ", "│   ")
        yield from _rows(child, below + branch, below + rest)
