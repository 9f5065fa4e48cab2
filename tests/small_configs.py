"""A small config.json of every family."""

from __future__ import annotations

from vksteer.loading import families

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
TINY = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
FAMILY = {f.model_type: f for f in families.FAMILIES}


def base(model_type, **changes):
    """A small config.json of the family."""
    return {
        "model_type": model_type,
        "architectures": [FAMILY[model_type].architectures[0]],
        **TINY,
        "head_dim": 12,
        **changes,
    }
