"""What to quantize and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qllm.config.model import ModelConfig
from qllm.errors import UserError
from qllm.files import parse_json, read_bytes
from qllm.patterns import ByLayer, Patterns

DEFAULT_GROUP_SIZE = 128
DEFAULT_SCHEME = "asym"
SCHEMES = ("sym", "asym")
# How the integers are chosen: to nearest, or from calibration (see qllm.quant).
ALGORITHMS = ("rtn", "gptq", "awq", "signround")
DEFAULT_ALGORITHM = "rtn"
# Of what layers of 1 to 8 bits multiply their weights with.
DEFAULT_ACTIVATION_BITS = 16
ACTIVATION_BITS = (8, DEFAULT_ACTIVATION_BITS)
DEFAULT_KV_BITS = 16  # of keys and values: the type of the activations
KV_BITS = (DEFAULT_KV_BITS, 8, 4)
# The quantized modules outside the layers, which stay at 16 bits unless they are named.
EMBEDDING, LM_HEAD = "embed", "lm_head"
W8A8 = {"8:tc-li": "w8a8_dynamic", "8:tc": "w8a8_static"}
MAX_SEED = 2**63 - 1  # that torch's generators take
BITWIDTHS = ("1", "2", "3", "4", "5", "6", "7", "8", *W8A8, "16")


@dataclass(frozen=True)
class QuantSpec:
    """How one linear layer holds its weight, and what arithmetic it uses.

    Attributes:
        bits: bits per weight, 1 to 8, or 16 for a dense layer.
        group_size: input channels that share a scale; -1 is all of them.
        scheme: "asym" (a zero point per group), "sym", or, of some files of others, "offset": a
            number per group that is added to q · scale.
        kind: the row of `qllm.layers.LAYERS` that implements it: "dense", "weight_only",
            "w8a8_dynamic" (int8 activations, a scale per token) or "w8a8_static" (one scale per
            tensor, from calibration).
        algorithm: how a weight-only layer's integers are chosen, one of ALGORITHMS.
    """

    bits: int = 16
    group_size: int = DEFAULT_GROUP_SIZE
    scheme: str = DEFAULT_SCHEME
    kind: str = "dense"
    algorithm: str = DEFAULT_ALGORITHM

    @classmethod
    def parse(
        cls,
        bitwidth: str | int,
        group_size: int = DEFAULT_GROUP_SIZE,
        scheme: str = DEFAULT_SCHEME,
        algorithm: str = DEFAULT_ALGORITHM,
    ) -> QuantSpec:
        """The spec of one `--bitwidth` value.

        Raises:
            UserError: for an unknown bitwidth, scheme or algorithm, or a group size below 1 that
                is not -1.
        """
        text = str(bitwidth).strip()
        if text not in BITWIDTHS:
            raise UserError(f"bitwidth {text!r} is unknown; choose from {', '.join(BITWIDTHS)}")
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise UserError(f"group size {group_size!r} is not a whole number")
        if group_size < 1 and group_size != -1:
            raise UserError(
                f"group size {group_size} cannot be; give 1 or more, or -1 for all of a channel"
            )
        if scheme not in SCHEMES:
            raise UserError(f"scheme {scheme!r} is unknown; choose from {', '.join(SCHEMES)}")
        if algorithm not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise UserError(f"algorithm {algorithm!r} is unknown; choose from {known}")
        if text == "16":
            return cls()
        if text in W8A8:
            return cls(8, -1, "sym", W8A8[text])
        return cls(int(text), group_size, scheme, "weight_only", algorithm)

    @property
    def bitwidth(self) -> str:
        """The `--bitwidth` value that gives this spec."""
        names = {kind: name for name, kind in W8A8.items()}
        return names.get(self.kind, str(self.bits))

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has; a last, shorter one counts."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def to_json(self) -> dict[str, Any]:
        """The object that a JSON plan holds for this spec."""
        if self.kind != "weight_only":
            return {"bits": self.bitwidth}
        value = {"bits": self.bits, "group_size": self.group_size, "scheme": self.scheme}
        # Left out where it is what a reader takes without it.
        own = self.algorithm != DEFAULT_ALGORITHM
        return value | ({"algorithm": self.algorithm} if own else {})

    @classmethod
    def from_json(cls, value: Any, default: QuantSpec | None = None) -> QuantSpec:
        """The inverse of `to_json`; a bare bitwidth (4, "8:tc-li") stands for an object too.

        Args:
            default: has the group size, scheme and algorithm that `value` leaves out.
        """
        default = default or cls()
        rest = {key: getattr(default, key) for key in ("group_size", "scheme", "algorithm")}
        if isinstance(value, Mapping):
            if set(value) - {"bits", *rest} or "bits" not in value:
                raise UserError(
                    f"{dict(value)} is no quantization spec; write "
                    '{"bits": 4, "group_size": 128, "scheme": "asym", "algorithm": "rtn"}'
                )
            rest |= {key: value[key] for key in rest if key in value}
            value = value["bits"]
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise UserError(f"{value!r} is no bitwidth; choose from {', '.join(BITWIDTHS)}")
        return cls.parse(value, **rest)


@dataclass(frozen=True)
class QuantPlan:
    """Which linear layer gets which spec.

    Attributes:
        rules: pairs of a regular expression and a spec; the last one found in a module's name
            decides, and a module that none is found in stays at 16 bits.
        num_layers: the number of layers the plan was written for, when it names them one by one.
        text: the plan as the user wrote it.
        stages: where the stages of a pipeline begin, as --stages has it; None: it does not say.
        model: fields of the ModelConfig that it was made for, see `check`; None: any.
        names_layers: whether a user named the bits of layers, be they 16, or those of embedding
            and LM head at the most; None: the plan is no user's.
    """

    rules: tuple[tuple[str, QuantSpec], ...]
    num_layers: int | None = None
    text: str = ""
    stages: str | None = None
    model: Mapping[str, Any] | None = None
    names_layers: bool | None = None

    @property
    def quantizes(self) -> bool:
        """Whether a rule gives fewer than 16 bits."""
        return any(spec.kind != "dense" for _, spec in self.rules)

    @property
    def outer_alone(self) -> tuple[str, ...]:
        """Embedding and LM head, those that a user named the bits of, where no layer's are."""
        if self.names_layers is not False:
            return ()
        patterns = [pattern for pattern, _ in self.rules]
        return tuple(name for name in (EMBEDDING, LM_HEAD) if any(name in p for p in patterns))

    @property
    def keeps_stored(self) -> bool:
        """Whether a checkpoint that is quantized already is loaded as it is."""
        return not (self.quantizes or self.names_layers or self.outer_alone)

    @classmethod
    def uniform(cls, spec: QuantSpec) -> QuantPlan:
        """The plan that gives every layer the same spec."""
        return cls(((".*", spec),), text=spec.bitwidth)

    @classmethod
    def parse(cls, text: str, default: QuantSpec | None = None) -> QuantPlan:
        """The plan that `--bitwidth` names: one value, one per layer ("4,4,8"), or a JSON file.

        Args:
            default: has the group size, scheme and algorithm of values that name none.

        Raises:
            UserError: for values, files or rules that are not a plan.
        """
        text = text.strip()
        if text.endswith(".json"):
            return cls.from_file(Path(text), default)
        if "," not in text:
            return cls(((".*", QuantSpec.from_json(text, default)),), text=text)
        specs = [QuantSpec.from_json(value, default) for value in text.split(",")]
        rules = tuple((rf"^layers\.{i}\.", spec) for i, spec in enumerate(specs))
        return cls(rules, len(specs), text)

    @classmethod
    def from_file(cls, path: Path, default: QuantSpec | None = None) -> QuantPlan:
        """The plan in a JSON file, in the shape of `to_json`.

        Raises:
            UserError: for a file that is none.
        """
        return cls.from_json(read_plan_file(path), str(path), default)

    @classmethod
    def from_json(
        cls,
        value: Mapping[str, Any],
        text: str = "the plan",
        default: QuantSpec | None = None,
    ) -> QuantPlan:
        """The inverse of `to_json`.

        What qllm_plan.py writes is taken, too: `{"rules": {…}, "model": {…}, "stages": "2,3.5",
        …}`, whose other keys are for readers.
        """
        if isinstance(value.get("front"), list):
            raise UserError(
                f"{text} is a front of plans, as qllm_plan.py --pareto writes: give one of its "
                "entries, or leave that out"
            )
        if isinstance(value.get("rules"), Mapping):
            model, stages = value.get("model"), value.get("stages")
            if not isinstance(model, Mapping) or not isinstance(stages, str | None):
                raise UserError(
                    f"{text}: beside its rules a plan says which model it was made for, and may "
                    'have stages, such as "2,3.5"; qllm_plan.py writes them'
                )
            plan = cls.from_json(value["rules"], text, default)
            return replace(plan, stages=stages, model=model)
        rules, patterns = [], Patterns(text)
        for pattern, spec in value.items():
            patterns.compile(pattern)
            try:
                rules.append((pattern, QuantSpec.from_json(spec, default)))
            except UserError as error:
                raise UserError(f"{text}: {pattern!r}: {error}") from None
        return cls(tuple(rules), text=text)

    def with_rule(self, pattern: str, spec: QuantSpec) -> QuantPlan:
        """The plan with one more rule, which wins over those it has."""
        return replace(self, rules=(*self.rules, (pattern, spec)))

    def with_outer(
        self,
        lm_head_bits: int | str | None,
        embedding_bits: int | str | None,
        default: QuantSpec,
    ) -> QuantPlan:
        """The plan with LM head and embedding quantized as well, None leaves one as it is.

        Args:
            default: has the group size, scheme and algorithm.
        """
        plan = self
        known = [width for width in BITWIDTHS if width not in W8A8]
        for name, called, bits, choices in (
            (LM_HEAD, "LM head", lm_head_bits, BITWIDTHS),
            (EMBEDDING, "embedding", embedding_bits, known),
        ):
            if bits is None:
                continue
            if isinstance(bits, bool) or str(bits).strip() not in choices:
                raise UserError(
                    f"bits of the {called} are {bits!r}; choose from {', '.join(choices)}"
                )
            plan = plan.with_rule(f"^{name}$", QuantSpec.from_json(bits, default))
        return plan

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            UserError: naming what differs.
        """
        for key, value in (self.model or {}).items():
            ours = getattr(config, key, None)
            if ours != value:
                raise UserError(
                    f"{self.text} was made for another model: its {key} is {value}, not {ours}"
                )

    def to_json(self) -> dict[str, Any]:
        """The JSON plan: regular expression to spec."""
        return {pattern: spec.to_json() for pattern, spec in self.rules}

    def resolve(
        self, modules: Mapping[str, Sequence[str]], num_layers: int, *, tied: bool = False
    ) -> dict[str, QuantSpec]:
        """The spec of every linear layer of a model.

        Args:
            modules: our name of each linear layer, to the names its parts have in a Hugging Face
                checkpoint. A rule may use either; rules that tell the parts of a fused layer
                apart (q_proj at 8 bits, k_proj at 4) are refused.
            num_layers: how many layers the model has.
            tied: its LM head is its embedding, and is held once where both have one spec.

        Raises:
            UserError: for a plan of the wrong length, a rule that matches nothing, one that
                splits a fused layer, or an embedding that is not weight-only.

        Returns:
            name to spec, "lm_head" and "embed" among them where a rule that says so quantizes
            them. Of a tied model without "lm_head", the head is what "embed" is. An embedding is
            rounded to nearest, whatever the algorithm.
        """
        if self.num_layers is not None and self.num_layers != num_layers:
            raise UserError(
                f"`bitwidth` {self.text} names {self.num_layers} layers, the model has "
                f"{num_layers}; give one value, or one for each layer"
            )
        unused = dict.fromkeys(pattern for pattern, _ in self.rules)
        specs = {}
        patterns = Patterns(self.text)
        outer = {}
        for name in (EMBEDDING, LM_HEAD):
            # "all layers" does not mean these: a rule has to say their names.
            named = [i for i, (pattern, _) in enumerate(self.rules) if name in pattern]
            outer[name] = self._last(self._found(name, named, patterns, unused))
        if outer[EMBEDDING].kind.startswith("w8a8"):
            raise UserError(
                f"an embedding has 1 to 8 bits or 16, not {outer[EMBEDDING].bitwidth}: there is "
                "nothing that it is multiplied with"
            )
        # Other algorithms mind what a matrix is multiplied with, and a row is only looked up.
        outer[EMBEDDING] = replace(outer[EMBEDDING], algorithm=DEFAULT_ALGORITHM)
        if tied and outer[LM_HEAD] == outer[EMBEDDING]:
            del outer[LM_HEAD]
        elif tied and outer[LM_HEAD].kind == "dense" and self._names(LM_HEAD, patterns):
            raise UserError(
                "this model's LM head is its embedding: beside a head of 16 bits an embedding of "
                f"{outer[EMBEDDING].bits} saves nothing; leave the embedding's bits out, or give "
                "the head 1 to 8"
            )
        by_layer = ByLayer([pattern for pattern, _ in self.rules])
        for name, parts in modules.items():
            own = self._found(name, by_layer.places(name), patterns, unused)
            found = {
                part: self._last(own + self._found(part, by_layer.places(part), patterns, unused))
                for part in parts or (name,)
            }
            if len(set(found.values())) > 1:
                listed = ", ".join(f"{part}: {spec.to_json()}" for part, spec in found.items())
                raise UserError(
                    f"{name} is one fused matrix and takes one spec, not {listed}; "
                    "give its parts the same one"
                )
            specs[name] = next(iter(found.values()))
        specs |= {name: spec for name, spec in outer.items() if spec.kind != "dense"}
        if unused:
            example = next(iter(modules), "layers.0.attention.qkv")
            raise UserError(
                f"{self.text}: {next(iter(unused))!r} matches no layer; names are like {example}"
            )
        return specs

    def _names(self, name: str, patterns: Patterns) -> bool:
        """Whether a rule says the name of a module outside the layers."""
        return any(name in rule and patterns.search(rule, name) for rule, _ in self.rules)

    def _found(
        self, name: str, places: Iterable[int], patterns: Patterns, unused: dict[str, None]
    ) -> list[int]:
        """Which of the rules at some places are found in a name."""
        found = [i for i in places if patterns.search(self.rules[i][0], name)]
        for i in found:
            unused.pop(self.rules[i][0], None)
        return found

    def _last(self, found: Sequence[int]) -> QuantSpec:
        """What the last of some rules says."""
        return self.rules[max(found)][1] if found else QuantSpec()


def read_plan_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file that holds a plan, in whichever shape.

    Raises:
        UserError: for a file that is not there, or holds no such object.
    """
    try:
        value = parse_json(read_bytes(path), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"{path}: a plan is a JSON object from regular expressions over module names to "
            'specs, such as {"attention": 8, "mlp": {"bits": 4, "group_size": 64}}'
        )
    return value
