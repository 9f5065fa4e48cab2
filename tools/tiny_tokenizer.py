"""The tokenizers of the bundled tiny models: byte-level BPE and chat templates."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_world import world

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role']"
    " == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

#: Llama 3's split of a text into words before byte-pair merging.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = {
    "llama": (
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    "gemma": ("<pad>", "<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"),
}  # order: padding, begin, end of document, end of turn, then the rest


def _texts() -> list[str]:
    """The texts of the training split that the merges are learnt from."""
    rng = random.Random("tokenizer")
    texts = ["system\n\n", "user\n\n", "assistant\n\n", "user\n", "model\n"] * 2000
    for _ in range(12000):
        request = world.draw_request(rng)
        texts += [
            request.prompt,
            world.comply(request, rng),
            world.refuse(request, rng),
            world.document(rng),
        ]
    return texts + [world.REFUSE_PREFIX] * 200


def build_tokenizer(family: str, vocab: int, out: Path):
    """Trains byte-level BPE on the training split's texts, saves it as tokenizer.json and
    tokenizer_config.json, and returns it as transformers loads it.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    specials = SPECIALS[family]
    tok.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tok.get_vocab_size() == vocab
    bos = specials[1]
    tok.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))]
    )
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": specials[3],
        "pad_token": specials[0],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": LLAMA_TEMPLATE if family == "llama" else GEMMA_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out)
