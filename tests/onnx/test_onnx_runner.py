"""Models of other exporters' operators: what a row gets does not depend on those beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.onnx.graph import MODEL
from qllm.onnx.runner import OnnxDecoder

VOCAB, WIDTH, HEADS, KV_HEADS, DIM, POSITIONS = 50, 32, 4, 2, 16, 40


def grouped_query_attention(folder: Path) -> Path:
    """A layer as onnxruntime-genai's builder writes them: attention that is given no mask."""
    random = np.random.default_rng(0)
    angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(DIM // 2) / (DIM // 2))
    shapes = {"embed": (VOCAB, WIDTH), "q": (WIDTH, HEADS * DIM), "k": (WIDTH, KV_HEADS * DIM)}
    shapes |= {"v": shapes["k"], "o": (HEADS * DIM, WIDTH), "head": (WIDTH, VOCAB)}
    arrays = {f"{name}_w": random.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    weights |= {"one": np.array([1]), "first": np.array(1)}
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    present = ["present.0.key", "present.0.value"]
    node = helper.make_node
    nodes = [
        node("Gather", ["embed_w", "input_ids"], ["x"]),
        *(node("MatMul", ["x", f"{name}_w"], [name]) for name in "qkv"),
        node("ReduceSum", ["attention_mask", "one"], ["count"], keepdims=0),
        node("Sub", ["count", "one"], ["last"]),
        node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["sizes"]),
        node("Gather", ["sizes", "first"], ["size"]),
        node("Cast", ["size"], ["total"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["q", "k", "v", *past, "lengths", "total", "cos", "sin"],
            ["attended", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        node("MatMul", ["attended", "o_w"], ["added"]),
        node("Add", ["x", "added"], ["y"]),
        node("MatMul", ["y", "head_w"], ["logits"]),
    ]
    value, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    ids = [value(name, TensorProto.INT64, ["b", name]) for name in ("input_ids", "attention_mask")]
    held = [value(name, floats, ["b", KV_HEADS, "p", DIM]) for name in past]
    outputs = [value(name, floats, ["b", KV_HEADS, "q", DIM]) for name in present]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [*ids, *held],
        [value("logits", floats, ["b", "input_ids", VOCAB]), *outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 14), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / MODEL)
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "head_dim": DIM}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config |= {"num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_attention_without_a_mask_gets_no_pads(tmp_path):
    model = OnnxDecoder(grouped_query_attention(tmp_path / "model"))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1]]
    config = GenerationConfig(max_new_tokens=6, eos_token_ids=())
    together = generate(model, prompts, config)
    for prompt, found in zip(prompts, together, strict=True):
        assert found == generate(model, [prompt], config)[0]
        whole = [*prompt, *found]
        logits = model.prefill([whole], last=False)  # of a text that is read in one go
        assert found == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert torch.equal(model.prefill(prompts)[0], model.prefill(prompts[:1])[0])
