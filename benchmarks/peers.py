"""The programs that the engine is compared with: PyTorch with transformers on the same weights, and
llama.cpp's CPU backend where llama-cpp-python could be built.

    python benchmarks/peers.py           builds llama-cpp-python from its source package into
                                         .models/peers (minutes)

Caches outside git, all in .models/: SmolLM2 as a safetensors folder, and as an
F16 file for llama.cpp.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".models"
GGUF = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = MODELS / "smollm2-bf16"
F16 = MODELS / "smollm2-f16.gguf"
LLAMA_CPP = MODELS / "peers" / "llama_cpp"
#: llama-bench on a machine with 2 cores and 2 threads: a quoted figure, not measured here.
QUOTED_LLAMA_CPP = {
    "decode_tokens_per_s": 67.0,
    "prefill_tokens_per_s": 802.0,
    "how": "quoted, not measured here (llama-bench, F16, 2 threads)",
}


def quiet():
    """The transformers module without network access and without its messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def safetensors_folder() -> Path:
    """SmolLM2 as transformers writes it, bfloat16, with its tokenizer; made once from the GGUF
    file.
    """
    if not (FOLDER / "model.safetensors").exists():
        import torch

        transformers = quiet()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
        )
        config = model.config.to_dict()
        # transformers refuses to save a model that was read from a GGUF file, although its weights
        # are dequantised by now.
        config.pop("quantization_config", None)
        plain = transformers.AutoModelForCausalLM.from_config(
            type(model.config)(**config), dtype=torch.bfloat16
        )
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(FOLDER)
        transformers.AutoTokenizer.from_pretrained(
            GGUF.parent, gguf_file=GGUF.name
        ).save_pretrained(FOLDER)
    return FOLDER


def torch_model(folder, dtype: str):
    import torch

    model = quiet().AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval()


def waiting(call, device: str):
    """A function that makes the call without gradients, and on "cuda" waits until it is done."""
    import torch

    def run():
        with torch.inference_mode():
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def last_logits(model, tokens):
    """A function that runs one prompt and returns the logits of the last position."""
    import torch

    ids = torch.tensor([tokens])

    def call():
        with torch.inference_mode():
            return model(input_ids=ids, logits_to_keep=1, use_cache=False).logits

    return call


def greedy(model, tokens, n: int):
    """A function that decodes exactly n tokens after one prompt."""
    import torch

    ids = torch.tensor([tokens])

    def call():
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )

    return call


# -- llama.cpp -------------------------------------------------------------------------------------


def build_llama_cpp() -> bool:
    """Builds llama-cpp-python from its source package into .models/peers; whether that worked."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--upgrade",
        "--target",
        str(LLAMA_CPP),
        "llama-cpp-python",
        "diskcache",
    ]
    options = (
        "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
        " -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF"
    )
    done = subprocess.run(command, env=os.environ | {"CMAKE_ARGS": options}, check=False)
    return done.returncode == 0


def llama_cpp(rounds: int = 5, prompt: int = 128, new: int = 64) -> dict:
    """Tokens/s of prefill and decoding, F16, as many threads as cores, in a process of its own; or
    the quoted figures where it is not built.
    """
    if not (LLAMA_CPP / "llama_cpp" / "__init__.py").exists():
        return dict(QUOTED_LLAMA_CPP)
    done = subprocess.run(
        [sys.executable, __file__, "llama-cpp", str(rounds), str(prompt), str(new)],
        env=os.environ | {"PYTHONPATH": str(LLAMA_CPP)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return dict(QUOTED_LLAMA_CPP, error=done.stderr.strip().splitlines()[-1:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _llama_cpp_here(rounds: int, prompt: int, new: int) -> dict:
    import ctypes

    import llama_cpp
    from llama_cpp import llama_cpp as low

    if not F16.exists():
        options = low.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = (
            low.LLAMA_FTYPE_MOSTLY_F16,
            True,
            os.cpu_count(),
        )
        if low.llama_model_quantize(str(GGUF).encode(), str(F16).encode(), ctypes.byref(options)):
            raise RuntimeError("llama.cpp could not write the F16 file")
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        str(F16), n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    tokens = list(range(1000, 1000 + prompt))
    prefill, decode = [], []
    for i in range(rounds + 1):
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        middle = time.perf_counter()
        for token in range(2000, 2000 + new):
            model.eval([token])
        end = time.perf_counter()
        if i:
            prefill.append(prompt / (middle - start))
            decode.append(new / (end - middle))
    return {
        "decode_tokens_per_s": statistics.median(decode),
        "prefill_tokens_per_s": statistics.median(prefill),
        "how": f"measured: llama-cpp-python {llama_cpp.__version__}, F16, {threads} threads",
        "n": rounds,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["llama-cpp"]:
        print(json.dumps(_llama_cpp_here(*map(int, sys.argv[2:]))))
    else:
        sys.exit(0 if build_llama_cpp() else 1)
