"""Cache steering without a cache, in float64: one forward pass of prompt and continuation in which
the queries from `first` on, and only they, see changed keys and values at one position.
"""

from __future__ import annotations

import numpy as np
import torch


def hooks(ref, position, first, keys, values):
    """Hooks for `Reference.forward`. keys, values: [L, G, d_head], added to the entry at `position`
    as the queries at `first` and later see it.
    """
    f, seen, found = ref.facts, {}, {}
    keys, values = (torch.tensor(np.array(x), dtype=torch.float64) for x in (keys, values))
    group = f.n_heads // f.n_kv_heads

    def keep(name):
        def hook(x):
            seen[name] = x
            return x

        return hook

    def scores(l):
        def hook(x):
            key = seen["k", l][position] + keys[l]
            new = torch.einsum("qhd,hd->hq", seen["q", l], key.repeat_interleave(group, 0))
            new = new * f.attn_scale
            if f.attn_softcap:
                new = f.attn_softcap * torch.tanh(new / f.attn_softcap)
            old = x[:, :, position]
            later = (torch.arange(x.shape[1]) >= first) & ~torch.isinf(old)
            return torch.cat(
                [
                    x[:, :, :position],
                    torch.where(later, new, old)[..., None],
                    x[:, :, position + 1 :],
                ],
                -1,
            )

        return hook

    def z(l):
        def hook(x):
            weight = seen["pattern", l][:, :, position].T.clone()  # [query, head]
            weight[:first] = 0
            return x + weight[..., None] * values[l].repeat_interleave(group, 0)

        return hook

    for l in range(f.n_layers):
        at, rotated = f"blocks.{l}.attn.", bool(f.rope[l])
        assert rotated or not f.qk_norm, "no site holds the key of such a layer"
        for part in "qk":
            found[f"{at}hook_{'rot_' if rotated else ''}{part}"] = keep((part, l))
        found[at + "hook_attn_scores"] = scores(l)
        found[at + "hook_pattern"] = keep(("pattern", l))
        found[at + "hook_z"] = z(l)
    return found


def rotated(ref, keys, position, n):
    """Keys [L, G, d_head] before rotation as they lie at a position of a text of n tokens."""
    from .reference import _Pass

    run = _Pass(ref, [0] * n, [], n, None, None, None, None, {}, False)
    out = torch.tensor(np.array(keys), dtype=torch.float64)
    for l in range(ref.facts.n_layers):
        if ref.facts.rope[l]:
            out[l] = run.rotate(out[l][None].expand(n, -1, -1), l, query=False)[position]
    return out.numpy()
