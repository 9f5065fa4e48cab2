"""How the tokenizer.json files of published models normalise and split text, and which expressions
llama.cpp applies, written down independently of vksteer's table.

RECIPES: the parts of a tokenizer.json. CLASSES: tokenizer classes of transformers that build it.
LLAMA_CPP: names for which only llama.cpp's expressions are known; each splits the pieces of the one
before it, and what it does not match stays as a piece (ggml-org/llama.cpp, src/unicode.cpp).
"""

from __future__ import annotations


def split(pattern, behavior="Isolated", invert=False):
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": invert,
    }


def byte_level(use_regex):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN_FREE_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_HAN_FREE_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_HAN_FREE_UPPER}*{_HAN_FREE_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_HAN_FREE_UPPER}+{_HAN_FREE_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
DEEPSEEK_V3 = [
    split(r"\p{N}{1,3}"),
    split("[一-龥\u3040-ゟ゠-ヿ]+"),
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
]
DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"


def steps(*parts, normalizer=None, ignore_merges=False):
    """One recipe; byte-level mapping follows the last part unless a part does it."""
    own = any(part["type"] == "ByteLevel" for part in parts)
    return {
        "normalizer": normalizer,
        "pre_tokenizers": [*parts, *([] if own else [byte_level(False)])],
        "ignore_merges": ignore_merges,
    }


RECIPES = {
    "llama-bpe": steps(split(CL100K), ignore_merges=True),
    "llama3": steps(split(CL100K), ignore_merges=True),
    "llama-v3": steps(split(CL100K), ignore_merges=True),
    "pixtral": steps(split(CL100K), ignore_merges=True),
    "dbrx": steps(split(CL100K, "Removed", invert=True)),
    "smaug-bpe": steps(split(CL100K)),
    "chatglm-bpe": steps(split(CL100K)),
    "glm4": steps(split(CL100K)),
    "deepseek-r1-qwen": steps(split(QWEN2), normalizer=NFC),
    "stablelm2": steps(split(QWEN2, "Removed", invert=True), normalizer=NFC),
    "hunyuan": steps(split(QWEN2), normalizer=NFC),
    "laguna": steps(split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext"), split(QWEN2)),
    "bailingmoe": steps(
        split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
            r"\s*[\r\n]|\s+(?!\S)|\s+"
        )
    ),
    "seed-coder": steps(
        split(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}|"
            " ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        )
    ),
    "minicpm5": steps(split(r"\p{N}{1,3}"), split(CL100K.replace("{1,3}", "+"))),
    "tekken": steps(split(TEKKEN), ignore_merges=True),
    "gpt-4o": steps(split(O200K, "Removed", invert=True)),
    "llama4": steps(split(O200K)),
    "kimi-k2": steps(split(KIMI)),
    "jais": steps(byte_level(True)),
    "smollm": steps(DIGITS, byte_level(True)),
    "starcoder": steps(DIGITS, byte_level(True)),
    "refact": steps(DIGITS, byte_level(True)),
    "minerva-7b": steps(DIGITS, byte_level(True)),
    "falcon": steps(
        {"type": "Punctuation", "behavior": "Contiguous"},
        byte_level(True),
        {"type": "Digits", "individual_digits": False},
        split("[0-9][0-9][0-9]"),
    ),
    # The file lists letters: those with case, without the mathematical alphabets. (Letters that
    # are newer than the list do not occur in the tests' texts.)
    "deepseek-llm": steps(
        split("[\r\n]"),
        split("\\s?[\\p{Lu}\\p{Ll}\\p{Lt}&&[^\U0001d400-\U0001d7ff]]+"),
        split("\\s?[!-/:-~！-／：-～‘-‟\u3000-\u3002]+"),
        split(r"\s+$"),
        split(DEEPSEEK_CJK),
        DIGITS,
    ),
    "deepseek-coder": steps(
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(DEEPSEEK_CJK), DIGITS
    ),
    "deepseek-v3": steps(*DEEPSEEK_V3, normalizer={"type": "Sequence", "normalizers": []}),
    "bloom": steps(split(BLOOM)),
    "gpt3-finnish": steps(split(BLOOM)),
    "poro-chat": steps(split(BLOOM)),
}
#: GGUF name -> (module of transformers, class)
CLASSES = {
    "qwen2": ("qwen2.tokenization_qwen2", "Qwen2Tokenizer"),
    "qwen35": ("qwen3_5.tokenization_qwen3_5", "Qwen3_5Tokenizer"),
    "gpt-2": ("gpt2.tokenization_gpt2", "GPT2Tokenizer"),
    "phi-2": ("codegen.tokenization_codegen", "CodeGenTokenizer"),
    "mpt": ("gpt_neox.tokenization_gpt_neox", "GPTNeoXTokenizer"),
    "olmo": ("gpt_neox.tokenization_gpt_neox", "GPTNeoXTokenizer"),
    "command-r": ("cohere.tokenization_cohere", "CohereTokenizer"),
}
_C = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_CL100K = CL100K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _C)
_QWEN2 = QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _C)
_O200K = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _C)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_V3 = [part["pattern"]["Regex"] for part in DEEPSEEK_V3]
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_EXAONE_MOE = _C + (
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|"
    r"\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2_SPACES = (
    r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|"
    r"\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
_K2_LETTERS = "[^\\r\\n\\p{L}\\p{N}]?(?:\\p{L}|\\p{M}|\u200c|\u200d)+"
_CHAMELEON = [
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    "([\\t\\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
]
_YOUTU = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"
_ROWS = (
    ("falcon3 falcon-h1 midm-2.0 lfm2", [_CL100K]),
    ("kormo f2llmv2 megrez solar-open grok-2", [_QWEN2]),
    ("exaone4 trillion granite-docling gigachat a.x-4.0 mellum", [_GPT2]),
    ("codeshell exaone mellum2", [r"\p{N}", _GPT2]),
    ("minimax-m2 kanana2 talkie", [_O200K]),
    ("tiny_aya cohere2moe", [r"\d{1,3}(?=(?:\d{3})*\b)", _O200K]),
    ("hunyuan-dense joyai-llm hy_v4", _V3),
    ("bailingmoe2 llada-moe", [_BAILING]),
    ("jais-2", [_CL100K.replace(r"\s+(?!\S)|\s+", _JAIS2_SPACES)]),
    ("ufakzeka", [_QWEN2.replace(_C + "|", "")]),
    ("exaone-moe", [_EXAONE_MOE]),
    ("spark2_5", [*_V3[:2], _V3[2].replace("[\r\n]*|\\s*[\r\n]+", "|[\r\n]"), r"\p{N}"]),
    ("youtu", [_YOUTU, _O200K.replace("{1,3}", "")]),
    ("viking", [" ?[^(\\s|.,!?…。，、।۔،)]+", r"\p{N}"]),
    ("superbpe", [r"\p{N}+", r"(?=(\d{3})+(?!\d))"]),
    ("k2-horizon", [_CL100K.replace(r"[^\r\n\p{L}\p{N}]?\p{L}+", _K2_LETTERS)]),
    ("chameleon", _CHAMELEON),
    ("default", [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
)
LLAMA_CPP = {name: patterns for names, patterns in _ROWS for name in names.split()}
#: Whole words that are tokens skip the merges; texts begin with BOS.
LLAMA_CPP_WHOLE = {"falcon3", "falcon-h1", "midm-2.0", "lfm2"}
BEGIN_WITH_BOS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "pixtral",
    "tekken",
    "chameleon",
    *LLAMA_CPP_WHOLE,
}


def llama_cpp_pieces(text, patterns):
    """A text cut as llama.cpp cuts it."""
    import regex

    pieces = [text]
    for pattern in patterns:
        compiled, cut = regex.compile(pattern), []
        for piece in pieces:
            at = 0
            for match in compiled.finditer(piece):
                cut += [piece[at : match.start()], match.group()]
                at = match.end()
            cut.append(piece[at:])
        pieces = [piece for piece in cut if piece]
    return pieces
