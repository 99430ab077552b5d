"""Our ONNX models against transformers and against our own decoder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import gguf_files
import onnx
import pytest
import torch
from conftest import FAMILIES, examples, tiny
from covering import slow_but
from foreign import folder_of, mlx
from foreign_changes import as_mlx
from foreign_integers import hqq, hqq_config, hqq_settings
from hypothesis import assume, given
from oracle import (
    TIE,
    assert_logits_close,
    assert_same_model,
    bundled,
    draw_prompts,
    load,
    random_model,
    spread,
)
from quantizing import saved
from random_configs import CONFIGS, MIXTURES, batches, seeds
from random_hybrids import HYBRIDS
from random_sizes import MAX_NEW_TOKENS

from qllm import LLM
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import FAMILIES as MODEL_FAMILIES
from qllm.onnx.export import ExportOptions, export
from qllm.onnx.graph import DATA, MODEL
from qllm.onnx.nbits import OPERATOR
from qllm.onnx.runner import OnnxDecoder
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts((3, 17, 1, 30), 4096)
COUNT = 24
# Of families that are not written as ONNX.
REFUSED = (*MIXTURES, *HYBRIDS, "gemma4_text")
# How far logits may be from ours, as a share of their range, by accuracy level: with int8
# activations a packed layer loses about as much as its output is from that of 8 bits.
TOLERANCE = {0: 2e-5, 1: 2e-5, 4: 2e-2}


def exported(source: Path, target: Path, **options) -> OnnxDecoder:
    export(source, target, ExportOptions(**options))
    return OnnxDecoder(target)


def check_random_model(config, lengths: list[int], seed: int) -> None:
    assume(config.model_type != "phi3" or min(lengths) > 1)  # see phi3_configs
    theirs = random_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "model")
        ours = exported(Path(folder) / "model", Path(folder) / "onnx")
    prompts = draw_prompts(lengths, config.vocab_size, seed)
    assert_same_model(ours, theirs, prompts, MAX_NEW_TOKENS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen2_moe", "is a mixture of experts, which is not written"),
        ("qwen3_5", "has attention with gates, which is not written"),
        ("gemma4_text", "is a mixture of experts|has layers of unlike sizes"),
    ],
)
def test_what_is_not_written_is_one_line(name, why, tmp_path):
    source = saved(name, tmp_path / "model")
    with pytest.raises(UserError, match=f"^{source} .*({why}).*; qllm_gen.py runs it$"):
        export(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("family", [name for name in MODEL_FAMILIES if name not in REFUSED])
def test_random_models(family):
    configs, count = CONFIGS[family]

    @examples(max(4, count // 2))
    @given(configs, batches, seeds)
    def check(config, lengths, seed):
        check_random_model(config, lengths, seed)

    check()


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, tmp_path_factory):
    """A family, and its bundled model as we export it at 16 bits: the folder, and its size."""
    target = tmp_path_factory.mktemp("whole") / "onnx"
    return request.param, target, export(tiny(request.param), target)


def test_bundled_models_at_16_bits(whole):
    family, folder, _ = whole
    ours = OnnxDecoder(folder)
    assert ours.bitwidth == "16"
    assert_same_model(ours, bundled(family), PROMPTS, COUNT)


def quantized(source: Path, folder: Path, spec: QuantSpec, **options) -> Path:
    samples = draw_prompts((32, 32), 4096) if spec.algorithm == "gptq" else None
    job = Job(source, QuantPlan.uniform(spec), samples=samples, **options)
    quantize_checkpoint(job, folder)
    return folder


FORMS = (("4", 32, "asym"), ("8", -1, "sym"))


@pytest.mark.parametrize(
    ("level", "form", "family"),
    slow_but(
        [(0, FORMS[0], "opt"), (4, FORMS[1], "bloom"), (4, FORMS[0], "llama")],
        *((0, 4), FORMS, FAMILIES),
    ),
    ids=str,
)
def test_quantized_models(level, form, family, shallow_of, tmp_path):
    """Logits within the level's tolerance, and so tokens wherever two logits are further apart."""
    bits, group, scheme = form
    spec = QuantSpec.parse(bits, group, scheme)
    source = quantized(shallow_of(family), tmp_path / "checkpoint", spec)
    theirs = exported(source, tmp_path / "onnx", accuracy_level=level)
    ours = load(source)
    assert theirs.bitwidth == bits
    want = ours.prefill(PROMPTS, last=False)
    assert_logits_close(theirs.prefill(PROMPTS, last=False), want, TOLERANCE[level])
    tokens, found = (generate(m, PROMPTS, GenerationConfig(COUNT)) for m in (ours, theirs))
    for prompt, a, b in zip(PROMPTS, tokens, found, strict=True):
        if a != b:
            step = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
            logits = ours.prefill([[*prompt, *a[:step]]])[0]
            first, second = logits.topk(2).values.tolist()
            assert (first - second) / spread(logits) < max(2 * TOLERANCE[level], TIE)


def test_groups_in_any_order(shallow_of, tmp_path):
    """Act-order without static groups: the inputs are put in order first."""
    spec = QuantSpec.parse("4", 32, "asym", "gptq")
    options = QuantizeOptions(gptq=GPTQOptions(static_groups=False))
    source = quantized(shallow_of("opt"), tmp_path / "checkpoint", spec, options=options)
    theirs = exported(source, tmp_path / "onnx", accuracy_level=0)
    assert any("perm" in t.name for t in onnx.load(tmp_path / "onnx" / MODEL).graph.initializer)
    want = load(source).prefill(PROMPTS, last=False)
    assert_logits_close(theirs.prefill(PROMPTS, last=False), want)


def test_layers_of_a_gguf_file_stay_packed_where_the_operator_holds_them(tmp_path):
    path = gguf_files.write_model(
        tmp_path / "model.gguf", gguf_files.llama(), "Q8_0", kinds={"ffn_down": "Q4_1"}
    )
    notes = []
    export(path, tmp_path / "onnx", ExportOptions(accuracy_level=0), note=notes.append)
    assert [note.split(" are ")[0] for note in notes] == ["layers of Q4_1"]
    nodes = onnx.load(tmp_path / "onnx" / MODEL).graph.node
    assert sum(node.op_type == OPERATOR for node in nodes) == 2 * 3  # all but the two ffn_down
    prompts = draw_prompts((3, 17), gguf_files.VOCAB)
    want = LLM.from_pretrained(path, dtype="float32").model.prefill(prompts, last=False)
    assert_logits_close(OnnxDecoder(tmp_path / "onnx").prefill(prompts, last=False), want)


@pytest.mark.parametrize("name", ["mlx", "hqq"])
def test_integers_with_offsets_are_written_as_numbers(name, tmp_path):
    if name == "mlx":
        folder = folder_of("llama", mlx(3), None)
        as_mlx(mlx(3), 3)(folder)
    else:
        folder = folder_of("llama", hqq(3), hqq_config(hqq_settings(3, 32)))
    folder.write(tmp_path / "model")
    notes, prompts = [], draw_prompts((3, 17), 96)
    export(tmp_path / "model", tmp_path / "onnx", note=notes.append)
    assert [note.split(" are ")[0] for note in notes] == [f"layers of {name}"]
    assert not [k for k in json.loads((tmp_path / "onnx/config.json").read_text()) if "quant" in k]
    assert_same_model(OnnxDecoder(tmp_path / "onnx"), folder.twin, prompts, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_float16(family, shallow_of, tmp_path):
    source = shallow_of(family)
    theirs = exported(source, tmp_path / "onnx", dtype="float16")
    assert theirs.dtype == torch.float16
    want = load(source).prefill(PROMPTS, last=False)
    assert_logits_close(theirs.prefill(PROMPTS, last=False), want, 5e-3)


def test_a_row_is_the_same_alone(whole):
    theirs = OnnxDecoder(whole[1])
    together = generate(theirs, PROMPTS, GenerationConfig(COUNT))
    alone = [generate(theirs, [prompt], GenerationConfig(COUNT))[0] for prompt in PROMPTS]
    assert together == alone


def test_names_and_files(whole):
    family, target, size = whole
    config = json.loads((tiny(family) / "config.json").read_text())
    layers = config.get("num_hidden_layers") or config["n_layer"]
    graph = onnx.load(target / MODEL, load_external_data=False).graph
    past = [f"{i}.{what}" for i in range(layers) for what in ("key", "value")]
    positions = ["position_ids"] if family == "llama" else []
    names = ["input_ids", "attention_mask", *positions, *(f"past_key_values.{n}" for n in past)]
    assert [value.name for value in graph.input] == names
    assert [value.name for value in graph.output] == ["logits", *(f"present.{n}" for n in past)]
    # In float32, each weight once: a tied embedding, too.
    assert (target / DATA).stat().st_size < 2.2 * (
        tiny(family) / "model.safetensors"
    ).stat().st_size
    assert size == sum((target / name).stat().st_size for name in (MODEL, DATA))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (target / name).exists()


def test_a_quantized_config_is_that_of_the_float_model(shallow_of, tmp_path):
    source = quantized(shallow_of("opt"), tmp_path / "checkpoint", QuantSpec.parse("4", 32))
    export(source, tmp_path / "onnx")
    assert "quantization_config" in json.loads((source / "config.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "onnx/config.json").read_text())


@pytest.mark.parametrize(
    ("bitwidth", "group", "words"),
    [
        ("3", 32, "attention.qkv is at bitwidth 3.*takes 4 and 8 bits"),
        ("8:tc-li", -1, "8:tc-li.*takes 4 and 8 bits"),
        ("4", 8, "group size 8.*16 and its multiples"),
    ],
)
def test_what_onnxruntime_lacks_is_refused_and_leaves_nothing(
    bitwidth, group, words, shallow_of, tmp_path
):
    spec = QuantSpec.parse(bitwidth, group)
    source = quantized(shallow_of("opt"), tmp_path / "checkpoint", spec)
    with pytest.raises(UserError, match=words):
        export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_is_there_is_kept(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "something").touch()
    with pytest.raises(UserError, match="is there already"):
        export(tiny("opt"), tmp_path / "onnx")


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def stop(items):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny("opt"), tmp_path / "onnx", progress=stop)
    assert not list(tmp_path.iterdir())
