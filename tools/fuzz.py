"""Fuzzes the readers of model files: config.json, GGUF, safetensors and tokenizer files.

    python tools/fuzz.py [--seconds 600] [READER ...]

Each reader gets `--seconds` of processor time on inputs that hypothesis draws from the good files
in tests/fuzz_seeds (tests/fuzzing.py). What raises anything but ModelError is made small, kept in
tests/fuzz_seeds/found, where tests/test_fuzz.py tries it from then on, and printed; the exit status
is 1. `--make-seeds` writes the good files anew, with transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]

EXAMPLES = 1000  # of one call of hypothesis; each call has another seed


def fuzz(name: str, seconds: float, first: int) -> bool:
    """Fuzzes a reader; whether it is clean."""
    import hypothesis
    from hypothesis import HealthCheck, settings

    import fuzzing

    tried: Counter[bool] = Counter()
    last: dict[str, bytes] = {}
    begin, seed = time.process_time(), first
    with tempfile.TemporaryDirectory() as place:
        while time.process_time() - begin < seconds:

            @hypothesis.seed(seed)
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(fuzzing.READERS[name].cases())
            def once(case: dict[str, bytes]) -> None:
                last.clear()
                accepted = None
                try:
                    accepted = fuzzing.check(name, case, Path(place))
                finally:
                    if accepted is None:
                        last.update(case)
                tried[accepted] += 1

            try:
                once()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                error.__notes__ = []  # the input in full
                traceback.print_exception(error)
                if last:
                    print(f"{name}: kept as {fuzzing.keep(name, last)}")
                return False
            seed += 1
    print(
        f"{name}: clean after {sum(tried.values()):,} inputs in"
        f" {time.process_time() - begin:.0f} s of processor time; {tried[True]:,} were accepted"
    )
    return True


#: Vocabularies of GGUF files: byte-level and SentencePiece.
TOKENS = (
    {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    },
    {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x41>", "\u2581a", "b"],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    },
)


#: Small models that GGUF files cannot hold.
NOT_IN_GGUF = ("phi_norm", "gpt_neox_sequential")


def make_seeds() -> None:
    """Writes the good files: metadata, names and shapes of small random models of every family."""
    import numpy as np
    from safetensors import safe_open

    import fuzzing
    from gguf_models import ARCHITECTURES, convert
    from oracle import families
    from tokenizer_texts import TEMPLATES, train
    from vksteer.loading.gguf_file import GGUFFile

    stored, gguf = {}, {}
    for name in families.FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            folder = families.build(name, Path(place))
            config = json.loads((folder / "config.json").read_text())
            with safe_open(folder / "model.safetensors", "np") as file:
                parts = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118  not a mapping
                tensors = {k: [p.get_dtype(), list(p.get_shape())] for k, p in parts.items()}
            stored[name] = {"config": config, "tensors": tensors}
            if config["model_type"] not in ARCHITECTURES or name in NOT_IN_GGUF:
                continue
            with GGUFFile(convert(folder, folder / "m.gguf")) as file:
                metadata = {
                    k: v.tolist() if isinstance(v, np.ndarray) else v
                    for k, v in file.metadata.items()
                }
                shapes = {t.name: list(t.shape) for t in file.tensors.values()}
            tokens = TOKENS[len(gguf) % len(TOKENS)]
            gguf[name] = {"metadata": {**metadata, **tokens}, "tensors": shapes}
    tokenizers = {}
    for style, (template, *_) in TEMPLATES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = train(Path(place), template)
            tokenizers[style] = {p.name: p.read_text() for p in sorted(folder.iterdir())}
    for name, content in (
        ("safetensors", stored),
        ("gguf", gguf),
        ("tokenizer", tokenizers),
    ):
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (fuzzing.SEEDS / f"{name}.json").write_text(text)


def main() -> int:
    import fuzzing

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(fuzzing.READERS))
    parser.add_argument("--seconds", type=float, default=600, help="processor time a reader")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1_000_000_000)
    parser.add_argument("--make-seeds", action="store_true", help="write the good files anew")
    args = parser.parse_args()
    if args.make_seeds:
        make_seeds()
        return 0
    unknown = set(args.readers) - set(fuzzing.READERS)
    if unknown:
        parser.error(f"unknown reader {', '.join(sorted(unknown))}")
    print(f"--seed {args.seed}")
    clean = [fuzz(n, args.seconds, args.seed) for n in args.readers or fuzzing.READERS]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
