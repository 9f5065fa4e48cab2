"""Model: weights on a device, and everything that runs on them."""

from __future__ import annotations

import atexit
import hashlib
import sys
import weakref
from functools import cached_property
from typing import Any

import numpy as np

from . import device as _devices

_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ACTS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
#: The engine's matrices and vectors -> the tensors that are stacked in them.
_MATRICES = {
    "qkv": ("wq", "wk", "wv"),
    "o": ("wo",),
    "gate_up": ("wgate", "wup"),
    "down": ("wdown",),
}
_VECTORS = {
    "ln1": ("ln1",),
    "ln2": ("ln2",),
    "ln1_post": ("ln1_post",),
    "ln2_post": ("ln2_post",),
    "q_norm": ("q_norm",),
    "k_norm": ("k_norm",),
    "b_qkv": ("bq", "bk", "bv"),
    "b_o": ("bo",),
    "b_gate_up": ("bgate", "bup"),
    "b_down": ("bdown",),
}

_alive: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_all():
    # Drivers must not be called while the interpreter or the C library is being taken down.
    _devices.hold_all()
    for model in list(_alive):
        model.close()


class Model:
    """A language model on a Vulkan device. Use `from_pretrained`; close it (or use it as a context
    manager) to free device memory.

    Attributes: config (Config), tokenizer (Tokenizer or None), device (Device), name, eos_ids.
    """

    def __init__(
        self, engine, engine_device, device, config, tokenizer, name, eos_ids, fingerprint
    ):
        from .sites import SiteTable

        self._engine, self._engine_device, self.device = engine, engine_device, device
        self.config, self.tokenizer, self.name, self.fingerprint = (
            config,
            tokenizer,
            name,
            fingerprint,
        )
        self.eos_ids = tuple(eos_ids)
        self._sites = SiteTable(config)
        self._cache = self._tape = None
        _alive.add(self)

    # -- loading -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, source, *, device=None, dtype: str = "auto", revision=None, progress=True
    ) -> Model:
        """Loads a model: a folder (safetensors, with or without a tokenizer), a .gguf file, a hub
        name, or a bundled name.

        dtype: how matrices are held on the device: "auto" (as stored; bfloat16 for a quantised
        file), "float32", "bfloat16", "float16". The device is opened before any weight is read.
        progress: the memory plan and a bar on stderr.
        Raises DeviceError (no device, not enough memory), ModelError (files), ValueError (dtype).
        """
        from ..loading.model_files import DTYPES, open_model

        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
        engine_device, chosen = _devices.open_device(device)
        files = open_model(source, dtype=dtype, revision=revision)
        try:
            engine, fingerprint = _load(engine_device, chosen, files, str(source), progress)
            tokenizer = files.tokenizer()
        finally:
            files.close()
        eos = tuple(
            dict.fromkeys(files.eos_ids + (tokenizer.eos_ids if tokenizer is not None else ()))
        )
        return cls(
            engine, engine_device, chosen, files.config, tokenizer, str(source), eos, fingerprint
        )

    def close(self) -> None:
        """Frees the device memory; legal twice. Arrays that were returned stay as they are."""
        self._cache = self._tape = None
        if self._engine is not None:
            self._engine.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __repr__(self):
        c = self.config
        return (
            f"Model({self.name!r}, {c.architecture}, {c.n_layers} layers, width {c.d_model}, on"
            f" {self.device.name})"
        )

    @property
    def kernels(self) -> str:
        """The matrix kernels in use (measured once per device and stored, or pinned by
        VKSTEER_KERNELS); belongs beside every result.
        """
        return self._engine.kernels

    # -- tokens ------------------------------------------------------------------------------------

    @cached_property
    def sites(self) -> dict[str, str]:
        """Every site of this model: name -> axes, e.g. "blocks.3.attn.hook_pattern":
        "batch head query key".
        """
        return self._sites.shapes()

    def chat_tokens(
        self, prompts, system=None, response=None, date: str = "26 Jul 2024"
    ) -> list[list[int]]:
        """Prompts as token lists. A str is an instruction and goes through the chat template; token
        lists stay as they are (they may not begin with two BOS). The date is fixed, so that
        templates that print one give the same tokens every day.
        """
        if self.tokenizer is not None:
            return self.tokenizer.chat_tokens(prompts, system=system, response=response, date=date)
        from ..loading.tokenizer import prompt_list

        rows = prompt_list(prompts)
        if any(isinstance(r, str) for r in rows) or isinstance(response, str) or system is not None:
            self._need_tokenizer("a text prompt")
        answers = [None] * len(rows) if response is None else prompt_list(response)
        return [
            list(r) + list(a or [])
            for r, a in zip(rows, answers * (len(rows) if len(answers) == 1 else 1))
        ]

    @property
    def post_instruction_length(self) -> int:
        """Tokens that the template puts after the instruction: candidate positions of a steering
        vector are -length..-1.
        """
        return len(self._need_tokenizer("the chat template").post_instruction_tokens)

    def _need_tokenizer(self, what):
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, and this model was loaded without one (no"
                " tokenizer.json): pass token lists instead"
            )
        return self.tokenizer

    # -- running -----------------------------------------------------------------------------------

    def run(
        self,
        prompts,
        responses=None,
        *,
        edits=(),
        capture=(),
        logits="all",
        freeze=None,
        ablate=None,
        freeze_layers=None,
    ):
        """One teacher-forced forward pass.

        prompts: a str, a token list, or a list of these. responses: one per prompt (text or
        tokens), after it. edits: one list for all rows, or one list per row. capture: site names or
        patterns ("blocks.*.hook_resid_post"). logits: "all" [B, S, V], "last" [B, V] or None.
        freeze: None, "qk", "ov", "mlp"; ablate: None, "svv", "mlp_direct" (method.md section 6;
        exactly one Steer edit a row); freeze_layers: act only in these layers instead of all from
        the steering layer on.
        Returns a Run. Raises ValueError, TypeError, KeyError (unknown site, nearest named) before
        any work; DeviceError.
        """
        from .run import execute

        self._check_open()
        return execute(
            self,
            prompts,
            responses,
            edits=edits,
            capture=capture,
            logits=logits,
            freeze=freeze,
            ablate=ablate,
            freeze_layers=freeze_layers,
        )

    def generate(
        self,
        prompts,
        *,
        max_new_tokens=128,
        edits=(),
        freeze=None,
        ablate=None,
        freeze_layers=None,
        circuit=None,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        stop=None,
        ignore_eos=False,
        capture=(),
        batch_size=None,
        on_token=None,
        progress=True,
    ):
        """Continues every prompt; greedy unless a temperature is given. Returns
        list[Generation], one per prompt.

        edits, freeze, ablate, freeze_layers: as in `run`, valid for decoded tokens too. circuit: a
        Circuit along whose edges alone what the row's one Steer edit does is passed on, the rest as
        in the base run of the same tokens (method.md section 5); other edits must lie below that
        layer. stop: a str or list of str, cut from .text and kept in .tokens. capture: sites at the
        new tokens. batch_size: rows at once (default: as memory allows). on_token(row, token, text
        piece) is called for every new token. progress: True, False or callable(done, total).
        Raises ValueError, TypeError, KeyError before any work; DeviceError. Ctrl-C raises
        KeyboardInterrupt and leaves the model usable.
        """
        from .generation import generate

        self._check_open()
        return generate(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            edits=edits,
            freeze=freeze,
            ablate=ablate,
            freeze_layers=freeze_layers,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            capture=capture,
            batch_size=batch_size,
            on_token=on_token,
            progress=progress,
            circuit=circuit,
        )

    def gradients(self, prompts, responses=None, *, of, at, edits=(), progress=True):
        """d(scalar)/d(site), one scalar a row, computed on the device with respect to activations.

        of: vs.LogitDiff(position, a, b), vs.LogProb(positions, tokens) or vs.KL(reference_logits,
        positions); one for all rows or a list with one a row. at: site names or patterns; the
        gradient is with respect to the captured value (after edits), shaped and left-padded as
        `run[site]`; at a site that several later inputs read (the stream) it is the whole gradient.
        edits: as in `run`; what an edit overwrote passes no gradient on.
        Returns Gradients (`grads[site]`, `.values` float64 [B]). Raises ValueError, TypeError,
        KeyError before any work (edits of scales, scores and patterns have no way back);
        DeviceError. Source: method.md section 5.
        """
        from .gradients import gradients

        self._check_open()
        return gradients(self, prompts, responses, of=of, at=at, edits=edits, progress=progress)

    def _check_open(self):
        try:
            self._engine.plan()
        except ValueError:
            raise ValueError(
                "this model is closed: load it again with Model.from_pretrained"
            ) from None

    # -- inside ------------------------------------------------------------------------------------

    def _run_cache(self, lengths, double):
        """(cache, first slot of every engine row). Rows that are finished give their slots
        back: the cache is a ring that is longer than what one chunk of tokens and the rows that
        reach into it can cover.
        """
        from .device import _engine

        longest, total = max(lengths) * double, sum(lengths) * double
        size = min(total, 2 * self._engine.plan()["chunk"] + 3 * longest)
        cache = self._cache  # other threads may exchange it meanwhile
        if cache is None or cache[1] < size:
            self._cache = cache = None
            self._cache = cache = (_engine().Cache(self._engine, size), size)
        slots, at = [], 0
        for n in lengths:
            if at + n * double > size:
                at = 0
            slots += [at + i * n for i in range(double)]
            at += n * double
        return cache[0], np.array(slots, np.uint32)

    @cached_property
    def _layer_inputs(self):
        from .resume import LayerInputs

        return LayerInputs(self)

    def _value_direction(self, direction, layer: int) -> np.ndarray:
        """W_V (s * gain of the layer's first norm), float32 [G, d_head]: what steering by s adds to
        the values, up to 1/RMS (method.md section 7).
        """
        c = self.config
        gain = self._engine.vector("ln1", layer)
        product = self._engine.apply(
            "qkv", layer, np.ascontiguousarray((np.asarray(direction, np.float32) * gain)[None])
        )[0]
        return product[(c.n_heads + c.n_kv_heads) * c.d_head :].reshape(c.n_kv_heads, c.d_head)


def _facts(config, weight_type) -> dict[str, Any]:
    names = (
        "n_layers",
        "d_model",
        "n_heads",
        "n_kv_heads",
        "d_head",
        "d_mlp",
        "d_vocab",
        "n_ctx",
        "norm_eps",
        "norm_offset",
        "embed_scale",
        "attn_scale",
        "attn_softcap",
        "final_softcap",
        "post_norms",
        "qk_norm",
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "tied",
    )
    facts = {n: getattr(config, n) for n in names}
    facts.update(
        act=_ACTS[config.act],
        weight_type=weight_type,
        window=list(config.window),
        rope_table=list(config.rope_table),
        rope=[
            (np.asarray(t.inv_freq, np.float64).tolist(), float(t.attention_factor))
            for t in config.rope
        ],
    )
    facts["n_ctx"] = min(facts["n_ctx"], 1 << 24)
    return facts


def _load(engine_device, device, files, name, progress):
    """The engine's model with all weights, and a hash over config and a sample of the weights."""
    from ..base.progress import Progress
    from . import kernels
    from .device import _engine

    engine = _engine()
    tensors = {t.name: t for t in files.tensors}
    kinds = {t.dtype for t in files.tensors if len(t.shape) == 2}
    weight_type = _TYPES[kinds.pop()] if len(kinds) == 1 else 0
    model = engine.Model(engine_device, _facts(files.config, weight_type))
    plan = model.plan()
    if progress is True:
        print(
            f"vksteer: {name} on {device.name}: weights {plan['weights'] / 1e6:.0f} MB, work memory"
            f" {plan['work'] / 1e6:.0f} MB, {plan['cache_per_token'] / 1e3:.1f} kB per cached"
            f" token; {engine_device.available_bytes / 1e9:.1f} GB free",
            file=sys.stderr,
        )
    mapped = [None] * len(files.paths)
    digest = hashlib.sha256(repr(files.config).encode())

    def source(tensor):
        rows, columns = tensor.shape if len(tensor.shape) == 2 else (tensor.shape[0], 1)
        if tensor.file is not None:
            if mapped[tensor.file] is None:
                mapped[tensor.file] = engine.MappedFile(files.paths[tensor.file])
            return (_TYPES[tensor.dtype], rows, columns, mapped[tensor.file], tensor.offset)
        array = tensor.array()
        return (
            _TYPES[tensor.dtype],
            rows,
            columns,
            array if array.dtype != np.float16 else array.view(np.uint16),
        )

    jobs = [("embed", -1, ["embed"], True), ("ln_final", -1, ["ln_final"], False)]
    if not files.config.tied:
        jobs.append(("unembed", -1, ["unembed"], True))
    for layer in range(files.config.n_layers):
        for table, matrix in ((_MATRICES, True), (_VECTORS, False)):
            for target, parts in table.items():
                names = [f"l.{layer}.{p}" for p in parts]
                if all(n in tensors for n in names):
                    jobs.append((target, layer, names, matrix))
    try:
        with Progress(progress, len(jobs), "load") as bar:
            for target, layer, names, matrix in jobs:
                sources = [source(tensors[n]) for n in names]
                (model.load_matrix if matrix else model.load_vector)(target, layer, sources)
                bar.step()
        model.finish()
        if progress is True and not kernels.is_chosen(device, kernels.WEIGHT_TYPES[weight_type]):
            print(
                "vksteer: testing and measuring the matrix kernels for"
                f" {kernels.WEIGHT_TYPES[weight_type]} on {device.name} (once; stored in"
                f" {_devices.cache_folder()})",
                file=sys.stderr,
            )
        kernels.choose(model, engine_device, device, kernels.WEIGHT_TYPES[weight_type])
        model.prepare()
        for vector in ("ln_final", "ln1"):
            digest.update(model.vector(vector, 0).tobytes())
        probe = (
            np.random.default_rng(0).standard_normal((1, files.config.d_model)).astype(np.float32)
        )
        digest.update(model.apply("qkv", files.config.n_layers // 2, probe).tobytes())
    except BaseException:
        model.close()
        raise
    return model, digest.hexdigest()[:16]
