"""ONNX: models written for onnxruntime, those of others quantized, and either of them run.

onnx and onnxruntime are an optional extra: what needs them calls `check_installed` first.
"""

from __future__ import annotations

from importlib.util import find_spec

from qllm.errors import UserError

PACKAGES = ("onnx", "onnxruntime")
# What MatMulNBits may round activations to: not at all (0 and 1: float32), float16, bfloat16, or
# int8 in blocks, which is by far the fastest, and what onnxruntime-genai takes on CPUs.
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
DEFAULT_ACCURACY_LEVEL = 4


def check_installed() -> None:
    """Refuse to go on without the extra.

    Raises:
        UserError: naming what to install.
    """
    specs = {name: find_spec(name) for name in PACKAGES}
    # A mere folder of that name, such as a model saved to onnx/, has a spec without an origin.
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise UserError(
            f"ONNX models take the package{'s' if len(missing) > 1 else ''} "
            f"{' and '.join(missing)}; pip install {' '.join(PACKAGES)} installs what is needed"
        )
