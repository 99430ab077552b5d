"""From a name, a repository or a path to a folder: the cache, the Hub, and neither of them.

A server of our own stands for the Hub where something is to be downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import processes
import pytest
import torch
from conftest import FAMILIES, ROOT, run_json, tiny

from qllm import hub
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.models import FAMILIES as FAMILY_TABLE
from tools.random_checkpoint import COMMIT, bloom_config, lay_out, llama_config, opt_config

RESOLVE = """
import json, sys
from qllm import hub
from qllm.errors import UserError

for asked in json.loads(sys.argv[1]):
    try:
        found = hub.resolve(**asked, note=lambda line: print("note:", line))
        print(found.path, found.name)
    except UserError as error:
        print("error:", error)
"""
SMALL = opt_config(64, 2, 4, vocab_size=4096)


def resolve(home: Path, *asked: dict, online: str | None = None) -> list[str]:
    """What hub.resolve does in a process of its own: its notes, then the folder or the error.

    In a process, since huggingface_hub reads its variables when it is imported.

    Args:
        asked: options of each call; a call without any where there are none.
        online: the address of the Hub; None is HF_HUB_OFFLINE=1.
    """
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1"}
    if online:
        environment |= {"HF_ENDPOINT": online, "HF_HUB_OFFLINE": "0"}
    calls = json.dumps([{"family": "opt", **options} for options in asked or ({},)])
    done = processes.run(["-c", RESOLVE, calls], environment, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_sizes_that_there_are():
    assert " ".join(hub.sizes("opt")) == "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b tiny"
    assert " ".join(hub.sizes("bloom")) == "560m 1b1 1b7 3b 7b1 176b tiny"
    assert " ".join(hub.sizes("llama")) == "7b 13b 70b 7b-chat 13b-chat 70b-chat tiny"
    assert hub.REPOSITORIES["bloom"]["176b"] == "bigscience/bloom"
    assert hub.REPOSITORIES["llama"]["7b-chat"] == "meta-llama/Llama-2-7b-chat-hf"
    assert hub.REPOSITORIES["qwen2"]["2.5-0.5b-instruct"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert hub.REPOSITORIES.keys() == FAMILY_TABLE.keys()
    page = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    for family in FAMILY_TABLE:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{family}` |"))
        assert row.endswith(f"| {' '.join(hub.sizes(family))} |")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_is_bundled(family):
    found = hub.resolve(family, "tiny")
    assert found.path == tiny(family)
    assert found.key == f"{family}-tiny"


@pytest.mark.parametrize("size", ["7m", "", "TINY", "125M"])
def test_an_unknown_size_lists_the_known_ones(size):
    with pytest.raises(UserError, match=rf"opt has no size '{size}'; choose from 125m, 350m.*tiny"):
        hub.resolve("opt", size)


def test_paths(tmp_path):
    assert hub.resolve("opt", path=str(tmp_path)).name == tmp_path.name
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; `model` takes a folder"):
        hub.resolve("opt", path=str(tmp_path / "file"))
    for path in ("nowhere", "./no/where", "/no/where", "~/nowhere", "a/b/c", "a/", ""):
        with pytest.raises(UserError, match="there is no such folder"):
            hub.resolve("opt", path=path)
    for path in ("nowhere", "gpt2", "https://huggingface.co/openai-community/gpt2"):
        with pytest.raises(UserError, match="llama-tiny are bundled, and the Hub's are OWNER/NAME"):
            hub.resolve("opt", path=path)
    for path in ("nowhere.gguf", "./nowhere.gguf", "/no/where.gguf", "a/b/c.gguf"):
        with pytest.raises(UserError, match="there is no such file"):
            hub.resolve("opt", path=path)
    with pytest.raises(UserError, match=r"no/where\.gguf is no file here; on the Hub"):
        hub.resolve("opt", path="no/where.gguf")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UserError, match=r"out is not finished; .* in out\.partial, and"):
        hub.resolve("opt", path=str(tmp_path / "out"))


def test_folders_of_one_name_have_keys_of_their_own(tmp_path):
    keys = set()
    for parent in ("a", "b"):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True)
        keys.add(hub.resolve("opt", path=str(folder)).key)
    assert len(keys) == 2
    assert all("/" not in key for key in keys)


def test_the_smallest_published_size_is_the_default(tmp_path):
    smallest = {
        "opt": "facebook/opt-125m",
        "bloom": "bigscience/bloom-560m",
        "llama": "meta-llama/Llama-2-7b-hf",
    }
    lines = resolve(tmp_path, *({"family": family} for family in smallest))
    for name, line in zip(smallest.values(), lines, strict=True):
        assert line.startswith(f"error: {name} is not in the cache ({tmp_path}/hub)")
        assert line.endswith("(HF_HUB_OFFLINE is set); `opt-tiny` runs offline")


def test_a_cached_model_is_found_offline(tmp_path):
    snapshot = lay_out(tmp_path, "facebook/opt-125m", SMALL)
    found = resolve(tmp_path, {}, {"path": "facebook/opt-125m"})
    assert found == [f"{snapshot} facebook/opt-125m"] * 2


def test_files_that_a_run_does_not_need_may_be_missing(tmp_path):
    """The cache keeps a list of all files of a repository; QLLM fetches some of them."""
    snapshot = lay_out(tmp_path, "facebook/opt-125m", SMALL)
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    files = {name: {"size": 1, "blob_id": "0"} for name in ("config.json", "flax_model.msgpack")}
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert resolve(tmp_path) == [f"{snapshot} facebook/opt-125m"]


def test_a_cache_without_weights_does_for_random_input_alone(tmp_path):
    snapshot = lay_out(tmp_path, "facebook/opt-125m", SMALL, weights=False)
    found, line = resolve(tmp_path, {"weights": False}, {})
    assert found == f"{snapshot} facebook/opt-125m"
    assert line.startswith("error: facebook/opt-125m is not in the cache")


def test_a_name_that_cannot_be_one(tmp_path):
    (line,) = resolve(tmp_path, {"path": "not a/repo--name.."})
    assert line.startswith("error: not a/repo--name.. is no folder here; on the Hub, not a/")


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a download takes; `server.files` is what it serves."""

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0].strip("/"))
        self.server.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        if self.server.refusal:
            status, code = self.server.refusal
            return self.answer(b"{}", status, {"X-Error-Code": code})
        if "tree" in parts:
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{len(name):040}"}
                for name, data in self.server.files.items()
            ]
            return self.answer(json.dumps(listed).encode())
        if parts[0] == "api":
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        name = path.partition(f"resolve/{COMMIT}/")[2]
        headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
        return self.answer(self.server.files[name], 200, headers)

    def answer(self, data: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def serving() -> Iterator[ThreadingHTTPServer]:
    """A Hub of our own, at `server.address`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.asked, server.refusal = {}, [], None
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["sub/model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
    ],
)
def test_a_download_takes_what_a_run_needs(weights, taken, serving, tmp_path):
    """safetensors where there are any, nothing twice, nothing of other frameworks."""
    small = ["config.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"]
    small += ["additional_chat_templates/tool use [1].jinja"]
    others = ["flax_model.msgpack", "tf_model.h5", "original/params.json", "README.md"]
    others += ["consolidated.safetensors", "onnx/config.json"]
    serving.files = {name: name.encode() for name in [*small, *weights, *others]}
    (line,) = resolve(tmp_path, online=serving.address)
    snapshot = Path(line.split()[0])
    assert snapshot.name == COMMIT
    found = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert found == {*small, *taken}
    for name in [*small, *taken]:
        assert (snapshot / name).read_bytes() == name.encode()
    # And from then on it is there without a network.
    assert resolve(tmp_path) == [line]


def test_a_downloaded_model_runs(serving, tmp_path):
    folder = tiny("llama")
    serving.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": serving.address,
        "HF_HUB_OFFLINE": "0",
    }
    options = ("--model-path", "someone/llama", "--bitwidth", "4")
    result = run_json("qllm_gen.py", *options, env=environment)
    assert result["model"] == "someone/llama"
    expected = run_json("qllm_gen.py", "--model-path", folder, "--bitwidth", "4")
    assert result["results"] == expected["results"]


def test_random_input_takes_no_weights(serving, tmp_path):
    serving.files = {"config.json": b"{}", "model.safetensors": b"large"}
    (line,) = resolve(tmp_path, {"weights": False}, online=serving.address)
    assert [path.name for path in Path(line.split()[0]).iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "GatedRepo"), "is gated: accept its licence on its Hub page and set HF_TOKEN"),
        ((404, "RepoNotFound"), "is no model of the Hub, or one that needs an HF_TOKEN"),
        ((503, ""), "cannot be downloaded now"),
    ],
)
def test_what_the_hub_refuses(refusal, words, serving, tmp_path):
    serving.refusal = refusal
    (line,) = resolve(tmp_path, online=serving.address)
    assert line.startswith("error: facebook/opt-125m ")
    assert words in line
    assert line.endswith("; `opt-tiny` runs offline")
    # One that was downloaded before is used, with a note.
    snapshot = lay_out(tmp_path, "facebook/opt-125m", SMALL)
    note, line = resolve(tmp_path, online=serving.address)
    assert note.startswith("note: facebook/opt-125m: the Hub does not serve it")
    assert line == f"{snapshot} facebook/opt-125m"


@pytest.mark.parametrize(
    "kind", ["no name", "no server", pytest.param("silence", marks=pytest.mark.slow)]
)
def test_without_a_network_the_error_comes_soon(kind, silent_hub, tmp_path):
    """Before `resolve` gives up; it names what runs offline, and a cached model is used."""
    address = {
        "no name": "http://hub.invalid",
        "no server": "http://127.0.0.1:9",
        "silence": silent_hub,
    }[kind]
    if kind != "silence":  # each wait for which takes seconds
        (line,) = resolve(tmp_path, online=address)
        assert line.startswith("error: facebook/opt-125m is not in the cache")
        assert "cannot be downloaded now (" in line
        assert line.endswith("; `opt-tiny` runs offline")
    snapshot = lay_out(tmp_path, "facebook/opt-125m", SMALL)
    note, line = resolve(tmp_path, online=address)
    assert note.startswith("note: ")
    assert line == f"{snapshot} facebook/opt-125m"


PUBLISHED_FORMS = {
    "opt": (SMALL, "bin"),
    "opt-350m": (
        opt_config(64, 2, 4, do_layer_norm_before=False, word_embed_proj_dim=32, vocab_size=4096),
        "safetensors",
    ),
    "bloom": (bloom_config(64, 2, 4, vocab_size=4096), "safetensors"),
    "llama": (llama_config(64, 2, 8, 2, 160, vocab_size=4096), "safetensors"),
}


@pytest.mark.parametrize("name", PUBLISHED_FORMS)
def test_published_names_load_and_equal_the_reference(name, tmp_path):
    """The tensors' names and config.json's fields as they are published, in small."""
    from transformers import AutoModelForCausalLM

    config, kind = PUBLISHED_FORMS[name]
    snapshot = lay_out(tmp_path, f"someone/{name}", config, kind=kind)
    ours = load_model(snapshot, QuantPlan.parse("16"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    prompt = [2, 17, 900, 33, 4]
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours.prefill([prompt], last=False), expected, rtol=1e-4, atol=1e-4)


def test_the_cache_may_move(tmp_path):
    """Its links are relative, and nothing keeps the old place."""
    lay_out(tmp_path / "old", "facebook/opt-125m", SMALL)
    shutil.move(tmp_path / "old", tmp_path / "new")
    (line,) = resolve(tmp_path / "new")
    folder = Path(line.split()[0])
    load_model(folder, QuantPlan.parse("4"))
