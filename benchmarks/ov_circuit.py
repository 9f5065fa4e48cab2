"""The OV circuit: value vectors of a model of 3B shape (bounded by reading the weights once), and
the logit lens of all heads of Qwen 0.5B (a matrix product).
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import peers
from timing import at_least, row, summary, take_turns

from vksteer import SteeringVector, ov
from vksteer.demo import qwen as demo_real
from vksteer.runtime import ceilings
from vksteer.runtime.model import Model

#: The attention of Llama 3.2 3B. MLP and vocabulary are small: value vectors do not read them.
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD = 28, 3072, 24, 8, 128
TOP = 20


def stack(device) -> Model:
    """A model of random bfloat16 weights of that shape, made in memory."""
    from vksteer.loading.config import Config
    from vksteer.runtime import device as devices
    from vksteer.runtime.model import _load

    config = Config.from_hf(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD,
            "intermediate_size": 16,
            "vocab_size": 64,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        }
    )
    engine_device, chosen = devices.open_device(device)
    engine, fingerprint = _load(
        engine_device,
        chosen,
        SimpleNamespace(config=config, tensors=_tensors(), paths=[]),
        "3B-shaped stack",
        False,
    )
    return Model(engine, engine_device, chosen, config, None, "3B-shaped stack", (), fingerprint)


def _tensors() -> list[SimpleNamespace]:
    """The weights, as a model file would give them: the same bfloat16 noise in every matrix."""
    rng = np.random.default_rng(0)
    noise = (
        rng.standard_normal((HEADS * HEAD + 2 * KV_HEADS * HEAD, WIDTH)) / np.sqrt(WIDTH)
    ).astype(np.float32).view(np.uint32) >> 16

    def tensor(name, *shape):
        weights = (
            noise.astype(np.uint16).reshape(-1)[: int(np.prod(shape))].reshape(shape)
            if len(shape) == 2
            else np.full(shape, 0x3F80, np.uint16)
        )
        return SimpleNamespace(
            name=name, dtype="bfloat16", shape=shape, file=None, array=lambda: weights
        )

    tensors = [tensor("embed", 64, WIDTH), tensor("ln_final", WIDTH)]
    for l in range(LAYERS):
        tensors += [
            tensor(f"l.{l}.{name}", *shape)
            for name, shape in (
                ("ln1", (WIDTH,)),
                ("ln2", (WIDTH,)),
                ("wq", (HEADS * HEAD, WIDTH)),
                ("wk", (KV_HEADS * HEAD, WIDTH)),
                ("wv", (KV_HEADS * HEAD, WIDTH)),
                ("wo", (WIDTH, HEADS * HEAD)),
                ("wgate", (16, WIDTH)),
                ("wup", (16, WIDTH)),
                ("wdown", (WIDTH, 16)),
            )
        ]
    return tensors


#: Products that measure_linear runs: one to compile, nine that it times.
PRODUCTS = 10


def processor_seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def weight_bytes(config) -> int:
    """Bytes that the value vectors of all layers must read: W_V and W_O, bfloat16."""
    c = config
    return 2 * c.n_layers * c.d_model * c.d_head * (c.n_kv_heads + c.n_heads)


def value_vectors(device, rounds: int) -> list[dict]:
    """All value vectors of the stack: GB/s of its weights, beside the rate of a kernel that only
    reads.
    """
    with stack(device) as model:
        vector = SteeringVector(np.random.default_rng(1).standard_normal(WIDTH), 0)
        ov.steering_value_vectors(model, vector)
        before = model._engine.dispatches
        ov.steering_value_vectors(model, vector)
        dispatches = model._engine.dispatches - before
        times = summary(
            take_turns({"ours": lambda: ov.steering_value_vectors(model, vector)}, 3 * rounds)[
                "ours"
            ]
        )
        read = ceilings.measure(model, rounds).read
        rate = weight_bytes(model.config) / times["median_s"]
    return [
        row(
            f"value vectors of a 3B-shaped stack ({LAYERS} layers x {HEADS} heads, width {WIDTH})",
            1e3 * times["median_s"],
            "ms",
            ours=times,
            dispatches=dispatches,
        ),
        row(
            "the same, weights read once, share of the plain read bandwidth",
            100 * rate / read,
            "%",
            gbytes_per_s=rate / 1e9,
            read_gbytes_per_s=read / 1e9,
        ),
    ]


def lens(device, rounds: int) -> list[dict]:
    """The logit lens of all heads of Qwen 0.5B, beside NumPy's bare product (no norm, no ranking)
    and our matrix kernel's peak.
    """
    with Model.from_pretrained(
        peers.MODELS / demo_real.QWEN, device=device, progress=False
    ) as model:
        c = model.config
        values = ov.steering_value_vectors(
            model, SteeringVector(np.random.default_rng(1).standard_normal(c.d_model), 0)
        ).values
        n = values.shape[0] * values.shape[1]
        unembed = np.ascontiguousarray(model._engine.rows("unembed", -1, 0, c.d_vocab).T)
        flat = values.reshape(n, -1)
        # Peak, lens and peer take turns, so that other load slows all of them alike.
        peaks = []
        times = take_turns(
            {
                "ours": lambda: ov.logit_lens(model, values, TOP),
                "cosine": lambda: ov.logit_lens(model, values, TOP, "cosine"),
                "numpy": lambda: flat @ unembed,
                "peak": lambda: peaks.append(ceilings.measure(model, 1).matrix),
            },
            rounds,
        )
        s = {name: summary(t) for name, t in times.items()}
        work, peak = 2.0 * n * c.d_vocab * c.d_model, max(peaks)
        by_processor = None
        if model.device.type == "software":
            by_processor = _share_by_processor_time(model, values, work, rounds)
    share = lambda name: 100 * work / s[name]["median_s"] / peak
    return [
        at_least(
            f"lens of all heads of Qwen 0.5B ({n} vectors x {c.d_vocab:,} tokens, top {TOP}), share"
            " of the matrix kernel's peak",
            share("ours"),
            60,
            "%",
            ours=s["ours"],
            gflops=work / s["ours"]["median_s"] / 1e9,
            matrix_peak_gflops=peak / 1e9,
            cosine_share=share("cosine"),
            cosine=s["cosine"],
            share_by_processor_time=by_processor,
        ),
        row(
            "the same, NumPy's bare product",
            s["numpy"]["median_s"],
            "s",
            numpy=s["numpy"],
            ours_s=s["ours"]["median_s"],
            numpy_gflops=work / s["numpy"]["median_s"] / 1e9,
        ),
    ]


def _share_by_processor_time(model, values, work: float, rounds: int) -> float:
    """Percent of the matrix kernel's rate, by processor time, which other load disturbs least. A
    software device computes in this process.
    """
    shape = 512, 2 * model.config.d_mlp, model.config.d_model
    best = lambda call: min(processor_seconds(call) for _ in range(rounds))
    matrix = best(lambda: model._engine.measure_linear(*shape)) / (PRODUCTS * 2.0 * np.prod(shape))
    ours = best(lambda: ov.logit_lens(model, values, TOP)) / work
    return float(100 * matrix / ours)


def run(rounds: int, device):
    """Yields rows as they are measured."""
    yield from value_vectors(device, rounds)
    if (peers.MODELS / demo_real.QWEN).exists():
        yield from lens(device, rounds)
    else:
        print(f"{demo_real.QWEN} is not there (tools/fetch_model.py qwen): the lens is left out")
