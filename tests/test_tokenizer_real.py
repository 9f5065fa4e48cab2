"""Tokenizers and weights of the three real models, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_vocabularies import texts
from tokenizer_texts import (
    TEXTS,
    random_texts,
)
from vksteer.loading import model_files as source

MODELS = Path(__file__).resolve().parent.parent / ".models"
REAL = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    "gemma3": "gemma-3-270m.Q4_K_M.gguf",
}


def real(name):
    path = MODELS / REAL[name]
    assert path.exists(), (
        f"{path} is not there: run .venv/bin/python tools/fetch_model.py {name} (make test fetches"
        " smollm2, make test-all all of them)"
    )
    return path


def test_smollm2_by_heart():
    """Its system message and five post-instruction tokens, without transformers."""
    files = source.open_model(real("smollm2"))
    ours = files.tokenizer()
    assert ours.decode(ours.post_instruction_tokens) == "<|im_end|>\n<|im_start|>assistant\n"
    assert (
        ours.decode(ours.chat_tokens("Hi")[0])
        == "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.eos_ids == (2,) and not ours.add_bos
    # digits stand alone
    assert ours.encode("Hello world 12  34") == [19556, 905, 216, 33, 34, 256, 35, 36]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_equal_transformers(name):
    import transformers
    from tokenizers import pre_tokenizers

    path = real(name)
    ours = source.open_model(path).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if name == "smollm2":
        # transformers 5 has no entry for the pre-tokenizer "smollm" and splits like GPT-2; the
        # model was trained with single digits, which differs where several spaces or newlines
        # stand before a digit.
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if name == "qwen":
        # From a GGUF file transformers builds a Qwen tokenizer without the normaliser that its own
        # class for Qwen has.
        theirs.backend_tokenizer.normalizer = (
            transformers.Qwen2Tokenizer().backend_tokenizer.normalizer
        )
    for text in (
        TEXTS
        + random_texts(2000, 4)
        + texts(2000, 7)
        + ["<|im_end|> inside <eos> <bos>text", "<table><tr>\n\n\n\n</tr>"]
    ):
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode("Hi") == theirs("Hi")["input_ids"]
    if ours.chat_template is None:
        return
    for system in (None, "Be brief."):
        for text in ("What  is 2+2?", "multi\nline\n", " x "):
            messages = ([] if system is None else [{"role": "system", "content": system}]) + [
                {"role": "user", "content": text}
            ]
            assert ours.chat_tokens(text, system=system)[0] == theirs.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["smollm2", "qwen", "gemma3"])
def test_real_weights_equal_transformers(name):
    """Every tensor of the real files, in float32, as transformers dequantises it; and the facts as
    its config has them.
    """
    import torch
    import transformers

    from vksteer.loading.config import Config
    from vksteer.loading.tensor_names import hf_name

    path = real(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    files = source.open_model(path, dtype="float32")
    state = theirs.state_dict()
    gemma = files.config.model_type.startswith("gemma")
    for t in files.tensors:
        expected = state[hf_name(t.name, files.config, "model.", "lm_head.weight")].numpy()
        got = t.array()
        if gemma and got.ndim == 1:
            got = got - np.float32(1)  # transformers stores w, the file 1 + w
        np.testing.assert_array_equal(got, expected, err_msg=t.name)
    hf = Config.from_hf(
        {
            **theirs.config.to_dict(),
            "architectures": [files.config.architecture],
            "eos_token_id": None,
            "bos_token_id": None,
            "quantization_config": None,
        }
    )
    assert (
        files.config.replace(
            norm_offset=hf.norm_offset, eos_ids=(), bos_id=None, norm_eps=hf.norm_eps
        )
        == hf
    )
    assert files.config.norm_eps == pytest.approx(hf.norm_eps, rel=1e-6)
