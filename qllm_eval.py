"""What quantization costs in quality: perplexity, LAMBADA, agreement with the reference.

    python3 qllm_eval.py --model-name opt --model-size tiny --bitwidth 16,8,4,3 --dataset FILE
    python3 qllm_eval.py --model-size tiny --bitwidth 4 --tasks lambada_openai --agreement
    python3 qllm_eval.py --model-path QUANTIZED --dataset wikitext2 --conventions all --json

Several bitwidths, separated by commas, are rows of one table.
"""

from __future__ import annotations

if __name__ == "__main__":
    import signal
    import sys
    from pathlib import Path

    # Held back while imports run, for `cli.run` to answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qllm import cli
from qllm.errors import UserError

if TYPE_CHECKING:
    from qllm.config import ModelConfig, QuantPlan
    from qllm.evaluate.agreement import Reference
    from qllm.evaluate.evaluation import Evaluation
    from qllm.evaluate.perplexity import Text
    from qllm.hub import ModelFolder
    from qllm.huggingface import ReferenceModel
    from qllm.tokenizer import Tokenizer

CONVENTIONS = "gptq, strided, llama.cpp, word, byte"
NEW_TOKENS = 32
# What agreement takes of a text: prompts that are continued, and tokens whose every distribution
# is compared.
PROMPTS, TOKENS = 64, 16384


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    cli.add_model_options(parser)
    cli.add_quant_options(parser, several=True)
    cli.add_activation_options(parser)
    group = parser.add_argument_group("perplexity")
    group.add_argument(
        "--dataset",
        metavar="FILE_OR_NAME",
        help="a text or JSON-lines file, or wikitext2, c4, ptb, pile-10k",
    )
    group.add_argument(
        "--conventions", metavar="NAMES", help=f"some of {CONVENTIONS}, or all (gptq)"
    )
    group.add_argument(
        "--window", type=number, metavar="N", help="tokens (2048, llama.cpp: 512, or the model's)"
    )
    group.add_argument(
        "--stride", type=number, metavar="N", help="of the strided convention (half a window)"
    )
    group.add_argument(
        "--max-tokens", type=number, metavar="N", help="of the text, its first (all)"
    )
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks", metavar="NAMES", help="lambada_openai, or JSON-lines files of that form"
    )
    group.add_argument("--limit", type=number, metavar="N", help="rows of a task, its first (all)")
    group = parser.add_argument_group("agreement")
    group.add_argument(
        "--agreement",
        action="store_true",
        help="how far each is from transformers at 16 bits, on the text or on prompts",
    )
    group.add_argument(
        "--reference",
        metavar="DIR_OR_REPO",
        help="the 16-bit checkpoint of a model that is quantized already (the model itself)",
    )
    group.add_argument(
        "--compare", choices=("hf",), help="measure transformers, too, in the same run"
    )
    cli.add_prompt_options(parser)
    parser.set_defaults(max_gen_tokens=cli.Default(NEW_TOKENS))
    cli.add_run_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--batch-size", type=number, metavar="N", help="passages per forward call (8)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--plot",
        metavar="FILE",
        help="quality against bytes, error per layer: a .png, .svg or .pdf",
    )
    group.add_argument("--report", metavar="FILE", help="the same and the table as one .html page")
    return parser.parse_args()


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming the first of them.
    """
    if not (args.dataset or args.tasks or args.agreement):
        raise UserError(
            "there is nothing to measure; give --dataset for perplexity, --tasks, or --agreement"
        )
    prompts = args.prompt or args.prompt_file or args.stdin
    for option, given, needs, there in (
        ("--conventions", args.conventions, "--dataset", args.dataset),
        ("--window", args.window, "--dataset", args.dataset),
        ("--max-tokens", args.max_tokens, "--dataset", args.dataset),
        ("--stride", args.stride, "--conventions strided", "strided" in conventions(args)),
        ("--limit", args.limit, "--tasks", args.tasks),
        ("--prompt", prompts, "--agreement", args.agreement),
        ("--reference", args.reference, "--agreement or --compare", reference_wanted(args)),
        ("--compare", args.compare, "--dataset or --tasks", args.dataset or args.tasks),
    ):
        if given and not there:
            raise UserError(f"{option} does nothing without {needs}")
    from qllm.evaluate import plots

    if args.plot:
        plots.check("--plot", Path(args.plot), plots.SUFFIXES)
    if args.report:
        plots.check("--report", Path(args.report), (".html",))


def reference_wanted(args: argparse.Namespace) -> bool:
    """Whether transformers' model is needed."""
    return args.agreement or args.compare is not None


def conventions(args: argparse.Namespace) -> tuple[str, ...]:
    """The names that --conventions gives."""
    text = CONVENTIONS if args.conventions == "all" else args.conventions or "gptq"
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def read_text(args: argparse.Namespace, tokenizer: Tokenizer) -> Text | None:
    """The text of --dataset."""
    if args.dataset is None:
        return None
    from qllm.data import load_text
    from qllm.evaluate.perplexity import Text

    return Text.encode(load_text(args.dataset, "evaluation"), tokenizer, args.max_tokens)


def read_tasks(
    args: argparse.Namespace, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[dict[str, list], dict[str, dict]]:
    """The passages of each task, and what to say of where they are from."""
    from qllm.data import load_rows
    from qllm.evaluate import fingerprints
    from qllm.evaluate.lambada import passages

    found, about = {}, {}
    for task in args.tasks.split(",") if args.tasks else ():
        rows = load_rows(task)[: args.limit]
        name = Path(task).name
        found[name] = passages(rows, tokenizer, config)
        about[name] = {"rows": len(rows), "sha256": fingerprints.of_text("\0".join(rows))}
    return found, about


def read_reference(
    args: argparse.Namespace, model: ReferenceModel, tokenizer: Tokenizer, text: Text | None
) -> Reference:
    """What transformers says of the prompts, or of the text and of prompts cut from it."""
    from qllm.data import sample_windows
    from qllm.evaluate.agreement import Reference
    from qllm.generate import GenerationConfig, check_prompts

    own = bool(args.prompt or args.prompt_file or args.stdin)
    cli.fit_defaults(args, model.config, own)
    count = args.max_gen_tokens
    if text is None or own:
        prompts = passages = cli.tokenize(tokenizer, cli.read_prompts(args), args.max_prompt_length)
    else:
        ids = text.ids[:TOKENS]
        window = min(args.window or 2048, model.config.max_positions or 2048, len(ids))
        passages = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
        length = min(args.max_prompt_length, len(ids))
        prompts = sample_windows(list(ids), PROMPTS, length, seed=1)
    check_prompts(model.config, prompts, GenerationConfig(max_new_tokens=count))
    return Reference.of(model, passages, prompts, count, cli.progress("reference"))


def main() -> None:
    args = parse_args()
    check_options(args)
    plans = cli.read_plans(args)
    folder = cli.resolve_model(args)
    onnx = cli.holds_onnx(args, folder, agreement=False)
    if onnx and args.compare and not args.reference:
        raise UserError("--compare takes the checkpoint of an ONNX model; name it with --reference")
    device = "cpu" if onnx else cli.resolve_device(args)

    from qllm import report
    from qllm.checkpoint.load import activation_bits
    from qllm.checkpoint.reader import read_raw_config
    from qllm.evaluate import page, plots
    from qllm.evaluate.evaluation import Evaluation
    from qllm.evaluate.perplexity import PerplexityOptions, cut
    from qllm.evaluate.table import print_evaluation
    from qllm.models import read_config
    from qllm.tokenizer import Tokenizer

    config = read_config(read_raw_config(folder.path))
    tokenizer = Tokenizer.load(folder.path, config.vocab_size)
    batch = {} if args.batch_size is None else {"batch": args.batch_size}
    options = PerplexityOptions(conventions(args), args.window, args.stride, **batch)
    text = read_text(args, tokenizer)
    # Mistakes come to light here, before a model is loaded.
    cuts = [] if text is None else cut(text, config, options)
    tasks, about_tasks = read_tasks(args, tokenizer, config)
    asked = Evaluation(text, options, tasks)
    bits = [] if onnx else activation_bits(folder.path, plans, args.activation_bits)
    models = list(zip(plans, bits, strict=False))
    asked, other = run_reference(args, folder, config, device, asked, tokenizer)
    rows = run_onnx(folder, asked) if onnx else run_models(args, folder, device, models, asked)
    result = {
        "model": folder.name,
        "device": device,
        "dataset": about_text(args, text),
        "conventions": about_cuts(cuts),
        "tasks": about_tasks,
        "rows": rows,
        **other,
    }
    if args.json or args.report:
        result |= about_run(args, folder, onnx)
    if args.plot:
        plots.save(result, Path(args.plot))
    if args.report:
        page.write(result, Path(args.report))
    if args.json:
        report.print_json(report.finite(result))
    else:
        print_evaluation(result)


def run_reference(
    args: argparse.Namespace,
    folder: ModelFolder,
    config: ModelConfig,
    device: str,
    asked: Evaluation,
    tokenizer: Tokenizer,
) -> tuple[Evaluation, dict]:
    """What is asked, with the reference that agreement needs; and what --compare adds."""
    if not reference_wanted(args):
        return asked, {}
    from qllm.evaluate.evaluation import evaluate
    from qllm.huggingface import ReferenceModel

    dtype = cli.resolve_dtype(args)
    place = reference_folder(args, folder)
    model = ReferenceModel.load(place.path, dtype=dtype, device=device)
    for size in ("family", "vocab_size", "hidden_size", "num_layers"):
        ours, theirs = getattr(config, size), getattr(model.config, size)
        if ours != theirs:
            raise UserError(
                f"--reference {args.reference} is another model: its {size} is {theirs}, not {ours}"
            )
    other = {}
    if args.compare:
        about = {"name": "transformers", "dtype": model.dtype, "bytes": model.nbytes}
        found = evaluate(model, asked, partial(progress_at, "transformers"))
        other["compare"] = about | found
    if args.agreement:
        asked = replace(asked, reference=read_reference(args, model, tokenizer, asked.text))
    return asked, other


def run_models(
    args: argparse.Namespace,
    folder: ModelFolder,
    device: str,
    models: list[tuple[QuantPlan, int]],
    asked: Evaluation,
) -> list[dict]:
    """A row per plan and bits of activations, each model in memory alone."""
    from qllm import report
    from qllm.checkpoint.convert import find_source
    from qllm.checkpoint.load import load_model
    from qllm.evaluate.evaluation import decoder_row

    source = find_source(folder, cli.note)
    rows = []
    for plan, activation_bits in models:
        model = load_model(
            source,
            plan,
            dtype=cli.resolve_dtype(args),
            device=device,
            calibration=cli.find_calibration(args, folder, plan),
            activation_bits=activation_bits,
            meter=cli.meter("loading"),
            note=cli.silent if rows else cli.note,
        )
        bitwidth = report.bitwidth(model) if args.bitwidth is None else plan.text
        row = decoder_row(model, bitwidth, asked, partial(progress_at, bitwidth))
        rows.append(row | {"activation_bits": activation_bits})
        del model  # the next one has its place
    return rows


def run_onnx(folder: ModelFolder, asked: Evaluation) -> list[dict]:
    """The row of an ONNX model."""
    from qllm.evaluate.evaluation import evaluate
    from qllm.onnx.runner import OnnxDecoder

    model = OnnxDecoder(folder.path)
    dtype = str(model.dtype).removeprefix("torch.")
    about = {"bitwidth": model.bitwidth, "dtype": dtype, "bytes": model.nbytes}
    about["activation_bits"] = None  # a node's accuracy level says it
    return [about | evaluate(model, asked, partial(progress_at, model.bitwidth))]


def progress_at(bitwidth: str, what: str) -> Callable[[list], Iterable]:
    """Progress of one row's part."""
    return cli.progress(f"{what}, {bitwidth}")


def reference_folder(args: argparse.Namespace, folder: ModelFolder) -> ModelFolder:
    """The 16-bit checkpoint."""
    from qllm import hub

    if args.reference is None:
        return folder
    return hub.resolve(args.model_name, None, args.reference, note=cli.note)


def about_text(args: argparse.Namespace, text: Text | None) -> dict | None:
    """What says which text it was."""
    if text is None:
        return None
    from qllm.evaluate import fingerprints
    from qllm.evaluate.perplexity import count_bytes, count_words

    return {
        "name": args.dataset,
        "sha256": fingerprints.of_text(text.text),
        "bytes": count_bytes(text.text),
        "words": count_words(text.text),
        "tokens": len(text.ids),
    }


def about_cuts(cuts: list) -> dict[str, dict]:
    """What says how perplexity was measured, by convention."""
    from qllm.evaluate.perplexity import CONVENTIONS

    return {
        name: {
            "about": CONVENTIONS[name].about,
            "window": part.window,
            "stride": part.stride,
            "windows": len(part.windows.windows),
            "tokens": part.tokens,
        }
        for part in cuts
        for name in part.names
    }


def about_run(args: argparse.Namespace, folder: ModelFolder, onnx: bool) -> dict:
    """What two runs have to have in common."""
    from qllm.evaluate import fingerprints

    if onnx:
        from qllm.onnx.model import model_files

        files = [folder.path / "config.json", *model_files(folder.path)]
    return {
        "fingerprints": {
            "model": fingerprints.of_files(files) if onnx else fingerprints.of_model(folder.path),
            "tokenizer": fingerprints.of_tokenizer(folder.path),
        },
        "versions": fingerprints.versions(),
        "machine": fingerprints.machine(),
        "settings": {**vars(args), "conventions": list(conventions(args))},
    }


if __name__ == "__main__":
    cli.run(main)
