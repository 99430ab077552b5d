"""Activation statistics for SmoothQuant: each linear's largest inputs and outputs per channel.

    python3 fake_calib_gen.py --model-name bloom --model-size 560m
    python3 fake_calib_gen.py --model-name bloom --model-size tiny --dataset TEXT_FILE

Without --dataset they come from random input through the architecture with fresh weights: good
for measuring speed and memory, not quality. With it they come from text through the real model.
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
from qllm.errors import UserError

# Samples, and tokens of each: random input says the same of every channel, text does not.
TEXT, RANDOM = (32, cli.Default(256)), (1, cli.Default(128))


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_run_options(parser)
    group = cli.add_calibration_options(
        parser,
        dataset="random input",
        nsamples=f"{TEXT[0]}, of random input {RANDOM[0]}",
        seqlen=f"{TEXT[1]}, of random input {RANDOM[1]}",
    )
    group.add_argument(
        "--save", metavar="FILE", help="the file to write (a place that later runs look at)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for option in ("dtype", "device"):
        if cli.is_given(getattr(args, option)) and args.dataset is None:
            raise UserError(f"--{option} does nothing with random input; give --dataset, too")
    model = cli.resolve_model(args, weights=args.dataset is not None)

    from qllm import calibration, random_model
    from qllm.checkpoint.reader import read_raw_config
    from qllm.checkpoint.writer import new_file
    from qllm.models import read_config

    samples, tokens = TEXT if args.dataset else RANDOM
    args.nsamples = args.nsamples or samples
    args.seqlen = args.seqlen or tokens
    if args.save:
        target = Path(args.save)
    else:
        target = folders.home_path(calibration.stored_name(model), cli.note, "--save")
    if target.is_dir():
        raise UserError(f"--save {target} is a folder; name a file")
    if target.parent.is_dir():  # else it is made
        folders.check_writable(target)
    config = read_config(read_raw_config(model.path))
    args.seqlen = cli.up_to(args.seqlen, config.max_positions)
    if config.max_positions is not None and args.seqlen > config.max_positions:
        raise UserError(f"--seqlen {args.seqlen} exceeds the window of {config.max_positions}")
    if args.dataset is None:
        found = random_model.calibrate_random(config, args.nsamples, args.seqlen, args.seed)
        source = random_model.RANDOM_SOURCE
    else:
        found = calibrate_text(args, model.path, config.vocab_size)
        source = args.dataset
    found.about = {
        "model": model.name,
        "source": source,
        "nsamples": str(args.nsamples),
        "seqlen": str(args.seqlen),
        "seed": str(args.seed),
    }
    with new_file(target) as temporary:
        found.save(temporary)
    print(f"{model.name}: statistics of {len(found.inputs)} layers from {source} in {target}")


def calibrate_text(args: argparse.Namespace, folder: Path, vocab_size: int):  # noqa: ANN201
    """Statistics of text through the real model at 16 bits."""
    from qllm import calibration
    from qllm.checkpoint.load import load_model
    from qllm.config import QuantPlan, QuantSpec
    from qllm.data import load_text, sample_windows
    from qllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder, vocab_size)
    ids = tokenizer.encode(load_text(args.dataset))
    samples = sample_windows(ids, args.nsamples, args.seqlen, args.seed)
    model = load_model(
        folder,
        QuantPlan.uniform(QuantSpec()),
        dtype=cli.resolve_dtype(args),
        device=cli.resolve_device(args),
        meter=cli.meter("loading"),
        note=cli.note,
    )
    return calibration.calibrate(model, samples, cli.progress("calibrating"))


if __name__ == "__main__":
    cli.run(main)
