"""Stop strings that are or hold special tokens: where a row ends, against transformers'
StopStringCriteria, and what text is left.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

import vksteer as vs
from tokenizer_texts import SPECIAL, reference, train
from vksteer.loading.tokenizer import Tokenizer
from vksteer.runtime.decoding import Request, Row
from vksteer.runtime.sampling import Sampling


def row(tokenizer, tokens, *stops):
    """The row after these new tokens, or after the first at which it has ended."""
    request = Request(len(tokens) + 1, Sampling(0.0, 0, 1.0, 0), stops, frozenset(), True)
    state = Row(SimpleNamespace(tokenizer=tokenizer), 0, [1], request)
    for token in tokens:
        state.accept(token)
        if state.reason:
            break
    return state


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = train(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_folder(folder), reference(folder)


def stops_at(theirs, tokens, stop):
    """After how many tokens transformers stops; None where it does not."""
    import torch
    from transformers.generation.stopping_criteria import StopStringCriteria

    criterion = StopStringCriteria(theirs, stop)
    for n in range(1, len(tokens) + 1):
        if bool(criterion(torch.tensor([tokens[:n]]), None)[0]):
            return n
    return None


def test_where_rows_end(both):
    ours, theirs = both
    rng = random.Random(5)
    special = [ours.id(t) for t in SPECIAL]
    plain = ours.encode("the quick brown fox says hello, you user; it rains", add_bos=False)
    hits = 0
    for _ in range(150):
        tokens = [rng.choice(special if rng.random() < 0.3 else plain) for _ in range(12)]
        text = theirs.decode(tokens)
        start = rng.randrange(len(text) - 3)
        stop = rng.choice([text[start : start + rng.randint(1, 12)], rng.choice(SPECIAL)])
        state = row(ours, tokens, stop)
        want = stops_at(theirs, tokens, stop)
        assert (len(state.tokens) if state.reason else None) == want, (tokens, stop)
        if want is None:
            continue
        hits += 1
        before = theirs.decode(tokens[:want])
        before = before[: before.index(stop)]
        # special tokens, and a special token that the stop string cuts, are not in the text
        for token in sorted(SPECIAL, key=len, reverse=True):
            before = before.replace(token, "")
        cut = next(
            (
                t[:n]
                for t in SPECIAL
                for n in range(len(t) - 1, 0, -1)
                if before.endswith(t[:n])
                and (t[n:].startswith(stop[: len(t) - n]) or stop.startswith(t[n:]))
            ),
            "",
        )
        assert state.text == before[: len(before) - len(cut)], (tokens, stop)
    assert hits > 60


def test_a_special_token_ends_the_row(both):
    ours, _ = both
    tokens = [*ours.encode("Hello ", add_bos=False), ours.id("<|im_end|>")]
    tokens += ours.encode("there", add_bos=False)
    end = tokens.index(ours.id("<|im_end|>")) + 1
    for stop, n, text in (
        ("<|im_end|>", end, "Hello "),
        ("im_end|>", end, "Hello "),
        ("lo <|im_", end, "Hel"),
        ("<|im_end|>t", end + 1, "Hello "),
    ):
        state = row(ours, tokens, stop)
        assert state.reason == "stop" and state.text == text and len(state.tokens) == n
        assert state.result().text == text
    # text on both sides of a special token is not adjacent
    assert row(ours, tokens, "lo there").reason is None
    assert row(ours, tokens, "nothing").text == "Hello there"


def test_in_generation():
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        prompt = vs.data.tiny_pair("test", 1)[1][0]
        options = dict(max_new_tokens=40, ignore_eos=True, progress=False)
        free = model.generate(prompt, **options)[0]
        special = model.tokenizer.special_ids
        first = next(i for i, t in enumerate(free.tokens.tolist()) if t in special)
        name = model.tokenizer.token(int(free.tokens[first]))
        got = model.generate(prompt, stop=name, **options)[0]
        assert got.finish_reason == "stop" and len(got.tokens) == first + 1
        assert got.text == model.tokenizer.decode(free.tokens[:first])
