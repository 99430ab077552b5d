"""GGUF files that are written: the `gguf` package reads them, and they run as what they are of."""

from __future__ import annotations

import json
from shutil import copytree

import pytest
import torch
from conftest import ROOT, tiny
from covering import each, slow_but
from gguf import quants
from gguf_files import (
    ENDS,
    PHI3_TEXTS,
    TEXTS,
    checkpoint_of,
    ending,
    read_whole,
    stretch_rope,
    trained_sentencepiece,
    with_phi3_s_tokens,
    write_model,
)
from gguf_models import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from qllm import LLM
from qllm.chat import Chat, ChatTemplate
from qllm.checkpoint.convert import copy_small_files
from qllm.checkpoint.load import load_model
from qllm.checkpoint.to_gguf import export_gguf
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.generation_config import GenerationConfig
from qllm.gguf.file import read_gguf
from qllm.gguf.tokenizer import REST
from qllm.layers import Linear
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.tokenizer import Tokenizer

FORMS = (
    (None, "F16"),
    (QuantSpec(4, 32, "sym", "weight_only"), "Q4_0"),
    (QuantSpec(4, 64, "asym", "weight_only"), "Q8_0"),
    (QuantSpec(5, 32, "sym", "weight_only"), "Q5_0"),
    (QuantSpec(8, 32, "sym", "weight_only"), "Q8_0"),
)

LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = [1.0] * 8
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 2.0}
# Cosines and sines are as large as they are without YaRN, which a GGUF file cannot say.
MSCALE = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("family", "form"),
    slow_but(each(FAMILIES, FORMS), FAMILIES, FORMS),
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_there_and_back(tmp_path, family, form):
    spec, kind = form
    source = checkpoint_of(family, tmp_path / "source")
    if spec is not None:
        job = Job(source, QuantPlan.uniform(spec))
        quantize_checkpoint(job, tmp_path / "quantized")
        source = tmp_path / "quantized"
    path = tmp_path / "model.gguf"
    assert export_gguf(source, path) == path.stat().st_size
    types = {t.tensor_type.name for t in read_whole(path).tensors if "ffn_up" in t.name}
    assert types - {"F32"} == {kind}
    ours, again = (LLM.from_pretrained(p, dtype="float32") for p in (source, path))
    linears = [(n, m) for n, m in ours.model.named_modules() if isinstance(m, Linear)]
    for name, linear in linears:
        assert torch.equal(again.model.get_submodule(name).dequantize(), linear.dequantize()), name
    for text in ("He is working on", "  Zürich\n\n42", ""):
        assert again.tokenizer.encode(text) == ours.tokenizer.encode(text)
    ids = [ours.tokenizer.encode("Once upon a time there was a little")]
    (want,), (found,) = ours.logits(ids), again.logits(ids)
    # Other types of blocks go by other kernels.
    assert (found - want).abs().max() < 4e-3 * (want.max() - want.min())


def test_offsets_are_rounded_where_that_is_asked_for_and_kept_where_they_are_float16(tmp_path):
    job = Job(ROOT / "tiny_models" / "llama-tiny", QuantPlan.parse("4", QuantSpec(group_size=32)))
    quantize_checkpoint(job, tmp_path / "quantized")
    notes: list[str] = []
    export_gguf(tmp_path / "quantized", tmp_path / "wide.gguf", notes.append)
    assert "with `round_offsets` they are Q4_1" in notes[0]
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(tmp_path / "quantized", first, notes.append, round_offsets=True)
    export_gguf(first, second, notes.append)
    assert len(notes) == 1
    files = [read_whole(path).tensors for path in (tmp_path / "wide.gguf", first, second)]
    for wide, rounded, again in zip(*files, strict=True):
        assert rounded.data.tobytes() == again.data.tobytes()
        if wide.tensor_type.name != "Q8_0":
            continue
        assert rounded.tensor_type.name == "Q4_1"
        want, found = (quants.dequantize(t.data, t.tensor_type) for t in (wide, rounded))
        groups = want.reshape(-1, 32)
        step = (groups.max(1) - groups.min(1))[:, None] / 15
        assert (abs(found.reshape(-1, 32) - groups) <= 0.01 * step).all()


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "Q8_0"), ("qwen2", "Q5_1"), ("gemma3", "Q4_1"), ("phi3", "F32")]
)
def test_a_file_of_a_file_has_its_tensors(tmp_path, family, kind):
    first, second = (tmp_path / name for name in ("whole.gguf", "again.gguf"))
    write_model(first, FAMILIES[family](), kind)
    split = write_model(tmp_path / "split.gguf", FAMILIES[family](), kind, split=3)
    export_gguf(split, second)
    want, found = (
        {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
        for reader in map(read_whole, (first, second))
    )
    assert found == want
    with pytest.raises(UserError, match="is a GGUF file, whose tensors stay what they are"):
        export_gguf(split, tmp_path / "rounded.gguf", round_offsets=True)
    ours, again = (LLM.from_pretrained(path, dtype="float32") for path in (first, second))
    (want,), (found,) = ours.logits(["the cat"]), again.logits(["the cat"])
    assert torch.equal(found, want)


def test_rows_are_in_llama_cpp_s_order(tmp_path):
    source = ROOT / "tiny_models" / "llama-tiny"
    export_gguf(source, tmp_path / "model.gguf")
    model = load_model(source, QuantPlan.uniform(QuantSpec()))
    heads, dim = model.config.num_heads, model.config.head_dim
    query = model.layers[0].attention.qkv.dequantize()[: heads * dim]
    tensors = {t.name: t for t in read_whole(tmp_path / "model.gguf").tensors}
    written = tensors["blk.0.attn_q.weight"]
    found = torch.from_numpy(quants.dequantize(written.data, written.tensor_type))
    pairs = query.view(heads, 2, dim // 2, -1)
    assert torch.equal(found.view(heads, dim // 2, 2, -1), pairs.transpose(1, 2))


def test_what_gguf_has_not_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not of this opt"):
        export_gguf(ROOT / "tiny_models" / "opt-tiny", tmp_path / "model.gguf")
    for bits, group, says in (("4", 48, "groups of 48.*a multiple"), ("8", 32, "`scheme` sym")):
        spec, folder = QuantSpec(group_size=group), tmp_path / f"{bits} bits"
        job = Job(ROOT / "tiny_models" / "llama-tiny", QuantPlan.parse(bits, spec))
        quantize_checkpoint(job, folder)
        with pytest.raises(UserError, match=says):
            export_gguf(folder, tmp_path / "model.gguf")
    odd = tmp_path / "odd"
    copytree(ROOT / "tiny_models" / "llama-tiny", odd, ignore=lambda *_: ["model.safetensors"])
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=1, intermediate_size=72, **sizes)
    LlamaForCausalLM(config).save_pretrained(odd)
    job = Job(odd, QuantPlan.parse("4", QuantSpec(group_size=32)))
    quantize_checkpoint(job, tmp_path / "of odd")
    with pytest.raises(UserError, match=r"mlp\.down has 72 inputs, which .* blocks of 32"):
        export_gguf(tmp_path / "of odd", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("family", "changed", "says"),
    [
        ("llama", {"model_type": "mistral", "sliding_window": 9}, "windows \\(\\), not \\(9, 9"),
        ("gemma2", {"query_pre_attn_scalar": 9}, "score_scale 0.17.*, not 0.33"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"] * 3}, "windows"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_by_layer False, not True"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, r"rope_layers \(True, True, True, False"),
        ("cohere2", {"layer_types": ["full_attention"] * 5}, r"windows .*, not \(\)"),
        ("granite", {"hidden_act": "gelu"}, "activation 'silu', not 'gelu'"),
        ("phi3", {"hidden_act": "gelu"}, "activation 'silu', not 'gelu'"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE.*dynamic"),
        (
            "qwen2",
            {"rope_parameters": LLAMA3},
            "qwen2 does not divide.*, as llama3 of this.*from sa",
        ),
        ("smollm3", {"rope_parameters": LONGROPE}, "smollm3 does not divide.*, as longrope of"),
        ("starcoder2", {"rope_parameters": LLAMA3}, "of default, linear and yarn one can"),
        ("llama", {"rope_scaling": MSCALE}, r"rope\.attention_factor 1\.13\d+, not 1\.0"),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_one_line(tmp_path, family, changed, says):
    source = tmp_path / "source"
    if checkpoint_of(family, source) != source:
        copytree(tiny(family), source)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=says) as error:
        export_gguf(source, tmp_path / "model.gguf")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("scaled", ["llama3", "yarn", "linear", "longrope", "phi3"])
def test_rope_comes_back(tmp_path, scaled):
    source = tmp_path / "source"
    if scaled == "phi3":
        checkpoint_of("phi3", source, long=True)
    else:
        copytree(tiny("llama"), source)
        stretch_rope(source / "config.json", scaled)
    export_gguf(source, tmp_path / "model.gguf")
    ours, again = (LLM.from_pretrained(p).model for p in (source, tmp_path / "model.gguf"))
    for length in (20, 60, 300):  # LongRoPE's factors are others beyond 32, and 256
        want, found = (model.positions.frequencies(length) for model in (ours, again))
        assert torch.allclose(found, want, rtol=1e-6, atol=0)
    assert torch.allclose(again.positions.factors, ours.positions.factors, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["model", "Llama", "Gemma"])
def test_sentencepiece_s_tokenizers_come_back(tmp_path, form):
    source = tmp_path / "source"
    FAMILIES["llama"]().half().save_pretrained(source)
    trained_sentencepiece(source / "tokenizer")
    if form != "model":
        values = json.loads(Tokenizer.load(source).definition())
        (source / "tokenizer.model").unlink()
        settings = {"tokenizer_class": f"{form}Tokenizer", "bos_token": "<s>"}
        if form == "Gemma":
            values["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            values["pre_tokenizer"] = None
            # Its files have tokens that are cut out, and no merges of them.
            merges = values["model"]["merges"]
            own = next(text for text in map("".join, merges) if "▁" not in text)
            values["model"]["merges"] = [m for m in merges if own not in (*m, "".join(m))]
            values["added_tokens"].append(
                {
                    **values["added_tokens"][0],
                    **{"id": values["model"]["vocab"][own], "content": own, "special": False},
                    "normalized": False,
                }
            )
        (source / "tokenizer.json").write_text(json.dumps(values))
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export_gguf(source, tmp_path / "model.gguf")
    ours, again = Tokenizer.load(source), Tokenizer.load(tmp_path / "model.gguf")
    for text in (*TEXTS, "", "the ", "Zürich 北京 🙂", "a\nb", "sat<0x41>on", "x</s>"):
        assert again.encode(text) == ours.encode(text)


def test_what_was_quantized_from_a_file_is_written_again(tmp_path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(tiny("llama"), first)
    quantize_checkpoint(Job(first, QuantPlan.uniform(FORMS[1][0])), tmp_path / "quantized")
    export_gguf(tmp_path / "quantized", second)
    found, again = (read_gguf(path).metadata for path in (first, second))
    assert {key: again[key] for key in found} == found


def test_tokens_that_the_model_has_no_rows_of_are_left_out(tmp_path):
    source = tmp_path / "source"
    FAMILIES["llama"]().half().save_pretrained(source)  # 300 rows
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text((tiny("llama") / name).read_text())
    export_gguf(source, tmp_path / "model.gguf")
    tokenizer = Tokenizer.load(tmp_path / "model.gguf")
    ids = tokenizer.encode("The cat in Zürich 🙂")
    assert max(ids) < 300
    assert tokenizer.decode(ids) == "The cat in Zürich 🙂"


@pytest.mark.parametrize(("config", "generation", "ends"), ENDS)
def test_what_ends_a_text_comes_back(tmp_path, config, generation, ends):
    export_gguf(ending(tmp_path / "source", config, generation), tmp_path / "model.gguf")
    assert list(LLM.from_pretrained(tmp_path / "model.gguf").config.eos_token_ids) == ends


def test_two_tokens_in_front_of_each_text_are_none_in_a_file(tmp_path):
    """As GLM-4's, which its chat template writes itself."""
    source, notes, path = tmp_path / "source", [], tmp_path / "model.gguf"
    copytree(tiny("llama"), source)
    whole = json.loads((source / "tokenizer.json").read_text())
    ids = {each["content"]: each["id"] for each in whole["added_tokens"]}
    first = [{"SpecialToken": {"id": text, "type_id": 0}} for text in ids][:2]
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")],
        "special_tokens": {
            text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()
        },
    }
    (source / "tokenizer.json").write_text(json.dumps(whole))
    ours = LLM.from_pretrained(source)
    assert ours.tokenizer.prefix == tuple(ids.values())[:2]
    chat = Chat(ours, ChatTemplate("", {}, ""), GenerationConfig())
    text = "".join(list(ids)[:2]) + "The sea"
    assert chat._encode(text) == ours.tokenizer.encode("The sea")
    export_gguf(source, path, notes.append)
    assert notes == [
        "llama.cpp puts no more than one token in front of a text: begin each with "
        + "".join(list(ids)[:2])
    ]
    assert Tokenizer.load(path).encode(text) == ours.tokenizer.encode("The sea")


def test_tokens_that_take_spaces_along_come_back(tmp_path):
    source, notes = with_phi3_s_tokens(tmp_path / "source"), []
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(source, first, notes.append)
    export_gguf(first, second, notes.append)
    assert not notes
    ours, again = Tokenizer.load(source), Tokenizer.load(second)
    for text in PHI3_TEXTS:
        assert again.encode(text) == ours.encode(text)
    whole = source / "tokenizer.json"
    whole.write_text(whole.read_text().replace('"lstrip": false', '"lstrip": true'))
    export_gguf(source, tmp_path / "third.gguf", notes.append)
    assert len(notes) == 1 and "takes spaces beside it along" in notes[0]


@pytest.mark.parametrize("in_files", [False, True])
def test_chat_templates_of_several_names_are_written_and_read(in_files, tmp_path):
    from transformers import AutoTokenizer

    source, back = copytree(tiny("llama"), tmp_path / "source"), tmp_path / "back"
    templates = {name: f"{name}!" for name in ("tool_use", "default")}
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source, save_jinja_files=in_files)
    export_gguf(source, tmp_path / "model.gguf")
    found = read_gguf(tmp_path / "model.gguf").metadata
    assert found["tokenizer.chat_template"] == "default!"
    assert found["tokenizer.chat_template.tool_use"] == "tool_use!"
    back.mkdir()
    copy_small_files(tmp_path / "model.gguf", back)
    assert AutoTokenizer.from_pretrained(back).chat_template == templates


O200K = (  # as gpt-oss's tokenizer.json has it
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [
        (
            CL100K + "{1,3}" + REST,
            True,
            "llama-bpe",
        ),
        (CL100K + "{1,3}" + REST, False, "dbrx"),
        (CL100K + REST, False, "qwen2"),
        (r" ?[^(\s|[.,!?…。，、।۔،])]+", False, "bloom"),
        (O200K, False, "gpt-4o"),
        (O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", ""), True, "tekken"),
        (r"\w+", False, None),
    ],
)
def test_patterns_as_checkpoints_have_them(tmp_path, pattern, whole, name):
    source = copytree(tiny("llama"), tmp_path / "source")
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split | {"invert": False}, level | {"trim_offsets": True}],
    }
    values["model"]["ignore_merges"] = whole
    path.write_text(json.dumps(values))
    if name is None:
        with pytest.raises(UserError, match="this one does it otherwise"):
            export_gguf(source, tmp_path / "model.gguf")
        return
    export_gguf(source, tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf").metadata["tokenizer.ggml.pre"] == name
    ours, again = Tokenizer.load(source), Tokenizer.load(tmp_path / "model.gguf")
    for text in ("He'LL be 1234 years!\n\n  x", "…a,b", "Zürich  "):
        assert again.encode(text) == ours.encode(text)
