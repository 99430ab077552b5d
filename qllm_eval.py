"""What quantization costs in quality: perplexity, LAMBADA, agreement with the reference.

    python3 qllm_eval.py --model-name opt --model-size tiny --bitwidth 16,8,4,3 --dataset FILE
    python3 qllm_eval.py --model-size tiny --bitwidth 4 --tasks lambada_openai --agreement
    python3 qllm_eval.py --model-path QUANTIZED --dataset wikitext2 --conventions all --json
    python3 qllm_eval.py --model-path ORIGINAL RTN GPTQ AWQ --dataset FILE --report quality.html

Several bitwidths, separated by commas, are rows of one table, and so are several checkpoints.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qllm import cli
from qllm.config import DEFAULT_ACTIVATION_BITS
from qllm.errors import UserError

if TYPE_CHECKING:
    from qllm.candidates import Candidate
    from qllm.config import QuantPlan
    from qllm.evaluate.agreement import ReferenceModel, ReferenceOutputs
    from qllm.hub import ModelFolder
    from qllm.pretrained import Pretrained

CONVENTIONS = "gptq, strided, llama.cpp, word, byte"
NEW_TOKENS = 32


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    cli.add_model_options(parser, several=True)
    cli.add_quant_options(parser, several=True)
    cli.add_activation_options(parser)
    cli.add_kv_options(parser, several=True)
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
        help="the 16-bit checkpoint (the one that the model says it was made from, else itself)",
    )
    group.add_argument(
        "--compare", choices=("hf",), help="measure transformers, too, in the same run"
    )
    cli.add_prompt_options(parser)
    parser.set_defaults(max_gen_tokens=cli.Default(NEW_TOKENS))
    cli.add_run_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--batch-size",
        type=number,
        metavar="N",
        help="sequences that go through the model at once (8)",
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
    lengths = (args.max_gen_tokens, args.max_prompt_length)
    new_tokens, length = (not isinstance(each, cli.Default) for each in lengths)
    for option, given, needs, there in (
        ("--conventions", args.conventions, "--dataset", args.dataset),
        ("--window", args.window, "--dataset", args.dataset),
        ("--max-tokens", args.max_tokens, "--dataset", args.dataset),
        ("--stride", args.stride, "--conventions strided", "strided" in conventions(args)),
        ("--limit", args.limit, "--tasks", args.tasks),
        ("--prompt", prompts, "--agreement", args.agreement),
        ("--max-gen-tokens", new_tokens, "--agreement", args.agreement),
        ("--max-prompt-length", length, "--agreement", args.agreement),
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


def read_tasks(args: argparse.Namespace) -> dict[str, list[str]]:
    """The rows of each task, by its file's name, or its path where two files have one name."""
    from qllm.data import load_rows

    tasks = dict.fromkeys(map(str.strip, args.tasks.split(","))) if args.tasks else {}
    files = Counter(Path(task).name for task in tasks)
    names = {task: file if files[file := Path(task).name] == 1 else task for task in tasks}
    return {names[task]: load_rows(task)[: args.limit] for task in tasks}


def read_candidates(
    args: argparse.Namespace,
    models: list[Pretrained],
    text: str | None,
    tasks: dict[str, list[str]],
) -> list[Candidate]:
    """The models with what they are asked; mistakes come to light here, before one is loaded."""
    from qllm.candidates import Candidate, check_comparable, names_of
    from qllm.evaluate.perplexity import PerplexityOptions

    batch = {} if args.batch_size is None else {"batch": args.batch_size}
    options = PerplexityOptions(conventions(args), args.window, args.stride, **batch)
    names = names_of([model.folder for model in models], args.model_path or ())
    found = [
        Candidate.of(model, name, text, tasks, options, args.max_tokens)
        for model, name in zip(models, names, strict=True)
    ]
    if len(found) > 1:
        check_comparable(found, agree=args.agreement)
    return found


def read_reference(
    args: argparse.Namespace, model: ReferenceModel, first: Candidate
) -> ReferenceOutputs:
    """What a reference says of the prompts, or of the text and of prompts cut from it."""
    from qllm.evaluate.agreement import ReferenceOutputs, cut_text
    from qllm.evaluate.perplexity import LONGEST_WINDOW
    from qllm.generate import check_prompts
    from qllm.generation_config import GenerationConfig

    tokenizer, text = first.tokenizer, first.asked.text
    own = bool(args.prompt or args.prompt_file or args.stdin)
    cli.fit_defaults(args, model.config, own)
    count = args.max_gen_tokens
    if text is None or own:
        prompts = cli.tokenize(tokenizer, cli.read_prompts(args), args.max_prompt_length)
        sequences = prompts
    else:
        window, limit = args.window or LONGEST_WINDOW, model.config.max_positions
        window = window if limit is None else min(window, limit)
        sequences, prompts = cut_text(text.ids, window, args.max_prompt_length)
    check_prompts(model.config, prompts, GenerationConfig(max_new_tokens=count))
    return ReferenceOutputs.of(model, sequences, prompts, count, cli.progress("reference"))


def main() -> None:
    args = parse_args()
    check_options(args)
    plans = cli.read_plans(args)
    folders = cli.resolve_models(args)
    onnx = [cli.holds_onnx(args, folder, agreement=False) for folder in folders]
    cli.check_rounding(args, plans)
    device = "cpu" if any(onnx) else cli.resolve_device(args)

    from qllm import report
    from qllm.checkpoint.origin import base_model
    from qllm.data import load_text
    from qllm.evaluate import facts, page, plots, provenance
    from qllm.evaluate.table import evaluation_lines
    from qllm.pretrained import Pretrained

    for folder, there in zip(folders, onnx, strict=True):
        if there and args.compare and not args.reference and base_model(folder.path) is None:
            raise UserError(
                "--compare takes the checkpoint of an ONNX model; name it with --reference"
            )
    text = None if args.dataset is None else load_text(args.dataset, "evaluation")
    tasks = read_tasks(args)
    candidates = read_candidates(args, list(map(Pretrained.open, folders)), text, tasks)
    models = [plans_of(args, candidate, plans) for candidate in candidates]
    reference, other = run_reference(args, candidates, device)
    rows: list[dict] = []
    for candidate, each in zip(candidates, models, strict=True):
        asked = replace(candidate, asked=replace(candidate.asked, reference=reference))
        rows += show_rows(run_models(args, asked, device, each, bool(rows)))
    first = candidates[0]
    result = {
        "model": ", ".join(candidate.name for candidate in candidates),
        "models": [candidate.name for candidate in candidates],
        "device": device,
        "dataset": facts.of_text(args.dataset, first.asked.text),
        "conventions": facts.of_cuts(first.cuts),
        "tasks": facts.of_tasks(tasks),
        "samples": facts.of_samples(first.tokenizer, reference, rows),
        "rows": rows,
        **other,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if args.json or args.report:
        result["fingerprints"] = facts.of_files(
            folders, result["models"], list(map(onnx_files, folders, onnx))
        )
        result["settings"] = {**vars(args), "conventions": list(conventions(args))}
    if args.json:
        cli.print_json(report.finite(result))
    else:
        cli.print_lines(evaluation_lines(result))
    # Behind what is printed, which a full disk then does not cost.
    if args.plot:
        plots.save(result, Path(args.plot))
    if args.report:
        page.write(result, Path(args.report))


def run_reference(
    args: argparse.Namespace, candidates: list[Candidate], device: str
) -> tuple[ReferenceOutputs | None, dict]:
    """What agreement needs of the reference, None without it; and what --compare adds."""
    if not reference_wanted(args):
        return None, {}
    from qllm.candidates import find_reference, load_gguf_reference
    from qllm.checkpoint.origin import check_reference
    from qllm.evaluate.evaluation import evaluate
    from qllm.gguf import is_gguf
    from qllm.huggingface import HuggingFaceModel

    reference = find_reference(candidates, args.reference, cli.note, gguf=not args.compare)
    for candidate in candidates:
        check_reference(reference, candidate.folder, candidate.config)
    first = candidates[0]
    dtype = cli.resolve_dtype(args)
    if is_gguf(reference.path):
        meter = cli.meter("loading the reference")
        file = load_gguf_reference(reference, dtype, device, meter, cli.note)
        return read_reference(args, file, first), {}
    model = HuggingFaceModel.load(reference.path, dtype=dtype, device=device)
    other = {}
    if args.compare:
        about = {"name": "transformers", "dtype": model.dtype, "bytes": model.nbytes}
        found = evaluate(model, first.asked, partial(progress_at, "transformers"))
        other["compare"] = about | found
    if not args.agreement:
        return None, other
    return read_reference(args, model, first), other


def plans_of(
    args: argparse.Namespace, candidate: Candidate, plans: Sequence[QuantPlan]
) -> list[tuple[QuantPlan, int | None]]:
    """The plans of a model's rows with the bits of their activations; see `run_models`.

    Raises:
        UserError: for plans that the checkpoint cannot take.
    """
    from qllm.checkpoint.load import activation_bits

    if candidate.pretrained.onnx:
        return [(plan, None) for plan in plans]  # one, of 16 bits: others were refused
    bits = activation_bits(candidate.folder.path, plans, args.activation_bits)
    return list(zip(plans, bits, strict=True))


def run_models(
    args: argparse.Namespace,
    candidate: Candidate,
    device: str,
    models: list[tuple[QuantPlan, int | None]],
    again: bool,
) -> Iterator[dict]:
    """A row per plan and bits of keys and values, each model in memory alone.

    Args:
        models: plans, each with the bits of activations, None for an ONNX model.
        again: there are rows of other models; notes are of the first.
    """
    from qllm import report
    from qllm.llm import LLM
    from qllm.models import Decoder

    note = cli.silent if again else cli.note
    for plan, activation_bits in models:
        llm = LLM.load(
            candidate.pretrained,
            plan,
            dtype=cli.resolve_dtype(args),
            device=device,
            calibration=cli.find_calibration(args, candidate.folder, plan),
            activation_bits=activation_bits or DEFAULT_ACTIVATION_BITS,
            meter=cli.meter("loading"),
            note=note,
        )
        note = cli.silent
        model = llm.model
        own = report.bitwidth(model) if isinstance(model, Decoder) else model.bitwidth
        bitwidth = own if args.bitwidth is None else plan.text
        for kv_bits in args.kv_bits:
            outer = report.outer_bits(model) if isinstance(model, Decoder) else {}
            what = report.label({"bitwidth": bitwidth, "kv_bits": kv_bits, **outer})
            what = f"{candidate.name}, {what}" if args.model_path else what
            progress = partial(progress_at, what)
            yield candidate.row(llm, bitwidth, activation_bits, kv_bits, progress)
        del llm, model  # the next one has its place


def show_rows(rows: Iterable[dict]) -> list[dict]:
    """The rows, each said on standard error as soon as it is there."""
    from qllm.evaluate.table import line

    found = []
    for row in rows:
        found.append(row)
        cli.note(line(row))
    return found


def onnx_files(folder: ModelFolder, there: bool) -> list[Path]:
    """The files of the ONNX model that a folder holds; none where there is none."""
    if not there:
        return []
    from qllm.onnx.model import model_file, model_files

    return model_files(folder.onnx or model_file(folder.path))


def progress_at(bitwidth: str, what: str) -> Callable[[list], Iterable]:
    """Progress of one row's part."""
    return cli.progress(f"{what}, {bitwidth}")


if __name__ == "__main__":
    cli.run(main)
