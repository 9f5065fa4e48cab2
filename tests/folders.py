"""Model folders as people have them, for the tests of loading: copies of small random models with
changed files, and what transformers makes of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np


def copy(source, to, drop=(), **config):
    """A copy of a folder whose config.json lacks the keys `drop` and has other values."""
    shutil.copytree(source, to)
    change(to, drop, **config)
    return Path(to)


def change(folder, drop=(), **config):
    path = Path(folder) / "config.json"
    content = json.loads(path.read_text())
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps({**content, **config}))


def hf_model(folder):
    """Transformers' model of a folder, in float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def hf_logits(folder, ids):
    import torch

    with torch.no_grad():
        return hf_model(folder)(torch.tensor([ids])).logits[0].numpy()


def hf_greedy(model, ids, n):
    import torch

    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False
        )
    return out[0, len(ids) :].tolist()


def logits(folder, ids, **options):
    import vksteer as vs

    with vs.Model.from_pretrained(str(folder), progress=False, **options) as model:
        return model.run([ids]).logits[0]


def tokens(n, vocab, seed=1):
    return np.random.default_rng(seed).integers(3, vocab, n).tolist()


def assert_close(ours, theirs, bound=2e-4):
    assert np.abs(ours - theirs).max() <= bound * max(1.0, np.abs(theirs).max())
