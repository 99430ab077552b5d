"""The README's commands at the published sizes, from a Hub cache with random weights.

One model lies on the disk at a time, 2.6 GB at the most. The smallest is run by default.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import run

from tools.random_checkpoint import lay_out

# As the README has them; its test takes these as run here.
COMMANDS = (
    "python3 ref_gen.py --model-name bloom --model-size 560m",
    "python3 weight_convert.py --model-name opt --model-size 125m",
    "python3 fake_calib_gen.py --model-name bloom --model-size 560m",
    "python3 qllm_gen.py --model-name bloom --model-size 560m",
    "python3 qllm_gen.py --model-name bloom --model-size 560m --bitwidth '8:tc-li'",
    "python3 qllm_gen.py --model-name bloom --model-size 560m --bitwidth 4 --num-shards 3",
    "python3 qllm_gen.py --model-size 1.3b --bitwidth '8:tc-li'",
    "python3 qllm_gen.py --model-name bloom --bitwidth 4",
)
REFERENCE, CONVERT, CALIBRATE, SIXTEEN, INT8, FOUR, LARGE_INT8, FOUR_DEFAULT = COMMANDS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """HF_HOME and QLLM_HOME of this module's commands."""
    folder = tmp_path_factory.mktemp("real")
    yield folder
    shutil.rmtree(folder)


def cached(home, repository: str, kind: str):
    """Lay a model out, and take it away again with all that was made of it."""
    lay_out(home, repository, kind=kind)
    yield
    for name in ("hub", "qllm"):
        shutil.rmtree(home / name, ignore_errors=True)


@pytest.fixture(scope="class")
def opt_125m(home):
    yield from cached(home, "facebook/opt-125m", "bin")


@pytest.fixture(scope="class")
def bloom_560m(home):
    yield from cached(home, "bigscience/bloom-560m", "safetensors")


@pytest.fixture(scope="class")
def opt_1_3b(home):
    yield from cached(home, "facebook/opt-1.3b", "safetensors")


def command(home, line: str) -> subprocess.CompletedProcess:
    """Run a command as the README writes it."""
    python, script, *args = shlex.split(line)
    assert python == "python3"
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "QLLM_HOME": str(home / "qllm"),
        # Threads that spin while they wait take the cores of tests that run beside this one.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = run(script, *args, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(note.startswith("note: ") for note in done.stderr.splitlines()), done.stderr
    return done


def shards(done: subprocess.CompletedProcess) -> list[tuple[str, float]]:
    """Layers and megabytes of each shard that was printed."""
    found = re.findall(r"^shard \d+: layers ([\d-]+), ([\d.]+) MB$", done.stdout, re.M)
    return [(layers, float(size)) for layers, size in found]


def results(done: subprocess.CompletedProcess) -> str:
    """Prompts, texts and counts as they are printed."""
    found = done.stdout.partition("\n\n")[2]
    assert found.count("prompt:") == found.count("new tokens:") == 3
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("opt_125m")
class TestOpt125m:
    def test_conversion_is_kept_and_picked_up(self, home):
        fly = command(home, "python3 qllm_gen.py")
        done = command(home, CONVERT)
        copy = home / "qllm" / "converted" / "facebook--opt-125m"
        assert done.stdout == f"facebook/opt-125m: 250.49 MB written to {copy}\n"
        kept = command(home, "python3 qllm_gen.py --model-size 125m --num-shards 2")
        assert "note: reading the converted copy" in kept.stderr
        assert results(kept) == results(fly)
        # 125 million weights of 2 bytes.
        assert sum(size for _, size in shards(kept)) == pytest.approx(250.5, abs=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("bloom_560m")
class TestBloom560m:
    def test_sixteen_bits_say_what_the_reference_says(self, home):
        reference = command(home, REFERENCE)
        assert reference.stdout.startswith("bigscience/bloom-560m in transformers, 1118.43 MB\n")
        ours = command(home, f"{SIXTEEN} --num-shards 2")
        assert results(ours) == results(reference)
        assert sum(size for _, size in shards(ours)) == pytest.approx(1118.4, abs=0.1)

    def test_four_bits(self, home):
        done = command(home, FOUR)
        layers = [found for found, _ in shards(done)]
        assert len(layers) == 3
        assert (layers[0][0], layers[-1][-2:]) == ("0", "23")
        # The embedding, and 302 million weights of 4 bits with 3 bytes per group of 128.
        expected = (250880 * 1024 * 2 + 24 * 12 * 1024**2 * (4 / 8 + 3 / 128)) / 1e6
        assert sum(size for _, size in shards(done)) == pytest.approx(expected, rel=0.01)
        # The default size; shards that nobody asked for are not printed.
        again = command(home, FOUR_DEFAULT)
        assert results(again) == results(done)
        assert not shards(again)

    def test_int8_with_statistics_of_random_input(self, home):
        done = command(home, CALIBRATE)
        path = home / "qllm" / "calibration" / "bigscience--bloom-560m.safetensors"
        assert done.stdout == (
            f"bigscience/bloom-560m: statistics of 97 layers from random input in {path}\n"
        )
        done = command(home, f"{INT8} --num-shards 2")
        assert f"note: activation statistics of random input: {path}" in done.stderr
        expected = (250880 * 1024 * 2 + 24 * 12 * 1024**2) / 1e6
        assert sum(size for _, size in shards(done)) == pytest.approx(expected, rel=0.01)
        results(done)


@pytest.mark.slow
@pytest.mark.usefixtures("opt_1_3b")
class TestOpt13b:
    def test_int8(self, home):
        done = command(home, f"{LARGE_INT8} --num-shards 2")
        assert done.stdout.startswith("facebook/opt-1.3b at bitwidth 8:tc-li, float16 on cpu")
        expected = ((50272 + 2050) * 2048 * 2 + 24 * 12 * 2048**2) / 1e6
        assert sum(size for _, size in shards(done)) == pytest.approx(expected, rel=0.01)
        results(done)
