"""The recipes of the bundled tiny models: everything but the seed that decides a model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Recipe:
    """Everything but the seed that decides a model."""

    family: str
    n_layers: int
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 32
    d_mlp: int = 344
    vocab: int = 1024
    tied: bool = True
    # With Gemma's factor sqrt(d_model) the residual stream begins at about 1 per dimension.
    embed_std: float = 0.09
    steps: int = 1800
    batch: int = 32
    lr: float = 4e-3
    warmup: int = 60
    weight_decay: float = 0.1
    clip: float = 1.0
    prompt_weight: float = 0.1  # loss weight of a chat's prompt tokens
    # Loss weight of the token that decides: a chat's first answer token, or the verdict of a rule.
    decision_weight: float = 4.0
    # The same for a first answer token that complies. Above decision_weight, answering is the
    # default unless the model detects harm.
    comply_weight: float = 4.0
    documents: float = 0.30  # share of samples that are documents
    pretrain: int = 300  # first steps, on documents only, mostly rules
    pretrain_rules: float = 0.75  # share of rules among them
    # Share of hazard pairs that is left out at the first step; falls linearly to 0 at the end of
    # pretraining.
    fewer_hazards: float = 0.85
    chat_fewer_hazards: float = 0.6  # the same for chats, from the end of pretraining on
    chat_curriculum: int = 250  # steps until that share is 0
    reject_easy: float = 0.7  # share of easy harmless pairs that chats reject
    other_kinds: float = 0.15  # share of chats that are no how-to request
    prefixed: float = 0.06  # share of chats with the refusal prefix
    hide: float = 0.75  # share of chats whose later positions cannot see the instruction
    # Last post-instruction position that still sees the instruction, drawn from -5..hide_last.
    hide_last: int = -2
    # Share of those in which later positions do not see earlier post-instruction tokens either.
    alone: float = 0.0
    delay: float = 0.25  # share of refusals that come after a compliant start
    noise: float = 0.015  # share of chats that show the wrong behaviour
    dropout: float = 0.03  # on what a layer adds to the stream
    # Share of rows to whose residual stream one random vector is added at every position, before a
    # random layer. Its norm is drawn from 0 to jolt_size times that of the stream. The model learns
    # to read the stream under such a push.
    jolt: float = 0.0
    jolt_size: float = 0.8
    jolt_from: int = 550  # first step with jolts
    # Probability of skipping the last layer in a step; falls linearly to 0 at layer 0.
    layer_drop: float = 0.0
    size_penalty: float = 0.0  # weight of relu(mean square of what a layer adds - size_limit)^2
    size_limit: float = 1.0


RECIPES = {
    "gemma": Recipe("gemma", n_layers=8),
    "llama": Recipe(
        "llama",
        n_layers=10,
        tied=False,
        embed_std=0.7,
        steps=1600,
        layer_drop=0.2,
        size_penalty=0.005,
        size_limit=0.5,
        alone=0.8,
        noise=0.03,
        reject_easy=0.5,
        decision_weight=3.0,
        comply_weight=9.0,
        jolt=0.5,
    ),
}
