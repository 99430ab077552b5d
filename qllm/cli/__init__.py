"""What the scripts share: option groups, prompts, printing, and how errors end a run.

Nothing heavy is imported until it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

from qllm.cli.bars import meter, note_above, progress
from qllm.cli.console import (
    Parser,
    error,
    note,
    print_json,
    print_lines,
    rearm,
    run,
    whole_number,
)
from qllm.cli.lengths import Default, DefaultName, check_rounding, fit_defaults, is_given, up_to
from qllm.cli.models import (
    DTYPES,
    add_accuracy_option,
    add_activation_options,
    add_calibration_options,
    add_kv_options,
    add_model_options,
    add_quant_options,
    add_run_options,
    add_threads_option,
    find_calibration,
    holds_onnx,
    read_plan,
    read_plans,
    refuse_for_onnx,
    resolve_device,
    resolve_dtype,
    resolve_model,
    resolve_models,
)
from qllm.cli.processes import (
    add_parallel_options,
    check_processes,
    join,
    session,
    unbounded,
)
from qllm.cli.prompts import (
    DEFAULT_PROMPTS,
    add_prompt_options,
    add_sampling_options,
    read_prompts,
    read_sampling_options,
    tokenize,
)
from qllm.progress import silent

__all__ = [
    "DEFAULT_PROMPTS",
    "DTYPES",
    "Default",
    "DefaultName",
    "Parser",
    "add_accuracy_option",
    "add_activation_options",
    "add_calibration_options",
    "add_kv_options",
    "add_model_options",
    "add_parallel_options",
    "add_prompt_options",
    "add_quant_options",
    "add_run_options",
    "add_sampling_options",
    "add_threads_option",
    "check_processes",
    "check_rounding",
    "error",
    "find_calibration",
    "fit_defaults",
    "holds_onnx",
    "is_given",
    "join",
    "meter",
    "note",
    "note_above",
    "print_json",
    "print_lines",
    "progress",
    "read_plan",
    "read_plans",
    "read_prompts",
    "read_sampling_options",
    "rearm",
    "refuse_for_onnx",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
    "resolve_models",
    "run",
    "session",
    "silent",
    "tokenize",
    "unbounded",
    "up_to",
    "whole_number",
]
