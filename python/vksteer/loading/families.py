"""The table of supported model families: which keys of a config.json each understands, and
what they default to.

The defaults are those of transformers' configuration classes (tests/test_config.py compares them
with the installed ones), because a released config.json leaves out what equals its class's default.
"""

from __future__ import annotations

from . import family_rows_layernorm as layer
from . import family_rows_rms as rms
from .family_type import Family

FAMILIES = (
    rms.LLAMA,
    rms.MISTRAL,
    rms.GEMMA2,
    rms.GEMMA3,
    rms.QWEN2,
    rms.QWEN3,
    layer.GPT2,
    layer.GPT_NEOX,
    layer.GPTJ,
    layer.OPT,
    layer.PHI,
    rms.PHI3,
    layer.OLMO,
    rms.OLMO2,
    rms.OLMO3,
    rms.SMOLLM3,
    rms.GRANITE,
    layer.COHERE,
    layer.COHERE2,
    layer.STABLELM,
    rms.GLM4,
    rms.EXAONE4,
    rms.MINISTRAL3,
    rms.ARCEE,
    layer.NEMOTRON,
    rms.SEED_OSS,
    rms.GEMMA,
)
BY_MODEL_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES}

#: Keys that say how the rotation is scaled; rope.py reads them.
ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    }
)

#: Keys of the outer config of a model that also sees images, by its model_type; its text_config is
#: what is read.
OUTER = {
    "gemma3": frozenset(
        {
            "text_config",
            "vision_config",
            "mm_tokens_per_image",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "boi_token_id",
            "eoi_token_id",
            "image_token_id",
            "tie_word_embeddings",
        }
    ),
    "mistral3": frozenset(
        {
            "text_config",
            "vision_config",
            "image_token_index",
            "image_token_id",
            "projector_hidden_act",
            "vision_feature_layer",
            "multimodal_projector_bias",
            "spatial_merge_size",
            "tie_word_embeddings",
        }
    ),
}
#: The text model's model_type where an outer config's text_config does not say it.
OUTER_TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral"}

#: Activation names of transformers -> the engine's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}


def markdown() -> str:
    """The README's table of supported families."""
    lines = [
        "| family | architecture | GGUF | attention windows | rope scalings | dtypes |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        architectures = ", ".join(f"`{a}`" for a in family.architectures)
        gguf = ", ".join(f"`{a}`" for a in family.gguf)
        lines.append(
            f"| {family.title} | {architectures} | {gguf} | {family.window_note} | default, linear,"
            " dynamic, llama3, yarn | float32, bfloat16, float16; GGUF of any type the `gguf`"
            " package knows |"
        )
    return "\n".join(lines)
