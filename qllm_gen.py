"""Greedy generation with a quantized model.

python3 qllm_gen.py --model-name bloom --model-size 560m --bitwidth 4 --num-shards 3
python3 qllm_gen.py --model-name bloom --model-size tiny --bitwidth 4 --compare
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial

from qllm import cli


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_quant_options(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    parser.add_argument(
        "--num-shards",
        type=cli.whole_number(1),
        default=2,
        metavar="N",
        help="contiguous layer ranges, run one after the other (%(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="run the reference too, and show where they differ"
    )
    parser.add_argument(
        "--explain", action="store_true", help="show which kernel each layer uses, and why"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print text as it comes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompts = cli.read_prompts(args)
    folder = cli.resolve_model(args)

    from qllm import report
    from qllm.checkpoint.convert import find_source
    from qllm.checkpoint.load import load_model
    from qllm.checkpoint.reader import read_raw_config
    from qllm.config import QuantPlan
    from qllm.generate import TextStream, check_prompts, generate, read_generation_config
    from qllm.models import read_config
    from qllm.tokenizer import Tokenizer

    plan = QuantPlan.parse(args.bitwidth, args.group_size, args.scheme)
    config = read_config(read_raw_config(folder.path))
    tokenizer = Tokenizer.load(folder.path, config.vocab_size)
    ids = cli.tokenize(tokenizer, prompts, args.max_prompt_length)
    generation = replace(
        read_generation_config(folder.path, config, cli.note),
        max_new_tokens=args.max_gen_tokens,
        pad_token_id=tokenizer.pad_id,
    )
    check_prompts(config, ids, generation)
    start = time.perf_counter()
    model = load_model(
        find_source(folder, cli.note),
        plan,
        dtype=cli.resolve_dtype(args),
        device=cli.resolve_device(args),
        num_shards=args.num_shards,
        calibration=cli.find_calibration(args, folder, plan),
        cache_shape=(len(ids), max(map(len, ids)) + args.max_gen_tokens),
        progress=cli.progress("loading"),
    )
    result = {"model": folder.name, "bitwidth": args.bitwidth, "results": []}
    result["shards"] = report.shard_rows(model)
    if args.explain:
        result["kernels"] = report.kernel_rows(model)
    if not args.json:
        dtype = str(model.dtype).removeprefix("torch.")
        loaded = time.perf_counter() - start
        print(f"{folder.name} at bitwidth {args.bitwidth}, {dtype} on {model.device}, ", end="")
        print(f"loaded in {loaded:.2f} s")
        report.print_shards(result["shards"])
        if args.explain:
            report.print_kernels(model)

    write = partial(print, end="", flush=True)
    stream = None
    if args.stream:
        stream = TextStream(tokenizer, ids, lambda row: write(f"\n{prompts[row]}"), write)
    start = time.perf_counter()
    tokens = generate(model, ids, generation, *([stream.add] if stream else []))
    result["seconds"] = time.perf_counter() - start
    if stream:
        stream.finish()
        print("\n")
    texts = [tokenizer.continuation(*pair) for pair in zip(ids, tokens, strict=True)]
    result["results"] = report.result_rows(prompts, texts, tokens)
    if args.compare:
        from qllm.huggingface import reference_generate

        dtype, device = model.dtype, str(model.device)
        del model  # the two need not fit into memory together
        reference = reference_generate(
            folder.path,
            prompts,
            max_prompt_length=args.max_prompt_length,
            max_new_tokens=args.max_gen_tokens,
            dtype=dtype,
            device=device,
        )
        result["compare"] = report.comparison_rows(
            tokenizer, tokens, reference.tokens, reference.texts
        )
    if args.json:
        report.print_json(result)
        return
    report.print_speed(result["results"], result["seconds"])
    if args.compare or not stream:
        report.print_results(result["results"], result.get("compare", ()))


if __name__ == "__main__":
    cli.run(main)
