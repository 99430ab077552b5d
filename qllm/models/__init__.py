"""Model families: one decoder, and one description per family."""

from __future__ import annotations

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.models.arcee import ARCEE
from qllm.models.bloom import BLOOM
from qllm.models.cohere import COHERE, COHERE2
from qllm.models.decoder import Decoder
from qllm.models.ernie4_5 import ERNIE4_5
from qllm.models.exaone4 import EXAONE4
from qllm.models.family import Family, RawConfig
from qllm.models.gemma import GEMMA
from qllm.models.gemma2 import GEMMA2
from qllm.models.gemma3_text import GEMMA3_TEXT
from qllm.models.gemma4_text import GEMMA4_TEXT
from qllm.models.glm import GLM, GLM4
from qllm.models.gpt2 import GPT2
from qllm.models.gpt_neox import GPT_NEOX
from qllm.models.gpt_oss import GPT_OSS
from qllm.models.granite import GRANITE
from qllm.models.granitemoe import GRANITEMOE
from qllm.models.llama import LLAMA
from qllm.models.ministral3 import MINISTRAL3
from qllm.models.mistral import MISTRAL
from qllm.models.mixtral import MIXTRAL
from qllm.models.multimodal import MULTIMODAL
from qllm.models.olmo import OLMO
from qllm.models.olmo2 import OLMO2
from qllm.models.olmo3 import OLMO3
from qllm.models.olmoe import OLMOE
from qllm.models.opt import OPT
from qllm.models.phi import PHI
from qllm.models.phi3 import PHI3
from qllm.models.qwen2 import QWEN2
from qllm.models.qwen2_moe import QWEN2_MOE
from qllm.models.qwen3 import QWEN3
from qllm.models.qwen3_moe import QWEN3_MOE
from qllm.models.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from qllm.models.seed_oss import SEED_OSS
from qllm.models.smollm3 import SMOLLM3
from qllm.models.stablelm import STABLELM
from qllm.models.starcoder2 import STARCODER2

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(OPT, BLOOM, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT, PHI3, GPT_NEOX, GPT2),
        *(QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT),
        *(GEMMA4_TEXT, MINISTRAL3, STARCODER2, GRANITE, SMOLLM3, OLMO2, OLMO3),
        *(
            GLM,
            GLM4,
            COHERE,
            COHERE2,
            EXAONE4,
            ERNIE4_5,
            GEMMA,
            STABLELM,
            OLMO,
            SEED_OSS,
            PHI,
            ARCEE,
        ),
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE, GPT_OSS),
    )
}


def family_of(raw: RawConfig) -> Family:
    """The family of a config.json.

    Raises:
        UserError: for a model of another family.
    """
    name = raw.values.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    runs = f"QLLM runs {', '.join(FAMILIES)} checkpoints"
    if raw.outer is not None:
        raise UserError(
            f"{raw.where}: the model_type of its text_config is {name!r}; of the text models "
            f"inside a {raw.outer}, {runs}"
        )
    texts = f", and the text model inside {', '.join(MULTIMODAL)}"
    raise UserError(f"{raw.where}: model_type is {name!r}; {runs}{texts}")


def read_config(raw: RawConfig) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        UserError: for values that no model of the family can have.
    """
    return family_of(raw).read_config(raw)


__all__ = ["FAMILIES", "Decoder", "Family", "RawConfig", "family_of", "read_config"]
