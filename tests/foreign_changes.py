"""What makes a checkpoint of others peculiar: changes to one before it is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from foreign import Folder, Writer, gptq, mlx, quantize, twin_of


def moved(folder: Folder, name: str, **changes: object) -> None:
    """The entry of config.json goes to a file beside it; None takes a key out."""
    entry = folder.config.pop("quantization_config") | changes
    folder.beside[name] = {key: value for key, value in entry.items() if value is not None}


def named(folder: Folder, *names: str) -> None:
    """The tensors in files of these names, without an index."""
    tensors = list(folder.state)
    part = -(-len(tensors) // len(names))
    folder.files = {name: tensors[i * part : (i + 1) * part] for i, name in enumerate(names)}


def with_tensors(folder: Folder, value: float, *names: str) -> None:
    folder.state |= {name: torch.full((4,), value) for name in names}


def indexed(folder: Folder, *, left_out: int = 0) -> None:
    """Two files and an index, which leaves a tensor out that the second one holds, and others."""
    named(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    of = {name: file for file, names in folder.files.items() for name in names}
    weight_map = dict(list(of.items())[left_out:])
    folder.beside["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    with_tensors(folder, 7.0, "model.layers.0.nobody.knows")
    folder.files["model-00002-of-00002.safetensors"].append("model.layers.0.nobody.knows")


def some_quantized(*ends: str, config: list) -> Callable[[Folder], None]:
    """Linears of these names alone are quantized, and the config says which."""

    def change(folder: Folder) -> None:
        random = np.random.default_rng(1)
        for name in list(folder.state):
            module = name.removesuffix(".weight")
            if module.endswith(ends):
                quantize(folder.twin, folder.state, module, gptq(), random)
        folder.config["quantization_config"]["modules_in_block_to_quantize"] = config

    return change


def tables_quantized(
    write: Writer, *targets: str, head: bool = False, **group: object
) -> Callable[[Folder], None]:
    """Embeddings that one of the targets names are quantized as well, or alone.

    Args:
        head: a tied model's head is in the file, too, with numbers of its own.
        group: of the configuration's group.
    """

    def change(folder: Folder) -> None:
        random = np.random.default_rng(1)
        for name, module in list(folder.twin.named_modules()):
            positions = isinstance(module, torch.nn.Embedding) and "positions" in name
            if isinstance(module, torch.nn.Embedding) and ("Embedding" in targets or not positions):
                quantize(folder.twin, folder.state, name, write, random)
        if head:
            own = torch.randn(folder.twin.lm_head.weight.shape) * 0.1
            folder.twin.lm_head.weight = torch.nn.Parameter(own)
            folder.state["lm_head.weight"] = own.clone()
        elif folder.config["tie_word_embeddings"]:
            folder.twin.lm_head.weight = folder.twin.get_input_embeddings().weight
        found = folder.config["quantization_config"]["config_groups"]["group_0"]
        folder.config["quantization_config"]["config_groups"] = {
            "group_0": found | {"targets": list(targets)} | group
        }

    return change


def as_mlx(
    write: Writer, bits: int, *, repeated: bool = True, mode: str = "affine"
) -> Callable[[Folder], None]:
    """Embedding and head are quantized as well, and config.json has it under MLX's name.

    Args:
        repeated: as newer versions do, under the usual name as well.
    """

    def change(folder: Folder) -> None:
        random, twin = np.random.default_rng(1), folder.twin
        tables = [n for n, m in twin.named_modules() if isinstance(m, torch.nn.Embedding)]
        if folder.config["tie_word_embeddings"]:
            quantize(twin, folder.state, *tables, write, random)
            twin.lm_head.weight = twin.get_input_embeddings().weight
        else:
            for name in (*tables, "lm_head"):
                quantize(twin, folder.state, name, write, random)
        settings = {"group_size": 32, "bits": bits, "mode": mode}
        folder.config["quantization"] = settings
        if repeated:
            folder.config["quantization_config"] = dict(settings)

    return change


def of_several_bits(folder: Folder) -> None:
    """MLX's settings of modules: other bits, or none."""
    as_mlx(mlx(), 4)(folder)
    twin, state, random = folder.twin, folder.state, np.random.default_rng(2)
    down, o = (f"model.layers.1.{name}_proj" for name in ("mlp.down", "self_attn.o"))
    quantize(twin, state, down, mlx(6, 16), random)
    for key in [key for key in state if key.startswith(f"{o}.")]:
        del state[key]
    state[f"{o}.weight"] = twin.get_submodule(o).weight.detach().clone()
    own = {down: {"group_size": 16, "bits": 6, "mode": "affine"}, o: False}
    for key in ("quantization", "quantization_config"):
        folder.config[key] = folder.config[key] | own


def head_quantized(folder: Folder) -> None:
    quantize(folder.twin, folder.state, "lm_head", gptq(), np.random.default_rng(1))
    folder.config["quantization_config"]["lm_head"] = True


def auto_scheme(folder: Folder) -> None:
    """Linears of other bits, of other groups and of none, and a head, each with its own entry."""
    state, twin, random = folder.state, folder.twin, np.random.default_rng(1)
    original = twin_of("llama")
    down, up = (f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1))
    for name, write in (
        *((f"model.layers.0.mlp.{part}_proj", gptq(8, 32, sym=True)) for part in ("gate", "up")),
        (down, gptq(2, 16, sym=True)),
        ("lm_head", gptq(3, 32, sym=True)),
    ):
        state.setdefault(f"{name}.weight", torch.empty(0))
        quantize(twin, state, name, write, random)
    for key in [key for key in state if key.startswith(f"{up}.")]:
        del state[key]
    weight = original.get_submodule(up).weight.detach()
    state[f"{up}.weight"] = weight.clone()
    twin.get_submodule(up).weight.data = weight.clone()
    folder.config["quantization_config"]["extra_config"] = {
        # A name counts before an expression, and of those the first that is found.
        r".*layers\.0\.mlp.*": {"bits": 8},
        r".*mlp\.(gate|up|down)_proj$": {"bits": 4},
        down: {"bits": 2, "group_size": 16},
        up: {"bits": 16, "data_type": "float"},
        "lm_head": {
            **{"bits": 3, "group_size": 32, "sym": True, "data_type": "int", "act_bits": 16},
            **{"act_data_type": "float", "act_dynamic": True, "act_group_size": 32},
            **{"rotation_config": None, "super_bits": None, "super_group_size": None},
        },
    }


def one_dense(folder: Folder, linear: str = "self_attn.o_proj") -> None:
    """A linear that the config calls quantized is not so in the file, which decides."""
    stem = f"model.layers.1.{linear}."
    for name in [name for name in folder.state if name.startswith(stem)]:
        del folder.state[name]
    folder.state[f"{stem}weight"] = folder.twin.get_submodule(stem[:-1]).weight.detach().clone()


def other_order(folder: Folder) -> None:
    name = "model.layers.0.self_attn.k_proj.g_idx"
    folder.state[name] = folder.state[name].flip(0)


def three_heads(folder: Folder) -> None:
    """Heads that do not divide the hidden size, as their size is given: transformers 4 ran it."""
    config = folder.config | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    folder.config = config
    for layer in folder.twin.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = 3
        for name, rows in (("q_proj", 48), ("k_proj", 16), ("v_proj", 16)):
            getattr(attention, name).weight.data = getattr(attention, name).weight[:rows].detach()
        attention.o_proj.weight.data = attention.o_proj.weight[:, :48].detach()
    object.__setattr__(folder.twin.config, "num_attention_heads", 3)
    object.__setattr__(folder.twin.config, "num_key_value_heads", 1)
    folder.state = {name: tensor.clone() for name, tensor in folder.twin.state_dict().items()}


def without(key: str, *tensors: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.config.pop(key, None)
        for name in tensors:
            del folder.state[name]

    return change


def configured(**changes: object) -> Callable[[Folder], None]:
    return lambda folder: folder.config["quantization_config"].update(changes)
