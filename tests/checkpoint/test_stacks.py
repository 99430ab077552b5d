"""Experts of a layer in one tensor: as transformers, MLX and gpt-oss's own files have them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import mlx
from oracle import assert_same_model, draw_prompts, load, pretrained, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    Mxfp4Config,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 90, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 96, "num_key_value_heads": 2, "num_experts_per_tok": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=5),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=96, head_dim=16),
    "granitemoe": GraniteMoeConfig(**SIZES, num_local_experts=5),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=5, head_dim=16, sliding_window=6),
}
PROMPTS = draw_prompts((9, 2), 90)
State = dict[str, Tensor]


def written(folder: Path, config: dict, state: State) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: part.contiguous() for name, part in state.items()}, folder / "model.safetensors"
    )
    return folder


def saved(family: str, folder: Path) -> tuple[dict, State]:
    """The settings and tensors of a random model, as transformers saves it."""
    random_model(CONFIGS[family]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def fused(state: State, names: tuple[str, str, str], block: str, *, turned: bool) -> State:
    """Experts as transformers has them in memory, gate and up one behind the other."""
    gate, up, down = names
    found = {name: part for name, part in state.items() if ".experts." not in name}
    for layer in range(2):
        each = [f"model.layers.{layer}.{block}experts.{i}." for i in range(5)]
        gate_up = torch.stack(
            [torch.cat([state[f"{e}{n}.weight"] for n in (gate, up)]) for e in each]
        )
        downs = torch.stack([state[f"{e}{down}.weight"] for e in each])
        stem = f"model.layers.{layer}.{block}experts."
        found[f"{stem}gate_up_proj"] = gate_up.mT if turned else gate_up
        found[f"{stem}down_proj"] = downs.mT if turned else downs
    return found


QWEN, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
NAMES = {"qwen3_moe": (QWEN, "mlp."), "mixtral": (MIXTRAL, "block_sparse_moe.")}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_stacks_of_transformers(family, turned, tmp_path):
    """Of either orientation, the tensors are those of the file that has them one by one."""
    config, state = saved(family, tmp_path / "saved")
    stacked = written(tmp_path / "stacked", config, fused(state, *NAMES[family], turned=turned))
    ours, plain = (Weights(Checkpoint(folder)) for folder in (stacked, tmp_path / "saved"))
    for name in plain.shapes:
        assert torch.equal(ours.read(name), plain.read(name))
        if ".experts." in name:
            run = [range(3, 11)]
            cut = ours.read(name, rows=run, columns=range(2, 9))
            assert torch.equal(cut, plain.read(name)[3:11, 2:9])


def mxfp4(shape: tuple[int, ...], random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Codes of E2M1, two to a byte, of which 32 along the last dimension share an exponent."""
    *outer, columns = shape
    blocks = random.integers(0, 256, (*outer, columns // 32, 16), dtype=np.uint8)
    scales = random.integers(118, 123, (*outer, columns // 32), dtype=np.uint8)
    return torch.from_numpy(blocks), torch.from_numpy(scales)


def in_mxfp4(config: dict, state: State) -> tuple[dict, State]:
    """gpt-oss as it was released: its experts' matrices in MXFP4, all else in bfloat16."""
    random, found = np.random.default_rng(0), {}
    for name, part in state.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            pair = mxfp4(part.mT.shape, random)
            found |= zip((f"{name}_blocks", f"{name}_scales"), pair, strict=True)
        else:
            found[name] = part.bfloat16()
    left = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    return config | {"quantization_config": settings, "dtype": "bfloat16"}, found


def test_gpt_oss_as_it_was_released(tmp_path):
    """Integers, of which the logits and tokens are transformers' of the numbers."""
    config, state = saved("gpt_oss", tmp_path / "saved")
    folder = written(tmp_path / "mxfp4", *in_mxfp4(config, state))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = load(folder)
    assert_same_model(ours, theirs.float().eval(), PROMPTS, 6)
    assert {m.spec.bits for n, m in ours.named_modules() if n.endswith("experts.3.down")} == {5}


def in_mlx(family: str, state: State, settings: dict) -> tuple[State, State]:
    """Linears of experts in 4 bits with an offset per group, stacked as MLX has them.

    Returns:
        MLX's tensors, and those of the same weights that transformers saves.
    """
    random, write = np.random.default_rng(0), mlx(4, 32)
    names, block = NAMES[family]
    stacked = {name: part for name, part in state.items() if ".experts." not in name}
    plain = dict(stacked)
    for layer in range(2):
        stem = f"model.layers.{layer}.{block}"
        for theirs, own in zip(names, QWEN, strict=True):
            module = f"{stem}switch_mlp.{own}"
            parts: dict[str, list[Tensor]] = {}
            for i in range(5):
                name = f"{stem}experts.{i}.{theirs}.weight"
                tensors, weight = write(*state[name].shape, random)
                plain[name] = weight.float()
                for key, tensor in tensors.items():
                    parts.setdefault(key, []).append(tensor)
            stacked |= {f"{module}.{key}": torch.stack(each) for key, each in parts.items()}
            settings[module] = {"bits": 4, "group_size": 32}
    return stacked, plain


@pytest.mark.parametrize("family", NAMES)
def test_stacks_of_mlx(family, tmp_path):
    """Settings name a stack: other modules have other bits, and none here."""
    config, state = saved(family, tmp_path / "saved")
    settings: dict = {"bits": 8, "group_size": 64}
    stacked, plain = in_mlx(family, state, settings)
    folder = written(tmp_path / "mlx", config | {"quantization": settings}, stacked)
    ours = load(folder)
    written(tmp_path / "plain", config, plain)
    assert_same_model(ours, pretrained(tmp_path / "plain"), PROMPTS, 6)
    assert ours.get_submodule("layers.1.mlp.experts.3.up").spec.bits == 4


def test_a_router_of_mlx_is_numbers(tmp_path):
    """MLX quantizes what chooses experts as well; its bias is a tensor by itself."""
    config, state = saved("gpt_oss", tmp_path / "saved")
    random, packed = np.random.default_rng(0), dict(state)
    for layer in range(2):
        router = f"model.layers.{layer}.mlp.router"
        tensors, weight = mlx(8, 64)(5, 64, random)
        state[f"{router}.weight"] = weight.float()
        del packed[f"{router}.weight"]
        packed |= {f"{router}.{key}": tensor for key, tensor in tensors.items()}
    settings = {"bits": 8, "group_size": 64}
    ours = load(written(tmp_path / "mlx", config | {"quantization": settings}, packed))
    theirs = pretrained(written(tmp_path / "plain", config, state))
    assert_same_model(ours, theirs, PROMPTS, 6)
    assert ours.get_submodule("layers.1.mlp.router").spec.bits == 16


def without_a_dimension(state: State) -> None:
    state[DOWN] = state[DOWN][0]


def of_an_odd_number(state: State) -> None:
    state[GATE_UP] = state[GATE_UP][:, :, :-1]


def of_none(state: State) -> None:
    state[DOWN] = state[DOWN][:0]


DOWN, GATE_UP = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("down", "gate_up"))
BROKEN: dict[str, tuple[Callable[[State], None], str]] = {
    "a matrix": (without_a_dimension, f"{DOWN} has the shape [96, 64]; it is to have"),
    "gate and up of unlike rows": (of_an_odd_number, "[5, 64, 191]; it is to have a tensor of 2"),
    "of no experts": (
        of_none,
        "[0, 96, 64]; it is to have a tensor for each of up to 4096 experts",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_stack_is_one_line(case, tmp_path):
    change, said = BROKEN[case]
    config, state = saved("gpt_oss", tmp_path / "saved")
    change(state)
    with pytest.raises(UserError, match=re.escape(said)):
        load(written(tmp_path / "broken", config, state))
