"""Plans for a model: one that keeps to limits, a front of them, and the file that others read."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qllm.config import EMBEDDING, LM_HEAD, ModelConfig, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.patterns import Patterns
from qllm.plan.candidates import labels
from qllm.plan.devices import Cluster, DescribedSpeed, Device
from qllm.plan.modules import linears_of, pattern_of
from qllm.plan.possible import CLUSTER, rounded_up
from qllm.plan.problem import Problem, Solution, UnsolvedError
from qllm.plan.program import build
from qllm.plan.sensitivity import Fit, Sensitivity
from qllm.plan.shape import Shape, Workload
from qllm.plan.solve import orders, solve

# What tells one model from another in a plan.
MODEL_KEYS = ("family", "num_layers", "hidden_size", "intermediate_size", "vocab_size")
USUAL_BITS = 4
# What a device is where no speed is asked for.
ANYWHERE = Device("here", math.inf, DescribedSpeed(math.inf, math.inf, math.inf), "here")


@dataclass(frozen=True)
class Limits:
    """What a plan has to keep to, and what it should be best at.

    Attributes:
        objective: one of `qllm.plan.problem.OBJECTIVES`.
        max_divergence: nats per token; None: no limit.
        max_bits: mean bits per weight; None: no limit.
        time_limit: seconds for the solver.
    """

    objective: str = "loss"
    max_divergence: float | None = None
    max_bits: float | None = None
    time_limit: float = 60.0


@dataclass(frozen=True, eq=False)
class Plan:
    """What was decided.

    Attributes:
        order: devices in the order of their stages; those without one are left out.
        cuts: the halves of layers with which stages begin, but the first.
    """

    planner: Planner
    problem: Problem
    solution: Solution
    order: tuple[Device, ...]
    cuts: tuple[int, ...]

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """The spec of what is decided on, by its name in `Sensitivity`."""
        candidates = self.planner.sensitivity.candidates
        pairs = zip(self.planner.sensitivity.modules, self.solution.choice, strict=True)
        return {name: candidates[index] for name, index in pairs}

    @property
    def divergence(self) -> float:
        """Predicted, nats per token."""
        return self.planner.fit.divergence(self.solution.costs.loss)

    @property
    def nbytes(self) -> float:
        """Of all weights, as loading has them."""
        costs = self.solution.costs
        return costs.nbytes + costs.copied + float(self.planner.shape.fixed.sum())

    @property
    def quant_plan(self) -> QuantPlan:
        """What the other scripts take: integers are chosen as these are told to."""
        rules = tuple(
            (pattern_of(name), replace(spec, algorithm="rtn"))
            for name, spec in self.specs.items()
            if spec.kind != "dense"
        )
        config = self.planner.shape.config
        model = {key: getattr(config, key) for key in MODEL_KEYS}
        return QuantPlan(rules, text="the plan", stages=self.stages, model=model)

    @property
    def stages(self) -> str | None:
        """As --stages takes them."""
        return ",".join(f"{cut / 2:g}" for cut in self.cuts) or None

    @property
    def decided(self) -> tuple[object, ...]:
        """What tells it from other plans of its planner."""
        return self.specs, self.cuts, [device.name for device in self.order]

    def is_here(self) -> bool:
        """Whether this machine can time the plan: one probed device, or stages on its CPU."""
        known = [device.host == platform.node() for device in self.order]
        staged = all(device.threads for device in self.order)
        return self.planner.cluster is not None and all(known) and (staged or not self.cuts)

    def seconds_on(self, devices: Sequence[Device]) -> tuple[float, float]:
        """What the prompts and a step would take on devices in place of those of `order`."""
        problem = self.planner.problem(Limits(), devices)
        _, indices = np.unique(self.solution.device, return_inverse=True)
        costs = problem.evaluate(self.solution.choice, indices)
        return costs.prefill, costs.decode

    def predicted(self) -> dict[str, object]:
        """What the program says of it."""
        costs = self.solution.costs
        found: dict[str, object] = {
            "divergence": self.divergence,
            "bits_per_weight": costs.bits,
            "bytes": int(self.nbytes),
            "gap": self.solution.gap,
            "solver_seconds": self.solution.seconds,
        }
        if self.planner.cluster is not None:
            work = self.planner.work
            total = costs.prefill + work.new * costs.decode
            held = [int(each) for each in costs.held if each]
            found |= {
                "bytes_by_device": held,
                "prefill_seconds": costs.prefill,
                "decode_seconds": costs.decode,
                "latency_seconds": total,
                "tokens_per_second": work.batch * work.new / costs.slowest,
            }
        return found

    def to_json(self) -> dict[str, object]:
        """What the other scripts take as a plan."""
        quant = self.quant_plan
        value: dict[str, object] = {"rules": quant.to_json(), "model": quant.model}
        if self.cuts:
            value["stages"] = self.stages
        if self.planner.cluster is not None:
            value["devices"] = [device.name for device in self.order]
        return value | {"predicted": self.predicted()}


@dataclass(frozen=True, eq=False)
class Planner:
    """A model with its losses, and what it is to run on.

    Attributes:
        cluster: None: bits alone are decided.
        max_bytes: of the weights, where bits alone are decided; None: no limit.
        allowed: bool (M, C), what each linear may have; None: all.
        memory_option: the one that names the devices' memory, or `max_bytes`, for errors.
    """

    sensitivity: Sensitivity
    shape: Shape
    work: Workload
    cluster: Cluster | None = None
    max_bytes: float | None = None
    allowed: np.ndarray | None = None
    memory_option: str = CLUSTER

    @property
    def fit(self) -> Fit:
        return self.sensitivity.fit()

    @property
    def devices(self) -> tuple[Device, ...]:
        """Those of the cluster, or one that has no limit but the weights' bytes."""
        if self.cluster is not None:
            return self.cluster.devices
        return (ANYWHERE if self.max_bytes is None else replace(ANYWHERE, memory=self.max_bytes),)

    def problem(self, limits: Limits, devices: Sequence[Device]) -> Problem:
        """The program for devices in this order."""
        fit = self.fit
        divergence = limits.max_divergence
        return build(
            self.shape,
            self.sensitivity.sums,
            self.sensitivity.candidates,
            self.cluster,
            devices,
            self.work,
            limits.objective,
            None if divergence is None else fit.total(divergence),
            limits.max_bits,
            self.allowed,
        )

    def decide(self, limits: Limits) -> Plan:
        """The best plan within the limits.

        Raises:
            UserError: there is none, with which limits it is that exclude each other.
        """
        try:
            return self._best(limits)
        except UnsolvedError as error:
            raise self.why_not(limits, error) from None

    def _best(self, limits: Limits) -> Plan:
        devices = self.devices
        tried = orders([device.kind for device in devices])
        best: Plan | None = None
        failed: UnsolvedError | None = None
        for order in tried:
            chosen = [devices[i] for i in order]
            problem = self.problem(limits, chosen)
            try:
                solution = solve(problem, limits.time_limit / len(tried))
            except UnsolvedError as error:
                if failed is None or failed.in_time:  # with more time there may be one
                    failed = error
                continue
            if best is None or solution.value < best.solution.value:
                best = self._plan(problem, solution, chosen)
        if best is None:
            assert failed is not None
            raise failed
        return best

    def why_not(self, limits: Limits, found: UnsolvedError | None = None) -> UserError:
        """The error where no plan keeps to limits, with what would do.

        Args:
            found: what the solver said; None: there is none.
        """
        if found is not None and not found.in_time:
            return UserError(
                f"no plan was found in `time_limit` {limits.time_limit:g} seconds; give more"
            )
        if limits.max_divergence is None:
            return UserError(
                f"no cut into stages leaves each device of {self.memory_option} what it has memory "
                "for; give it more devices or memory"
            )
        said = f"`max_divergence` {limits.max_divergence:.3g}"
        mask = np.ones_like(self.sensitivity.sums) if self.allowed is None else self.allowed
        sums = np.where(mask, self.sensitivity.sums, np.inf).min(axis=1)
        least = self.fit.divergence(float(sums.sum()))
        if least > limits.max_divergence:
            return UserError(
                f"{said} is below what the most bits of `bits` leave, {rounded_up(least)} nats as "
                "predicted; give that or more, or name more bits in `bits`"
            )
        others = ["`max_bits`"] if limits.max_bits is not None else []
        if self.cluster is not None or self.max_bytes is not None:
            others.append(self.memory_option)
        try:
            best = self._best(replace(limits, objective="loss", max_divergence=None))
        except UnsolvedError as error:
            return self.why_not(replace(limits, max_divergence=None), error)
        return UserError(
            f"no plan keeps to {said} and {' and '.join(others)}: the least divergence is "
            f"{rounded_up(best.divergence)} nats, as predicted; give `max_divergence` that or "
            f"more, or allow more in {' or '.join(others)}"
        )

    def _plan(self, problem: Problem, solution: Solution, devices: Sequence[Device]) -> Plan:
        used = np.unique(solution.device)
        cuts = tuple(int(c) for c in np.flatnonzero(np.diff(solution.device)) + 1)
        return Plan(self, problem, solution, tuple(devices[d] for d in used), cuts)

    def uniform(self, candidate: int, limits: Limits, cuts: Sequence[int] | None = None) -> Plan:
        """All linears at one of the candidates, on the devices as they are given.

        An embedding, which is not one, has the most bits that there are.

        Args:
            candidate: its index.
            cuts: halves of layers with which stages begin; None: even ones.
        """
        devices = self.devices
        choice = np.full(len(self.shape.modules), candidate)
        if EMBEDDING in self.shape.modules:
            choice[self.shape.modules.index(EMBEDDING)] = self._most_bits()
        halves = len(self.shape.fixed)
        if cuts is None:
            layers = halves // 2
            cuts = [2 * round(layers * d / len(devices)) for d in range(1, len(devices))]
        device = np.searchsorted(np.asarray(cuts), np.arange(halves), side="right")
        problem = self.problem(limits, devices)
        costs = problem.evaluate(choice, device)
        solution = Solution(choice, device, costs, problem.value(costs), 0.0, 0.0)
        return self._plan(problem, solution, devices)

    def _most_bits(self) -> int:
        """The candidate with the most bits of those that an embedding may have."""
        packed = [not spec.kind.startswith("w8a8") for spec in self.sensitivity.candidates]
        return int(np.flatnonzero(packed)[-1])

    def uniform_name(self, candidate: int) -> str:
        """What `uniform` is called: its label, and the embedding's where that is another one."""
        names = labels(self.sensitivity.candidates)
        if EMBEDDING not in self.shape.modules or self._most_bits() == candidate:
            return names[candidate]
        return f"{names[candidate]}, embedding {names[self._most_bits()]}"

    def usual_divergence(self, objective: str) -> tuple[str, float]:
        """What most people take: the candidate nearest to USUAL_BITS for all linears.

        Returns:
            its name, and the divergence that is predicted of it, nats per token.
        """
        candidates = self.sensitivity.candidates
        index = min(range(len(candidates)), key=lambda i: abs(candidates[i].bits - USUAL_BITS))
        return self.uniform_name(index), self.uniform(index, Limits(objective)).divergence

    def front(self, limits: Limits, points: int) -> list[Plan]:
        """Plans from the fewest bits to the most that there are, or that `limits` allow.

        Each has the least loss at its bits, and is another one than the plan in front of it.
        """
        weights, candidates = self.shape.weights, self.sensitivity.candidates
        packed = [i for i, spec in enumerate(candidates) if spec.kind != "dense"]
        bits = (weights @ self.shape.bits)[packed] / weights.sum()
        most = min(bits.max(), math.inf if limits.max_bits is None else limits.max_bits)
        found: list[Plan] = []
        for target in np.linspace(bits.min(), most, points):
            try:
                plan = self._best(replace(limits, max_bits=float(target)))
            except UnsolvedError:  # so many bits, or so few, do not fit the other limits
                continue
            if not found or plan.decided != found[-1].decided:
                found.append(plan)
        return found


def allowed(
    modules: Sequence[str],
    candidates: Sequence[QuantSpec],
    fixed: Mapping[str, str],
    where: str = "`fixed`",
    config: ModelConfig | None = None,
) -> np.ndarray:
    """What each linear may have (M, C), where expressions over names hold some of them.

    Args:
        modules: names of the linears, or of what decides on several.
        fixed: regular expression to a bitwidth or a label of `candidates.labels`; the last one
            found in a name counts.
        config: the model's, where it is a mixture of experts.

    Raises:
        UserError: for a bitwidth that is no candidate, an expression that no name matches, or some
            of the experts and not others, or an embedding for which there is no candidate.
    """
    names = labels(candidates)
    mask = np.ones((len(modules), len(names)), dtype=bool)
    if EMBEDDING in modules:  # there is nothing that is rounded to be multiplied with it
        int8 = [spec.kind.startswith("w8a8") for spec in candidates]
        mask[modules.index(EMBEDDING), int8] = False
        if all(int8):
            raise UserError(
                f"an embedding has 1 to 8 bits or 16, and `bits` are {','.join(names)}; add some, "
                "or leave `embedding` out"
            )
    patterns = Patterns(where)
    for pattern, bits in fixed.items():
        patterns.compile(pattern)
        held = [bits in (n, spec.bitwidth) for n, spec in zip(names, candidates, strict=True)]
        if not any(held):
            raise UserError(
                f"{where} {pattern}={bits}: {bits} is not among `bits` {','.join(names)}"
            )
        rows = []
        for i, module in enumerate(modules):
            linears = (module,) if config is None else linears_of(module, config)
            found = [patterns.search(pattern, linear) for linear in linears]
            if any(found):
                rows.append(i)
            if any(found) and not all(found):
                raise UserError(
                    f"{where}: {pattern!r} matches {linears[found.index(True)]} and not "
                    f"{linears[found.index(False)]}, and all experts of a layer have the same "
                    f"bits; write what matches all of them, such as {pattern_of(module)}"
                )
        if not rows:
            outer = [name for name in (EMBEDDING, LM_HEAD) if patterns.search(pattern, name)]
            left = [f"{name} is not decided on by itself" for name in outer]
            raise UserError(
                f"{where}: {pattern!r} matches no linear; "
                f"{left[0] if left else f'names are like {modules[0]}'}"
            )
        mask[rows] = held
    return mask
