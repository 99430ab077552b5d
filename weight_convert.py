"""A Hugging Face checkpoint -> QLLM's layout: QKV fused, one safetensors file that can be mapped.

    python3 weight_convert.py --model-name opt --model-size 125m
    python3 weight_convert.py --model-path DIR --save OUT

Later runs of qllm_gen.py pick the converted copy up; without one they convert on the fly.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse
from pathlib import Path

from qllm import cli, folders


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    parser.add_argument(
        *("--save", "--output-dir"),
        metavar="DIR",
        help="the folder to write (one that later runs find by themselves)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = cli.resolve_model(args)

    from qllm.checkpoint.convert import convert, stored_name
    from qllm.report import megabytes

    target = (
        Path(args.save) if args.save else folders.home_path(stored_name(model), cli.note, "--save")
    )
    # Our own copy of this model may be of an older state; a folder the user names is the user's.
    meter = cli.meter("converting")
    size = convert(model, target, overwrite=not args.save, meter=meter, note=cli.note)
    print(f"{model.name}: {megabytes(size)} written to {target}")


if __name__ == "__main__":
    cli.run(main)
