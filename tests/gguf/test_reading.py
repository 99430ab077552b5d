"""GGUF files that the `gguf` package writes, against its numbers and transformers' models."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from cpu_paths import everywhere
from gguf import GGMLQuantizationType, quants
from gguf_files import (
    KINDS,
    TEXTS,
    add_delta_net,
    dequantized,
    trained_sentencepiece,
    write_model,
    write_sentencepiece,
)
from gguf_models import FAMILIES, READ_ALONE
from torch import nn

from qllm import LLM, report
from qllm.checkpoint import load
from qllm.checkpoint.device_map import CPU
from qllm.checkpoint.gguf import GGUFFile
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.gguf import i_quants
from qllm.gguf.config import read_config as gguf_config
from qllm.gguf.file import GGUF, read_gguf
from qllm.gguf.metadata import Metadata
from qllm.gguf.tokenizer import GGUFCodec, tokenizer_files
from qllm.gguf.types import OTHER_TYPES, TYPES
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import RawConfig, read_config
from qllm.onnx.export import ExportOptions
from qllm.onnx.export import export as export_onnx
from qllm.ops.cpu import library as native
from qllm.ops.cpu import linear
from qllm.pretrained import Pretrained
from qllm.quant.packing import PackedWeight, unpack
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.tokenizer import Tokenizer

# Where the float16 factors of a block are: random bytes may be no numbers there.
FACTORS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_XXS", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XS", "IQ2_S"), (0,)),
    **{"TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": ()},
}
IDS = [[5, 9, 70, 33, 2, 61, 90], [17, 4], list(range(40))]


@pytest.mark.parametrize("name", FACTORS)
def test_blocks_are_llama_cpp_s_numbers(name):
    (kind,) = (kind for kind in TYPES.values() if kind.name == name)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (5, 3, kind.nbytes), dtype=np.uint8)
    if name == "TQ2_0":  # 2 bits of which 3 is none of its values
        blocks &= ~((blocks & 0b01010101) << 1)
    for at in FACTORS[name]:
        factors = random.standard_normal((5, 3, 1)).astype(np.float16)
        blocks[..., at : at + 2] = factors.view(np.uint8)
    rows = blocks.reshape(5, -1)
    want = torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[name]))
    assert torch.equal(kind.dequantize(torch.from_numpy(rows)), want)
    assert torch.equal(kind.dequantize(torch.from_numpy(rows), torch.float16), want.half())
    if kind.packs:
        qweight, scales, offsets = (
            everywhere(lambda i=i: kind.to_packed(torch.from_numpy(rows))[i]) for i in range(3)
        )
        q = unpack(qweight, kind.bits, want.shape[1]).float().unflatten(1, (-1, kind.group))
        zero = 0 if offsets.numel() else kind.zero
        packed = (q - zero) * scales.float()[..., None]
        if offsets.numel():
            packed += offsets.float()[..., None]
        assert torch.equal(packed.flatten(1), want)
        # Of 256 values all scales share a factor, but that of the offsets of IQ1_S takes 9 bits.
        stored = PackedWeight(qweight, scales, offsets)
        held = linear.pack(stored, kind.bits, kind.group, want.shape[1]).scales.dtype
        compact = torch.uint8 if name == "MXFP4" else torch.int8
        as_they_are = scales.dtype != torch.float32 or name == "IQ1_S"
        assert held == (scales.dtype if as_they_are else compact)
        # Of many rows, of which a table is worth its bytes.
        many = [torch.cat([part] * 60) if part.numel() else part for part in stored[:3]]
        held = linear.pack(PackedWeight(*many), kind.bits, kind.group, want.shape[1]).qweight
        shape = (19, want.shape[1] // 32, kind.bits, 64)
        flat = (shape[0] * shape[1] * kind.held_bits * 64 + 64,)
        assert held.shape == (shape if kind.held_bits == kind.bits else flat)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", kind) for kind in KINDS]
    + [
        pytest.param(family, kind, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, family in enumerate((*FAMILIES, *READ_ALONE))
        for j, kind in enumerate(("F16", "Q4_1"))
        if family != "llama"
    ],
)
def test_the_model_is_transformers_(tmp_path, family, kind):
    model = (FAMILIES | READ_ALONE)[family]()
    path = write_model(tmp_path / "model.gguf", model, kind)
    llm = LLM.from_pretrained(path, dtype="float32")
    specs = {layer.spec.bits for layer in report.quantizable(llm.model)}
    bits = {kind.name: kind.bits or 16 for kind in TYPES.values()}
    assert specs == {bits[kind]}
    if model.config.tie_word_embeddings and kind == "Q4_1":
        assert llm.model.lm_head is llm.model.embed.linear
    reference = dequantized(model, kind)
    for ids in IDS:
        (logits,) = llm.logits([ids])
        want = reference(torch.tensor([ids])).logits[0]
        assert (logits - want).abs().max() < 1e-4 * (want.max() - want.min())


def test_layers_that_predict_later_tokens_are_left_out(tmp_path):
    model = READ_ALONE["qwen3_5"](num_hidden_layers=3)
    path = write_model(tmp_path / "model.gguf", model, "F16", predicting=1)
    llm = LLM.from_pretrained(path, dtype="float32")
    reference = dequantized(model, "F16")
    del reference.model.layers[2]
    reference.config.num_hidden_layers = 2
    (logits,) = llm.logits([IDS[0]])
    want = reference(torch.tensor([IDS[0]])).logits[0]
    assert (logits - want).abs().max() < 1e-4 * (want.max() - want.min())


def test_heads_beyond_the_file_take_no_memory(tmp_path, monkeypatch):
    def of_many(writer, config):
        many = {"linear_num_value_heads": 2**25, "linear_num_key_heads": 1}
        add_delta_net(writer, SimpleNamespace(**vars(config) | many))

    monkeypatch.setattr(gguf_files, "add_delta_net", of_many)
    path = write_model(tmp_path / "model.gguf", READ_ALONE["qwen3_5"](), "F16")
    with pytest.raises(UserError, match=r"delta nets have \d+ channels, more than the \d+ rows"):
        LLM.from_pretrained(path)


def _linears(model: nn.Module):
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "spec")]


def test_numbers_are_quantized_where_bits_are_asked_for(tmp_path):
    model = FAMILIES["llama"]()
    path = write_model(tmp_path / "model.gguf", model, "Q8_0")
    for bits in (3, 16):
        llm = LLM.from_pretrained(path, bitwidth=bits, group_size=32)
        assert {m.spec.bits for n, m in _linears(llm.model) if n != "lm_head"} == {bits}
        assert report.outer_bits(llm.model) == {"embedding_bits": "16", "lm_head_bits": "16"}


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # whose head is tied, and is not
@pytest.mark.parametrize("bits", [4, 16])
def test_embedding_and_head_alone_leave_the_rest_as_the_file_has_it(tmp_path, family, bits):
    """By transformers, of the file's numbers: those of the one or the other rounded once more."""
    model = FAMILIES[family]()
    tied = model.config.tie_word_embeddings
    path = write_model(tmp_path / "model.gguf", model, "Q5_1")
    numbers = dequantized(model, "Q5_1")
    for option in ("embedding_bits", "lm_head_bits"):
        reference = deepcopy(numbers)
        llm = LLM.from_pretrained(path, dtype="float32", group_size=32, **{option: bits})
        assert {layer.spec.bits for _, layer in _linears(llm.model.layers)} == {5}
        both = {"embedding_bits": "5", "lm_head_bits": "5", option: str(bits)}
        if tied and option == "embedding_bits":
            both["lm_head_bits"] = str(bits)
        assert report.outer_bits(llm.model) == both
        head = option == "lm_head_bits"
        weight = (reference.lm_head if head else reference.model.embed_tokens).weight
        if bits < 16:
            spec = QuantSpec(bits, 32, "asym", "weight_only")
            rounded = WeightOnlyLinear.from_float(weight.detach(), None, spec).dequantize()
            new = nn.Parameter(rounded.float())
            if not head:
                reference.model.embed_tokens.weight = new
            if head or tied:
                reference.lm_head.weight = new
        want = reference(torch.tensor(IDS[:1])).logits[0]
        (logits,) = llm.logits(IDS[:1])
        assert (logits - want).abs().max() < 1e-4 * (want.max() - want.min())


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3", "gptneox"])
def test_what_is_quantized_from_a_file_is_a_checkpoint_of_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    path = write_model(tmp_path / "model.gguf", FAMILIES[family](), "F16")
    plan = QuantPlan.uniform(QuantSpec(6, 32, "asym", "weight_only"))
    quantize_checkpoint(Job(path, plan, fake=True), tmp_path / "fake")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.float32)
    llm = LLM.from_pretrained(path, bitwidth=6, group_size=32, dtype="float32")
    want = reference(torch.tensor(IDS[:1])).logits[0]
    (logits,) = llm.logits(IDS[:1])
    # The checkpoint's values are float16.
    assert (logits - want).abs().max() < 4e-3 * (want.max() - want.min())


@pytest.mark.parametrize("part", ["attn_v", "ffn_gate"])
def test_matrices_that_are_held_at_16_bits_are_named(tmp_path, part):
    path = write_model(tmp_path / "model.gguf", FAMILIES["qwen3"](), "Q5_1", kinds={part: "F16"})
    notes = []
    llm = LLM.from_pretrained(path, dtype="float32", note=notes.append)
    (note,) = notes
    assert note.startswith("matrices of Q5_1 are held at 16 bits: other parts of them (q, k, v; ")
    numbers = LLM.from_pretrained(path, dtype="float32", bitwidth=16)
    (logits,), (want,) = llm.logits(IDS[:1]), numbers.logits(IDS[:1])
    assert (logits - want).abs().max() < 1e-4 * (want.max() - want.min())
    LLM.from_pretrained(path, embedding_bits=4, group_size=32, note=notes.append)
    assert notes == [note, note]


@pytest.mark.parametrize("kernels", [True, False])
def test_what_has_to_fit_is_what_is_held(tmp_path, monkeypatch, kernels):
    monkeypatch.setattr(linear, "MANY_WEIGHTS", 0)  # of matrices as small as these, too
    if not kernels:
        monkeypatch.setattr(native, "unavailable", lambda: "there is no compiler")
    asked = []

    def on_cpu(sizes, *rest):
        asked.append(sum(sizes))
        return [CPU] * len(sizes)

    monkeypatch.setattr(load, "infer_device_map", on_cpu)
    path = write_model(tmp_path / "model.gguf", FAMILIES["llama"](), "IQ4_NL")
    llm = LLM.from_pretrained(path)
    # Panels, of 16 rows, and tables of levels have their ends.
    assert 0.9 * llm.nbytes < asked[0] < 1.1 * llm.nbytes


def test_a_split_model_is_one(tmp_path):
    model = FAMILIES["llama"]()
    whole = write_model(tmp_path / "whole.gguf", model, "Q4_0")
    first = write_model(tmp_path / "part.gguf", model, "Q4_0", split=3)
    assert first.name == "part-00001-of-00003.gguf"
    for path in (first, first.with_name("part-00003-of-00003.gguf")):
        parts, one = Checkpoint(path), Checkpoint(whole)
        assert parts.tensors == one.tensors
        assert all(torch.equal(parts.read_any(n), one.read_any(n)) for n in one.tensors)
    first.with_name("part-00002-of-00003.gguf").unlink()
    with pytest.raises(UserError, match="lacks part-00002-of-00003"):
        Checkpoint(first)


def test_parts_of_rows_and_columns(tmp_path):
    path = write_model(tmp_path / "model.gguf", FAMILIES["llama"](), "Q4_1")
    for packed in (True, False):
        file = GGUFFile(read_gguf(path), packed)
        for name, info in file.tensors.items():
            whole, run = file.read(name), range(info.shape[0] // 3, info.shape[0] - 1)
            assert torch.equal(file.read_part(name, run, None), whole[run.start : run.stop])
            if len(info.shape) > 1:
                part = file.read_part(name, run, range(1, 5))
                assert torch.equal(part, whole[run.start : run.stop, 1:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_of_the_type_that_is_asked_for(tmp_path, dtype):
    """Whatever the types of the tensors in front of them in the file."""
    kinds = {"token_embd": "F16", "attn_q": "Q8_0", "attn_k": "BF16"}
    path = write_model(tmp_path / "model.gguf", FAMILIES["llama"](), "Q4_1", kinds=kinds)
    tensors = GGUFFile(read_gguf(path), packed=False, dtype=dtype).tensors
    found = {name.removeprefix("layers."): info.dtype for name, info in tensors.items()}
    assert {found[f"{i}.mlp.{name}.weight"] for i in (0, 1) for name in ("up", "down")} == {dtype}
    # Of bfloat16 and blocks: as wide as the wider of the two.
    mixed = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert {found[f"{i}.attention.qkv.weight"] for i in (0, 1)} == {mixed}
    assert found["embed.weight"] == torch.float16


@pytest.mark.parametrize(
    ("kind", "kinds", "spec"),
    [
        ("Q4_0", {"attn_v": "Q8_0", "ffn_up": "Q5_0"}, (8, 5, "sym")),
        ("Q4_1", {"attn_k": "Q5_0", "ffn_gate": "MXFP4"}, (5, 5, "offset")),
        ("MXFP4", {"attn_q": "Q4_0", "ffn_up": "Q5_1"}, (5, 5, "offset")),
        ("Q4_0", {"attn_v": "NVFP4", "ffn_gate": "NVFP4"}, (5, 5, "sym")),
        ("Q4_1", {"attn_q": "NVFP4", "ffn_up": "NVFP4"}, (5, 5, "offset")),
    ],
)
def test_parts_of_several_types_are_one_matrix(tmp_path, kind, kinds, spec):
    path = write_model(tmp_path / "model.gguf", FAMILIES["llama"](), kind, kinds=kinds)
    notes = []
    llm = LLM.from_pretrained(path, dtype="float32", note=notes.append)
    numbers = LLM.from_pretrained(path, dtype="float32", bitwidth=16)
    qkv, up = (llm.model.get_submodule(f"layers.1.{n}").spec for n in ("attention.qkv", "mlp.up"))
    assert (qkv.bits, up.bits, up.scheme) == spec
    for name, layer in _linears(llm.model.layers):
        weight = numbers.model.layers.get_submodule(name).weight
        assert torch.equal(layer.dequantize(), weight)
        held = Weights(Checkpoint(path)).read_quantized(f"layers.{name}", [range(5, 37)])
        whole = Weights(Checkpoint(path)).read_quantized(f"layers.{name}")
        assert torch.equal(held.qweight, whole.qweight[5:37])
        assert torch.equal(held.scales, whole.scales[5:37])
    assert not notes
    for ids in IDS:
        (logits,), (want,) = llm.logits([ids]), numbers.logits([ids])
        assert (logits - want).abs().max() < 1e-4 * (want.max() - want.min())
    export_onnx(path, tmp_path / "onnx", ExportOptions(accuracy_level=1))
    (logits,) = LLM.from_pretrained(tmp_path / "onnx").logits([IDS[0]])
    (want,) = numbers.logits([IDS[0]])
    assert (logits - want).abs().max() < 1e-3 * (want.max() - want.min())


def test_tables_that_are_not_there_are_one_line(monkeypatch):
    (kind,) = (kind for kind in TYPES.values() if kind.name == "IQ2_XS")
    i_quants._grid.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="need the package gguf: pip install gguf"):
        kind.dequantize(torch.zeros(1, kind.nbytes, dtype=torch.uint8))


def test_other_types_have_llama_cpp_s_names():
    names = {kind.value: kind.name for kind in GGMLQuantizationType}
    assert {number: names[number] for number in OTHER_TYPES} == OTHER_TYPES


@pytest.mark.parametrize(
    "broken", ["type", "vector", "end", "overlap", "architecture", "tokenizer", "keys"]
)
def test_what_is_broken_is_one_line(tmp_path, broken):
    path = write_model(tmp_path / "model.gguf", FAMILIES["llama"](), "Q4_0")
    data = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    last = reader.tensors[-1]
    if broken in ("type", "vector"):
        type_at = last.field.parts[4]
        at = last.field.offset + sum(part.nbytes for part in last.field.parts[:4])
        assert int(type_at[0]) == int.from_bytes(data[at : at + 4], "little")
        data[at : at + 4] = (41 if broken == "type" else 2).to_bytes(4, "little")
    elif broken == "end":
        del data[-40:]
    elif broken == "overlap":
        at = last.field.offset + sum(part.nbytes for part in last.field.parts[:5])
        data[at : at + 8] = (0).to_bytes(8, "little")
    elif broken == "architecture":
        data = data.replace(b"llama", b"lhama")
    elif broken == "tokenizer":
        data = data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mmmmm")
    else:
        data[16:24] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)
    says = {
        "type": "has the type Q1_0; QLLM reads F32",
        "vector": r"has the shape \[64\] and the type Q4_0, which matrices have",
        "end": "get it again",
        "overlap": "begins inside",
        "architecture": "its architecture is 'lhama'; QLLM runs llama",
        "tokenizer": "has no tokenizer",
        "keys": "keys and",
    }
    with pytest.raises(UserError, match=says[broken]) as error:
        LLM.from_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_that_cannot_be_are_one_line(tmp_path, family):
    found = read_gguf(write_model(tmp_path / "model.gguf", FAMILIES[family](), "F16"))
    architecture = found.metadata["general.architecture"]
    for key, value in found.metadata.items():
        if not key.startswith(architecture) or isinstance(value, str):
            continue
        for other in (0, -1, 1, 3, 2**31 - 1, 2**62, 1e300, float("nan"), True, "x", [4, 5], []):
            changed = replace(found, metadata={**found.metadata, key: other})
            try:
                file = GGUFFile(changed, True)
                read_config(RawConfig(gguf_config(changed), "model.gguf"))
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert file.tensors


def test_any_header_is_a_model_or_one_line(tmp_path):
    path = write_model(tmp_path / "model.gguf", FAMILIES["gemma3"](), "Q4_1")
    data, tensors = path.read_bytes(), read_gguf(path).tensors
    header = min(tensor.offset for tensor in tensors.values())
    random, refused = Random(0), 0
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 2, 8))):
            at, length = random.randrange(header), random.randrange(1, 9)
            new = random.choice((b"", b"\0", b"\xff", b"\1")) * length
            changed[at : at + length] = new if random.random() < 0.5 else random.randbytes(length)
        path.write_bytes(changed)
        try:
            Weights(Checkpoint(path))
            Pretrained.open(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 100


def test_sentencepiece_s_tokens(tmp_path):
    own = trained_sentencepiece(tmp_path / "model")
    path = write_sentencepiece(tmp_path / "model.gguf", own)
    tokenizer = Tokenizer.load(path)
    for text in (*TEXTS, "", " ", "  the", "the ", "Zürich 北京 🙂", "a\nb", "sat<0x41>on"):
        ids = tokenizer.encode(text)
        assert ids == [own.bos_id(), *own.encode(text)], text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("begins", [False, True])
def test_the_tokenizer_as_files_of_a_folder(tmp_path, begins):
    path = write_model(tmp_path / "model.gguf", FAMILIES["llama"](), "F16", begins=begins)
    for name, text in tokenizer_files(path).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    ours, written = Tokenizer.load(path), Tokenizer.load(tmp_path)
    for text in ("", "the hen in a tent", "<|begin|>x\n\n  y 42<|im_end|>", "Zürich 北京"):
        assert ours.encode(text) == written.encode(text)
        assert ours.decode(ours.encode(text)) == written.decode(written.encode(text))
    assert (ours.prefix_token_id, ours.added_bos_id) == (
        written.prefix_token_id,
        written.added_bos_id,
    )
    assert (ours.added_bos_id is not None) == begins


@pytest.mark.parametrize("kind", [1, 4])  # normal, and defined by a user
def test_what_a_token_is_called_ends_a_text_whatever_its_type(tmp_path, kind):
    whole = read_gguf(write_model(tmp_path / "model.gguf", FAMILIES["llama"](), "F16"))
    tokens = whole.metadata["tokenizer.ggml.tokens"]
    end, types = tokens.index("<|im_end|>"), [*whole.metadata["tokenizer.ggml.token_type"]]
    types[end] = kind
    other = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eos_token_id": 7}
    found = GGUF(whole.path, whole.metadata | other, whole.tensors)
    assert gguf_config(found)["eos_token_id"] == [7, end]
    codec = GGUFCodec(Metadata(found))
    ids = codec.encode("the<|im_end|>", None)
    assert ids[-1] == end and codec.decode(ids) == "the"
    assert types[end] == kind  # the file's own stay what they are


def test_a_factor_of_attention_multiplies_yarn_s_own(tmp_path):
    """As in llama.cpp, of files of OLMo 3 that say it."""
    whole = read_gguf(write_model(tmp_path / "model.gguf", FAMILIES["olmo3"](), "F16"))
    other = {"olmo2.rope.scaling.attn_factor": 1.3}
    found = GGUF(whole.path, whole.metadata | other, whole.tensors)
    before, after = (
        read_config(RawConfig(gguf_config(each), "model.gguf")).rope.attention_factor
        for each in (whole, found)
    )
    assert after == pytest.approx(1.3 * before)
