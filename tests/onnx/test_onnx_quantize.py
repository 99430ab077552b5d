"""ONNX models of torch's exporter, and our own, quantized: what becomes of each linear."""

from __future__ import annotations

import shutil

import onnx
import pytest
import torch
from conftest import tiny
from covering import slow_but
from exports import torch_export
from onnx import helper, numpy_helper
from oracle import assert_logits_close, assert_same_model, draw_prompts, load, pretrained

from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.onnx.export import export
from qllm.onnx.graph import MODEL
from qllm.onnx.linears import SCOPES, find_linears
from qllm.onnx.quantize import OnnxJob, quantize_onnx
from qllm.onnx.runner import OnnxDecoder
from qllm.onnx.stages import Stages
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts((3, 17, 1, 30), 4096)
SAMPLES = draw_prompts((32, 32, 32), 4096, seed=1)
# Layer 0's, as transformers and our decoder have them.
MODULES = {
    "opt": [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        *("fc1", "fc2"),
    ],
    "bloom": [
        *("self_attention.query_key_value", "self_attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ],
    "llama": [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ],
}


def spec(algorithm: str = "rtn", bits: str = "4") -> QuantSpec:
    return QuantSpec.parse(bits, 32, "asym", algorithm)


def job(folder, algorithm="rtn", plan=None, **options) -> OnnxJob:
    plan = plan or QuantPlan.uniform(spec(algorithm))
    samples = SAMPLES if algorithm == "gptq" else None
    return OnnxJob(folder, plan, samples=samples, accuracy_level=0, **options)


@pytest.fixture(scope="module", params=list(MODULES))
def foreign(request, shallow_of, tmp_path_factory):
    """A family, and a folder with torch's export of the first layers of its bundled model."""
    folder = tmp_path_factory.mktemp("foreign") / request.param
    return request.param, torch_export(shallow_of(request.param), folder)


@pytest.fixture(scope="module")
def own(shallow_of, tmp_path_factory):
    """Our own export of OPT's first layers at 16 bits."""
    folder = tmp_path_factory.mktemp("own") / "opt"
    export(shallow_of("opt"), folder)
    return folder


def test_torchs_exports_run_as_they_are(foreign, shallow_of):
    family, folder = foreign
    assert_same_model(OnnxDecoder(folder), pretrained(shallow_of(family)), PROMPTS, 8)


@pytest.mark.parametrize(
    ("foreign", "algorithm"),
    slow_but([("llama", "rtn"), ("bloom", "gptq")], MODULES, ("rtn", "gptq")),
    indirect=["foreign"],
)
def test_a_foreign_model_quantized_is_the_checkpoint_quantized(
    foreign, algorithm, shallow_of, tmp_path
):
    """Name by name the same errors; to nearest the same integers, and so the same logits."""
    family, folder = foreign
    reports = quantize_onnx(job(folder, algorithm), tmp_path / "out")
    assert [r.name for r in reports][: len(MODULES[family])] == [
        f"layers.0.{name}" for name in MODULES[family]
    ]
    quantized = OnnxDecoder(tmp_path / "out")
    assert quantized.bitwidth == "4"
    samples = SAMPLES if algorithm == "gptq" else None
    plan = QuantPlan.uniform(spec(algorithm))
    source = Job(shallow_of(family), plan, samples=samples, dtype=torch.float32)
    theirs = quantize_checkpoint(source, tmp_path / "checkpoint")
    found, want = quantized.prefill(PROMPTS, last=False), None
    if algorithm == "rtn":
        want = load(tmp_path / "checkpoint").prefill(PROMPTS, last=False)
        assert_logits_close(found, want)
        return
    # Each of ours is several of theirs; the last is not fused in any family.
    assert reports[-1].error == pytest.approx(theirs[-1].error, rel=0.05)
    assert all(report.of_output for report in reports)
    quantize_onnx(job(folder), tmp_path / "nearest")
    want = load(shallow_of(family)).prefill(SAMPLES, last=False)
    errors = [
        (OnnxDecoder(tmp_path / name).prefill(SAMPLES, last=False) - want).norm()
        for name in ("out", "nearest")
    ]
    assert errors[0] < errors[1]


def test_gptq_of_our_export_is_gptq_of_the_checkpoint(own, shallow_of, tmp_path):
    """The same Hessians but for rounding: errors within 2 % of each other, linear by linear."""
    reports = quantize_onnx(job(own, "gptq"), tmp_path / "out")
    plan = QuantPlan.uniform(spec("gptq"))
    source = Job(shallow_of("opt"), plan, samples=SAMPLES, dtype=torch.float32)
    theirs = quantize_checkpoint(source, tmp_path / "checkpoint")
    assert [r.name for r in reports] == [r.name for r in theirs]
    for ours, other in zip(reports, theirs, strict=True):
        assert ours.error == pytest.approx(other.error, rel=0.05), ours.name


def test_plans_by_layer_and_by_name(tmp_path):
    plan = QuantPlan.parse("4,4,8,8,4,16", spec()).with_rule("^lm_head$", spec(bits="8"))
    export(tiny("opt"), tmp_path / "whole")
    reports = quantize_onnx(job(tmp_path / "whole", plan=plan), tmp_path / "out")
    bits = {report.name: report.spec.bits for report in reports}
    assert bits["layers.0.mlp.up"] == 4
    assert bits["layers.2.attention.qkv"] == bits["lm_head"] == 8
    assert not any(name.startswith("layers.5.") for name in bits)
    quantized = OnnxDecoder(tmp_path / "out")
    assert quantized.bitwidth == "4,8"
    want = load(tiny("opt"), plan=plan).prefill(PROMPTS, last=False)
    assert_logits_close(quantized.prefill(PROMPTS, last=False), want)


def test_the_folder_comes_along(own, tmp_path):
    shutil.copytree(own, tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("kept")
    quantize_onnx(job(tmp_path / "in"), tmp_path / "out")
    names = {path.name for path in own.iterdir()} | {"notes.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    tables = 4 * 256 * (4096 + 512)  # of tokens and positions, which stay as they are
    sizes = [
        (folder / "model.onnx_data").stat().st_size - tables for folder in (own, tmp_path / "out")
    ]
    assert 0 < sizes[1] < sizes[0] / 5


def test_an_interrupted_run_leaves_nothing(own, tmp_path):
    def stop(items):
        yield items[0]
        raise KeyboardInterrupt

    for algorithm in ("rtn", "gptq"):
        with pytest.raises(KeyboardInterrupt):
            quantize_onnx(job(own, algorithm), tmp_path / "out", stop)
        assert not list(tmp_path.iterdir())


REFUSED = {
    "3 bits": ("takes 4 and 8 bits", QuantPlan.uniform(spec(bits="3"))),
    "groups of 8": ("group size 8", QuantPlan.uniform(QuantSpec.parse("4", 8))),
    "awq": ("ONNX models take rtn and gptq", QuantPlan.uniform(spec("awq"))),
    "no text": ("gptq needs calibration text", QuantPlan.uniform(spec("gptq"))),
    "nothing": ("every layer stays as it is", QuantPlan.uniform(QuantSpec())),
    "a name": ("matches no layer; names are like layers.0", QuantPlan((("fc9", spec()),))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_do_not_fit_are_refused(case, own, tmp_path):
    words, plan = REFUSED[case]
    with pytest.raises(UserError, match=words):
        quantize_onnx(job(own, plan=plan), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_quantized_already_is_refused(own, tmp_path):
    plan = QuantPlan.uniform(spec()).with_rule("^lm_head$", spec())
    quantize_onnx(job(own, plan=plan), tmp_path / "out")
    with pytest.raises(UserError, match="nothing to quantize"):
        quantize_onnx(job(tmp_path / "out"), tmp_path / "again")
    quantize_onnx(job(own), tmp_path / "layers")  # the head is still of floats
    with pytest.raises(UserError, match="its layers are quantized already"):
        quantize_onnx(job(tmp_path / "layers"), tmp_path / "again")


def graph_of(*nodes, **shapes) -> onnx.GraphProto:
    weights = [
        numpy_helper.from_array(torch.ones(*shape).numpy(), name) for name, shape in shapes.items()
    ]
    return helper.make_graph(list(nodes), "graph", [], [], weights)


def test_products_of_every_form_are_found():
    node = helper.make_node
    scoped = node("MatMul", ["x", "val_3"], ["f"], name="node_linear_7")
    scoped.metadata_props.add(key=SCOPES, value="['', 'model.layers.3.fc2', 'linear_7']")
    graph = graph_of(
        node("MatMul", ["x", "model.layers.0.fc1.weight"], ["a"]),
        node("Transpose", ["t"], ["transposed"], perm=[1, 0]),
        node("MatMul", ["x", "transposed"], ["b"], name="/model/layers.1/fc1/MatMul"),
        node("Gemm", ["x", "g", "bias"], ["c"], name="/h.2/fc1/Gemm", transB=1),
        scoped,
        node("Transpose", ["same"], ["as_it_is"], perm=[0, 1]),
        node("Transpose", ["as_it_is"], ["turned"]),
        node("MatMul", ["x", "turned"], ["d"], name="/model/layers.4/fc1/MatMul"),
        node("MatMul", ["x", "x"], ["scores"]),
        node("Gemm", ["x", "g", "matrix"], ["h"], transB=1),
        node("Gemm", ["x", "g"], ["i"], alpha=2.0),
        node("MatMul", ["x", "head"], ["logits"]),
        **{"model.layers.0.fc1.weight": (4, 6), "t": (6, 4), "g": (6, 4), "val_3": (4, 6)},
        **{"bias": (6,), "matrix": (2, 6), "head": (4, 9), "same": (6, 4)},
    )
    found = find_linears(graph, 9)
    names = [f"layers.{i}.fc1" for i in range(3)] + ["layers.3.fc2", "layers.4.fc1", "lm_head"]
    assert [each.name for each in found] == names
    assert [(each.rows, each.columns) for each in found] == [(6, 4)] * 5 + [(9, 4)]
    assert [each.transposed for each in found] == [False, True, True, False, True, False]
    assert [each.bias for each in found] == ["", "", "bias", "", "", ""]
    assert find_linears(onnx.GraphProto(), 9) == []


def test_two_weights_that_are_one_are_quantized_twice(tmp_path, own):
    """A matrix that other nodes read, too, stays for them."""
    model = onnx.load(own / MODEL, load_external_data=False)
    names = {each.weight for each in find_linears(model.graph, 4096)}
    assert "embed.weight" in names  # the tied head's
    plan = QuantPlan.uniform(spec()).with_rule("^lm_head$", spec())
    quantize_onnx(job(own, plan=plan), tmp_path / "out")
    model = onnx.load(tmp_path / "out" / MODEL, load_external_data=False)
    left = {tensor.name for tensor in model.graph.initializer}
    assert left & names == {"embed.weight"}


def test_stages_whose_inputs_are_read_early(tmp_path):
    """Something reads the input of the second group before the first group's linear runs."""
    node, value = helper.make_node, helper.make_tensor_value_info
    graph = graph_of(
        node("Cast", ["input_ids"], ["wide"], to=1),
        node("Unsqueeze", ["wide", "axis"], ["x"]),
        node("Relu", ["x"], ["y"]),
        node("Exp", ["y"], ["read"]),
        node("MatMul", ["x", "first"], ["a"]),
        node("Add", ["a", "read"], ["b"]),
        node("MatMul", ["y", "second"], ["c"]),
        node("Add", ["b", "c"], ["d"]),
        node("MatMul", ["d", "third"], ["logits"]),
        first=(1, 4),
        second=(1, 4),
        third=(4, 2),
    )
    graph.initializer.append(numpy_helper.from_array(torch.tensor([2]).numpy(), "axis"))
    graph.input.append(value("input_ids", onnx.TensorProto.INT64, [1, None]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = [[0, 1, 2], [3, 1, 4]]
    stages = Stages(model, find_linears(graph, 99), tmp_path, samples, tmp_path / "states")
    first, second, third = stages.groups
    x = torch.tensor(samples)[:, None, :, None].float()
    assert torch.equal(torch.stack(list(stages.run(first))), x)
    stages.replace(first[0], torch.full((4, 1), 2.0))
    assert torch.equal(torch.stack(list(stages.run(second))), x)
    stages.replace(second[0], torch.full((4, 1), 3.0))
    want = (2 * x + x.exp() + 3 * x).expand(-1, -1, -1, 4)
    torch.testing.assert_close(torch.stack(list(stages.run(third))), want)


@pytest.mark.parametrize("algorithm", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_links_as_a_hub_cache_has_them(algorithm, own, tmp_path):
    blobs, linked = tmp_path / "blobs", tmp_path / "linked"
    shutil.copytree(own, tmp_path / "whole")
    shutil.copytree(own, blobs)
    linked.mkdir()
    for path in blobs.iterdir():
        (linked / path.name).symlink_to(path)
    for name in ("whole", "linked"):
        quantize_onnx(job(tmp_path / name, algorithm), tmp_path / f"{name}-4")
    for path in (tmp_path / "whole-4").iterdir():
        assert path.read_bytes() == (tmp_path / "linked-4" / path.name).read_bytes()
    ours, theirs = (OnnxDecoder(tmp_path / name) for name in ("whole", "linked"))
    assert torch.equal(ours.prefill(PROMPTS), theirs.prefill(PROMPTS))
