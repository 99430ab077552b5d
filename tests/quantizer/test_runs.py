"""Runs that are killed and gone on with, and the files that they leave."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS
from conftest import tiny
from killing import contents, is_killed, killed_at
from oracle import load
from quantizer_cases import PROMPTS, assert_same_tensors, plan_of, quantize
from quantizing import samples
from safetensors.torch import load_file

from qllm import ops
from qllm.errors import UserError
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_shards(algorithm, sources, tmp_path):
    plan, source = plan_of(4, "8", algorithm=algorithm), sources("llama")
    quantize(source, tmp_path / "whole", plan, samples=samples())
    quantize(source, tmp_path / "parts", plan, samples=samples(), shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    for path in (tmp_path / "parts").glob("*.safetensors"):
        parts = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(parts) <= 10_000 or len(parts) == 1
    assert_same_tensors(load(tmp_path / "parts"), load(tmp_path / "whole"))


@pytest.mark.parametrize("plan", [plan_of(4, "4", algorithm="gptq"), plan_of("8:tc")])
def test_two_runs_give_the_same_bytes(plan, sources, tmp_path):
    for name in ("one", "two"):
        quantize(sources("opt"), tmp_path / name, plan, samples=samples(), about={"model": "m"})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        *("model.safetensors", "config.json", "generation_config.json", "README.md")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", plan_of(4, "8", algorithm="gptq")),
        ("opt-350m", plan_of({".*": 3, "mlp": {"bits": 4, "algorithm": "awq"}}, "4")),
        pytest.param("bloom", plan_of("8:tc"), marks=pytest.mark.slow),
        pytest.param("opt", plan_of(5), marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_and_gone_on_with(name, plan, sources, monkeypatch, tmp_path):
    """At some of all places; test_resume.py takes each of them."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    needs = plan_of(5) != plan
    job = {"shard_bytes": 8000, "samples": samples(3, 12) if needs else None}

    def run(target: Path) -> None:
        quantize(sources(name), target, plan, **job)

    # What the first run alone does must not count: a checkpoint is made, kernels are compiled.
    sources(name)
    ops.prepare("cpu")
    with killed_at(10**6) as came:
        run(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    for number in range(7):
        point = len(came) * number // 7 if number < 5 else len(came) - 5 * (7 - number)
        target = tmp_path / str(point) / "out"
        assert is_killed(lambda target=target: run(target), point)
        is_killed(lambda target=target: run(target), len(came) // 5)
        if not target.exists():
            run(target)
        assert contents(target) == expected


def test_other_options_do_not_go_on_with_a_run(sources, tmp_path):
    plan, target = plan_of(4, algorithm="gptq"), tmp_path / "out"
    job = Job(sources("opt"), plan, samples=samples(), about={"samples": "many"})
    assert is_killed(lambda: quantize_checkpoint(job, target), 60)
    for change, words in (
        ({"plan": plan_of(3, algorithm="gptq")}, "layers layers.0.attention.qkv bits 4, this one"),
        (
            {"plan": plan.with_rule("down", plan_of(8).rules[0][1])},
            "layers layers.0.mlp.down bits 4, this one has 8",
        ),
        ({"plan": plan.with_rule("embed", plan_of(8).rules[0][1])}, "layers embed null, this one"),
        ({"samples": samples(seed=1)}, "calibration samples "),
        (
            {"samples": samples(seed=1), "about": {"samples": "few"}},
            'about samples "many", this one has "few"',
        ),
        ({"options": QuantizeOptions(gptq=GPTQOptions(damp=0.1))}, "option gptq "),
        ({"fake": True}, "fake false, this one has true"),
        ({"shard_bytes": 10**6}, "shard size 5000000000, this one has 1000000"),
        ({"dtype": torch.bfloat16}, 'dtype "None", this one has "torch.bfloat16"'),
        ({"source": tiny("opt")}, "model "),
    ):
        with pytest.raises(UserError, match="interrupted run") as error:
            quantize_checkpoint(replace(job, **change), target)
        assert words in str(error.value)

    lines: list[str] = []
    counted: list[float] = []

    def meter(total: int, done: int) -> nullcontext:
        counted.extend([total, -done])
        return nullcontext(lambda count: counted.append(-count))

    reports = quantize_checkpoint(job, target, meter, lines.append)
    assert lines[0] == "going on at layers.1, 1 of 2 layers are done"
    ours = [report for report in reports if report.name.startswith("layers.1.")]
    assert lines[1:-1] == [
        f"{report.name}: relative error {report.error:.2%} of the outputs" for report in ours
    ]
    assert lines[-1].startswith("loads in QLLM, ")
    total, done, *steps = counted
    assert done == -total / 2 and len(steps) > len(ours) and max(steps) < 0
    assert sum(counted) == pytest.approx(0, abs=0.5)
    assert load(target).prefill(PROMPTS).isfinite().all()


def test_a_source_that_changed_does_not_go_on(sources, tmp_path):
    source = shutil.copytree(sources("opt"), tmp_path / "source")
    job = Job(source, plan_of(4))
    assert is_killed(lambda: quantize_checkpoint(job, tmp_path / "out"), 30)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="state of the model"):
        quantize_checkpoint(job, tmp_path / "out")


def test_what_stands_in_the_way_may_be_mended(sources, tmp_path):
    """A run that failed lets go of what it held, even while its error is at hand."""
    source = shutil.copytree(sources("opt"), tmp_path / "source")
    whole = load_file(source / "model.safetensors")
    broken = {name: tensor.clone() for name, tensor in whole.items()}
    broken["model.decoder.layers.1.fc2.weight"][3, 3] = torch.nan
    FORMS["safetensors"](source, broken)
    with pytest.raises(UserError, match=r"layers\.1\.fc2\.weight holds NaN") as error:
        quantize(source, tmp_path / "out", plan_of(4))
    with pytest.raises(UserError, match=r"layers\.1\.fc2\.weight holds NaN"):
        quantize(source, tmp_path / "out", plan_of(4))
    assert "NaN" in str(error.value)
    assert not (tmp_path / "out").exists()
