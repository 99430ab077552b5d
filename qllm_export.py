"""Write a checkpoint in another runtime's format: ONNX (layers as MatMulNBits), or GGUF.

    python3 qllm_export.py --model-path QUANTIZED --format onnx --save onnx
    python3 qllm_export.py --model-name llama --model-size tiny --format onnx --save onnx
    python3 qllm_export.py --model-path QUANTIZED --format onnx --dtype float16 --save onnx

    python3 qllm_export.py --model-path QUANTIZED --format gguf --save model.gguf

qllm_gen.py, qllm_eval.py, qllm_bench.py and qllm_quant.py take the folder or file by --model-path.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse
import time
from pathlib import Path

from qllm import cli
from qllm.errors import UserError
from qllm.onnx import check_installed


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=("onnx", "gguf"), required=True, help="what to write")
    group.add_argument(
        "--save",
        "--output-dir",
        metavar="PATH",
        required=True,
        help="the folder, or the .gguf file, to write",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        help="ONNX: type of activations and unquantized weights (float32)",
    )
    cli.add_accuracy_option(group)
    group.add_argument(
        "--round-offsets",
        action="store_true",
        help="GGUF: write 4 and 5 bits with zero points as Q4_1 and Q5_1, whose offsets are "
        "float16, where Q8_0 would hold them without a loss",
    )
    cli.add_threads_option(group)
    group.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    onnx = args.format == "onnx"
    if onnx:
        if args.round_offsets:
            raise UserError("--round-offsets is for --format gguf; leave it out")
        check_installed()
    elif args.dtype or args.accuracy_level is not None:
        raise UserError("--dtype and --accuracy-level are for --format onnx; leave them out")
    folder = cli.resolve_model(args)
    if folder.holds_onnx:
        raise UserError(
            f"{folder.path} holds an ONNX model already; qllm_quant.py takes it, to quantize it"
        )

    from qllm import report
    from qllm.memory import peak_resident_bytes

    start = time.perf_counter()
    size = (export_onnx if onnx else export_gguf)(args, folder.path)
    result = {
        "model": folder.name,
        "saved": args.save,
        "bytes": size,
        "seconds": time.perf_counter() - start,
        "peak_memory": peak_resident_bytes(),
    }
    if args.json:
        cli.print_json(result)
        return
    print(
        f"{folder.name}: {report.megabytes(size)} written to {args.save} in "
        f"{result['seconds']:.1f} s"
    )


def export_onnx(args: argparse.Namespace, source: Path) -> int:
    """Write a folder; returns its model's bytes."""
    from qllm.onnx.export import ExportOptions, export

    given = {"dtype": args.dtype, "accuracy_level": args.accuracy_level}
    given = {key: value for key, value in given.items() if value is not None}
    target = Path(args.save)
    return export(source, target, ExportOptions(**given), cli.progress("writing"), cli.note)


def export_gguf(args: argparse.Namespace, source: Path) -> int:
    """Write a file; returns its bytes."""
    from qllm.checkpoint import to_gguf

    target = Path(args.save)
    return to_gguf.export_gguf(source, target, cli.note, round_offsets=args.round_offsets)


if __name__ == "__main__":
    cli.run(main)
