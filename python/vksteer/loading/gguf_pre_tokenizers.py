"""The table of pre-tokenizers that `tokenizer.ggml.pre` names in GGUF files.

Each row says how a family normalises text and splits it before merges are applied. The rules are
those of the tokenizer.json of the repository that the row names. Where a row names
ggml-org/llama.cpp, the rule is the one that llama.cpp applies to files of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

#: Steps that are not the isolating split of a regular expression.
GPT2 = "<byte level, split as GPT-2 does>"
DIGITS = "<every digit by itself>"
DIGIT_RUNS = "<runs of digits>"
PUNCTUATION = "<runs of punctuation>"

Steps: TypeAlias = "tuple[str | tuple[str, str], ...]"


@dataclass(frozen=True)
class Rule:
    """How the families of one name split text.

    steps: applied one after the other. One of the constants above, a regular expression whose
    matches become pieces of their own, or (regular expression, behaviour of `tokenizers` Split).
    Unless GPT2 is among them, bytes are mapped to characters after the last step.
    source: the repository whose rule it is. nfc: whether text is normalised to NFC first.
    ignore_merges: whether a piece that is a token is taken whole. add_bos: whether texts begin
    with BOS where the file does not say.
    """

    steps: Steps
    source: str
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _SYMBOLS_AND_SPACES
LLAMA3_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _SYMBOLS_AND_SPACES
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|" + _SYMBOLS_WITH_SLASH


def _cased_words(digits: str) -> str:
    """GPT-4o's expression: a word's case changes split it, contractions stay with the word."""
    return (
        rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|{digits}|" + _SYMBOLS_WITH_SLASH
    )


_GPT4O = _cased_words(r"\p{N}{1,3}")
_HAN_FREE_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_HAN_FREE_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = (
    rf"[\p{{Han}}]+|{_WORD}{_HAN_FREE_UPPER}*{_HAN_FREE_LOWER}+{_CONTRACTIONS}?"
    rf"|{_WORD}{_HAN_FREE_UPPER}+{_HAN_FREE_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}|" + _SYMBOLS_AND_SPACES
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s{1}"
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_VIKING = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

#: Letters with case, as DeepSeek LLM's tokenizer.json lists them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _KANA_HAN,
    _DEEPSEEK3_WORDS + r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

#: What llama.cpp applies to files that name no pre-tokenizer, or "default".
FALLBACK = Rule(
    (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"), "ggml-org/llama.cpp"
)
LLAMA3 = Rule((LLAMA3_WORDS,), "meta-llama/Meta-Llama-3-8B", ignore_merges=True, add_bos=True)

_LLAMA_CPP = "ggml-org/llama.cpp"
_ROWS: tuple[tuple[str, Rule], ...] = (
    ("llama-bpe llama3 llama-v3", LLAMA3),
    (
        "falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        Rule((LLAMA3_WORDS,), _LLAMA_CPP, ignore_merges=True, add_bos=True),
    ),
    ("dbrx", Rule((LLAMA3_WORDS,), "databricks/dbrx-base")),
    ("smaug-bpe", Rule((LLAMA3_WORDS,), "abacusai/Smaug-Llama-3-70B-Instruct")),
    ("chatglm-bpe glm4", Rule((LLAMA3_WORDS,), "THUDM/glm-4-9b-chat")),
    ("jais-2", Rule((_JAIS2,), _LLAMA_CPP)),
    ("qwen2", Rule((QWEN2_WORDS,), "Qwen/Qwen2.5-7B", nfc=True)),
    (
        "deepseek-r1-qwen",
        Rule((QWEN2_WORDS,), "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", nfc=True),
    ),
    ("stablelm2", Rule((QWEN2_WORDS,), "stabilityai/stablelm-2-1_6b", nfc=True)),
    ("hunyuan", Rule((QWEN2_WORDS,), "tencent/Hunyuan-A13B-Instruct", nfc=True)),
    ("kormo f2llmv2 megrez solar-open grok-2", Rule((QWEN2_WORDS,), _LLAMA_CPP)),
    ("qwen35", Rule((_QWEN35,), "Qwen/Qwen3.5-35B-A3B", nfc=True)),
    (
        "laguna",
        Rule(((r"(?:\r?\n)+(?!\r?\n)", "merged_with_next"), QWEN2_WORDS), "poolside/Laguna"),
    ),
    (
        "ufakzeka",
        Rule((r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _SYMBOLS_AND_SPACES,), _LLAMA_CPP),
    ),
    ("bailingmoe bailingmoe2 llada-moe", Rule((_BAILING,), "inclusionAI/Ling-lite")),
    ("seed-coder", Rule((_SEED_CODER,), "ByteDance-Seed/Seed-Coder-8B-Base")),
    ("exaone-moe", Rule((_EXAONE_MOE,), _LLAMA_CPP)),
    (
        "minicpm5",
        Rule(
            (r"\p{N}{1,3}", LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}+")),
            "openbmb/MiniCPM5-1B",
        ),
    ),
    (
        "tekken",
        Rule((_TEKKEN,), "mistralai/Mistral-Nemo-Base-2407", ignore_merges=True, add_bos=True),
    ),
    ("gpt-4o minimax-m2 kanana2 talkie", Rule((_GPT4O,), _LLAMA_CPP)),
    ("llama4", Rule((_GPT4O,), "meta-llama/Llama-4-Scout-17B-16E")),
    ("tiny_aya cohere2moe", Rule((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O), _LLAMA_CPP)),
    ("kimi-k2", Rule((_KIMI,), "moonshotai/Kimi-K2-Base")),
    ("gpt-2", Rule((GPT2,), "openai-community/gpt2")),
    ("phi-2", Rule((GPT2,), "microsoft/phi-2")),
    ("mpt", Rule((GPT2,), "mosaicml/mpt-7b", nfc=True)),
    ("olmo", Rule((GPT2,), "allenai/OLMo-1.7-7B-hf", nfc=True)),
    ("jais", Rule((GPT2,), "core42/jais-13b")),
    ("exaone4 trillion granite-docling gigachat a.x-4.0 mellum", Rule((GPT2,), _LLAMA_CPP)),
    ("smollm", Rule((DIGITS, GPT2), "HuggingFaceTB/SmolLM2-135M")),
    ("starcoder", Rule((DIGITS, GPT2), "bigcode/starcoder2-3b")),
    ("refact", Rule((DIGITS, GPT2), "smallcloudai/Refact-1_6B-fim")),
    ("command-r", Rule((DIGITS, GPT2), "CohereForAI/c4ai-command-r-v01", nfc=True)),
    ("minerva-7b", Rule((DIGITS, GPT2), "sapienzanlp/Minerva-7B-base-v1.0")),
    ("codeshell exaone mellum2", Rule((DIGITS, GPT2), _LLAMA_CPP)),
    (
        "falcon",
        Rule((PUNCTUATION, GPT2, DIGIT_RUNS, "[0-9][0-9][0-9]"), "tiiuae/falcon-7b"),
    ),
    (
        "deepseek-llm",
        Rule(
            (
                "[\r\n]",
                rf"\s?[{_CASED}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _CJK,
                DIGITS,
            ),
            "deepseek-ai/deepseek-llm-7b-base",
        ),
    ),
    (
        "deepseek-coder",
        Rule(
            ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGITS),
            "deepseek-ai/deepseek-coder-6.7b-base",
        ),
    ),
    ("deepseek-v3", Rule(_DEEPSEEK3, "deepseek-ai/DeepSeek-V3")),
    ("hunyuan-dense joyai-llm hy_v4", Rule(_DEEPSEEK3, _LLAMA_CPP)),
    (
        "spark2_5",
        Rule(
            (
                *_DEEPSEEK3[:2],
                _DEEPSEEK3_WORDS + r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
                r"\p{N}",
            ),
            _LLAMA_CPP,
        ),
    ),
    (
        "youtu",
        Rule(
            (
                "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a"
                "\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _KANA_HAN,
                _cased_words(r"\p{N}"),
            ),
            _LLAMA_CPP,
        ),
    ),
    ("bloom", Rule((_BLOOM,), "bigscience/bloom")),
    ("gpt3-finnish", Rule((_BLOOM,), "TurkuNLP/gpt3-finnish-small")),
    ("poro-chat", Rule((_BLOOM,), "LumiOpen/Poro-34B-chat")),
    ("viking", Rule((_VIKING, DIGITS), "LumiOpen/Viking-7B")),
    ("superbpe", Rule((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), "UW/OLMo2-8B-SuperBPE-t180k")),
    (
        "k2-horizon",
        Rule(
            (
                _CONTRACTIONS + "|[^\\r\\n\\p{L}\\p{N}]?(?:\\p{L}|\\p{M}|\u200c|\u200d)+"
                r"|\p{N}{1,3}|" + _SYMBOLS_AND_SPACES,
            ),
            _LLAMA_CPP,
        ),
    ),
    (
        "chameleon",
        Rule(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2_PATTERN,
            ),
            _LLAMA_CPP,
            add_bos=True,
        ),
    ),
)

#: tokenizer.ggml.pre -> Rule
PRE_TOKENIZERS: Mapping[str, Rule] = {name: rule for names, rule in _ROWS for name in names.split()}


def apply(rule: Rule, tokenizer: Tokenizer) -> None:
    """Sets normaliser, pre-tokenizer and decoder of a byte-level `tokenizers.Tokenizer`."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = [_step(step) for step in rule.steps]
    if GPT2 not in rule.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()


def _step(step: str | tuple[str, str]) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if step == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if step in (DIGITS, DIGIT_RUNS):
        return pre_tokenizers.Digits(individual_digits=step == DIGITS)
    if step == PUNCTUATION:
        return pre_tokenizers.Punctuation("contiguous")
    pattern, behavior = (step, "isolated") if isinstance(step, str) else step
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior)
