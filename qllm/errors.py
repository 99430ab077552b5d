"""The one exception that stands for a mistake in what was given, rather than in QLLM."""

from __future__ import annotations

import re
from typing import ClassVar

# What the scripts' options are called in Python, where both have them.
PARAMETERS = {
    "--model-name opt --model-size tiny": '"opt-tiny"',
    "--calib": "calibration",
    "--max-gen-tokens": "max_new_tokens",
    "--model-path": "model",
    "--nsamples": "CalibrationText.samples",
    "--seqlen": "CalibrationText.tokens",
    **{
        f"--{name.replace('_', '-')}": name
        for name in (
            *("bitwidth", "group_size", "scheme", "lm_head_bits", "embedding_bits", "algorithm"),
            *("activation_bits", "kv_bits", "dtype", "device", "num_shards", "tp", "dataset"),
            *("max_prompt_length", "batch_size", "window", "stride", "accuracy_level", "save"),
        )
    },
}
# An option, but for those of a command that a message says: "qllm_quant.py --bitwidth 8:tc".
OPTION = re.compile(rf"(?<!\.py )(?:{'|'.join(PARAMETERS)})(?![\w-])")


class UserError(ValueError):
    """Something given (an option, a file, a shape) cannot work.

    The message is one line which says what was given and what would work. The scripts print it
    and exit with status 2; a library caller catches it, or `ValueError`, and is told of parameters
    where a script's user is told of options.

    Attributes:
        tells_options: whether a script runs.
    """

    tells_options: ClassVar[bool] = False

    def __str__(self) -> str:
        message = super().__str__()
        if UserError.tells_options:
            return message
        return OPTION.sub(lambda found: PARAMETERS[found[0]], message)


class WritingError(UserError, OSError):
    """Something cannot be written: the disk is full or read-only, or what is named cannot be."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
