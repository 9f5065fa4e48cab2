"""`model.gradients`: d(scalar)/d(site) at every site of every family, against autograd through the
float64 oracle.

The scalar of a row is logit(a) - logit(b) at a position, or the sum over positions of log p(token)
or of KL(P_reference||P). The gradient is with respect to the captured value, which is the one after
edits; it is 0 where a pattern or a score is masked.

Bound: 1e-4 of the largest value of a site over the batch. Largest error met on lavapipe: 1.8e-5.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.compare import assert_close, assert_same_bits, padding, real
from oracle.families import FAMILIES
from oracle.reference import is_pattern
from vksteer import KL, LogitDiff, LogProb

BOUND = 1e-4
PROMPTS, RESPONSES = (5, 17, 9), (4, 0, 7)


def place(position, prompt_length):
    """A position counts from the start of the row, a negative one from the end of the prompt."""
    return position if position >= 0 else prompt_length + position


def scalar(of, logits, prompt_length):
    """The scalar `of` of one row. logits: float64 [S, V]."""
    kind = type(of).__name__
    if kind == "LogitDiff":
        p = place(of.position, prompt_length)
        return logits[p, of.a] - logits[p, of.b]
    at = [place(p, prompt_length) for p in of.positions]
    q = torch.log_softmax(logits[at], dim=-1)
    if kind == "LogProb":
        return q[torch.arange(len(at)), torch.as_tensor(np.asarray(of.tokens, np.int64))].sum()
    p = torch.log_softmax(torch.as_tensor(np.asarray(of.reference_logits, np.float64)), dim=-1)
    return (p.exp() * (p - q)).sum()


def want(ref, tokens, prompt_length, of, sites, edits):
    """{site: gradient}, float64, by autograd through one row."""
    leaf = lambda x: x.detach().requires_grad_()
    row = ref.forward(
        tokens,
        edits=edits,
        prompt_length=prompt_length,
        hooks={"hook_embed": leaf, "hook_pos_embed": leaf},
    )
    found = torch.autograd.grad(
        scalar(of, row.logits, prompt_length), [row.sites[s] for s in sites], allow_unused=True
    )
    out = {}
    for site, of_site in zip(sites, found):
        g = torch.zeros_like(row.sites[site]) if of_site is None else of_site
        if is_pattern(site):
            layer = int(site.split(".")[1])
            i = torch.arange(len(tokens))
            ahead = i[:, None] - i[None, :]
            attended = (ahead >= 0) & (ahead < (ref.facts.window[layer] or len(tokens)))
            g = torch.where(attended, g, 0.0)
        out[site] = g
    return out


@pytest.fixture
def case(zoo, rng):
    """The oracle and the engine of a family, ragged prompts and responses, and a scalar of each
    kind for every row.
    """

    def make(name):
        ref, model = zoo.reference(name), zoo.engine(name)
        draw = lambda n: rng.integers(0, ref.facts.d_vocab, n).tolist()
        prompts, responses = [draw(n) for n in PROMPTS], [draw(n) for n in RESPONSES]
        other = lambda n: (3 * rng.standard_normal((n, ref.facts.d_vocab))).astype(np.float32)
        a, b = rng.choice(ref.facts.d_vocab, 2, replace=False).tolist()
        kinds = {
            "logit difference": [LogitDiff(-1, a, b), LogitDiff(16, b, a), LogitDiff(12, a, b)],
            "log probability": [
                LogProb(list(range(n - 1, n - 1 + len(r))) or [-2, -1], r or draw(2))
                for n, r in zip(PROMPTS, responses)
            ],
            "KL": [KL(other(2), [-1, 2]), KL(other(3), [0, 5, 16]), KL(other(1), [15])],
        }
        return ref, model, prompts, responses, kinds

    return make


def check(ref, model, prompts, responses, of, sites, edits, what):
    """Compares every site and returns the gradients. of: one object for all rows or for each."""
    found = model.gradients(prompts, responses, of=of, at=sites, edits=edits)
    rows = [
        want(ref, p + r, len(p), of[b] if isinstance(of, list) else of, sites, edits)
        for b, (p, r) in enumerate(zip(prompts, responses))
    ]
    failures = []
    for site in sites:
        got = found[site]
        assert got.dtype == np.float32 and got.shape[0] == len(prompts)
        largest = max(float(row[site].abs().max()) for row in rows)
        for b, (p, r) in enumerate(zip(prompts, responses)):
            n = len(p) + len(r)
            mine, theirs = real(site, got, b, n), rows[b][site].numpy()
            assert mine.shape == theirs.shape, f"{site}: {mine.shape}, expected {theirs.shape}"
            assert not np.any(padding(site, got, b, n)), f"{site}, row {b}: padding is not 0"
            error = np.abs(mine - theirs)
            if not error.max() <= BOUND * largest:
                at = np.unravel_index(np.nan_to_num(error, nan=np.inf).argmax(), error.shape)
                failures.append(
                    f"{site}, row {b}, {tuple(map(int, at))}: got {mine[at]!r}, expected"
                    f" {theirs[at]!r}; largest {largest:.3g}"
                )
    assert not failures, f"{what}: {len(failures)} of {len(sites) * len(prompts)}:\n" + "\n".join(
        failures[:20]
    )
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_every_family(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses, kinds = case(name)
    assert set(model.sites) == set(ref.site_names())
    vector = vs.SteeringVector(rng.standard_normal(ref.facts.d_model).astype(np.float32), 1)
    for kind, of in kinds.items():
        check(
            ref,
            model,
            prompts,
            responses,
            of,
            list(model.sites),
            [vs.Steer(vector, -0.8)],
            f"{name}, {kind}",
        )


@pytest.mark.parametrize("name", ["gemma2", "llama_bias", "qwen3"])
def test_without_edits_and_steered_at_some_positions(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses, kinds = case(name)
    vector = vs.SteeringVector(rng.standard_normal(ref.facts.d_model).astype(np.float32), 0)
    sites = [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.1.attn.hook_v",
        "blocks.1.ln2.hook_scale",
        "ln_final.hook_normalized",
    ]
    for edits in ([], [vs.Steer(vector, 1.0, positions=slice(-2, None))]):
        check(
            ref,
            model,
            prompts,
            responses,
            kinds["log probability"],
            sites,
            edits,
            f"{name}, {edits}",
        )


@pytest.mark.parametrize("name", ["gemma2", "llama3"])
def test_other_edits(case, rng, name):
    """A gradient goes through what an edit keeps and stops at what it replaces."""
    import vksteer as vs

    ref, model, prompts, responses, kinds = case(name)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    f = ref.facts
    sites = [
        "hook_embed",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_mid",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_pattern",
        "blocks.1.mlp.hook_post",
        "blocks.2.ln1.hook_normalized",
    ]
    for edits in (
        [vs.Scale("blocks.1.attn.hook_v", -0.5, heads=[0])],
        [vs.Set("blocks.1.attn.hook_z", draw(f.d_head), heads=[1], positions=[-1, 2])],
        [vs.Ablate(draw(f.d_model))],
        [
            vs.Set("blocks.1.hook_resid_mid", draw(f.d_model), positions=[1]),
            vs.Scale("blocks.1.mlp.hook_post", -1.0),
        ],
        [vs.Scale("blocks.0.hook_resid_post", 2.0), vs.Add("blocks.2.ln1.hook_normalized", 0.3)],
    ):
        check(ref, model, prompts, responses, kinds["KL"], sites, edits, f"{name}, {edits}")


def test_one_object_for_all_rows(case):
    ref, model, prompts, responses, _ = case("qwen2")
    sites = ["hook_embed", "blocks.2.hook_resid_post"]
    for of in (LogitDiff(-1, 3, 7), LogProb([-2, -1, 2], [5, 9, 5]), LogProb([0], [1])):
        one = check(ref, model, prompts, responses, of, sites, [], str(of))
        each = model.gradients(prompts, responses, of=[of] * 3, at=sites)
        for site in sites:
            assert_same_bits(site, one[site], each[site])


def test_rows_do_not_touch_each_other(case):
    """A row has the same gradient alone, and 0 after the last position that its scalar reads."""
    _ref, model, prompts, responses, _ = case("gemma2")
    of = [LogitDiff(2, 3, 7), LogitDiff(9, 1, 2), LogitDiff(-1, 5, 6)]
    sites = ["blocks.1.hook_resid_pre", "blocks.2.attn.hook_k"]
    together = model.gradients(prompts, responses, of=of, at=sites)
    for b in range(3):
        n = PROMPTS[b] + RESPONSES[b]
        alone = model.gradients([prompts[b]], [responses[b]], of=of[b], at=sites)
        for site in sites:
            assert_same_bits(f"{site}, row {b}", together[site][b, -n:], alone[site][0])
            last = place(of[b].position, PROMPTS[b])
            assert not np.any(alone[site][0, last + 1 :]) and np.any(alone[site][0, last])


def test_a_difference_of_runs(case, rng):
    """A small step along the gradient changes the scalar by what the gradient says. The tolerance
    of 2 % is wide because differences of logits in single precision lose digits. The largest
    difference met is 2.2e-5.
    """
    import vksteer as vs

    _ref, model, prompts, _, _ = case("qwen3")
    of = LogitDiff(-1, 3, 7)
    site = "blocks.1.hook_resid_mid"
    grad = model.gradients(prompts, of=of, at=[site])[site]
    logits = [
        model.run(
            prompts,
            edits=[
                [vs.Add(site, sign * 1e-2 * grad[b, -n:] / np.linalg.norm(grad[b]))]
                for b, n in enumerate(PROMPTS)
            ],
            logits="last",
        ).logits
        for sign in (1, -1)
    ]
    for b in range(3):
        up, down = (float(x[b, 3]) - float(x[b, 7]) for x in logits)
        assert_close(
            f"row {b}", np.array([(up - down) / 2e-2]), np.array([np.linalg.norm(grad[b])]), 2e-2
        )


def test_refusals(case):
    ref, model, prompts, responses, _ = case("llama2")
    V = ref.facts.d_vocab
    run = lambda of, at=("hook_embed",): model.gradients(prompts, responses, of=of, at=list(at))
    with pytest.raises(KeyError, match="hook_resid_pre"):
        run(LogitDiff(-1, 1, 2), ["blocks.0.hook_resid_prr"])
    for of in (
        LogitDiff(-1, 1, V),
        LogitDiff(40, 1, 2),
        LogitDiff(-6, 1, 2),
        [LogitDiff(-1, 1, 2)] * 2,
    ):
        with pytest.raises(ValueError):
            run(of)
    for make in (
        lambda: LogProb([0, 1], [5]),
        lambda: KL(np.zeros((2, V), np.float32), [0]),
        lambda: KL(np.zeros((1, V + 1), np.float32), [0]),
        lambda: KL(np.full((1, V), np.nan, np.float32), [0]),
    ):
        with pytest.raises(ValueError):
            run(make())
    with pytest.raises((TypeError, ValueError)):
        run("logit_diff")


@pytest.mark.parametrize(
    "site",
    ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.1.ln1.hook_scale"],
)
def test_edits_without_a_gradient_are_refused(case, site):
    """There is a gradient at these sites, but none through an edit of them; this is refused before
    any work.
    """
    import vksteer as vs

    _, model, prompts, _, _ = case("llama2")
    with pytest.raises(ValueError, match="no gradient through"):
        model.gradients(
            prompts, of=LogitDiff(-1, 1, 2), at=["hook_embed"], edits=[vs.Scale(site, 0.5)]
        )
