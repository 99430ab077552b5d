"""Write a checkpoint in another runtime's format: ONNX, 4- and 8-bit layers as MatMulNBits.

    python3 qllm_export.py --model-path QUANTIZED --format onnx --save onnx
    python3 qllm_export.py --model-name llama --model-size tiny --format onnx --save onnx
    python3 qllm_export.py --model-path QUANTIZED --format onnx --dtype float16 --save onnx

qllm_gen.py, qllm_eval.py, qllm_bench.py and qllm_quant.py take the folder by --model-path.
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
from qllm.onnx import check_installed, is_onnx


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=("onnx",), required=True, help="what to write")
    group.add_argument("--save", "--output-dir", metavar="DIR", required=True, help="where to")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of activations and unquantized weights (%(default)s)",
    )
    cli.add_accuracy_option(group)
    cli.add_threads_option(group)
    group.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_installed()
    folder = cli.resolve_model(args)
    if is_onnx(folder.path):
        raise UserError(
            f"{folder.path} holds an ONNX model already; qllm_quant.py takes it, to quantize it"
        )

    from qllm import report
    from qllm.memory import peak_resident_bytes
    from qllm.onnx.export import ExportOptions, export

    given = {} if args.accuracy_level is None else {"accuracy_level": args.accuracy_level}
    start = time.perf_counter()
    size = export(
        folder.path,
        Path(args.save),
        ExportOptions(dtype=args.dtype, **given),
        cli.progress("writing"),
        cli.note,
    )
    result = {
        "model": folder.name,
        "saved": args.save,
        "bytes": size,
        "seconds": time.perf_counter() - start,
        "peak_memory": peak_resident_bytes(),
    }
    if args.json:
        report.print_json(result)
        return
    print(
        f"{folder.name}: {report.megabytes(size)} written to {args.save} in "
        f"{result['seconds']:.1f} s"
    )


if __name__ == "__main__":
    cli.run(main)
