"""Talk with a model by its chat template; /reset forgets, /exit ends, Ctrl-C stops an answer.

    python3 qllm_chat.py --model-path MODEL.gguf
    echo "What is gravity?" | python3 qllm_chat.py --model-path MODEL.gguf

From a pipe each line is a message of one conversation, and each answer a line. A message that
cannot be answered has none: standard error says why, and the status at the end is 2.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse
import signal
import sys
from typing import TYPE_CHECKING

from qllm import cli
from qllm.errors import UserError

if TYPE_CHECKING:
    from qllm.chat import Chat

NEW_TOKENS = 512
FIRST_MESSAGE = 48  # tokens with what a template adds: for so many kernels are compiled in time


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    cli.add_quant_options(parser)
    cli.add_activation_options(parser)
    cli.add_kv_options(parser)
    cli.add_sampling_options(parser)
    cli.add_run_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the message in front of all others")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=cli.whole_number(1),
        metavar="N",
        help="tokens of the conversation that are remembered (the model's window, up to 8192)",
    )
    parser.add_argument(
        "--max-gen-tokens",
        "--max-new-tokens",
        type=cli.whole_number(1),
        default=NEW_TOKENS,
        metavar="N",
        help="tokens of an answer, at most (%(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    """The status: 2 where a message from a pipe could not be answered."""
    args = parse_args()
    plan = cli.read_plan(args)
    folder = cli.resolve_model(args)
    if cli.holds_onnx(args, folder):
        raise UserError(f"{folder.path} holds an ONNX model; chat takes a checkpoint")
    cli.check_rounding(args, [plan])
    device = cli.resolve_device(args)

    from qllm.chat import Chat, ChatTemplate, context_size
    from qllm.llm import LLM, Pretrained
    from qllm.stopping import check_stops

    pretrained = Pretrained.open(folder, note=cli.note)
    template = ChatTemplate.load(folder.path)
    config = pretrained.generation_with(
        max_new_tokens=args.max_gen_tokens, **cli.read_sampling_options(args)
    )
    stop = args.stop or ()
    check_stops(pretrained.tokenizer, stop)
    context = context_size(pretrained.config, args.ctx_size)
    llm = LLM.load(
        pretrained,
        plan,
        dtype=cli.resolve_dtype(args),
        device=device,
        calibration=cli.find_calibration(args, folder, plan),
        activation_bits=args.activation_bits,
        kv_bits=args.kv_bits,
        cache_shape=(1, context),
        prompt_lengths=[FIRST_MESSAGE],
        meter=cli.meter("loading"),
        note=cli.note,
    )
    chat = Chat(llm, template, config, system=args.system, stop=stop, context=context)
    if sys.stdin.isatty():
        talk(chat)
        return 0
    return answer_lines(chat)


def answer_lines(chat: Chat) -> int:
    """Answer each line of standard input in a line; the status, see `main`.

    Of a line that cannot be answered standard error says why, and those behind it are answered.
    """
    status = 0
    for number, line in enumerate(sys.stdin, 1):
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            chat.reset()
        elif text:
            try:
                print(" ".join("".join(chat.answer(text)).split()), flush=True)
            except UserError as error:
                cli.error(f"line {number}: {error}")
                status = 2
    return status


def talk(chat: Chat) -> None:
    """A conversation in a terminal."""
    import readline  # noqa: F401 - which gives input() its history

    while True:
        try:
            cli.rearm()
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt as error:
            if ends_program(error):
                raise
            print("\n/exit ends the conversation")
            continue
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text:
            say(chat, text)


def ends_program(error: KeyboardInterrupt) -> bool:
    """Whether it is of another signal than Ctrl-C's."""
    return bool(error.args) and error.args[0] != signal.SIGINT


def say(chat: Chat, text: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    try:
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt as error:
        if ends_program(error):
            raise
    except UserError as error:
        cli.note(str(error))
    print()


if __name__ == "__main__":
    cli.run(main)
