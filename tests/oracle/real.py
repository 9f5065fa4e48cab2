"""The answers of transformers for the three real models (float32, from the same GGUF files),
computed once per machine and kept.

Reading a GGUF file through transformers takes half a minute to minutes, so the answers are kept in
`.models/reference/` (ignored by git), one npz per model, named by the file's size, transformers'
version and a hash of this file. Delete the folder to make them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from file_lock import file_lock

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = Path(os.environ.get("VKSTEER_MODELS", ROOT / ".models"))

#: name -> (glob of the file, does it have a chat template)
REAL = {
    "smollm2": ("*[sS]mol[lL][mM]2*.gguf", True),
    "qwen": ("*[qQ]wen2*.gguf", True),
    "gemma": ("*[gG]emma*3*.gguf", False),
}

PROMPTS = [
    "Tell me about coffee.",
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
    "Give me three tips for a good night's sleep.",
    "Write a Python function that adds two numbers.",
    "How do bees make honey?",
    "Tell a two-sentence story about a lighthouse.",
    "What does the word 'serendipity' mean?",
    "List four kinds of cheese.",
    "Why is the sky blue?",
    "Describe a rainy day in a small village.",
    "How many legs does a spider have?",
    "What is 17 plus 25?",
    "Suggest a name for a grey cat.",
    "Translate 'good morning' into Spanish.",
    "What happens when water freezes?",
    "Write a haiku about autumn leaves.",
    "Who wrote Hamlet?",
    "Explain recursion to a child.",
]

#: Texts that are hard for tokenizers.
TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "line\nbreak\n\nand\ttab",
    "naïve café — “quotes”…",
    "日本語のテキスト",
    "emoji 🙂👩‍🚀",
    "12345 3.14 1,000,000",
    "I'm you're they'll IT'S",
    "def f(x):\n    return x**2  # 平方",
    "<|im_start|>user",
    "\u00a0nbsp\u200bzero",
    "Ünïcödé\u0301 combining",
    "a" * 60,
]

N_NEW = 64


def gguf(name):
    pattern, _ = REAL[name]
    found = sorted(p for p in MODELS.rglob(pattern) if p.is_file())
    return found[0] if found else None


class Answers:
    """The answers kept for one model."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.meta = json.loads(str(arrays["meta"]))

    def tokens(self, i):
        return self.meta["tokens"][i]

    def text_tokens(self):
        return self.meta["text_tokens"]

    def logits(self, i):
        return self.arrays[f"logits{i}"]

    def sites(self):
        return {k[5:]: self.arrays[k] for k in self.arrays.files if k.startswith("site:")}

    def greedy(self, i):
        """(new tokens, the margin between the two largest logits at each step)."""
        return self.arrays[f"new{i}"].tolist(), self.arrays[f"margin{i}"]


def answers(name, thorough):
    """thorough: greedy texts of all prompts and the logits of a long one; else 16 greedy tokens of
    the first three prompts.
    """
    import transformers

    path = gguf(name)
    key = hashlib.sha256(
        Path(__file__).read_bytes() + f"{path.stat().st_size} {transformers.__version__}".encode()
    ).hexdigest()[:12]
    kept = MODELS / "reference" / f"{name}-{'all' if thorough else 'quick'}-{key}.npz"
    full = MODELS / "reference" / f"{name}-all-{key}.npz"
    with file_lock(kept.with_suffix(".lock")):
        for file in (full, kept):
            if file.exists():
                return Answers(np.load(file))
        arrays = _compute(path, REAL[name][1], thorough)
        part = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **arrays)
        os.replace(part, kept)
    return Answers(np.load(kept))


def _compute(path, chat, thorough):
    import torch
    import transformers

    from test_oracle import hf_sites

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if chat:
        encode = lambda text: list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True
            )["input_ids"]
        )
    else:
        encode = lambda text: list(tokenizer(text).input_ids)
    tokens = [encode(p) for p in PROMPTS]
    out = {"meta": json.dumps({"tokens": tokens, "text_tokens": [encode(t) for t in TEXTS]})}

    sites, logits = hf_sites(model, tokens[0])
    out["logits0"] = logits.numpy()
    last = model.config.num_hidden_layers - 1
    for site, value in sites.items():
        if not site.endswith("normed") and (
            ".hook_resid" in site
            or site.startswith(
                ("hook_embed", "blocks.0.", f"blocks.{last // 2}.", f"blocks.{last}.")
            )
        ):
            out["site:" + site] = value.numpy()
    with torch.no_grad():
        for i in (1, 2):
            out[f"logits{i}"] = model(torch.tensor([tokens[i]])).logits[0].numpy()
        if thorough:  # 700 tokens, past Gemma 3's window of 512; every 20th position is kept
            long = ([t for row in tokens for t in row] * 3)[:700]
            out["long"] = np.array(long)
            out["long_logits"] = model(torch.tensor([long])).logits[0, 19::20].numpy()
        for i in range(len(PROMPTS) if thorough else 3):
            got = model.generate(
                torch.tensor([tokens[i]]),
                attention_mask=torch.ones(1, len(tokens[i]), dtype=torch.long),
                do_sample=False,
                max_new_tokens=N_NEW if thorough else 16,
                output_logits=True,
                return_dict_in_generate=True,
            )
            top = torch.stack([torch.topk(step[0], 2).values for step in got.logits])
            out[f"new{i}"] = got.sequences[0, len(tokens[i]) :].numpy()
            out[f"margin{i}"] = (top[:, 0] - top[:, 1]).numpy()
    return out
