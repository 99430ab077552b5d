"""Which folders hold ONNX models, and where in them: `qllm.onnx` reads, writes and runs those."""

from __future__ import annotations

from pathlib import Path

# A folder with any of these holds a checkpoint, whatever else is in it.
CHECKPOINTS = ("*.safetensors", "pytorch_model*.bin")
# Where transformers.js and optimum put ONNX models of a folder, which has what stands beside them.
SUBFOLDER = "onnx"
SUFFIX = ".onnx"


def is_onnx(folder: Path) -> bool:
    """Whether a folder holds an ONNX model, and no checkpoint beside it."""
    if not folder.is_dir():  # but a GGUF file
        return False
    if any(True for pattern in CHECKPOINTS for _ in folder.glob(pattern)):
        return False
    return bool(onnx_files(folder))


def onnx_files(folder: Path) -> list[Path]:
    """The ONNX models in a folder; else those in its SUBFOLDER."""
    for place in (folder, folder / SUBFOLDER):
        if found := sorted(path for path in place.glob(f"*{SUFFIX}") if path.is_file()):
            return found
    return []


def folder_of(path: Path) -> Path | None:
    """The folder of the model that an ONNX file belongs to, or one's SUBFOLDER; else None."""
    if path.is_dir():
        alone = path.resolve().name == SUBFOLDER and not (path / "config.json").exists()
        return path.resolve().parent if alone and onnx_files(path) else None
    if path.suffix != SUFFIX or not path.is_file():
        return None
    if (path.parent / "config.json").exists() or path.parent.resolve().name != SUBFOLDER:
        return path.parent
    return path.parent.resolve().parent
