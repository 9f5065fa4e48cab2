"""Random small models of every supported family, saved as ordinary Hugging Face folders.

Written with transformers' configuration and model classes, so that they are like a user's folders.
Sizes are awkward on purpose: heads * d_head is not d_model, vocabularies and MLP widths are odd or
prime, one or more query heads share a key/value head, norm gains scatter around 1 (those of Gemma
around 0 as stored), biases are not zero, windows are shorter than the prompts of the tests, and
soft caps are small enough to matter. Weights come from a seeded generator: the same name always
gives the same folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .more_families import MORE_FAMILIES
from .released import released_style  # noqa: F401  one of the styles that a folder has

#: name -> (transformers class prefix, how weights are stored, arguments of the configuration class)
FAMILIES = {
    "llama2": (
        "Llama",
        "float32",
        dict(
            hidden_size=40,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=6,
            intermediate_size=77,
            vocab_size=101,
            num_hidden_layers=3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
        ),
    ),
    "llama3": (
        "Llama",
        "bfloat16",
        dict(
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=77,
            vocab_size=257,
            num_hidden_layers=4,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "llama_linear": (
        "Llama",
        "float16",
        dict(
            hidden_size=52,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=14,
            intermediate_size=61,
            vocab_size=101,
            num_hidden_layers=2,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
    ),
    "llama_yarn": (
        "Llama",
        "float32",
        dict(
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=77,
            vocab_size=101,
            num_hidden_layers=2,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ),
    "llama_bias": (
        "Llama",
        "float32",
        dict(
            hidden_size=36,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=10,
            intermediate_size=33,
            vocab_size=101,
            num_hidden_layers=3,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "mistral": (
        "Mistral",
        "bfloat16",
        dict(
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=77,
            vocab_size=101,
            num_hidden_layers=3,
            sliding_window=7,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "gemma2": (
        "Gemma2",
        "float32",
        dict(
            hidden_size=52,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=77,
            vocab_size=257,
            num_hidden_layers=4,
            sliding_window=9,
            query_pre_attn_scalar=7,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=9.0,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        "bfloat16",
        dict(
            hidden_size=36,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=12,
            intermediate_size=77,
            vocab_size=257,
            num_hidden_layers=5,
            sliding_window=6,
            query_pre_attn_scalar=9,
            tie_word_embeddings=True,
            sliding_window_pattern=3,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ),
    "gemma3_linear": (
        "Gemma3Text",
        "float32",
        dict(
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=45,
            vocab_size=101,
            num_hidden_layers=7,
            sliding_window=5,
            query_pre_attn_scalar=6,
            tie_word_embeddings=True,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ),
    "qwen2": (
        "Qwen2",
        "float16",
        dict(
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=77,
            vocab_size=257,
            num_hidden_layers=3,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "qwen2_window": (
        "Qwen2",
        "float32",
        dict(
            hidden_size=42,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=51,
            vocab_size=101,
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "qwen3": (
        "Qwen3",
        "float32",
        dict(
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=8,
            intermediate_size=77,
            vocab_size=101,
            num_hidden_layers=3,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
}

#: Sizes wide enough for whole panels, several tiles and several workgroups.
WIDE = {
    "wide": (
        "Llama",
        "bfloat16",
        dict(
            hidden_size=416,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=1100,
            vocab_size=3001,
            num_hidden_layers=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "wide_gemma": (
        "Gemma3Text",
        "float16",
        dict(
            hidden_size=330,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=256,
            intermediate_size=1030,
            vocab_size=2050,
            num_hidden_layers=2,
            sliding_window=40,
            query_pre_attn_scalar=256,
            tie_word_embeddings=True,
            sliding_window_pattern=2,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ),
}

MAX_POSITIONS = 512

FAMILIES |= MORE_FAMILIES
ALL = FAMILIES | WIDE

#: Classes whose stored gains are those of (1 + w).
OFFSET = ("Gemma", "Gemma2", "Gemma3Text", "Nemotron")


def _config(name):
    import transformers

    prefix, _, arguments = ALL[name]
    # A copy, because transformers writes into it.
    arguments = json.loads(json.dumps(arguments))
    positions = "n_positions" if prefix in ("GPT2", "GPTJ") else "max_position_embeddings"
    return getattr(transformers, prefix + "Config")(
        bos_token_id=None,
        eos_token_id=[] if prefix == "Glm4" else None,
        pad_token_id=None,
        **{positions: MAX_POSITIONS},
        **arguments,
    )


def _gain(name, config):
    """By what the rows (of Conv1D: columns) of a weight are multiplied, one number or as many as
    there are: queries and keys are larger, so that attention attends; also in fused tensors.
    """
    import torch

    if "q_proj" in name or "k_proj" in name:
        return 1.4
    if "lm_head" in name:
        return 3.0
    if not any(part in name for part in ("c_attn", "query_key_value", "qkv_proj")):
        return 1.0
    heads, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if "query_key_value" in name:  # head by head
        return torch.tensor([1.4, 1.4, 1.0]).repeat_interleave(d).repeat(heads)
    groups = getattr(config, "num_key_value_heads", heads)
    return torch.tensor([1.4] * ((heads + groups) * d) + [1.0] * (groups * d))


def _fill(model, offset, seed):
    """Fills in weights of such a spread that every part of the model matters: attention scores of a
    few units, logits far enough apart to rank. offset: stored gains are those of (1 + w).
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    config = model.config
    one = 0.0 if offset else 1.0
    scaled = type(config).__name__.startswith("Gemma") or hasattr(config, "embedding_multiplier")
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    generator = torch.Generator().manual_seed(seed)
    noise = lambda like: torch.randn(like.shape, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name or ".ln_" in name
            if name.endswith("bias"):
                p.copy_(0.3 * noise(p))
            elif (
                norm and "layers." not in name and ".h." not in name and config.tie_word_embeddings
            ):
                # Gains of both signs: with a tied unembedding a random model would otherwise only
                # repeat its last token.
                p.copy_(1.3 * noise(p) - (1.0 - one))
            elif norm:
                p.copy_(0.25 * noise(p) + (one or 0.1))
            elif "embed_positions" in name or "wpe" in name:
                p.copy_(0.6 * noise(p))
            elif any(part in name for part in ("embed_tokens", "embed_in", "wte")):
                p.copy_(noise(p) * (0.25 if scaled else 0.7))
            elif name.removesuffix(".weight") in transposed:
                p.copy_(noise(p) * _gain(name, config) / p.shape[0] ** 0.5)
            else:
                gain = _gain(name, config)
                gain = gain if isinstance(gain, float) else gain[:, None]
                p.copy_(noise(p) * gain / p.shape[1] ** 0.5)


def build(name, folder, seed=None):
    """Writes the family's model into `folder` (config.json in transformers' newer style) and
    returns it as a Path.
    """
    import torch
    import transformers

    prefix, stored, _ = ALL[name]
    config = _config(name)
    causal = "GPT2LMHeadModel" if prefix == "GPT2" else prefix.replace("Text", "") + "ForCausalLM"
    model = getattr(transformers, causal)(config)
    _fill(model, prefix in OFFSET, seed=sum(map(ord, name)) if seed is None else seed)
    model = model.to(getattr(torch, stored))
    model.save_pretrained(folder)
    return Path(folder)


def with_config(folder, to, **changes):
    """A copy of `folder` with some keys of config.json (and generation_config.json where
    it has them) changed.
    """
    to = Path(to)
    to.mkdir(parents=True, exist_ok=True)
    for path in Path(folder).iterdir():
        shutil.copy(path, to / path.name)
    for file in ("config.json", "generation_config.json"):
        if (to / file).exists():
            config = json.loads((to / file).read_text())
            config.update(
                changes
                if file == "config.json"
                else {k: v for k, v in changes.items() if k.endswith("token_id")}
            )
            (to / file).write_text(json.dumps(config, indent=2))
    return to


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def add_tokenizer(folder, vocabulary=101):
    """A byte-level BPE tokenizer over printable ASCII (one character a token, a few merges), so
    that any generated text is plain ASCII.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(c) for c in range(33, 127)] + ["Ġ"]
    vocab = {c: i for i, c in enumerate(letters)}
    merges = []
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    while len(vocab) + len(special) < vocabulary:
        pair = (letters[32 + len(merges) % 60], letters[64 + len(merges) % 26])
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    assert tokenizer.get_vocab_size() == vocabulary
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": CHAT_TEMPLATE,
                "eos_token": "<|end|>",
                "bos_token": None,
                "clean_up_tokenization_spaces": False,
                "model_max_length": MAX_POSITIONS,
            }
        )
    )
    return tokenizer
