"""Generation on random models: greedy decoding against the float64 oracle, what ends a row, edits
and captures while decoding, callbacks. test_generate_sampling.py has sampling.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clocks import assert_within_a_second, clocks
from oracle.compare import assert_close, assert_same_bits
from oracle.families import FAMILIES
from test_freezing import TIE, greedy_check

LENGTHS = (17, 1, 40, 5)


def setting(zoo, name, rng, lengths=LENGTHS):
    ref, model = zoo.reference(name), zoo.engine(name)
    return ref, model, [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in lengths]


# -- greedy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_the_oracles(zoo, name, rng):
    ref, model, prompts = setting(zoo, name, rng)
    gens = model.generate(prompts, max_new_tokens=32, ignore_eos=True, progress=False)
    assert len(gens) == len(prompts)
    for b, (prompt, gen) in enumerate(zip(prompts, gens, strict=True)):
        assert (
            gen.tokens.dtype == np.int32
            and gen.tokens.shape == (32,)
            and gen.finish_reason == "length"
        )
        assert gen.prompt_tokens.dtype == np.int32 and gen.prompt_tokens.tolist() == prompt
        greedy_check(ref, prompt, gen.tokens.tolist(), f"{name}, row {b}")


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_greedy_token_for_token(zoo, name, rng):
    """60 tokens, beyond the sliding window, against an oracle without a cache."""
    ref, model, prompts = setting(zoo, name, rng, (9, 2))
    for prompt, gen in zip(
        prompts,
        model.generate(prompts, max_new_tokens=60, ignore_eos=True, progress=False),
        strict=True,
    ):
        want, margins = ref.generate(prompt, 60)
        got = gen.tokens.tolist()
        if got != want:
            step = next(i for i in range(60) if got[i] != want[i])
            assert margins[step] < TIE, (
                f"step {step}: {got[step]} instead of {want[step]}, margin {margins[step]:.4g}"
            )


def test_one_prompt_comes_back_as_a_list(zoo, rng):
    _ref, model, prompts = setting(zoo, "llama3", rng)
    one = model.generate(prompts[0], max_new_tokens=3, ignore_eos=True, progress=False)
    assert isinstance(one, list) and len(one) == 1
    assert (
        one[0].tokens.tolist()
        == model.generate(
            [np.array(prompts[0])], max_new_tokens=3, ignore_eos=True, progress=False
        )[0].tokens.tolist()
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_batch_size_changes_nothing(zoo, size, rng):
    _ref, model, prompts = setting(zoo, "gemma2", rng, (9, 4, 21, 1, 3, 3, 12))
    want = model.generate(
        prompts, max_new_tokens=7, ignore_eos=True, progress=False, temperature=0.9, seed=11
    )
    greedy = model.generate(prompts, max_new_tokens=7, ignore_eos=True, progress=False)
    for a, b in zip(
        model.generate(prompts, max_new_tokens=7, ignore_eos=True, progress=False, batch_size=size),
        greedy,
        strict=True,
    ):
        assert a.tokens.tolist() == b.tokens.tolist()
    for a, b in zip(
        model.generate(
            prompts,
            max_new_tokens=7,
            ignore_eos=True,
            progress=False,
            batch_size=size,
            temperature=0.9,
            seed=11,
        ),
        want,
        strict=True,
    ):
        assert a.tokens.tolist() == b.tokens.tolist(), (
            "sampling must not depend on the micro-batches"
        )


# -- what ends a row -------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_end_tokens(zoo, several, rng):
    import vksteer as vs

    _ref, model, prompts = setting(zoo, "llama3", rng)
    free = [
        g.tokens.tolist()
        for g in model.generate(prompts, max_new_tokens=20, ignore_eos=True, progress=False)
    ]
    ends = [free[0][6], free[1][3]] if several else [free[0][6]]
    folder = zoo.variant("llama3", f"eos-{several}", eos_token_id=ends if several else ends[0])
    with vs.Model.from_pretrained(str(folder), dtype="float32") as other:
        gens = other.generate(prompts, max_new_tokens=20, progress=False)
        for gen, tokens in zip(gens, free, strict=True):
            at = min((tokens.index(e) for e in ends if e in tokens), default=None)
            assert gen.tokens.tolist() == (tokens if at is None else tokens[: at + 1]), (
                "the end token belongs to .tokens"
            )
            assert gen.finish_reason == ("length" if at is None else "stop")
        assert [
            g.tokens.tolist()
            for g in other.generate(prompts, max_new_tokens=20, ignore_eos=True, progress=False)
        ] == free
        assert gens[0].finish_reason == "stop"


@pytest.fixture
def chat(zoo, rng):
    """A model with a tokenizer whose texts are plain ASCII: (engine model, Tokenizer of the
    tokenizers package, prompts, their greedy tokens).
    """
    from tokenizers import Tokenizer

    model = zoo.engine("llama2", "chat")
    tokenizer = Tokenizer.from_file(str(zoo.folder("llama2", "chat") / "tokenizer.json"))
    specials = set(tokenizer.get_added_tokens_decoder())
    prompts = [rng.integers(0, 97, n).tolist() for n in (6, 11, 3, 8, 9, 4, 5, 7)]
    free = [
        g.tokens.tolist()
        for g in model.generate(prompts, max_new_tokens=24, ignore_eos=True, progress=False)
    ]
    keep = [i for i, t in enumerate(free) if not specials & set(t)]
    assert len(keep) >= 2, "the test needs texts without special tokens"
    return model, tokenizer, [prompts[i] for i in keep], [free[i] for i in keep]


def test_text_is_the_tokenizers(chat):
    model, tokenizer, prompts, free = chat
    for gen, tokens in zip(
        model.generate(prompts, max_new_tokens=24, ignore_eos=True, progress=False),
        free,
        strict=True,
    ):
        assert gen.text == tokenizer.decode(tokens)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_stop_strings(chat, width):
    """A stop string may span tokens. It is cut from .text and kept in .tokens; rows without it go
    on.
    """
    model, tokenizer, prompts, free = chat
    text = tokenizer.decode(free[0])
    stop = text[7 : 7 + width]
    for stops in (stop, [stop], ["never said", stop]):
        for gen, tokens in zip(
            model.generate(prompts, max_new_tokens=24, ignore_eos=True, stop=stops, progress=False),
            free,
            strict=True,
        ):
            whole = tokenizer.decode(tokens)
            if stop not in whole:
                assert (
                    gen.tokens.tolist() == tokens
                    and gen.text == whole
                    and gen.finish_reason == "length"
                )
                continue
            n = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
            assert gen.tokens.tolist() == tokens[:n]
            assert gen.text == whole[: whole.index(stop)] and gen.finish_reason == "stop"


def test_chat_tokens(chat):
    model, tokenizer, _, _ = chat
    id_of = tokenizer.token_to_id
    words = tokenizer.encode("Plant a tree.", add_special_tokens=False).ids
    want = [id_of("<|user|>"), *words, id_of("<|end|>"), id_of("<|assistant|>")]
    assert model.chat_tokens("Plant a tree.") == [want]
    assert model.chat_tokens(["Plant a tree.", "Plant a tree."]) == [want, want]
    assert model.post_instruction_length == 2
    system = [
        id_of("<|system|>"),
        *tokenizer.encode("Be kind.", add_special_tokens=False).ids,
        id_of("<|end|>"),
    ]
    assert model.chat_tokens("Plant a tree.", system="Be kind.") == [system + want]
    assert (
        model.chat_tokens("Plant a tree.", response="Yes.")[0][: len(want) + 1]
        == want + tokenizer.encode("Yes.", add_special_tokens=False).ids[:1]
    )
    run = model.run("Plant a tree.")
    assert run.tokens.tolist() == [want]
    assert_same_bits("instruction and its tokens", run.logits, model.run([want]).logits)
    gen = model.generate("Plant a tree.", max_new_tokens=3, ignore_eos=True, progress=False)[0]
    assert gen.prompt_tokens.tolist() == want
    with pytest.raises(ValueError):
        model.chat_tokens([])


# -- edits and captures while decoding -------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama3", "llama_bias", "mistral", "gemma2", "gemma3", "qwen2", "qwen3"]
)
def test_edits_act_on_decoded_tokens_as_their_positions_say(zoo, name, rng):
    import vksteer as vs

    ref, model, prompts = setting(zoo, name, rng)
    f = ref.facts
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    v = vs.SteeringVector(draw(f.d_model), 1)
    cases = [
        [vs.Steer(v, 1.0, positions)]
        for positions in (
            None,
            "prompt",
            "response",
            slice(-1, None),
            slice(None, -1),
            [0, -1, 6],
            slice(3, 8),
        )
    ] + [
        [vs.Ablate(v)],
        [
            vs.Scale("blocks.1.attn.hook_pattern", 0.5, positions="response"),
            vs.Add("blocks.0.attn.hook_attn_scores", 1.0, heads=[0]),
        ],
        [
            vs.Set("blocks.1.attn.hook_z", draw(f.n_heads, f.d_head), positions=slice(-2, None)),
            vs.Steer(v, -0.5),
        ],
        [
            vs.Add("blocks.1.attn.hook_k", draw(f.d_head)),
            vs.Scale("blocks.0.attn.hook_v", 0.5, positions="prompt"),
        ],
        [
            vs.MeanAblate("blocks.1.mlp.hook_post", draw(f.d_mlp), positions="response"),
            vs.Scale("ln_final.hook_scale", 1.2),
        ],
        [
            vs.Add("hook_embed", draw(f.d_model), positions="response"),
            vs.Scale("blocks.1.attn.hook_result", 0.7, heads=[0]),
        ],
    ]
    plain = [
        g.tokens.tolist()
        for g in model.generate(prompts, max_new_tokens=12, ignore_eos=True, progress=False)
    ]
    changed = 0
    for edits in cases:
        gens = model.generate(
            prompts, max_new_tokens=12, ignore_eos=True, edits=edits, progress=False
        )
        for b, (prompt, gen) in enumerate(zip(prompts, gens, strict=True)):
            greedy_check(ref, prompt, gen.tokens.tolist(), f"{name} {edits}, row {b}", edits=edits)
        changed += [g.tokens.tolist() for g in gens] != plain
    assert changed >= len(cases) - 2


def test_every_row_has_its_own_edits(zoo, rng):
    import vksteer as vs

    ref, model, prompts = setting(zoo, "gemma3", rng)
    v = vs.SteeringVector(rng.standard_normal(ref.facts.d_model).astype(np.float32), 2)
    edits = [
        [vs.Steer(v, 1.0)],
        [],
        [vs.Steer(v, -1.0, positions="response"), vs.Scale("blocks.1.attn.hook_z", 0.5)],
        [vs.Ablate(v)],
    ]
    gens = model.generate(prompts, max_new_tokens=12, ignore_eos=True, edits=edits, progress=False)
    for b, (prompt, gen) in enumerate(zip(prompts, gens, strict=True)):
        greedy_check(ref, prompt, gen.tokens.tolist(), f"row {b}", edits=edits[b])
        alone = model.generate(
            [prompt], max_new_tokens=12, ignore_eos=True, edits=edits[b], progress=False
        )[0]
        assert alone.tokens.tolist() == gen.tokens.tolist()


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
def test_captures_of_decoded_tokens(zoo, name, rng):
    """captured[site][i] is the site at new token i, not at the token before it: the value that
    `run` gives with the new tokens as a response.
    """
    import vksteer as vs

    ref, model, prompts = setting(zoo, name, rng)
    f = ref.facts
    v = vs.SteeringVector(rng.standard_normal(f.d_model).astype(np.float32), 1)
    sites = [
        "blocks.1.hook_resid_pre",
        f"blocks.{f.n_layers - 1}.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.0.attn.hook_k",
        "blocks.1.mlp.hook_post",
        "blocks.1.ln2.hook_scale",
        "ln_final.hook_normalized",
        "blocks.1.attn.hook_result",
        "hook_embed",
    ]
    gens = model.generate(
        prompts,
        max_new_tokens=9,
        ignore_eos=True,
        edits=[vs.Steer(v, 1.0)],
        capture=sites,
        progress=False,
    )
    for b, (prompt, gen) in enumerate(zip(prompts, gens, strict=True)):
        assert set(gen.captured) == set(sites)
        with torch.no_grad():
            want = ref.forward(
                prompt + gen.tokens.tolist(), prompt_length=len(prompt), edits=[vs.Steer(v, 1.0)]
            )
        for s in sites:
            assert gen.captured[s].dtype == np.float32 and gen.captured[s].flags.c_contiguous
            assert_close(f"{name} {s}, row {b}", gen.captured[s], want.sites[s][len(prompt) :])


def test_captures_by_pattern_and_per_row_lengths(zoo, rng):
    import vksteer as vs

    _ref, model, prompts = setting(zoo, "llama3", rng)
    free = model.generate(prompts, max_new_tokens=10, ignore_eos=True, progress=False)
    end = int(free[0].tokens[4])
    with vs.Model.from_pretrained(
        str(zoo.variant("llama3", "captured-end", eos_token_id=end)), dtype="float32"
    ) as other:
        gens = other.generate(
            prompts, max_new_tokens=10, capture=["blocks.*.hook_resid_post"], progress=False
        )
        assert len(gens) == len(prompts) and len(gens[0].tokens) <= 5, (
            "the test needs a row that ends early"
        )
        for gen in gens:
            assert set(gen.captured) == {f"blocks.{l}.hook_resid_post" for l in range(4)}
            for value in gen.captured.values():
                assert value.shape == (len(gen.tokens), 36)


# -- callbacks and interruption --------------------------------------------------------------------


def test_on_token_sees_every_token(zoo, rng):
    _ref, model, prompts = setting(zoo, "llama2", rng)
    calls = []
    gens = model.generate(
        prompts,
        max_new_tokens=6,
        ignore_eos=True,
        on_token=lambda *a: calls.append(a),
        progress=False,
    )
    assert len(calls) == 6 * len(prompts)
    for row, gen in enumerate(gens):  # the tokens of the row, in order, each once
        assert [token for at, token, _ in calls if at == row] == gen.tokens.tolist()
    silent = model.generate(prompts, max_new_tokens=6, ignore_eos=True, progress=False)
    assert [g.tokens.tolist() for g in gens] == [g.tokens.tolist() for g in silent]


@pytest.mark.parametrize("which", ["on_token", "progress"])
@pytest.mark.parametrize(
    "error", [RuntimeError("stop here"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_an_exception_in_a_callback_comes_out_and_leaves_the_model_usable(zoo, which, error, rng):
    ref, model, prompts = setting(zoo, "llama2", rng)
    calls = []

    def callback(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error

    options = (
        dict(on_token=callback, progress=False)
        if which == "on_token"
        else dict(progress=callback, batch_size=1)
    )
    with pytest.raises(type(error)) as caught:
        model.generate(prompts, max_new_tokens=20, ignore_eos=True, **options)
    assert caught.value is error and len(calls) == 3, (
        "the exception must come at once, without another call"
    )
    for prompt, gen in zip(
        prompts,
        model.generate(prompts, max_new_tokens=5, ignore_eos=True, progress=False),
        strict=True,
    ):
        greedy_check(ref, prompt, gen.tokens.tolist(), "after the exception")


def test_progress_ends_at_its_total(zoo, rng):
    _ref, model, prompts = setting(zoo, "llama2", rng)
    calls = []
    model.generate(
        prompts,
        max_new_tokens=5,
        ignore_eos=True,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    done, totals = [c[0] for c in calls], {c[1] for c in calls}
    assert len(totals) == 1 and done == sorted(done) and done[-1] == totals.pop()


def test_interrupt_within_a_second(zoo):
    """A SIGINT while decoding raises KeyboardInterrupt within a second, and the model goes on
    working.
    """
    import os
    import signal
    import threading

    ref, model = zoo.reference("llama2"), zoo.engine("llama2")
    sent = []

    def interrupt():
        sent.append(clocks())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.4, interrupt)
    timer.start()

    def decode_for_long():
        for _ in range(100):
            model.generate([[1, 2, 3]] * 8, max_new_tokens=500, ignore_eos=True, progress=False)

    try:
        with pytest.raises(KeyboardInterrupt):
            decode_for_long()
    finally:
        timer.cancel()
    assert_within_a_second(sent[0])
    greedy_check(
        ref,
        [4, 5, 6],
        model.generate([[4, 5, 6]], max_new_tokens=5, ignore_eos=True, progress=False)[
            0
        ].tokens.tolist(),
        "after the interrupt",
    )


def test_long_generation_to_the_end_of_the_context(zoo, rng):
    """509 positions, which are many windows and tiles."""
    ref, model, prompts = setting(zoo, "gemma3", rng, (3,))
    (gen,) = model.generate(prompts, max_new_tokens=506, ignore_eos=True, progress=False)
    assert len(gen.tokens) == 506
    greedy_check(ref, prompts[0], gen.tokens.tolist(), "gemma3 over 509 positions")
