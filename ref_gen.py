"""What Hugging Face says: transformers' own model and greedy search, as the reference.

python3 ref_gen.py --model-name bloom --model-size 560m
python3 ref_gen.py --model-name bloom --model-size tiny --prompt "He is working on"
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse

from qllm import cli


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompts = cli.read_prompts(args)
    model = cli.resolve_model(args)

    from qllm import report
    from qllm.checkpoint.reader import read_raw_config
    from qllm.generate import check_prompts
    from qllm.generation_config import GenerationConfig
    from qllm.huggingface import reference_generate
    from qllm.models import read_config
    from qllm.tokenizer import Tokenizer

    # Our own checks come first: they answer in one line, and before transformers is imported.
    config = read_config(read_raw_config(model.path))
    tokenizer = Tokenizer.load(model.path, config.vocab_size)
    cli.fit_defaults(args, config, prompts != list(cli.DEFAULT_PROMPTS))
    ids = cli.tokenize(tokenizer, prompts, args.max_prompt_length)
    check_prompts(config, ids, GenerationConfig(max_new_tokens=args.max_gen_tokens))
    device = cli.resolve_device(args)
    reference = reference_generate(
        model.path,
        prompts,
        max_prompt_length=args.max_prompt_length,
        max_new_tokens=args.max_gen_tokens,
        dtype=cli.resolve_dtype(args),
        device=device,
    )
    results = report.result_rows(prompts, reference.texts, reference.tokens)
    layers = list(range(reference.layers))
    shards = [{"layers": layers, "bytes": reference.bytes, "device": device}]
    if args.json:
        cli.print_json(
            {
                "model": model.name,
                "bitwidth": "16",
                "results": results,
                "shards": shards,
                "seconds": reference.seconds,
            }
        )
        return
    print(f"{model.name} in transformers, {report.megabytes(reference.bytes)}")
    print(report.speed_line(results, reference.seconds))
    cli.print_lines(report.result_lines(results))


if __name__ == "__main__":
    cli.run(main)
