"""The front door: a model and its tokenizer, from a name or a folder to text and logits.

    from qllm import LLM

    llm = LLM.from_pretrained("opt-tiny", bitwidth=4)
    for completion in llm.generate(["He is working on"], max_new_tokens=20):
        print(completion.text)

The scripts stand on this module: what they add is options, reports and words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from qllm.bitwidths import Bitwidth, check_rounding, make_plan
from qllm.calibration import find_calibration
from qllm.checkpoint.convert import find_source
from qllm.checkpoint.load import load_model, module_bytes
from qllm.checkpoint.weights import resolve_dtype
from qllm.config import (
    DEFAULT_ACTIVATION_BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_KV_BITS,
    DEFAULT_SCHEME,
    ModelConfig,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.evaluate.perplexity import DEFAULT_BATCH, PerplexityOptions, Text, perplexity
from qllm.generate import check_prompts, generate, generate_tokens
from qllm.generation_config import GenerationConfig
from qllm.memory import local_device, resolve_device
from qllm.models import Decoder
from qllm.parallel.world import check_world, join
from qllm.pretrained import Pretrained, Prompt
from qllm.progress import Meter, Note, silent, unseen
from qllm.prompts import several, stop_strings
from qllm.stopping import StopStrings, check_stops, cut
from qllm.stream import TextStream
from qllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qllm.calibration import Calibration
    from qllm.onnx.runner import OnnxDecoder
    from qllm.parallel.pipeline import ParallelContext


@dataclass(frozen=True)
class Completion:
    """What a model adds to a prompt.

    Attributes:
        prompt: as it was given.
        prompt_tokens: what the model read of it, special tokens included.
        tokens: the new ones, an end of text included.
        text: that the new tokens add, without special tokens.
        finish_reason: "stop" where the model ended its text, or a string did; "length" where it
            was cut off.
    """

    prompt: Prompt
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: str


class LLM:
    """A model that generates, and what belongs to it.

    Attributes:
        pretrained: its files, tokenizer and settings.
        model: a `Decoder`, or an `OnnxDecoder` for an ONNX model.
    """

    def __init__(self, pretrained: Pretrained, model: Decoder | OnnxDecoder) -> None:
        self.pretrained, self.model = pretrained, model

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        bitwidth: Bitwidth | None = None,
        group_size: int = DEFAULT_GROUP_SIZE,
        scheme: str = DEFAULT_SCHEME,
        lm_head_bits: int | str | None = None,
        embedding_bits: int | str | None = None,
        activation_bits: int = DEFAULT_ACTIVATION_BITS,
        kv_bits: int = DEFAULT_KV_BITS,
        calibration: str | Path | Calibration | None = None,
        dtype: str | torch.dtype | None = None,
        device: str = "auto",
        num_shards: int = 1,
        cache_shape: tuple[int, int] = (0, 0),
        prompt_lengths: Sequence[int] = (),
        tp: int = 1,
        parallel: ParallelContext | None = None,
        meter: Meter = unseen,
        note: Note = silent,
    ) -> Self:
        """Load a model, rounding its linear layers to nearest; or a quantized one as it is.

        Args:
            model: a folder, a Hub repository, or the name of a bundled model ("opt-tiny").
            bitwidth: 1 to 8, "8:tc-li", "8:tc" or 16 for all layers; one of them per layer; a
                mapping from regular expressions over module names to specs, or the JSON file of
                one, in Neural Compressor's shape too. None is 16, and leaves a checkpoint that is
                quantized already as it is, which takes nothing else; a GGUF file does.
            group_size: input channels that share a scale, -1 for all of them.
            scheme: "asym" or "sym".
            lm_head_bits: quantizes the LM head too.
            embedding_bits: quantizes the token embedding, and an LM head that is tied to it.
            activation_bits: 8 rounds what layers of 1 to 8 bits multiply with to int8.
            kv_bits: of keys and values, 8 or 4; 16 is the type of the activations.
            calibration: activation statistics for "8:tc-li" and "8:tc", or their file; without,
                those that `fake_calib_gen.py` keeps for the model, if there are any.
            dtype: of activations and dense weights; None is the checkpoint's.
            device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
            num_shards: contiguous ranges of layers, of which a GPU may hold the first ones alone.
            cache_shape: sequences, and tokens of each, whose KV cache must fit into memory beside
                the model; else it is refused, with the numbers, before it is loaded.
            prompt_lengths: tokens of each of the prompts that come first, where they are known: on
                a GPU kernels for them are compiled while weights are read.
            tp: processes that share each layer, all of which torchrun started with this program:
                each makes the same calls, and gets the same results.
            parallel: which part of the model this process has in a session of one's own
                (`qllm.parallel.session`), in place of `tp`.
            meter: shows how many bytes are loaded (`qllm.progress`).
            note: called with lines that a user may want to know.

        Raises:
            UserError: for a model that is not there, broken or too large, or settings that do not
                fit it; the message says what would.
        """
        if parallel is None:
            check_world(tp)
        pretrained = Pretrained.open(model, note=note)
        default = QuantSpec(group_size=group_size, scheme=scheme)
        plan = make_plan(bitwidth, default, lm_head_bits, embedding_bits)
        # Bits that were asked for may be a 16 among others, in a loop.
        if bitwidth is lm_head_bits is embedding_bits is None:
            check_rounding(
                [plan],
                None if group_size == DEFAULT_GROUP_SIZE else group_size,
                None if scheme == DEFAULT_SCHEME else scheme,
            )
        if parallel is None and tp > 1:
            device = resolve_device(local_device(device))
            calibration = find_calibration(calibration, pretrained.folder, plan, note)
            settings = {"dtype": str(dtype), "kv_bits": kv_bits, "activation_bits": activation_bits}
            parallel = join(tp, device, pretrained.facts(plan, calibration) | settings)
        return cls.load(
            pretrained,
            plan,
            dtype=resolve_dtype(dtype),
            device=resolve_device(device),
            num_shards=num_shards,
            calibration=calibration,
            cache_shape=cache_shape,
            prompt_lengths=prompt_lengths,
            activation_bits=activation_bits,
            kv_bits=kv_bits,
            parallel=parallel,
            meter=meter,
            note=note,
        )

    @classmethod
    def load(
        cls,
        pretrained: Pretrained,
        plan: QuantPlan,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        num_shards: int = 1,
        calibration: str | Path | Calibration | None = None,
        activation_bits: int = DEFAULT_ACTIVATION_BITS,
        kv_bits: int = DEFAULT_KV_BITS,
        cache_shape: tuple[int, int] = (0, 0),
        prompt_lengths: Sequence[int] = (),
        parallel: ParallelContext | None = None,
        meter: Meter = unseen,
        note: Note = silent,
    ) -> Self:
        """Load the weights of a model whose other files were read.

        Args:
            plan: which layer gets which spec.
            cache_shape: rows and tokens of the KV cache that must fit beside the model.
            prompt_lengths: tokens of each of the prompts that come first, where they are known.
            parallel: which part of the model this process of several has; None: all of it.

        Raises:
            UserError: see `from_pretrained`.
        """
        folder = pretrained.folder
        if pretrained.onnx:
            asked = dtype is not None or kv_bits != DEFAULT_KV_BITS
            if asked or not plan.keeps_stored:
                raise UserError(
                    f"{folder.path} holds an ONNX model, whose types and layers are as they are; "
                    "leave `bitwidth`, `dtype` and `kv_bits` out"
                )
            from qllm.onnx.runner import OnnxDecoder

            return cls(pretrained, OnnxDecoder(folder.path, folder.onnx))
        model = load_model(
            find_source(folder, note),
            plan,
            dtype=dtype,
            device=device,
            num_shards=num_shards,
            calibration=find_calibration(calibration, folder, plan, note),
            cache_shape=cache_shape,
            prompt_lengths=prompt_lengths,
            activation_bits=activation_bits,
            kv_bits=kv_bits,
            meter=meter,
            parallel=parallel,
            note=note,
        )
        return cls(pretrained, model)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.pretrained.config

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of text, and text of tokens."""
        return self.pretrained.tokenizer

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors."""
        return module_bytes(self.model) if isinstance(self.model, Decoder) else self.model.nbytes

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        max_prompt_length: int | None = None,
        on_token: Callable[[int, int, bool], None] | None = None,
        stop: str | Sequence[str] | None = None,
        repetition_penalty: float | None = None,
        batch_size: int | None = None,
        **sampling: float | None,
    ) -> list[Completion]:
        """Continue prompts; no prompt changes what another one gets.

        Args:
            prompts: texts or lists of token ids, or one of them.
            max_new_tokens: for each; None is what generation_config.json says, or 20.
            stop: a string that ends a text, which it is no part of, or a special token, or several.
            repetition_penalty: None is what generation_config.json says, or 1.
            sampling: `temperature`, `top_k`, `top_p`, `min_p` and `seed` (`qllm.sampling`): with
                one of them tokens are drawn, with the others as generation_config.json has them;
                without, or with a temperature of 0, the likeliest is taken.
            max_prompt_length: in tokens; a longer text loses its beginning. None: no limit.
            batch_size: prompts that are generated at once, for which there has to be memory;
                None: all.
            on_token: called with the row and the id of each new token as it is found, and whether
                it is the row's last.

        Raises:
            UserError: for an empty prompt, or one that the model's window cannot hold.
        """
        many = several(prompts)
        ids = [self.pretrained.encode(prompt, max_prompt_length) for prompt in many]
        config = self._generation(max_new_tokens, repetition_penalty, sampling)
        strings = self._stops(stop)
        more: dict[str, Any] = {"batch_size": batch_size}
        if on_token is not None:
            more["on_token"] = on_token
        ends = set(config.eos_token_ids)
        if strings and ids:
            more["stop"] = stops = StopStrings(self.tokenizer, ids, strings)
            ends |= stops.special
        found = generate(self.model, ids, config, **more) if ids else []
        texts = [self.tokenizer.continuation(*pair) for pair in zip(ids, found, strict=True)]
        return [
            Completion(
                prompt,
                tuple(read),
                tuple(new),
                cut(text, strings),
                "stop" if (new and new[-1] in ends) or cut(text, strings) != text else "length",
            )
            for prompt, read, new, text in zip(many, ids, found, texts, strict=True)
        ]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        repetition_penalty: float | None = None,
        **sampling: float | None,
    ) -> Iterator[str]:
        """Pieces of the text that `generate` adds to one prompt, each as soon as it is known.

        Arguments are those of `generate`.

        Raises:
            UserError: see `generate`; before the first piece is asked for.
        """
        ids = self.pretrained.encode(prompt)
        config = self._generation(max_new_tokens, repetition_penalty, sampling)
        check_prompts(self.model.config, [ids], config)
        return self._pieces(ids, config, self._stops(stop))

    def _pieces(self, ids: list[int], config: GenerationConfig, stop: list[str]) -> Iterator[str]:
        pieces: list[str] = []
        stream = TextStream(self.tokenizer, [ids], lambda row: None, pieces.append, stop)
        stops = StopStrings(self.tokenizer, [ids], stop) if stop else None
        for token in generate_tokens(self.model, [ids], config, stops):
            stream.add(*token)
            yield from pieces
            pieces.clear()

    def logits(self, prompts: Prompt | Sequence[Prompt]) -> list[Tensor]:
        """Logits of the token behind each token of each prompt: float32 (T, V) per prompt.

        Raises:
            UserError: for an empty prompt, or one that the model's window cannot hold.
        """
        many = several(prompts)
        if not many:
            return []
        ids = [self.pretrained.encode(prompt) for prompt in many]
        check_prompts(self.model.config, ids, GenerationConfig(max_new_tokens=0))
        found = self.model.prefill(ids, last=False)
        assert found is not None  # as all stages of a pipeline share logits
        return list(found.split([len(prompt) for prompt in ids]))

    def perplexity(
        self,
        text: str,
        *,
        convention: str = "gptq",
        window: int | None = None,
        stride: int | None = None,
        batch: int = DEFAULT_BATCH,
    ) -> float:
        """exp of the mean negative log-likelihood of a text.

        Args:
            convention: how the text is cut and what counts: a name of
                `qllm.evaluate.perplexity.CONVENTIONS`. Figures of one alone can be compared.
            window, stride, batch: see `qllm.evaluate.perplexity.PerplexityOptions`.

        Raises:
            UserError: for a text that is too short, or a window that the model cannot take.
        """
        if not isinstance(text, str):
            raise TypeError(f"the text is of type {type(text).__name__}; give a str")
        encoded = Text.encode(text, self.tokenizer)
        settings = PerplexityOptions((convention,), window, stride, batch)
        return perplexity(self.model, encoded, settings)[convention]

    def _stops(self, stop: str | Sequence[str] | None) -> list[str]:
        """Strings that end a text, checked to be such."""
        strings = stop_strings(stop)
        check_stops(self.tokenizer, strings)
        return strings

    def _generation(
        self,
        max_new_tokens: int | None,
        repetition_penalty: float | None,
        sampling: Mapping[str, float | None],
    ) -> GenerationConfig:
        """The checkpoint's settings, with those that were asked for; a seed is all ranks'."""
        config = self.pretrained.generation_with(
            max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, **sampling
        )
        if config.sampling is None or not isinstance(self.model, Decoder):
            return config
        drawn = config.sampling.with_seed()
        assert drawn.seed is not None
        seed = self.model.parallel.tp.first(drawn.seed)
        return replace(config, sampling=replace(drawn, seed=seed))
