"""GGUF files that are written: the `gguf` package reads them, and they run as what they are of."""

from __future__ import annotations

import gguf
import pytest
import torch
from conftest import ROOT
from covering import each, slow_but
from gguf import quants

from qllm import LLM
from qllm.checkpoint.load import load_model
from qllm.checkpoint.to_gguf import export_gguf
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

IDS = [[5, 9, 70, 33, 2, 61, 90], [17, 4]]


TYPES = (
    (None, "F16"),
    (QuantSpec(4, 32, "sym", "weight_only"), "Q4_0"),
    (QuantSpec(4, 64, "asym", "weight_only"), "Q8_0"),
    (QuantSpec(8, 32, "sym", "weight_only"), "Q8_0"),
)


@pytest.mark.parametrize(
    ("family", "form"),
    slow_but(each(("llama", "bloom"), TYPES), ("llama", "bloom"), TYPES),
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_there_and_back(tmp_path, family, form):
    spec, kind = form
    source = ROOT / "tiny_models" / f"{family}-tiny"
    if spec is not None:
        job = Job(source, QuantPlan.uniform(spec))
        quantize_checkpoint(job, tmp_path / "quantized")
        source = tmp_path / "quantized"
    path = tmp_path / "model.gguf"
    assert export_gguf(source, path) == path.stat().st_size
    types = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors if "ffn_up" in t.name}
    assert types - {"F32"} == {kind}
    ours, again = LLM.from_pretrained(source), LLM.from_pretrained(path)
    linears = [(n, m) for n, m in ours.model.named_modules() if isinstance(m, Linear)]
    for name, linear in linears:
        assert torch.equal(again.model.get_submodule(name).dequantize(), linear.dequantize()), name
    for text in ("He is working on", "  Zürich\n\n42", ""):
        assert again.tokenizer.encode(text) == ours.tokenizer.encode(text)
    prompt = "Once upon a time"
    assert again.generate(prompt, max_new_tokens=12) == ours.generate(prompt, max_new_tokens=12)


def test_offsets_are_rounded_where_that_is_asked_for_and_kept_where_they_are_float16(tmp_path):
    job = Job(ROOT / "tiny_models" / "llama-tiny", QuantPlan.parse("4", QuantSpec(group_size=32)))
    quantize_checkpoint(job, tmp_path / "quantized")
    notes: list[str] = []
    export_gguf(tmp_path / "quantized", tmp_path / "wide.gguf", notes.append)
    assert "--round-offsets makes Q4_1" in notes[0]
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(tmp_path / "quantized", first, notes.append, round_offsets=True)
    export_gguf(first, second, notes.append)
    assert len(notes) == 1
    files = [gguf.GGUFReader(path).tensors for path in (tmp_path / "wide.gguf", first, second)]
    for wide, rounded, again in zip(*files, strict=True):
        assert rounded.data.tobytes() == again.data.tobytes()
        if wide.tensor_type.name != "Q8_0":
            continue
        assert rounded.tensor_type.name == "Q4_1"
        want, found = (quants.dequantize(t.data, t.tensor_type) for t in (wide, rounded))
        groups = want.reshape(-1, 32)
        step = (groups.max(1) - groups.min(1))[:, None] / 15
        assert (abs(found.reshape(-1, 32) - groups) <= 0.01 * step).all()


def test_rows_are_in_llama_cpp_s_order(tmp_path):
    source = ROOT / "tiny_models" / "llama-tiny"
    export_gguf(source, tmp_path / "model.gguf")
    model = load_model(source, QuantPlan.uniform(QuantSpec()))
    heads, dim = model.config.num_heads, model.config.head_dim
    query = model.layers[0].attention.qkv.dequantize()[: heads * dim]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    written = tensors["blk.0.attn_q.weight"]
    found = torch.from_numpy(quants.dequantize(written.data, written.tensor_type))
    pairs = query.view(heads, 2, dim // 2, -1)
    assert torch.equal(found.view(heads, dim // 2, 2, -1), pairs.transpose(1, 2))


def test_what_gguf_has_not_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not of this opt"):
        export_gguf(ROOT / "tiny_models" / "opt-tiny", tmp_path / "model.gguf")
    job = Job(ROOT / "tiny_models" / "llama-tiny", QuantPlan.parse("4", QuantSpec(group_size=48)))
    quantize_checkpoint(job, tmp_path / "quantized")
    with pytest.raises(UserError, match="groups of 48"):
        export_gguf(tmp_path / "quantized", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
