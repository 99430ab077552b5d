"""Train one of the checkpoints in tiny_models/, with its tokenizer, from plain text.

    python3 -m tools.train_tiny --family opt --text a.txt b.txt --save tiny_models/opt-tiny

One paragraph per line in the text files. Those that are bundled saw 28 MB of text (18 novels of
Project Gutenberg, 2 MB of Wikipedia, WikiText-2's validation part) in about 1,000 steps (Llama
690) of 16 sequences of 256 tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from qllm import cli

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's own, with the ids it gives them
BOS, PAD, EOS = 0, 1, 2
POSITIONS = 512
SEQUENCE, BATCH = 256, 16
PEAK_RATE, WARMUP = 2e-3, 100
SHORTEST_LINE = 40  # shorter ones are headings


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--family", choices=("opt", "bloom", "llama"), required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=24, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    number = cli.whole_number(1)
    parser.add_argument("--vocab", type=number, default=4096, help="(%(default)s)")
    parser.add_argument("--hidden", type=number, default=256, help="(%(default)s)")
    parser.add_argument("--layers", type=number, default=6, help="(%(default)s)")
    parser.add_argument("--heads", type=number, default=8, help="(%(default)s)")
    return parser.parse_args()


def new_model(args: argparse.Namespace) -> torch.nn.Module:
    """A fresh model of a family: the same width, depth and vocabulary in each."""
    import transformers as hf

    common = {"vocab_size": args.vocab, "hidden_size": args.hidden}
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if args.family == "bloom":
        config = hf.BloomConfig(n_layer=args.layers, n_head=args.heads, **common, **tokens)
        return hf.BloomForCausalLM(config)
    common |= {
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": POSITIONS,
    }
    if args.family == "opt":
        width = {"ffn_dim": 4 * args.hidden, "word_embed_proj_dim": args.hidden, "dropout": 0.0}
        tokens["bos_token_id"] = EOS  # OPT begins a prompt with its end of text
        return hf.OPTForCausalLM(hf.OPTConfig(**common, **width, **tokens))
    width = {"intermediate_size": 11 * args.hidden // 4, "num_key_value_heads": args.heads // 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**common, **width, **tokens))


def train_tokenizer(lines: list[str], vocab: int):  # noqa: ANN201 - tokenizers is imported late
    """A byte-level BPE of the text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        lines, vocab_size=vocab, min_frequency=2, special_tokens=SPECIAL_TOKENS
    )
    return tokenizer


def train(model: torch.nn.Module, tokens: torch.Tensor, minutes: float) -> None:
    """AdamW with a warm-up and a cosine that ends with the time."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    start, step, mean = time.time(), 0, None
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        rate = (
            PEAK_RATE
            * min(1, (step + 1) / WARMUP)
            * (0.475 * (1 + math.cos(math.pi * done)) + 0.05)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - SEQUENCE, (BATCH,))
        batch = torch.stack([tokens[i : i + SEQUENCE] for i in starts])  # (B, T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: perplexity {math.exp(mean):.1f}", flush=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    lines = [
        line
        for path in args.text
        for line in path.read_text(encoding="utf-8").split("\n")
        if len(line) > SHORTEST_LINE
    ]
    random.Random(0).shuffle(lines)
    tokenizer = train_tokenizer(lines, args.vocab)
    encoded = tokenizer.encode_batch(lines)
    model = new_model(args)
    train(model, torch.tensor([t for line in encoded for t in (*line.ids, EOS)]), args.minutes)
    model.half().save_pretrained(args.save)
    tokenizer.save(str(args.save / "tokenizer.json"))

    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_file=str(args.save / "tokenizer.json"),
        bos_token=SPECIAL_TOKENS[EOS if args.family == "opt" else BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(args.save)


if __name__ == "__main__":
    cli.run(main)
