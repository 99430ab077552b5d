"""A model's name and size, a repository or a path -> a local folder with its files."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from qllm.errors import UserError, first_line
from qllm.files import portable, readable
from qllm.folders import partial_path
from qllm.gguf import SUFFIX as GGUF
from qllm.gguf import is_gguf
from qllm.onnx_files import SUFFIX as ONNX
from qllm.onnx_files import folder_of, is_onnx
from qllm.progress import Note, silent

PACKAGE = Path(__file__).resolve().parent
# Inside the package where pip has copied it, beside it in a clone.
_COPIED = PACKAGE / "tiny_models"
BUNDLED = _COPIED if _COPIED.is_dir() else PACKAGE.parent / "tiny_models"

REPOSITORIES: dict[str, dict[str, str]] = {
    "opt": {
        size: f"facebook/opt-{size}"
        for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    },
    "bloom": {
        **{size: f"bigscience/bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")},
        "176b": "bigscience/bloom",
    },
    "llama": {
        size + chat: f"meta-llama/Llama-2-{size}{chat}-hf"
        for chat in ("", "-chat")
        for size in ("7b", "13b", "70b")
    },
    "mistral": {
        "7b": "mistralai/Mistral-7B-v0.3",
        "12b": "mistralai/Mistral-Nemo-Base-2407",
        "7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
        "12b-instruct": "mistralai/Mistral-Nemo-Instruct-2407",
        "small-3.1": "mistralai/Mistral-Small-3.1-24B-Base-2503",
        "small-3.1-instruct": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    },
    "ministral3": {
        size.lower() + key: f"mistralai/Ministral-3-{size}-{name}"
        for key, name in (
            ("", "Base-2512"),
            ("-instruct", "Instruct-2512-BF16"),
            ("-reasoning", "Reasoning-2512"),
        )
        for size in ("3B", "8B", "14B")
    },
    "qwen2": {
        f"{version}{size.lower()}{chat.lower()}": f"Qwen/Qwen{name}-{size}{chat}"
        for version, name, numbers in (
            ("", "2", ("0.5B", "1.5B", "7B", "72B")),
            ("2.5-", "2.5", ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
        )
        for chat in ("", "-Instruct")
        for size in numbers
    },
    "qwen3": {
        **{f"{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")},
        **{f"{size}b-base": f"Qwen/Qwen3-{size}B-Base" for size in ("0.6", "1.7", "4", "8", "14")},
    },
    "gemma2": {
        size + chat: f"google/gemma-2-{size}{chat}"
        for chat in ("", "-it")
        for size in ("2b", "9b", "27b")
    },
    "gemma3_text": {
        "270m": "google/gemma-3-270m",
        "1b": "google/gemma-3-1b-pt",
        **{size: f"google/gemma-3-{size}-pt" for size in ("4b", "12b", "27b")},
        "270m-it": "google/gemma-3-270m-it",
        **{f"{size}-it": f"google/gemma-3-{size}-it" for size in ("1b", "4b", "12b", "27b")},
    },
    "gemma4_text": {
        size.lower() + chat: f"google/gemma-4-{size}{chat}"
        for chat in ("", "-it")
        for size in ("E2B", "E4B", "12B", "31B", "26B-A4B")
    },
    "phi3": {
        "mini-4k": "microsoft/Phi-3-mini-4k-instruct",
        "mini-128k": "microsoft/Phi-3-mini-128k-instruct",
        "medium-4k": "microsoft/Phi-3-medium-4k-instruct",
        "medium-128k": "microsoft/Phi-3-medium-128k-instruct",
        "3.5-mini": "microsoft/Phi-3.5-mini-instruct",
        "4-mini": "microsoft/Phi-4-mini-instruct",
        "4": "microsoft/phi-4",
    },
    "gpt_neox": {
        **{
            size: f"EleutherAI/pythia-{size}"
            for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
        },
        "20b": "EleutherAI/gpt-neox-20b",
    },
    "gpt2": {
        size: f"openai-community/gpt2{name}"
        for size, name in (
            ("124m", ""),
            ("355m", "-medium"),
            ("774m", "-large"),
            ("1.5b", "-xl"),
        )
    },
    "starcoder2": {
        **{size: f"bigcode/starcoder2-{size}" for size in ("3b", "7b", "15b")},
        "15b-instruct": "bigcode/starcoder2-15b-instruct-v0.1",
    },
    "granite": {
        f"{version}-{size}{chat}": f"ibm-granite/granite-{version}-{size}{name}"
        for version in ("3.3", "3.1")
        for chat, name in (("", "-base"), ("-instruct", "-instruct"))
        for size in ("2b", "8b")
    },
    "smollm3": {"3b": "HuggingFaceTB/SmolLM3-3B", "3b-base": "HuggingFaceTB/SmolLM3-3B-Base"},
    "olmo2": {
        size + chat.lower(): f"allenai/OLMo-2-{date}-{size.upper()}{chat}"
        for chat in ("", "-Instruct")
        for size, date in (("1b", "0425"), ("7b", "1124"), ("13b", "1124"), ("32b", "0325"))
    },
    "olmo3": {
        "7b": "allenai/Olmo-3-1025-7B",
        "32b": "allenai/Olmo-3-1125-32B",
        "7b-instruct": "allenai/Olmo-3-7B-Instruct",
        "7b-think": "allenai/Olmo-3-7B-Think",
        "32b-think": "allenai/Olmo-3-32B-Think",
    },
    "glm": {
        **{size: f"zai-org/glm-{size}-hf" for size in ("4-9b", "4-9b-chat")},
        **{size: f"zai-org/glm-{size}" for size in ("edge-1.5b-chat", "edge-4b-chat")},
    },
    "glm4": {
        kind.lower() + size: f"zai-org/GLM-{kind or '4-'}{size.upper()}-0414"
        for kind in ("", "Z1-")
        for size in ("9b", "32b")
    },
    "cohere": {
        **{f"aya-23-{size.lower()}": f"CohereLabs/aya-23-{size}" for size in ("8B", "35B")},
        **{f"aya-expanse-{size}": f"CohereLabs/aya-expanse-{size}" for size in ("8b", "32b")},
        "command-r": "CohereLabs/c4ai-command-r-v01",
    },
    "cohere2": {
        "r7b": "CohereLabs/c4ai-command-r7b-12-2024",
        "r7b-arabic": "CohereLabs/c4ai-command-r7b-arabic-02-2025",
        "command-a": "CohereLabs/c4ai-command-a-03-2025",
    },
    "exaone4": {size: f"LGAI-EXAONE/EXAONE-4.0-{size.upper()}" for size in ("1.2b", "32b")},
    "ernie4_5": {"0.3b" + base.lower(): f"baidu/ERNIE-4.5-0.3B{base}-PT" for base in ("", "-Base")},
    "arcee": {"4.5b": "arcee-ai/AFM-4.5B", "4.5b-base": "arcee-ai/AFM-4.5B-Base"},
    "phi": {size: f"microsoft/phi-{size.replace('.', '_')}" for size in ("2", "1", "1.5")},
    "gemma": {
        size + chat: f"google/gemma-{size}{chat}" for chat in ("", "-it") for size in ("2b", "7b")
    },
    "stablelm": {
        "3b-4e1t": "stabilityai/stablelm-3b-4e1t",
        "2-1.6b": "stabilityai/stablelm-2-1_6b",
        "2-1.6b-chat": "stabilityai/stablelm-2-1_6b-chat",
        "zephyr-3b": "stabilityai/stablelm-zephyr-3b",
    },
    "olmo": {size: f"allenai/OLMo-{size.upper()}-0724-hf" for size in ("1b", "7b")},
    "seed_oss": {
        f"36b{end}": f"ByteDance-Seed/Seed-OSS-36B-{kind}"
        for end, kind in (("", "Instruct"), ("-base", "Base"))
    },
    "mixtral": {
        f"{size.lower()}{chat.lower()}": f"mistralai/Mixtral-{size}{chat}-v0.1"
        for chat in ("", "-Instruct")
        for size in ("8x7B", "8x22B")
    },
    "qwen2_moe": {
        "1.5-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B",
        "1.5-a2.7b-chat": "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        "57b-a14b": "Qwen/Qwen2-57B-A14B",
        "57b-a14b-instruct": "Qwen/Qwen2-57B-A14B-Instruct",
    },
    "qwen3_5_text": {
        size.lower(): f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B")
    },
    "qwen3_5_moe_text": {"35b-a3b": "Qwen/Qwen3.5-35B-A3B"},
    "qwen3_next": {
        "80b-a3b": "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "80b-a3b-thinking": "Qwen/Qwen3-Next-80B-A3B-Thinking",
    },
    "qwen3_moe": {
        "30b-a3b": "Qwen/Qwen3-30B-A3B",
        "30b-a3b-base": "Qwen/Qwen3-30B-A3B-Base",
        "30b-a3b-instruct": "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "30b-a3b-thinking": "Qwen/Qwen3-30B-A3B-Thinking-2507",
        "coder-30b-a3b": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "235b-a22b": "Qwen/Qwen3-235B-A22B",
    },
    "olmoe": {
        "1b-7b": "allenai/OLMoE-1B-7B-0125",
        "1b-7b-instruct": "allenai/OLMoE-1B-7B-0125-Instruct",
    },
    "granitemoe": {
        f"3.1-{size}{chat}": f"ibm-granite/granite-3.1-{size}{name}"
        for chat, name in (("", "-base"), ("-instruct", "-instruct"))
        for size in ("1b-a400m", "3b-a800m")
    },
    "gpt_oss": {size: f"openai/gpt-oss-{size}" for size in ("20b", "120b")},
}
TINY = "tiny"
OFFLINE_DEFAULT = "`opt-tiny` runs offline"

# What a run needs besides weights; weights are safetensors where there are any.
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
# Chat templates besides the default one, where transformers 5 writes and looks for them.
TEMPLATES = "additional_chat_templates/*.jinja"
SAFETENSORS = ["*.safetensors"]
TORCH_FILES = ["pytorch_model*.bin", "gptq_model*.bin"]
# Files of subfolders, and the weights once more, in Mistral's own layout.
IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFolder:
    """A model's files.

    Attributes:
        path: the folder that holds them, or a GGUF file.
        name: what to call the model: a repository, or the folder's own name.
        onnx: of several ONNX models of the folder, the file of the one that is meant.
    """

    path: Path
    name: str
    onnx: Path | None = None

    @property
    def holds_onnx(self) -> bool:
        """Whether it is an ONNX model, and no checkpoint."""
        return self.onnx is not None or is_onnx(self.path)

    @property
    def key(self) -> str:
        """A file name that stands for this model and no other on this machine."""
        if "/" in self.name or self.path.parent == BUNDLED:
            return self.name.replace("/", "--")
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        return f"{self.name}-{digest[:8]}"

    @property
    def origin(self) -> str:
        """What `find` finds this model by, from any folder of this machine."""
        path = self.path.resolve()
        return self.name if "/" in self.name or path.parent == BUNDLED else str(path)


def sizes(family: str) -> list[str]:
    """The sizes a family has, its smallest published one first, and the bundled one, if any."""
    return [*REPOSITORIES[family], *([TINY] if family in bundled() else [])]


def bundled() -> list[str]:
    """The families of which a tiny model is bundled."""
    return [family for family in REPOSITORIES if (BUNDLED / f"{family}-{TINY}").is_dir()]


def find(name: str, *, weights: bool = True, note: Note = silent) -> ModelFolder:
    """The folder that a name stands for: a folder, a bundled model, or a Hub repository.

    Args:
        name: "path/to/folder", "opt-tiny" where there is no such folder, "facebook/opt-125m".
        weights, note: see `resolve`.

    Raises:
        UserError: see `resolve`.
    """
    family, _, size = name.partition("-")
    if family in REPOSITORIES and size == TINY and not Path(name).exists():
        return resolve(family, TINY)
    return resolve("opt", None, name, weights=weights, note=note)


def resolve(
    family: str,
    size: str | None = None,
    path: str | None = None,
    *,
    weights: bool = True,
    note: Note = silent,
) -> ModelFolder:
    """The folder of a model, downloaded where it has to be.

    Args:
        family: a key of REPOSITORIES.
        size: one of `sizes(family)`; None is the smallest published one.
        path: a folder, a GGUF or ONNX file or a Hub repository, which takes the place of family and
            size.
        weights: False where config.json is enough.
        note: called with a line when a cached copy is used because the Hub is out of reach.

    Raises:
        UserError: for an unknown size, a folder that is none, or a repository that can be neither
            downloaded nor found in the cache.
    """
    if path is not None:
        folder = Path(path)
        if path and (home := folder_of(folder)):
            file = None if folder.is_dir() else folder
            stem = readable(home.resolve().name)
            if file and file.stem != "model":
                stem = f"{stem}-{readable(file.stem)}"
            return ModelFolder(portable(home), stem, file)
        if path and folder.is_dir():
            return ModelFolder(portable(folder), readable(folder.resolve().name))
        kind = "file" if folder.suffix in (GGUF, ONNX) else "folder"
        if is_gguf(folder) and folder.exists():
            return ModelFolder(folder, readable(folder.resolve().stem))
        if path and folder.exists():
            raise UserError(
                f"{path} is a file; `model` takes a folder, a GGUF or ONNX file or a Hub repository"
            )
        named = path and "\0" not in path  # which no file's name has
        if named and (begun := partial_path(folder)).is_dir():
            raise UserError(
                f"{path} is not finished; what there is of it is in {begun.name}, and the command "
                "that makes it goes on with that"
            )
        if path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith("/"):
            name = kind == "folder" and path and ("/" not in path or "://" in path)
            listed = ", ".join(f"{family}-{TINY}" for family in bundled())
            hint = f"; {listed} are bundled, and the Hub's are OWNER/NAME" if name else ""
            raise UserError(f"{path}: there is no such {kind}{hint}")
        try:
            return _download(path, weights, note)
        except UserError as error:
            raise UserError(f"{path} is no {kind} here; on the Hub, {error}") from None
    size = sizes(family)[0] if size is None else size
    if size not in sizes(family):
        raise UserError(f"{family} has no size {size!r}; choose from {', '.join(sizes(family))}")
    if size == TINY:
        return ModelFolder(BUNDLED / f"{family}-tiny", f"{family}-tiny")
    return _download(REPOSITORIES[family][size], weights, note)


def _download(repository: str, weights: bool, note: Note) -> ModelFolder:
    # Imported here: a run from a folder needs none of it.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import (
        disable_progress_bars,
        filter_repo_objects,
        validate_repo_id,
    )

    if not os.isatty(2):
        disable_progress_bars()
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: {first_line(error)}") from None
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        # Asked first because it takes a limit of time, which snapshot_download does not.
        info = HfApi().model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = [file.rfilename for file in info.siblings or ()]

        def matching(patterns: list[str]) -> list[str]:
            return list(
                filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=IGNORED)
            )

        taken = [*matching(SMALL_FILES), *fnmatch.filter(files, TEMPLATES)]
        if weights:
            taken += matching(SAFETENSORS) or matching(TORCH_FILES)
        folder = snapshot_download(repository, allow_patterns=[glob.escape(t) for t in taken])
        return ModelFolder(Path(folder), repository)
    except Exception as error:  # the Hub's clients raise whatever their transport does
        cached = _cached(repository, weights)
        if cached is not None:
            if not constants.HF_HUB_OFFLINE:
                note(f"{repository}: the Hub does not serve it ({first_line(error)}); cached copy")
            return ModelFolder(cached, repository)
        if isinstance(error, GatedRepoError):
            reason = "is gated: accept its licence on its Hub page and set HF_TOKEN"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "is no model of the Hub, or one that needs an HF_TOKEN"
        else:
            reason = (
                f"is not in the cache ({constants.HF_HUB_CACHE}) and cannot be downloaded now "
                f"({first_line(error)})"
            )
        raise UserError(f"{repository} {reason}; {OFFLINE_DEFAULT}") from None


def _cached(repository: str, weights: bool) -> Path | None:
    """The cached snapshot of a repository's main branch, if it has what a run needs.

    snapshot_download takes one without the files that QLLM does not fetch for broken.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    found = any(True for name in (*SAFETENSORS, *TORCH_FILES) for _ in folder.glob(name))
    return folder if found or not weights else None
