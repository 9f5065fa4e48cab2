"""Control and user-defined tokens of byte-level GGUF files, and files that name no pre-tokenizer or
one that is not known, against tokenizers that the tokenizers library builds from the same
vocabulary.
"""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest

from gguf_vocabularies import (
    BOS,
    CONTROL,
    EOS,
    MARKED,
    USER_DEFINED,
    add_marked,
    add_vocabulary,
    texts,
    trained,
    write_vocabulary,
)
from tokenizer_recipes import CL100K, LLAMA_CPP, QWEN2, llama_cpp_pieces
from vksteer.loading.tokenizer import Tokenizer


def byte_level(pattern, *, tokens=None, merges=None, marked=MARKED, nfc=False, whole=False):
    """The tokenizer of a tokenizer.json with one split expression."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    default_tokens, default_merges = trained()
    backend = Backend(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens or default_tokens)},
            merges=list(default_merges if merges is None else merges),
            ignore_merges=whole,
        )
    )
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return add_marked(backend, marked)


def ids_of(name, marked=MARKED):
    return len(trained()[0]) + list(marked).index(name)


# -- literal tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "llama-bpe"])
def test_literal_tokens(tmp_path, pre):
    """Tokens with characters outside the byte alphabet, of both kinds, inside any text; texts come
    back without the control tokens.
    """
    file = write_vocabulary(
        tmp_path / "m.gguf",
        pre,
        bos_token_id=ids_of(BOS),
        eos_token_id=ids_of(EOS),
        padding_token_id=ids_of(EOS),
        add_bos_token=True,
    )
    ours = Tokenizer.from_gguf(file)
    qwen = pre == "deepseek-r1-qwen"
    theirs = byte_level(QWEN2 if qwen else CL100K, nfc=qwen, whole=not qwen)
    for text in [*texts(300, 11), *MARKED, "".join(MARKED), *(f"x{t} y" for t in MARKED)]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_bos=False) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (ids_of(BOS), (ids_of(EOS),), True)
    assert ours.encode("Hello")[0] == ids_of(BOS)
    assert ours.special_ids == {ids_of(t) for t, kind in MARKED.items() if kind == CONTROL}


def test_chat_template_with_literal_tokens(tmp_path):
    user = "<\uff5cUser\uff5c>"
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<\uff5cUser\uff5c>' if m.role == 'user' else"
        " '<|im_start|>' }}{{ m.content }}{% if m.role != 'user' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    ours = Tokenizer.from_gguf(_with_template(tmp_path / "t.gguf", template))
    theirs = byte_level(QWEN2, nfc=True)
    (ids,) = ours.chat_tokens("Hello there")
    want = theirs.encode(f"{BOS}{user}Hello there<|im_start|>", add_special_tokens=False).ids
    assert ids == want
    assert ours.end_of_turn == (ids_of(EOS),)


def _with_template(path, template):
    import gguf

    from vksteer.loading.gguf_file import GGUFFile

    writer = gguf.GGUFWriter(str(path), "qwen2")
    ids = {"bos_token_id": ids_of(BOS), "eos_token_id": ids_of(EOS)}
    add_vocabulary(writer, "deepseek-r1-qwen", *trained(), MARKED, ids)
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_literal_token_beside_its_spelling(tmp_path):
    """A run of spaces as a literal token next to the token that merges make of as many spaces."""
    tokens, _ = trained()
    spaces = next(t for t in tokens if len(t) >= 3 and set(t) == {"\u0120"})
    marked = {" " * len(spaces): USER_DEFINED, "<|end|>": CONTROL}
    ours = Tokenizer.from_gguf(write_vocabulary(tmp_path / "m.gguf", "llama-bpe", marked=marked))
    theirs = byte_level(CL100K, marked=marked, whole=True)
    text = "a" + " " * len(spaces) + "b<|end|>" + " " * (len(spaces) - 1) + "c"
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert len(tokens) in ids and tokens.index(spaces) not in ids


def test_ends_of_text_are_special_whatever_their_type(tmp_path):
    """Some files mark the tokens that end texts as ordinary or user-defined ones."""
    marked = dict.fromkeys(MARKED, 1) | {EOS: USER_DEFINED, "<think>": USER_DEFINED}
    ours = Tokenizer.from_gguf(
        write_vocabulary(
            tmp_path / "m.gguf",
            "qwen2",
            marked=marked,
            eos_token_id=ids_of(EOS),
            eot_token_id=ids_of("<|im_start|>"),
            bos_token_id=ids_of(BOS),
        )
    )
    assert ours.special_ids == {ids_of(EOS), ids_of("<|im_start|>"), ids_of(BOS)}
    ids = ours.encode(f"{BOS}Hello{EOS}<|im_start|><think>")
    assert [i for i in ids if i >= len(trained()[0])] == [
        ids_of(BOS), ids_of(EOS), ids_of("<|im_start|>"), ids_of("<think>"),
    ]  # fmt: skip
    assert ours.decode(ids, skip_special=True) == "Hello<think>"


def test_ordinary_token_as_end_of_text_stays_ordinary(tmp_path):
    """A wrong id in the metadata does not turn a word of the vocabulary into a control token."""
    tokens, merges = trained()
    word = tokens.index("".join(merges[200]))
    ours = Tokenizer.from_gguf(
        write_vocabulary(tmp_path / "m.gguf", "qwen2", eos_token_id=word, bos_token_id=0)
    )
    assert word not in ours.special_ids and 0 not in ours.special_ids


@pytest.mark.parametrize("stated", [None, True, False])
def test_add_bos_follows_the_metadata(tmp_path, stated):
    more = {} if stated is None else {"add_bos_token": stated}
    for pre, usual in (("qwen2", False), ("llama-bpe", True), ("tekken", True), ("gpt-2", False)):
        ours = Tokenizer.from_gguf(
            write_vocabulary(tmp_path / "m.gguf", pre, bos_token_id=ids_of(BOS), **more)
        )
        assert ours.add_bos == (usual if stated is None else stated)
        assert (ours.encode("Hello")[0] == ids_of(BOS)) == ours.add_bos


def test_add_eos_is_said(tmp_path):
    file = write_vocabulary(
        tmp_path / "m.gguf", "qwen2", eos_token_id=ids_of(EOS), add_eos_token=True
    )
    with pytest.warns(UserWarning, match="add_eos_token"):
        ours = Tokenizer.from_gguf(file)
    assert ours.encode("Hello")[-1] != ids_of(EOS)


# -- the normaliser --------------------------------------------------------------------------------


def test_decomposed_letters_give_the_tokens_of_the_folder(tmp_path):
    """A Qwen in GGUF reads decomposed letters as the folder of the same model does."""
    from transformers import Qwen2Tokenizer

    tokens, merges = trained()
    vocab = {t: i for i, t in enumerate([*tokens, *MARKED])}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=list(merges), unk_token=EOS)
    theirs.save_pretrained(str(tmp_path / "folder"))
    folder = Tokenizer.from_folder(tmp_path / "folder")
    ours = Tokenizer.from_gguf(write_vocabulary(tmp_path / "m.gguf", "qwen2"))
    for text in (
        "cafe\u0301",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8",
        "A\u030angstro\u0308m x\u0332",
    ):
        assert ours.encode(text) == folder.encode(text) == theirs(text)["input_ids"]


# -- no pre-tokenizer, or an unknown one -----------------------------------------------------------


def llama3_vocabulary():
    """Merges as Llama 3's splitting trains them."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    corpus = ["In 1234567 days (2024), it's fine.\n\nWELL'S done!!\n\nDon't say 12345.  "] * 9
    backend.train_from_iterator(
        corpus + texts(100, 3),
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


LLAMA3_MARKED = {"<|begin_of_text|>": CONTROL, "<|end_of_text|>": CONTROL, "<|eot_id|>": CONTROL}


@pytest.mark.parametrize("pre", [None, "default", ""])
@pytest.mark.parametrize("bos", [True, False])
def test_llama3_without_a_name(tmp_path, pre, bos):
    """Llama 3's own rule and BOS, without a warning."""
    tokens, merges = llama3_vocabulary()
    more = {"bos_token_id": len(tokens)} if bos else {}
    file = write_vocabulary(
        tmp_path / "m.gguf", pre, tokens=tokens, merges=merges, marked=LLAMA3_MARKED, **more
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Tokenizer.from_gguf(file)
    theirs = byte_level(CL100K, tokens=tokens, merges=merges, marked=LLAMA3_MARKED, whole=True)
    for text in texts(200, 5):
        assert ours.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.bos_id == len(tokens) and ours.encode("Hi")[0] == len(tokens)


@pytest.mark.parametrize("case", ["other tokens", "other merges", "Llama 4's tokens"])
@pytest.mark.parametrize("pre", [None, "default"])
def test_fallback_is_that_of_llama_cpp(tmp_path, pre, case):
    """Otherwise the rule that llama.cpp falls back to, with one warning that names the key."""
    tokens, merges = llama3_vocabulary() if case != "other merges" else trained()
    marked = {
        "other tokens": MARKED,
        "other merges": LLAMA3_MARKED,
        "Llama 4's tokens": {"<|begin_of_text|>": CONTROL, "<|eot|>": CONTROL},
    }[case]
    file = write_vocabulary(tmp_path / "m.gguf", pre, tokens=tokens, merges=merges, marked=marked)
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre") as said:
        ours = Tokenizer.from_gguf(file)
    assert len(said) == 1
    plain = byte_level("(?!)", tokens=tokens, merges=merges, marked={})
    without = re.compile("|".join(map(re.escape, MARKED)))
    for text in (without.sub("", text) for text in texts(200, 6)):
        want = [
            i
            for piece in llama_cpp_pieces(text, LLAMA_CPP["default"])
            for i in plain.encode(piece, add_special_tokens=False).ids
        ]
        assert ours.encode(text, add_bos=False) == want, text


@pytest.mark.parametrize("key, value", [("pre", [1, 2]), ("pre", 7), ("model", [1.5, 2.5])])
def test_kinds_of_another_type(tmp_path, key, value):
    """Metadata of another type than text name nothing that is known."""
    from model_writers import write_gguf
    from vksteer.loading.gguf_file import GGUFFile

    more = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
        f"tokenizer.ggml.{key}": value,
    }
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", more, []))
    with pytest.warns(UserWarning, match="without a tokenizer"):
        assert Tokenizer.from_gguf(file) is None


@pytest.mark.parametrize("what", [{"pre": "pre-tokenizer-of-2031"}, {"model": "rwkv"}])
def test_unknown_tokenizers_leave_the_model_usable(tmp_path, what):
    """The model runs on token lists; the reason is said once, when it is loaded."""
    import vksteer as vs
    from model_writers import TINY, gguf_model

    tokens, merges = [chr(0x100 + i) for i in range(20)], []
    more = {
        "tokenizer.ggml.model": what.get("model", "gpt2"),
        "tokenizer.ggml.pre": what.get("pre", "qwen2"),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }
    gguf_model(tmp_path / "m.gguf", hf=TINY, extra_metadata=more)
    with pytest.warns(UserWarning, match=r"without a tokenizer") as said:
        model = vs.Model.from_pretrained(tmp_path / "m.gguf", progress=False)
    (message,) = [str(w.message) for w in said if "tokenizer" in str(w.message)]
    assert next(iter(what.values())) in message
    with model:
        assert model.tokenizer is None
        assert np.isfinite(model.run([[1, 2, 3]]).logits).all()
        with pytest.raises(ValueError, match="pass token lists"):
            model.run("Hello")
