"""weight_convert.py's work: the same model in another layout, found again, never half written."""

from __future__ import annotations

import json
import os
import shutil
import signal

import processes
import pytest
import torch
from checkpoints import FORMS, change_json, copy_of, rewritten, state_of
from conftest import FAMILIES, ROOT, assert_user_error, run, tiny
from oracle import pretrained
from quantizing import MODELS, saved
from safetensors import safe_open

from qllm import PostTrainingQuantConfig, folders, quantization, quantize
from qllm.chat import ChatTemplate
from qllm.checkpoint.convert import convert, find_source, stored_name
from qllm.checkpoint.load import load_model
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.hub import ModelFolder


def model(folder) -> ModelFolder:
    return ModelFolder(folder, folder.name)


def logits(folder, plan="16", **options):
    loaded = load_model(folder, QuantPlan.parse(plan), **options)
    return loaded.prefill([[5, 6, 7, 8], [9, 10]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_same_model(family, tmp_path):
    size = convert(model(tiny(family)), tmp_path / "out", overwrite=False)
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    for plan in ("16", "4"):
        assert torch.equal(logits(tmp_path / "out", plan), logits(tiny(family), plan))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FAMILIES])
def test_the_copy_of_every_kind_of_model(name, tmp_path):
    source = saved(name, tmp_path / "in")
    convert(model(source), tmp_path / "out", overwrite=False)
    assert torch.equal(logits(tmp_path / "out", "4"), logits(source, "4"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A copy of the bundled OPT. Do not change it."""
    copy = tmp_path_factory.mktemp("converted") / "opt"
    convert(model(tiny("opt")), copy, overwrite=False)
    return copy


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_copy(form, converted, tmp_path):
    convert(model(rewritten("opt", tmp_path / "in", form)), tmp_path / "out", overwrite=False)
    copies = [
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", converted)
    ]
    assert copies[0] == copies[1]


def test_qkv_is_fused_and_every_tensor_can_be_mapped(converted):
    state, part = state_of("opt"), "model.decoder.layers.2.self_attn.{}_proj.weight"
    with safe_open(converted / "model.safetensors", framework="pt") as file:
        fused = file.get_tensor("layers.2.attention.qkv.weight")
    assert torch.equal(fused, torch.cat([state[part.format(name)] for name in "qkv"]))
    weights = Weights(Checkpoint(converted))
    file = weights.checkpoint._files["embed.weight"]
    for name in weights.shapes:
        weights.read(name, mapped=True)
        assert file._offsets[name] % file.tensors[name].dtype.itemsize == 0


def test_each_tensor_keeps_its_type(tmp_path):
    """A float32 matrix in a float16 model may hold what float16 cannot."""
    state = state_of("opt")
    name = "model.decoder.layers.1.fc1.weight"
    state[name] = state[name].float() * 1e6
    folder = rewritten("opt", tmp_path / "in", "safetensors", state)
    convert(model(folder), tmp_path / "out", overwrite=False)
    weights = Weights(Checkpoint(tmp_path / "out"))
    assert torch.equal(weights.read("layers.1.mlp.up.weight"), state[name])
    assert weights.dtype() == torch.float16
    for plan in ("8", "4"):
        pair = [logits(f, plan, dtype=torch.float32) for f in (tmp_path / "out", folder)]
        assert pair[0].isfinite().all()
        assert torch.equal(*pair)


def onnx_of(source, target):
    from qllm.onnx.export import export

    export(source, target)
    return target


WRITERS = {
    "convert": lambda source, target: convert(model(source), target, overwrite=False),
    "quantize": lambda source, target: quantize(str(source), 4, save=target),
    "export": onnx_of,
    "quantize ONNX": lambda source, target: quantize(
        onnx_of(source, target.with_name("onnx")), 4, group_size=32, save=target
    ),
    "Neural Compressor": lambda source, target: quantization.fit(
        pretrained(source), PostTrainingQuantConfig(approach="weight_only")
    ).save(target),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("names", [("default",), ("default", "tool_use", "rag"), ("tool_use",)])
@pytest.mark.parametrize("write", WRITERS)
def test_all_chat_templates_go_along(write, names, shallow_of, tmp_path):
    from transformers import AutoTokenizer

    if "ONNX" in write or write == "export":
        pytest.importorskip("onnxruntime")
    source = tmp_path / "source"
    shutil.copytree(shallow_of("opt"), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {name: f"{name}: {{{{ messages }}}}" for name in names}
    tokenizer.save_pretrained(source)
    want = AutoTokenizer.from_pretrained(source).chat_template
    WRITERS[write](source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == want
    if "default" in names:
        assert "default: " in ChatTemplate.load(tmp_path / "out").render([])
    else:
        with pytest.raises(UserError, match="has no chat template"):
            ChatTemplate.load(tmp_path / "out")


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_tied_head_is_stored_once(family, tmp_path):
    convert(model(tiny(family)), tmp_path / "out", overwrite=False)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path):
    """As in transformers, weights decide, whatever config.json says of tying."""
    state = state_of("opt")
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].flip(0).contiguous()
    folder = rewritten("opt", tmp_path / "in", "safetensors", state)
    convert(model(folder), tmp_path / "out", overwrite=False)
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    assert not torch.equal(logits(folder), logits(tiny("opt")))


def test_find_source_says_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("QLLM_HOME", str(tmp_path / "home"))
    source = model(copy_of("opt", tmp_path / "model"))
    notes: list[str] = []
    assert find_source(source, notes.append) == source.path
    assert "on the fly" in notes[-1]
    copy = folders.home_path(stored_name(source), pytest.fail)
    convert(source, copy, overwrite=False)
    assert find_source(source, notes.append) == copy
    assert "reading the converted copy" in notes[-1]
    # A converted folder that is named itself is read as it is.
    assert find_source(model(copy), notes.append) == copy
    assert len(notes) == 2


@pytest.mark.parametrize("change", ["config", "weights", "layout"])
def test_a_stale_copy_is_not_taken(change, tmp_path, monkeypatch):
    monkeypatch.setenv("QLLM_HOME", str(tmp_path / "home"))
    source = model(rewritten("opt", tmp_path / "model", "safetensors"))
    copy = folders.home_path(stored_name(source), pytest.fail)
    convert(source, copy, overwrite=False)
    if change == "config":
        change_json(source.path / "config.json", bos_token_id=5)
    elif change == "weights":
        os.utime(source.path / "model.safetensors", ns=(1, 1))
    else:  # a copy that an older QLLM wrote
        change_json(copy / "config.json", qllm_layout=0)
    notes: list[str] = []
    assert find_source(source, notes.append) == source.path
    assert "of an older state" in notes[-1]
    convert(source, copy, overwrite=True)
    assert find_source(source, notes.append) == copy


def test_refusals(tmp_path):
    convert(model(tiny("opt")), tmp_path / "out", overwrite=False)
    with pytest.raises(UserError, match="is there already"):
        convert(model(tiny("opt")), tmp_path / "out", overwrite=False)
    with pytest.raises(UserError, match="in QLLM's layout already"):
        convert(model(tmp_path / "out"), tmp_path / "twice", overwrite=False)
    with pytest.raises(UserError, match="is a GGUF file, which is mapped as it is"):
        convert(model(tmp_path / "x.gguf"), tmp_path / "twice", overwrite=False)
    change_json(tmp_path / "out" / "config.json", qllm_layout=99)
    with pytest.raises(UserError, match="QLLM layout 99; this version reads 1"):
        Weights(Checkpoint(tmp_path / "out"))


def old_copy(folder) -> dict[str, bytes]:
    """A folder with an older state of a copy, for a conversion to fail to replace."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"old": True}))
    return contents(folder)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True])
def test_a_broken_tensor_in_the_middle_leaves_the_old_copy_or_none(there, tmp_path):
    state = state_of("opt")
    state["model.decoder.layers.3.fc1.weight"][0, 0] = float("nan")
    folder = rewritten("opt", tmp_path / "in", "safetensors", state)
    target = tmp_path / "copies" / "out"
    before = old_copy(target) if there else None
    with pytest.raises(UserError, match="NaN"):
        convert(model(folder), target, overwrite=True)
    assert (contents(target) if there else None) == before
    assert [path.name for path in target.parent.iterdir()] == (["out"] if there else [])


CONVERTING = """
sys.argv = ["weight_convert.py", "--model-size", "tiny"]
import weight_convert
from qllm import cli
cli.run(weight_convert.main)
"""
LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
"""


def test_a_write_that_fails_is_one_line_and_leaves_the_old_copy(tmp_path):
    """RLIMIT_FSIZE makes the system refuse to write on, as a full disk does."""
    environment = {**os.environ, "QLLM_HOME": str(tmp_path)}
    target = tmp_path / "converted" / "opt-tiny"
    before = old_copy(target)
    done = processes.run(["-c", LIMITED.format(root=str(ROOT)) + CONVERTING], environment)
    assert_user_error(done, f"error: {target} cannot be written (File too large)")
    assert contents(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["opt-tiny"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from qllm.checkpoint import writer

whole = writer.SafetensorsWriter.write
def write(self, name, tensor):
    whole(self, name, tensor)
    if name.startswith("layers.3."):
        os.kill(os.getpid(), signal.{signal})

writer.SafetensorsWriter.write = write
"""


@pytest.mark.parametrize(
    ("name", "status", "there"),
    [
        ("SIGKILL", -signal.SIGKILL, True),
        ("SIGINT", 130, False),
        pytest.param("SIGKILL", -signal.SIGKILL, False, marks=pytest.mark.slow),
        pytest.param("SIGINT", 130, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_leaves_the_old_copy_or_none(name, status, there, tmp_path):
    """And the next run finishes the work."""
    environment = {**os.environ, "QLLM_HOME": str(tmp_path)}
    target = tmp_path / "converted" / "opt-tiny"
    before = old_copy(target) if there else None
    code = KILLED.format(root=str(ROOT), signal=name) + CONVERTING
    done = processes.run(["-c", code], environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert (contents(target) if target.exists() else None) == before
    if name == "SIGINT":
        assert done.stderr == "weight_convert.py: interrupted\n"
        assert [path.name for path in target.parent.iterdir()] == (["opt-tiny"] if there else [])
        return
    done = run("weight_convert.py", "--model-size", "tiny", env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(logits(target), logits(tiny("opt")))
    # What the killed run had written so far is gone too.
    assert [path.name for path in target.parent.iterdir()] == ["opt-tiny"]
    # What the killed run had written so far is gone too.
    assert [path.name for path in target.parent.iterdir()] == ["opt-tiny"]
