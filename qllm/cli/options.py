"""What the command line calls the parameters that the library's messages name.

A message of the library names a parameter in backticks, a value behind it: "`kv_bits` 8". Python's
callers read it so, and on the command line its option stands there. What is a command in both
begins with its program, and stays: "qllm_quant.py --bitwidth 8:tc", "torchrun --nproc-per-node 2".
"""

from __future__ import annotations

import re

# Names of parameters, of attributes, of functions and of a bundled model, as the library has them.
OPTIONS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("accuracy_level", "batch", "bits", "bitwidth", "cluster", "conventions", "dataset"),
            *("device", "dtype", "embedding", "embedding_bits", "fake", "fixed", "group_size"),
            *("kv_bits", "lm_head", "lm_head_bits", "max_prompt_length", "max_tokens", "memory"),
            *("num_shards", "pp", "prompt", "reference", "round_offsets", "save", "scheme"),
            *("stages", "static_groups", "table", "tasks", "time_limit", "tp", "window"),
        )
    },
    "agree": "--agreement",
    "calibration": "--calib",
    "CalibrationText.tokens": "--seqlen",
    "describe_machine": "--probe",
    "length": "--seqlen",
    "longest": "--max-length",
    "max_bits": "--avg-bits",
    "max_bytes": "--size",
    "max_divergence": "--max-kl",
    "max_new_tokens": "--max-gen-tokens",
    "model": "--model-path",
    "new": "--gen",
    "opt-tiny": "--model-name opt --model-size tiny",
    "predict": "--tp-model",
    "QuantPlan.rules": "--config",
}
NAME = re.compile(r"`([\w.-]+)`")


def name_options(message: str) -> str:
    """A message with the options of the parameters that it names; other names stay as they are."""
    return NAME.sub(lambda found: OPTIONS.get(found[1], found[0]), message)
