"""Value vectors, the decomposition and head weights against the float64 oracle, on random models of
every family; layers l and last, ragged prompts.

Bound: 1e-4 of the largest value for value vectors and both parts. Worst met on lavapipe,
float32: value vectors 5.3e-7, scales 4.0e-7, direct part 4.9e-7, indirect part 1.3e-6, stored
weights of any type 5.7e-7.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.compare import assert_close, assert_same_bits
from oracle.families import FAMILIES
from oracle.reference import Steer

BOUND = 1e-4
LENGTHS = (9, 3, 17)


@pytest.fixture
def case(zoo, rng):
    """(reference, engine, prompts, vector at `layer`)."""

    def make(name, layer=1, size=1.0):
        import vksteer as vs

        ref = zoo.reference(name)
        prompts = [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in LENGTHS]
        return (
            ref,
            zoo.engine(name),
            prompts,
            vs.SteeringVector(
                (size * rng.standard_normal(ref.facts.d_model)).astype(np.float32), layer
            ),
        )

    return make


def passed_on(ref, x):
    """What the norm before attention divides by its scale: x, for LayerNorm without its mean."""
    f = ref.facts
    return x - x.mean(-1, keepdim=True) if f.norm == "layer" and f.pre_norms else x


def parts(ref, layer):
    """(gain [D], W_V [H, D, dh], W_O [H, dh, D], bias of the values [H, dh], post gain [D] or
    None), float64, a row a query head. W_O has the factor on what attention adds to the stream, the
    bias that of the norm.
    """
    f, hf = ref.facts, f"model.layers.{layer}."
    group = f.n_heads // f.n_kv_heads
    w_v = (
        ref.w[hf + "self_attn.v_proj.weight"]
        .view(f.n_kv_heads, f.d_head, f.d_model)
        .transpose(1, 2)
        .repeat_interleave(group, 0)
    )
    w_o = (
        ref.w[hf + "self_attn.o_proj.weight"].view(f.d_model, f.n_heads, f.d_head).permute(1, 2, 0)
    )
    bias = ref.w.get(hf + "self_attn.v_proj.bias", torch.zeros(f.n_kv_heads * f.d_head).double())
    bias = bias.view(f.n_kv_heads, f.d_head).repeat_interleave(group, 0)
    gain = torch.ones(f.d_model).double()
    if f.pre_norms:
        gain = ref.w[hf + "input_layernorm.weight"] + f.norm_offset
        of_norm = ref.w.get(hf + "input_layernorm.bias", torch.zeros_like(gain))
        bias = bias + torch.einsum("d,hde->he", of_norm, w_v)
    post = ref.w[hf + "post_attention_layernorm.weight"] + f.norm_offset if f.post_norms else None
    return gain, w_v, f.residual_scale * w_o, bias, post


def svv(ref, vector, layer, post=True):
    """By the definition, float64 [H, D]."""
    gain, w_v, w_o, _, post_gain = parts(ref, layer)
    direction = passed_on(ref, torch.tensor(vector.direction, dtype=torch.float64))
    out = torch.einsum("d,hde,hef->hf", direction * gain, w_v, w_o)
    return out * post_gain if post and post_gain is not None else out


# -- value vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_value_vectors(case, name):
    import vksteer as vs

    for layer in (0, 1, case(name)[0].facts.n_layers - 1):
        ref, model, _, vector = case(name, layer)
        got = vs.ov.steering_value_vectors(model, vector)
        n = ref.facts.n_layers - layer
        assert (
            got.values.shape == (n, ref.facts.n_heads, ref.facts.d_model)
            and got.values.dtype == np.float32
            and got.values.flags.c_contiguous
        )
        assert (
            got.layers.tolist() == list(range(layer, ref.facts.n_layers)) and got.vector is vector
        )
        for i, l in enumerate(got.layers):
            want = svv(ref, vector, l)
            assert_close(f"{name}, layer {l}", got.values[i], want, BOUND)
            assert_close(f"{name}, layer {l}, sum", got.sum_over_heads()[i], want.sum(0), BOUND)


def test_value_vectors_as_an_object(case):
    import vksteer as vs

    _ref, model, _, vector = case("gemma2")
    got = vs.ov.steering_value_vectors(model, vector)
    assert_same_bits(
        "negated", got.negated.values, vs.ov.steering_value_vectors(model, -vector).values
    )
    assert got.negated.sign == -1 and got.negated.negated.sign == 1
    assert_same_bits("twice", got.values, vs.ov.steering_value_vectors(model, vector).values)
    np.testing.assert_array_equal(got[3, 1], got.values[2, 1])
    for wrong in ((0, 0), (4, 0), (1, 4), (1, -1)):
        with pytest.raises(KeyError, match="heads 0 to 3"):
            got[wrong]
    np.testing.assert_allclose(got.norms, np.linalg.norm(got.values, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(got.shares.sum(axis=1), 1.0)
    layer, head = got.largest(1)[0]
    assert got.norms[layer - 1, head] == got.norms.max() and len(got.largest(100)) == 12
    assert got.labels == [["L1", "L2", "L3"], ["H0", "H1", "H2", "H3"]]
    assert got.to_markdown(3).count("\n") == 4 and f"| {layer} | {head} |" in got.to_markdown(1)
    with pytest.raises(ValueError):
        got.values[0] = 0
    kept = got.values.copy()
    vs.ov.steering_value_vectors(model, 2.0 * vector)
    np.testing.assert_array_equal(got.values, kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_value_vectors_of_stored_weights(zoo, rng, dtype):
    """Whole panels and heads of 64, in every weight type; the engine's own weights (rounded
    once) are the reference.
    """
    import vksteer as vs

    model = zoo.engine("wide", dtype=dtype)
    c = model.config
    vector = vs.SteeringVector(rng.standard_normal(c.d_model), 0)
    got = vs.ov.steering_value_vectors(model, vector)
    for l in range(c.n_layers):
        for h in (0, 3, c.n_heads - 1):
            w = vs.ov.head_weights(model, l, h, folded=True)
            assert_close(
                f"{dtype}, layer {l}, head {h}",
                got.values[l, h],
                vector.direction.astype(np.float64) @ w.W_V.astype(np.float64) @ w.W_O,
                BOUND,
            )


# -- the decomposition -----------------------------------------------------------------------------


def oracle_parts(ref, vector, coefficient, layer, steered):
    """(scales, direct, indirect) of a steered run's sites, in float64: docs/method.md sections 7
    and 11. What a clamp takes away from the values is in the indirect part.
    """
    block, clip = f"blocks.{layer}.", ref.facts.clip_qkv
    gain, w_v, w_o, bias, _ = parts(ref, layer)
    pattern = steered[block + "attn.hook_pattern"]
    scale = steered.get(block + "ln1.hook_scale", torch.ones(pattern.shape[-1], 1).double())
    scales = coefficient * torch.einsum("hqk,kx->qh", pattern, 1 / scale)
    direct = scales[..., None] * svv(ref, vector, layer, post=False)
    added = coefficient * torch.tensor(vector.direction, dtype=torch.float64)
    without = passed_on(ref, steered[block + "hook_resid_pre"] - added) / scale * gain
    values = torch.einsum("kd,hde->hke", without, w_v) + bias[:, None]
    if clip:
        of_steering = torch.einsum("kd,hde->hke", passed_on(ref, added) / scale * gain, w_v)
        values = (values + of_steering).clamp(-clip, clip) - of_steering
    return scales, direct, torch.einsum("hqk,hke,hed->qhd", pattern, values, w_o)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("coefficient", [1.0, -0.7])
def test_identity(case, name, coefficient):
    """Direct part alone against pattern x 1/RMS x value vector; indirect part alone against the
    values without steering; their sum; ragged.
    """
    import vksteer as vs

    for last in (False, True):
        ref, model, prompts, vector = case(name)
        layer = ref.facts.n_layers - 1 if last else 1
        got = vs.ov.decompose(model, prompts, vector, coefficient, layer)
        S = max(LENGTHS)
        assert (
            got.direct.shape == got.indirect.shape == (3, S, ref.facts.n_heads, ref.facts.d_model)
            and got.direct.dtype == got.indirect.dtype == np.float32
        )
        assert (
            got.scales.shape == got.direct.shape[:3]
            and got.layer == layer
            and got.mask.sum(1).tolist() == list(LENGTHS)
        )
        for array in (got.direct, got.indirect, got.scales, got.base):
            assert not array[~got.mask].any() and np.isfinite(array).all()
        assert (np.sign(got.scales[got.mask]) == np.sign(coefficient)).all()
        run = model.run(
            prompts,
            edits=[vs.Steer(vector, coefficient)],
            capture=f"blocks.{layer}.attn.hook_result",
            logits=None,
        )
        assert_close(
            "the engine's own result",
            got.direct + got.indirect,
            run[f"blocks.{layer}.attn.hook_result"],
            1e-6,
        )
        for b, prompt in enumerate(prompts):
            with torch.no_grad():
                steered = ref.forward(prompt, edits=[Steer(vector, coefficient)]).sites
                base = ref.forward(prompt).sites[f"blocks.{layer}.attn.hook_result"]
            scales, direct, indirect = oracle_parts(ref, vector, coefficient, layer, steered)
            what, n = f"{name}, layer {layer}, row {b}", len(prompt)
            assert_close(
                f"{what}: the oracle agrees with itself",
                direct + indirect,
                steered[f"blocks.{layer}.attn.hook_result"],
                1e-12,
            )
            assert_close(f"{what}: scales", got.scales[b, -n:], scales, BOUND)
            assert_close(f"{what}: direct", got.direct[b, -n:], direct, BOUND)
            assert_close(f"{what}: indirect", got.indirect[b, -n:], indirect, BOUND)
            assert_close(
                f"{what}: result",
                got.direct[b, -n:] + got.indirect[b, -n:],
                steered[f"blocks.{layer}.attn.hook_result"],
                BOUND,
            )
            assert_close(f"{what}: base", got.base[b, -n:], base, BOUND)


@pytest.mark.parametrize("name", ["gemma2", "llama_bias"])
def test_indirect_part_is_the_run_without_direct_values(case, name):
    """Another way to the same numbers: the run whose value vectors are ablated in this one layer
    (method.md section 6).
    """
    import vksteer as vs

    ref, model, prompts, vector = case(name)
    for layer in (1, ref.facts.n_layers - 1):
        site = f"blocks.{layer}.attn.hook_result"
        run = model.run(
            prompts,
            edits=[vs.Steer(vector, 0.8)],
            ablate="svv",
            freeze_layers=[layer],
            capture=site,
            logits=None,
        )
        assert_close(
            f"{name}, layer {layer}",
            vs.ov.decompose(model, prompts, vector, 0.8, layer).indirect,
            run[site],
            BOUND,
        )


def test_shares(case):
    """Over one batch, over data in any batches, and against the definition."""
    import vksteer as vs

    _ref, model, prompts, vector = case("gemma3", 2)
    whole = vs.ov.direct_shares(model, prompts, vector, 0.9, progress=False)
    assert (
        whole.layers.tolist() == [2, 3, 4]
        and whole.heads.shape == (3, 4)
        and whole.n_positions == sum(LENGTHS)
    )
    for i, layer in enumerate(whole.layers):
        one = vs.ov.decompose(model, prompts, vector, 0.9, int(layer))
        np.testing.assert_allclose(one.heads_share, whole.heads[i], rtol=1e-5)
        np.testing.assert_allclose(one.share, whole.total[i], rtol=1e-5)
        direct, change = (
            one.direct.astype(np.float64),
            (one.direct + one.indirect - one.base).astype(np.float64),
        )
        np.testing.assert_allclose(
            one.heads_share[1],
            (direct * change)[:, :, 1].sum() / (change[:, :, 1] ** 2).sum(),
            rtol=1e-6,
        )
        rest = ((one.indirect - one.base) * change).sum((0, 1, 3)) / (change**2).sum((0, 1, 3))
        np.testing.assert_allclose(one.heads_share + rest, 1.0, rtol=1e-4)
    some = vs.ov.direct_shares(model, prompts, vector, 0.9, layers=[3], progress=False)
    np.testing.assert_allclose(some.heads[0], whole.heads[1], rtol=1e-12)
    assert "| 3 |" in some.to_markdown() and len(some.to_dict()["heads"][0]) == 4
    seen = []
    import vksteer.ov.decomposition as module

    before, module.CAPTURE_BYTES = module.CAPTURE_BYTES, 1
    try:
        apart = vs.ov.direct_shares(model, prompts, vector, 0.9, progress=lambda *a: seen.append(a))
    finally:
        module.CAPTURE_BYTES = before
    assert seen[-1] == (9, 9) and len(seen) == 9
    np.testing.assert_allclose(apart.heads, whole.heads, rtol=1e-6)
    still = vs.ov.decompose(model, prompts, vector, 0.0, 2)
    assert not still.direct.any() and np.isnan(still.heads_share).all() and np.isnan(still.share)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_head_weights(case, name):
    """Exactly the stored weights; value and output of a head make its value vector; factors
    and singular vectors.
    """
    import vksteer as vs

    ref, model, _, vector = case(name)
    f = ref.facts
    for layer, head in ((1, 0), (f.n_layers - 1, f.n_heads - 1)):
        w = W_Q, W_K, W_V, W_O = vs.ov.head_weights(model, layer, head)
        group, attn = head // (f.n_heads // f.n_kv_heads), f"model.layers.{layer}.self_attn."
        for got, part, at in ((W_Q, "q", head), (W_K, "k", group), (W_V, "v", group)):
            assert got.shape == (f.d_model, f.d_head)
            np.testing.assert_array_equal(
                got, ref.w[attn + f"{part}_proj.weight"][at * f.d_head : (at + 1) * f.d_head].T
            )
        np.testing.assert_array_equal(
            W_O, ref.w[attn + "o_proj.weight"][:, head * f.d_head : (head + 1) * f.d_head].T
        )
        assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in w)
        folded = vs.ov.head_weights(model, layer, head, folded=True)
        assert_close(
            "value vector",
            vector.direction.astype(np.float64) @ folded.W_V @ folded.W_O,
            svv(ref, vector, layer)[head],
            1e-5,
        )
        for circuit, product in (
            (w.ov, W_V.astype(np.float64) @ W_O),
            (w.qk, W_Q.astype(np.float64) @ W_K.T),
        ):
            u, s, vt = circuit.svd()
            assert (
                u.shape == (f.d_model, f.d_head)
                and vt.shape == (f.d_head, f.d_model)
                and (np.diff(s) <= 0).all()
            )
            assert_close("the product", (u.astype(np.float64) * s) @ vt, product, 1e-5)
            np.testing.assert_allclose(s, np.linalg.svd(product)[1][: f.d_head], atol=1e-5 * s[0])
            np.testing.assert_allclose(vt @ vt.T, np.eye(f.d_head), atol=1e-5)


def test_singular_vectors_through_the_lens(case):
    import vksteer as vs

    _, model, _, _ = case("gemma2")
    w = vs.ov.head_weights(model, 2, 1, folded=True)
    lens = vs.ov.singular_lens(model, 2, 1, n=3, top=7)
    u, s, vt = w.ov.svd()
    assert lens.tokens.shape == (2, 3, 7) and lens.labels == [
        ["+", "-"],
        [f"s{i} {v:.3g}" for i, v in enumerate(s[:3])],
    ]
    np.testing.assert_array_equal(lens.tokens[1], vs.ov.logit_lens(model, -vt[:3], 7).tokens)
    np.testing.assert_array_equal(
        vs.ov.singular_lens(model, 2, 1, n=2, side="in").tokens[0],
        vs.ov.logit_lens(model, u.T[:2]).tokens,
    )
    np.testing.assert_array_equal(
        vs.ov.singular_lens(model, 2, 1, n=2, circuit="qk", side="key").tokens[0],
        vs.ov.logit_lens(model, w.qk.svd()[2][:2]).tokens,
    )
    for wrong in (dict(circuit="ov", side="key"), dict(circuit="vo"), dict(n=11), dict(n=0)):
        with pytest.raises(ValueError):
            vs.ov.singular_lens(model, 2, 1, **wrong)


# -- refused, before any work ----------------------------------------------------------------------


def calls(vs, model):
    D = 40
    v = lambda layer=1, width=D, fill=1.0: vs.SteeringVector(
        np.full(width, fill, np.float32), layer
    )
    return {
        "width": lambda: vs.ov.steering_value_vectors(model, v(width=D + 1)),
        "layer": lambda: vs.ov.steering_value_vectors(model, v(3)),
        "zero": lambda: vs.ov.steering_value_vectors(model, v(fill=0.0)),
        "an array": lambda: vs.ov.steering_value_vectors(model, np.ones(D, np.float32)),
        "decompose: width": lambda: vs.ov.decompose(model, [[1, 2]], v(width=D - 1), 1.0, 1),
        "decompose: zero": lambda: vs.ov.decompose(model, [[1, 2]], v(fill=0.0), 1.0, 1),
        "decompose: below": lambda: vs.ov.decompose(model, [[1, 2]], v(), 1.0, 0),
        "decompose: above": lambda: vs.ov.decompose(model, [[1, 2]], v(), 1.0, 3),
        "decompose: NaN": lambda: vs.ov.decompose(model, [[1, 2]], v(), float("nan"), 1),
        "decompose: no prompt": lambda: vs.ov.decompose(model, [], v(), 1.0, 1),
        "decompose: empty prompt": lambda: vs.ov.decompose(model, [[]], v(), 1.0, 1),
        "decompose: vocabulary": lambda: vs.ov.decompose(model, [[101]], v(), 1.0, 1),
        "shares: no layer": lambda: vs.ov.direct_shares(model, [[1, 2]], v(), 1.0, layers=[]),
        "shares: layer": lambda: vs.ov.direct_shares(model, [[1, 2]], v(), 1.0, layers=[0]),
        "head": lambda: vs.ov.head_weights(model, 0, 5),
        "head's layer": lambda: vs.ov.head_weights(model, 3, 0),
        "negative head": lambda: vs.ov.head_weights(model, 0, -1),
    }


@pytest.mark.parametrize("what", calls(None, None))
def test_refused(zoo, what):
    import vksteer as vs

    model = zoo.engine("llama2")
    before = model._engine.dispatches
    with pytest.raises(ValueError) as error:
        calls(vs, model)[what]()
    assert len(str(error.value)) > 15 and model._engine.dispatches == before


def test_a_closed_model_is_refused(zoo):
    import vksteer as vs

    model = vs.Model.from_pretrained(str(zoo.folder("llama2")), progress=False)
    model.close()
    v = vs.SteeringVector(np.ones(40), 1)
    for call in (
        lambda: vs.ov.steering_value_vectors(model, v),
        lambda: vs.ov.decompose(model, [[1]], v, 1.0, 1),
        lambda: vs.ov.logit_lens(model, v),
        lambda: vs.ov.head_weights(model, 0, 0),
        lambda: vs.ov.direct_shares(model, [[1]], v, 1.0),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
