"""The model card of a quantized checkpoint: how it was made, and with what error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qllm import __version__
from qllm.layers.base import describe
from qllm.quant.algorithm import QuantizeOptions
from qllm.quant.algorithms import ALGORITHMS
from qllm.quantizer.compatibility import Loading
from qllm.quantizer.layer import LinearReport


def model_card(
    about: Mapping[str, str],
    reports: Sequence[LinearReport],
    options: QuantizeOptions,
    loading: Loading,
    *,
    fake: bool,
) -> str:
    """README.md of the folder.

    Args:
        about: "model", the name of what was quantized, and what to say of the calibration.
        loading: what else loads it.
    """
    name = about.get("model", "A model")
    what = "quantized and dequantized" if fake else "quantized"
    names = {report.spec.algorithm for report in reports}
    kinds = {report.spec.kind for report in reports}
    # The Hub shows how the library that is named here loads it.
    refused = {} if fake else loading.refusals()
    library = "qllm" if "transformers" in refused else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- qllm", "- quantized"]
    if "/" in name:  # a repository, to which the Hub then links
        lines += [f"base_model: {name}", "base_model_relation: quantized"]
    lines += ["---", ""]
    lines += [f"# {name}, {what}", "", f"Made by QLLM {__version__} from `{name}`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "model"]
    algorithms = [each for name, each in ALGORITHMS.items() if name in names]
    described = [each.describe(options) for each in algorithms]
    lines += [f"- {line}" for line in described if line is not None]
    if options.clip and not all(each.own_clipping for each in algorithms):
        lines.append("- clipping range searched for the least squared error of the weights")
    if any(kind.startswith("w8a8") for kind in kinds):
        smoothed = "dataset" in about
        lines.append(f"- SmoothQuant: {f'alpha {options.smooth_alpha}' if smoothed else 'no'}")
    if not fake:
        line = loading.summary()
        lines += ["", "## Where it loads", "", f"It {line}.", ""]
        if "transformers" not in refused:
            lines += loading.snippet()
        lines += ["", "```sh", "python3 qllm_gen.py --model-path DIR", "```"]
    lines += ["", "## Error of each linear", ""]
    lines += [
        "Relative root mean square error: of the layer's output over the calibration inputs, where",
        "its algorithm looked at them, else of its weights, and the two do not compare. A dead",
        "channel is an input that was always zero.",
        "",
        "| linear | format | algorithm | error | of | dead channels |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {report.name} | {describe(report.spec)} | {report.spec.algorithm} "
        f"| {report.error:.5f} | {'outputs' if report.of_output else 'weights'} "
        f"| {report.dead} |"
        for report in reports
    ]
    return "\n".join(lines) + "\n"
