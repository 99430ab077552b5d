"""Pictures and the page: drawn by matplotlib, complete in one file, shown by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from qllm.errors import UserError
from qllm.evaluate import page, plots
from qllm.evaluate.table import DIVERGENCE, table_of

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "br", "link", "img"}


def row(bitwidth: str, size: int, value: float) -> dict:
    kl = {"mean": value / 1e4, "p50": 0.0, "p90": 0.0, "p99": 0.1, "max": 0.2}
    return {
        "model": "a & <b>",
        "algorithm": "" if bitwidth == "16" else "rtn",
        "bitwidth": bitwidth,
        "format": "16 bits" if bitwidth == "16" else f"{bitwidth} bits, group 32, sym",
        "dtype": "float16",
        "bytes": size,
        "perplexity": {"gptq": value},
        "perplexity_error": {"gptq": 0.1 * value},
        "tasks": {"lambada_openai": {"accuracy": 0.5, "perplexity": 9.0, "rows": 2}},
        "agreement": {
            "kl": kl,
            "same_top": 0.9,
            "positions": 7,
            "layers": [0.01, 0.02 * value],
            "prefix": {"mean": 3.0, "median": 3, "min": 1, "of": 4, "prompts": 2},
        },
        "tokens_per_second": 100.0,
    }


RESULT = {
    "model": "a & <b>",
    "models": ["a & <b>"],
    "device": "cpu",
    "dataset": {"name": "</script>", "sha256": "00", "bytes": 3, "words": 1, "tokens": 600},
    "conventions": {
        "gptq": {"about": "as", "window": 512, "stride": None, "windows": 1, "tokens": 511}
    },
    "tasks": {"lambada_openai": {"rows": 2, "sha256": "11"}},
    "rows": [row("16", 2_000_000, 20.0), row("4", 600_000, 25.0), row("2", 400_000, 90.0)],
    "samples": [{"prompt": "It <was>", "reference": "the", "rows": ["the best", "a", "</td>"]}],
    "fingerprints": {"a & <b>": {"model": "22", "tokenizer": "33"}},
    "versions": {"qllm": "0.1.0"},
    "machine": {"system": "Linux", "cpu": "Z80 & more", "cpus": 2, "threads": 2},
    "date": "2026-11-26",
}
SEVERAL = RESULT | {
    "models": ["opt", "rtn", "gptq"],
    "rows": [
        {**each, "model": name, "algorithm": algorithm}
        for each, name, algorithm in zip(
            RESULT["rows"], ("opt", "rtn", "gptq"), ("", "rtn", "gptq"), strict=True
        )
    ],
}


# One picture alone, each of which takes matplotlib half a second.
UNTESTED = [row | {"agreement": None, "tasks": {}} for row in RESULT["rows"]]
ONE_PICTURE = RESULT | {"rows": UNTESTED, "tasks": {}}


class Reader(HTMLParser):
    """Tags that are open, those seen, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.fetched, self.cells = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "h1", "h3", "p"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    pytest.importorskip("matplotlib")
    return page.page(RESULT)


def test_the_page_is_whole_and_fetches_nothing(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert all(target.startswith("#") for target in reader.fetched)
    assert not re.search(r"@import|url\((?!#)", html)
    assert {"svg", "table", "script", "style"} <= set(reader.seen)
    assert {"25.00 ± 2.50", "0.0025", "90.00%", f"{DIVERGENCE}."} <= set(reader.cells)
    assert "a & <b> on script> (600 tokens)" in reader.cells
    assert "group 32, sym; rtn; Z80 & more; 2 threads; 2026-11-26" in reader.cells
    assert {"It <was> …", "the best", "</td>"} <= set(reader.cells)
    assert "</script>, 600 tokens, SHA-256 00" in reader.cells


def test_the_page_holds_the_object(html):
    (data,) = re.findall(r'<script type="application/json" id="result">(.*?)</script>', html)
    assert json.loads(data) == RESULT


def test_the_pictures_say_what_they_show(html):
    text = "".join(re.findall("<svg.*?</svg>", html, re.DOTALL))
    assert html.count("<svg") == 4
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for words in (
        *("perplexity (gptq) against bytes", "lambada_openai against bytes"),
        *("divergence from the reference", "error of each layer's output", "relative error"),
    ):
        assert words in text


def test_only_what_was_measured_is_drawn():
    rows = [row("4", 1000, 3.0) | {"agreement": None, "tasks": {}}]
    titles = [title for title, _ in plots.list_panels(RESULT | {"rows": rows, "tasks": {}})]
    assert titles == ["perplexity (gptq) against bytes"]
    assert len(plots.list_panels(RESULT)) == 4


def test_points_are_the_rows():
    pytest.importorskip("matplotlib")
    first, *_, last = plots.figure(RESULT).axes
    line, base = first.lines
    assert base.get_ydata() == [20.0, 20.0]  # at 16 bits
    assert line.get_xdata().tolist() == [0.4, 0.6, 2.0]
    assert line.get_ydata().tolist() == [90.0, 25.0, 20.0]
    assert [text.get_text() for text in first.texts] == ["2", "4", "16"]
    assert [line.get_ydata().tolist() for line in last.lines] == [
        row["agreement"]["layers"] for row in RESULT["rows"]
    ]


def test_several_models_are_told_apart():
    pytest.importorskip("matplotlib")
    whole = plots.figure(SEVERAL)
    first = whole.axes[0]
    assert [text.get_text() for text in first.legend_.texts] == ["opt", "rtn", "gptq", "opt: 20"]
    assert [line.get_ydata()[0] for line in first.lines] == [20.0, 25.0, 90.0, 20.0]
    assert "rtn; gptq; Z80" in whole.get_suptitle()
    columns, rows = table_of(SEVERAL)
    assert columns[:4] == ["model", "weights", "algorithm", "MB"]
    assert rows[2][:3] == ["gptq", "2 bits, group 32, sym", "gptq"]


@pytest.mark.parametrize("name", ["_rtn", "a$b_{$", "half \ud800"])
def test_names_are_shown_as_they_are(name):
    """Where matplotlib would read a formula, or leave the label out of the legend."""
    pytest.importorskip("matplotlib")
    named = SEVERAL | {
        "models": [name, "rtn", "gptq"],
        "rows": [
            {**each, "agreement": None, "tasks": {}, "model": own}
            for each, own in zip(SEVERAL["rows"], (name, "rtn", "gptq"), strict=True)
        ],
        "tasks": {},
    }
    (picture,) = plots.svgs(named)
    shown = re.findall(r"<text [^>]*>([^<]*)</text>", picture)
    assert name.replace("\ud800", "?") in [text.strip() for text in shown]


def test_a_baseline_is_never_invented():
    quantized = RESULT["rows"][1:]
    assert plots.baseline(RESULT | {"rows": quantized}, lambda row: row["bytes"]) is None
    compare = {"name": "transformers", "bytes": 5}
    found = plots.baseline(RESULT | {"rows": quantized, "compare": compare}, lambda r: r["bytes"])
    assert found == ("transformers", 5)


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_pictures_are_written(name, tmp_path):
    pytest.importorskip("matplotlib")
    plots.save(ONE_PICTURE, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    start = (tmp_path / name).read_bytes()[:5]
    assert start == (b"\x89PNG\r" if name.endswith("png") else b"<?xml")


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(html, width, tmp_path):
    """Its own rendering has the table, and the pictures with a size; nothing is wider than it."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    probe = (
        "<script>document.title = JSON.stringify([document.querySelectorAll('td').length, "
        "document.querySelector('svg').getBoundingClientRect().width, "
        "JSON.parse(document.getElementById('result').textContent).rows.length, "
        "performance.getEntriesByType('resource').length, "
        "document.documentElement.scrollWidth])</script></body>"
    )
    path = tmp_path / "report.html"
    path.write_text(html.replace("</body>", probe), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900")
    done = subprocess.run(
        [found, *options, f"--user-data-dir={tmp_path}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    cells, drawn, rows, fetched, whole = json.loads(
        re.search(r"<title>(.*?)</title>", done.stdout)[1]
    )
    assert cells > 3 * 5 and rows == 3
    assert 300 < drawn <= whole <= max(width, 500)  # Chromium has no window that is less wide
    assert fetched == 0


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "x.jpeg", "--plot .*x.jpeg: give a name that ends in .png or .svg or .pdf"),
        ("--report", "x", "--report .*x: give a name that ends in .html"),
        ("--plot", "nowhere/x.png", "there is no folder .*nowhere"),
    ],
)
def test_files_that_cannot_be(option, name, message, tmp_path):
    suffixes = plots.SUFFIXES if option == "--plot" else (".html",)
    with pytest.raises(UserError, match=message):
        plots.check(option, tmp_path / name, suffixes)


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--plot needs matplotlib, .* pip install matplotlib"):
        plots.check("--plot", tmp_path / "x.png", plots.SUFFIXES)
