"""Small byte-level vocabularies in GGUF files, written by the gguf package, and the texts on which
their tokenizers are compared with those of other libraries.
"""

from __future__ import annotations

import json
import random
from functools import cache

from vksteer.loading.gguf_file import GGUFFile

CONTROL, USER_DEFINED = 3, 4
#: Literal tokens after the trained ones, in this order; some have no spelling in GPT-2's alphabet.
MARKED = {
    "<|endoftext|>": CONTROL,
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>": CONTROL,
    "<\uff5cUser\uff5c>": CONTROL,
    "<|im_start|>": CONTROL,
    "<think>": USER_DEFINED,
    "<\uff5cfim\u2581hole\uff5c>": USER_DEFINED,
    "        ": USER_DEFINED,
    "\u0441\u043b\u043e\u0432\u043e": USER_DEFINED,
}
EOS, BOS = "<|endoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"

_PIECES = (
    "Hello world the The quick brown FOX iPhone McDonald naïve café Straße ÅNGSTRÖM",
    "don't CAN'T we'll They'Ve i'm I'D it's 'tis rock'n'roll 's 'S",
    "日本語の テキスト 漢字 中文。 한국어 문장 العربية عربى हिन्दी",
    "ไทย עברית Русский Ελληνικά Ⅻ ½ ² ٣٤٥ १२३ 𝔘𝔫𝔦 Ǆ ǅ ʰ ﬁ ª º",
    "0 7 12 345 6789 12345 1234567 3.14159 1,000,000 2024-05-01 v1.2.3 0xFF 50% $9.99",
    "e\u0301 n\u0303 A\u030a o\u0302\u0323 \u1112\u1161\u11ab \u0915\u094d\u0937 x\u0332",
    "👍 👩‍👩‍👧 🏳️‍🌈 🎉🎉 ✅ ™ © → ≤ ∑ € ¿ «x» “q” … — !!! ?! /* */ // # @x ... -- == +=",
    "def f(x):\n\treturn x**2 a_b [1] {k:v} <html> </p> \\n C++ foo.bar/baz",
    "zero\u200dwidth no\u00a0break ideographic\u3000space line\u2028sep \ufffd \u0085",
)
_UNREACHED = (
    " iPhone",
    " McDonald",
    " Stra\u00dfe",
    " quick",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    " FOX",
    "!!!",
)
_SPACES = (" ", " ", " ", "", "", "  ", "   ", "     ", "\n", "\n\n", "\r\n", " \n ", "\t", "\t\t")


def texts(count, seed):
    """Random texts: scripts, digits, contractions, spaces, newlines, emoji, decomposed letters and
    marked tokens, next to one another.
    """
    rng = random.Random(seed)
    pieces = [piece for line in _PIECES for piece in line.split(" ")]
    marked = list(MARKED)
    result = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 10)):
            r = rng.random()
            parts.append(
                rng.choice(marked)
                if r < 0.06
                else "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 9)))
                if r < 0.16
                else rng.choice(pieces)
            )
            parts.append(rng.choice(_SPACES))
        result.append("".join(parts))
    return result


@cache
def trained():
    """(tokens in GPT-2's alphabet, merges as pairs). The training text is not split into words,
    so tokens cross every boundary that a split rule could draw. The last tokens are words that no
    merges make: only rules that take whole pieces first find them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    corpus = texts(400, 99) + [line for line in _PIECES for _ in range(4)]
    for token in MARKED:
        corpus = [text.replace(token, "") for text in corpus]
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=2400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=12,
            show_progress=False,
        ),
    )
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    spell = backend.pre_tokenizer.pre_tokenize_str
    whole = (spell(word)[0][0] for word in _UNREACHED)
    return tokens + [word for word in whole if word not in tokens], merges


def write_vocabulary(path, pre=None, *, tokens=None, merges=None, marked=MARKED, **more):
    """A GGUF file with a byte-level vocabulary and no tensors. more: metadata below
    "tokenizer.ggml.", bool, int or str.
    """
    import gguf

    default_tokens, default_merges = trained()
    tokens = default_tokens if tokens is None else tokens
    merges = default_merges if merges is None else merges
    writer = gguf.GGUFWriter(str(path), "llama")
    add_vocabulary(writer, pre, tokens, merges, marked, more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def add_vocabulary(writer, pre, tokens, merges, marked, more):
    """The same metadata in an open gguf.GGUFWriter."""
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *marked])
    writer.add_token_types([1] * len(tokens) + list(marked.values()))
    writer.add_token_merges([" ".join(m) for m in merges])
    for key, value in more.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)


def add_marked(backend, marked=MARKED):
    """The marked tokens in a `tokenizers.Tokenizer`, as a tokenizer.json lists them."""
    from tokenizers import AddedToken

    for text, kind in marked.items():
        token = AddedToken(text, normalized=False, special=kind == CONTROL)
        (backend.add_special_tokens if kind == CONTROL else backend.add_tokens)([token])
    return backend
