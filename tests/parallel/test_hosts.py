"""Two hosts: network namespaces of this machine, each with an address of its own, over veth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_json

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29611
TIMEOUT = 10
OPTIONS = ("--model-size", "tiny", "--bitwidth", "4", "--tp", "2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces that reach each other."""
    names = tuple(f"qllm{os.getpid()}{letter}" for letter in "ab")
    links = tuple(f"q{os.getpid()}{letter}" for letter in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"this machine lets us make no network namespaces: {reason}")
    yield list(zip(names, links, strict=True))
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host: str, node: int, *args: object) -> subprocess.Popen:
    """torchrun on one of the hosts."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
    command += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"]
    return subprocess.Popen(
        [*command, str(ROOT / "qllm_gen.py"), *OPTIONS, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_hosts_generate_and_a_cut_link_ends_both(hosts):
    one = run_json("qllm_gen.py", *OPTIONS[:-2])
    runs = [start(host, node, "--json") for node, (host, _) in enumerate(hosts)]
    outs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    assert json.loads(outs[0][0])["results"] == one["results"] and outs[1][0] == ""

    long = ("--stream", "--max-gen-tokens", 490, "--timeout", TIMEOUT)
    runs = [start(host, node, *long) for node, (host, _) in enumerate(hosts)]
    for line in iter(runs[0].stdout.readline, ""):
        if line == "\n":  # its text begins
            break
    ip("-n", hosts[0][0], "link", "set", hosts[0][1], "down")
    errors = [run.communicate(timeout=120)[1] for run in runs]
    for node, error in enumerate(errors):
        assert runs[node].returncode == 1
        (line,) = re.findall("^qllm: error: .*", error, re.MULTILINE)
        assert f"rank {1 - node} (host " in line and "has not been heard of for 8 s" in line
