"""Whole checkpoints as others write them: transformers' tokens, or one line that says why not.

The oracle is transformers in float32 on the dequantized weights.
"""

from __future__ import annotations

import re

import pytest
from foreign import folder_of
from foreign_cases import CASES
from oracle import assert_same_model, draw_prompts, load

from qllm.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts((9, 3), 96)
# Kernels sum quantized layers in another order than a matrix of floats.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_others(name, tmp_path):
    case, notes = CASES[name], []
    folder = folder_of(case.family, case.write, case.config)
    case.change(folder)
    folder.write(tmp_path / "model")
    if case.error:
        with pytest.raises(UserError, match=case.error) as caught:
            load(tmp_path / "model")
        assert "\n" not in str(caught.value)
        return
    ours = load(tmp_path / "model", note=notes.append)
    assert_same_model(ours, folder.twin, PROMPTS, 4, TOLERANCE)
    assert len(notes) == bool(case.note)
    if case.note:
        assert re.search(case.note, notes[0])
