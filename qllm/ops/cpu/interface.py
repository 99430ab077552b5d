"""The C interface in Python: the arguments of each op, as `src/kernels.h` has them.

A structure is a line of names: int64 by itself, *name a pointer, =name a double. What the library
says of its ops and their sizes is compared with this when it is opened (`mismatch`).
"""

from __future__ import annotations

import ctypes
from itertools import count

KINDS = {"*": ctypes.c_void_p, "=": ctypes.c_double}
OK, NO_MEMORY, BAD_INDEX = range(3)  # what an op returns: Status of kernels.h


def structure(name: str, text: str) -> type[ctypes.Structure]:
    """A C structure of int64, of pointers (*name) and of doubles (=name)."""
    fields = [(word.lstrip("*="), KINDS.get(word[0], ctypes.c_int64)) for word in text.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Linear = structure(
    "Linear",
    "rows inputs outputs bits group mode prefill *x x_type x_stride *y *q *levels *scales "
    "scale_type *zeros *offsets *bias *input_scale",
)
Dense = structure("Dense", "rows inputs outputs x_stride type decode *x *w *bias *y")
Packing = structure(
    "Packing",
    "inputs outputs bits group *rows row_bytes *row_scales *row_zeros scale_bytes *q *scales "
    "*zeros *row_offsets *offsets *levels",
)
Distinct = structure("Distinct", "inputs outputs bits *rows row_bytes *found")
Factoring = structure("Factoring", "rows groups group *scales *factored *failed")
Blocks = structure("Blocks", "rows blocks kind *x *levels *q *scales *offsets")
Activate = structure("Activate", "rows channels kind gated type *x *y")
Norm = structure(
    "Norm",
    "rows channels stride centered type =eps =offset run first second third *x *weight *bias *y",
)
Add = structure("Add", "count type =factor *x *z *y")
ScaleRows = structure("ScaleRows", "rows columns scaled type *x *factors *y")
Gate = structure("Gate", "rows channels stride first kind type *x *gates *y")
Convolution = structure(
    "Convolution",
    "sequences channels stride kernel type *x *weight *rows *starts *positions *inputs *y",
)
DeltaRule = structure(
    "DeltaRule",
    "sequences key_heads heads key_dim value_dim type *qkv *gates *decay *rows *starts *positions "
    "*memory *y",
)
Route = structure("Route", "rows experts top_k normalizes type *logits *gate *weights *chosen")
Experts = structure(
    "Experts",
    "rows channels experts top_k calls_each capacity type *x *weights *chosen *calls *taken *given "
    "*total *y",
)
Gather = structure("Gather", "rows columns gathered bytes *x *index *y")
Join = structure("Join", "rows columns others joined bytes *x *z *y")
Embed = structure("Embed", "rows table_rows bytes offset *index *table *y")
EmbedPacked = structure(
    "EmbedPacked",
    "rows table_rows inputs bits group type scale_type *index *q *levels *scales *zeros "
    "*offsets *y",
)
# Of a decode step and of prefill: one token to a sequence, or runs of them.
Attend = structure(
    "Attend",
    "sequences heads kv_heads dim capacity type bits width window =scale =cap last *qkv *rows"
    " *starts *positions *cos *sin *slopes *sinks *keys *values *y *key_codes *value_codes"
    " *key_scales *value_scales *key_zeros *value_zeros",
)
# Of attention that gradients go through, and of the way back.
AttendSequences = structure(
    "AttendSequences",
    "sequences length heads kv_heads dim type window q_stride k_stride v_stride =scale =cap *q *k"
    " *v *slopes *sinks *y *stats *grad_y *grad_q *grad_k *grad_v",
)
StepRounding = structure(
    "StepRounding",
    "rows inputs groups group qmax symmetric scale_type type parts part_stride factor_stride =rate"
    " =range_rate =beta1 =beta2 =least_scale =least =largest *gradients *ideal *ideal_exp_avg *low"
    " *high *factors *factor_exp_avg *perm *matrix",
)
DescendBlock = structure(
    "DescendBlock",
    "channels rows qmax stride *products *values *gradient *scales *low *step_sizes *moves",
)

OPS: dict[str, type[ctypes.Structure]] = {
    "linear": Linear,
    "dense": Dense,
    "pack": Packing,
    "unpack": Packing,
    "distinct": Distinct,
    "factor": Factoring,
    "unblock": Blocks,
    "activate": Activate,
    "norm": Norm,
    "add": Add,
    "scale_rows": ScaleRows,
    "gate": Gate,
    "causal_conv": Convolution,
    "delta_rule": DeltaRule,
    "route": Route,
    "experts": Experts,
    "gather": Gather,
    "join": Join,
    "embed": Embed,
    "embed_packed": EmbedPacked,
    "attend": Attend,
    "attend_prefill": Attend,
    "attend_sequences": AttendSequences,
    "attend_sequences_backward": AttendSequences,
    "step_rounding": StepRounding,
    "descend_block": DescendBlock,
}


class Call(ctypes.Structure):
    """A function of the library and its arguments, as in kernels.h."""

    _fields_ = (("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


def declare(library: ctypes.CDLL) -> None:
    """Say what a library's functions return; ctypes takes all else for int."""
    for name in ("features", "op", "replay", "read_all", "multiply_all", *OPS):
        getattr(library, f"qllm_{name}").restype = ctypes.c_int64
    for name in ("amx_state", "message"):
        getattr(library, f"qllm_{name}").restype = ctypes.c_char_p
    library.qllm_use.restype = ctypes.c_bool


def mismatch(library: ctypes.CDLL) -> str | None:
    """The op whose arguments have another size here than in a library; None where all agree."""
    found = {}
    for index in count():
        name = ctypes.c_char_p()
        size = library.qllm_op(ctypes.c_int64(index), ctypes.byref(name))
        if size < 0 or name.value is None:
            break
        found[name.value.decode()] = size
    own = {name: ctypes.sizeof(arguments) for name, arguments in OPS.items()}
    return next((name for name in {**found, **own} if found.get(name) != own.get(name)), None)
