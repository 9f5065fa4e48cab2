"""Model: weights on a device, and everything that runs on them."""

from __future__ import annotations

import atexit
import hashlib
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..base.types import Float32Array, OneOrMorePrompts, PathLike, ProgressLike, UInt32Array
from ..errors import ModelError
from . import device as _devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .. import _engine as extension
    from ..loading.config import Config
    from ..loading.model_files import ModelFiles
    from ..loading.tokenizer import Tokenizer
    from .decoding import Generation
    from .device import Device
    from .edits import Edits
    from .gradients import Gradients
    from .profile import Profile
    from .resume import LayerInputs
    from .run import Run

_alive: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Drivers must not be called once the interpreter or the C library is being taken down.
    _devices.hold_all()
    for model in list(_alive):
        model.close()


def _tokenizer(files: ModelFiles, options: dict[str, Any]) -> Tokenizer | None:
    tokenizer = files.tokenizer(options)
    if options and tokenizer is None:
        raise ValueError(
            "template_options needs a tokenizer with a chat template, and this model has no"
            " tokenizer"
        )
    return tokenizer


class Model:
    """A language model on a Vulkan device. Use `from_pretrained`; close it (or use it as a context
    manager) to free device memory.

    Attributes: config (Config), tokenizer (Tokenizer or None), device (Device), name, eos_ids,
    dtype, config_overrides and template_options (as `from_pretrained` got them, {} for none).
    """

    def __init__(
        self,
        engine: extension.Model,
        engine_device: extension.Device,
        device: Device,
        config: Config,
        tokenizer: Tokenizer | None,
        name: str,
        eos_ids: Iterable[int],
        fingerprint: str,
        config_overrides: Mapping[str, Any] | None = None,
        weight_files: Iterable[PathLike] = (),
        dtype: str = "",
    ) -> None:
        from .sites import SiteTable

        self._engine, self._engine_device, self.device = engine, engine_device, device
        self.config, self.tokenizer = config, tokenizer
        self.name, self.fingerprint = name, fingerprint
        self.eos_ids = tuple(eos_ids)
        self.config_overrides = dict(config_overrides or {})
        self.dtype, self._weight_files = dtype, tuple(weight_files)
        self._sites = SiteTable(config)
        # the key/value cache with its slots, and the tape with its tokens, first layer, contents
        self._cache: tuple[extension.Cache, int] | None = None
        self._tape: tuple[extension.Tape, int, int, bool] | None = None
        _alive.add(self)

    # -- loading -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: PathLike,
        *,
        device: int | str | Device | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        template_options: Mapping[str, Any] | None = None,
        precision: str = "float32",
        progress: ProgressLike = True,
    ) -> Model:
        """Loads a model: a folder (safetensors, with or without a tokenizer), a GGUF file (the
        first part of a split one), a hub name, or a bundled name.

        dtype: how matrices are held on the device: "auto" (as stored; bfloat16 for a quantised
        file), "float32", "bfloat16", "float16". The device is opened before any weight is read.
        config_overrides: keys of config.json to replace, e.g. {"rope_scaling": {...}}; None for a
        key is JSON's null and drops what the file says. template_options: variables for the chat
        template, e.g. {"enable_thinking": False}, used wherever a prompt is rendered;
        "chat_template" chooses among several templates by name. Both are written into the
        provenance of results. precision: of products on matrix units: "float32" splits numbers
        into two float16 parts, which keeps float32's accuracy; "fast" rounds them to float16, which
        is said once and written into results (elsewhere it changes nothing). progress: the memory
        plan and a bar on stderr.
        Raises DeviceError (no device, not enough memory), ModelError (files), ValueError (dtype,
        precision, overrides of a GGUF file, options without a template to read them).
        """
        from ..loading.chat_template import check_options
        from ..loading.config import check_overrides
        from ..loading.model_files import DTYPES, open_model
        from . import kernels
        from .weights import load_weights

        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
        kernels.check_precision(precision)
        overrides, options = check_overrides(config_overrides), check_options(template_options)
        engine_device, chosen = _devices.open_device(device)
        files = open_model(source, dtype=dtype, revision=revision, config_overrides=overrides)
        try:
            tokenizer = _tokenizer(files, options)
            engine, fingerprint = load_weights(
                engine_device, chosen, files, str(source), precision == "fast", progress
            )
        finally:
            files.close()
        ends = tokenizer.eos_ids if tokenizer is not None else ()
        eos = tuple(dict.fromkeys(files.eos_ids + ends))
        opened = engine, engine_device, chosen, files.config, tokenizer
        return cls(*opened, str(source), eos, fingerprint, overrides, files.paths, dtype)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 (hex) over the contents of the files that the weights were loaded from. They are
        read when it is first asked for (seconds for files of many GB). Raises ModelError where one
        is gone.
        """
        whole = hashlib.sha256()
        for path in self._weight_files:
            try:
                with open(path, "rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise ModelError(
                    f"cannot read {path}, from which {self.name!r} was loaded: {error.strerror}; it"
                    " is needed to tell this model from others in files of unfinished work"
                ) from error
        return whole.hexdigest()

    @property
    def template_options(self) -> dict[str, Any]:
        """Variables that every rendering of a prompt passes to the chat template; {} for none."""
        return {} if self.tokenizer is None else dict(self.tokenizer.template_options)

    def close(self) -> None:
        """Frees the device memory; calling it again does nothing. Arrays that were returned stay as
        they are.
        """
        self._cache = self._tape = None
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Model({self.name!r}, {c.architecture}, {c.n_layers} layers, width {c.d_model}, on"
            f" {self.device.name})"
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernel families in use, chosen by a measurement that is stored for each
        device, or by VKSTEER_KERNELS. Results are bit-identical for one choice only.
        """
        return (self._engine.kernels,)

    @property
    def precision(self) -> str:
        """Of products: "float32", or "fast" where the model was loaded so and its kernels are those
        of matrix units.
        """
        return "fast" if self._engine.fast and self._engine.kernels == "matrix" else "float32"

    # -- tokens ------------------------------------------------------------------------------------

    @cached_property
    def sites(self) -> dict[str, str]:
        """Every site of this model: name -> axes, e.g. "blocks.3.attn.hook_pattern":
        "batch head query key".
        """
        return self._sites.shapes()

    def chat_tokens(
        self,
        prompts: OneOrMorePrompts,
        system: str | None = None,
        response: OneOrMorePrompts | None = None,
        date: str = "26 Jul 2024",
    ) -> list[list[int]]:
        """Prompts as token lists, one for each prompt.

        prompts: one or a list. A str is an instruction and goes through the chat template; token
        lists stay as they are. system: a system message for the instructions. response: a text or
        tokens that are appended, one for all or one for each prompt. date: what templates that
        print a date are given; it is fixed, so that they give the same tokens every day.
        Raises TypeError for what is neither text nor tokens; ValueError for no prompts, another
        number of responses, tokens that begin with two BOS, and texts without a tokenizer or a chat
        template.
        """
        if self.tokenizer is not None:
            return self.tokenizer.chat_tokens(prompts, system=system, response=response, date=date)
        from ..loading.prompt_rows import prompt_list

        rows = prompt_list(prompts)
        if any(isinstance(r, str) for r in rows) or isinstance(response, str) or system is not None:
            self._need_tokenizer("a text prompt")
        answers: list[Any] = [None] * len(rows) if response is None else prompt_list(response)
        answers *= len(rows) if len(answers) == 1 else 1
        return [[*map(int, r), *(a or [])] for r, a in zip(rows, answers)]

    @property
    def post_instruction_length(self) -> int:
        """Tokens that the template puts after the instruction: candidate positions of a steering
        vector are -length..-1.
        """
        return len(self._need_tokenizer("the chat template").post_instruction_tokens)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, and this model was loaded without one (no"
                " tokenizer.json, or a GGUF tokenizer that is not known): pass token lists instead"
            )
        return self.tokenizer

    # -- running -----------------------------------------------------------------------------------

    def run(
        self,
        prompts: OneOrMorePrompts,
        responses: OneOrMorePrompts | None = None,
        *,
        edits: Edits = (),
        capture: str | Iterable[str] = (),
        logits: str | None = "all",
        freeze: str | None = None,
        ablate: str | None = None,
        freeze_layers: Iterable[int] | None = None,
    ) -> Run:
        """One teacher-forced forward pass.

        prompts: a str, a token list, or a list of these. responses: one per prompt (text or
        tokens), after it. edits: one list for all rows, or one list per row. capture: site names or
        patterns ("blocks.*.hook_resid_post"). logits: "all" [B, S, V], "last" [B, V] or None.
        freeze: None, "qk", "ov", "mlp"; ablate: None, "svv", "mlp_direct" (docs/method.md section
        6; exactly one Steer edit a row); freeze_layers: act only in these layers instead of all
        from the steering layer on.
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
        prompts: OneOrMorePrompts,
        *,
        max_new_tokens: int = 128,
        edits: Edits = (),
        cache_edits: Any = (),
        freeze: str | None = None,
        ablate: str | None = None,
        freeze_layers: Iterable[int] | None = None,
        circuit: Any = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Iterable[str] | None = None,
        ignore_eos: bool = False,
        capture: str | Iterable[str] = (),
        batch_size: int | None = None,
        on_token: Callable[[int, int, str], object] | None = None,
        progress: ProgressLike = True,
    ) -> list[Generation]:
        """Continues every prompt; returns one Generation each, in the order of the prompts.

        prompts: as in `run`. max_new_tokens: of an answer. edits, freeze, ablate, freeze_layers: as
        in `run`, valid for decoded tokens too. cache_edits: `vs.kv.CacheSteer`s, one list for all
        rows or one per row, applied once, after the prompt. circuit: a Circuit; the row's one Steer
        edit acts along its edges only, all else is as in the base run of the same tokens
        (docs/method.md section 5); other edits must lie below that layer. temperature: divides the
        logits; 0 is greedy. top_k: tokens to draw from (0: all). top_p: of those, the fewest that
        reach this probability (1: all). seed: of the draws, with the row's number. stop: texts, cut
        from .text and kept in .tokens, matched against the text with special tokens. ignore_eos: do
        not stop at end tokens. capture: sites at new tokens. batch_size: rows at once (at most 64).
        on_token(row, token, text): called for every new token. progress: True, False or
        callable(done, total). Raises ValueError, TypeError and KeyError before any work;
        DeviceError. Ctrl-C raises KeyboardInterrupt; the model stays usable.
        """
        from .generation import generate

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
            cache_edits=cache_edits,
        )

    def gradients(
        self,
        prompts: OneOrMorePrompts,
        responses: OneOrMorePrompts | None = None,
        *,
        of: Any,
        at: str | Iterable[str],
        edits: Edits = (),
        progress: ProgressLike = True,
    ) -> Gradients:
        """d(scalar)/d(site), one scalar a row, computed on the device with respect to activations.

        of: vs.LogitDiff(position, a, b), vs.LogProb(positions, tokens) or vs.KL(reference_logits,
        positions); one for all rows or a list with one a row. at: site names or patterns; the
        gradient is with respect to the captured value (after edits), shaped and left-padded as
        `run[site]`; at a site that several later inputs read (the stream) it is the whole gradient.
        edits: as in `run`; no gradient passes to what an edit overwrote.
        Returns Gradients (`grads[site]`, `.values` float64 [B]). Raises ValueError, TypeError,
        KeyError before any work (no gradient passes an edit of scales, scores or patterns);
        DeviceError. Source: docs/method.md section 5.
        """
        from .gradients import gradients

        self._check_open()
        return gradients(self, prompts, responses, of=of, at=at, edits=edits, progress=progress)

    def _check_open(self) -> None:
        try:
            self._engine.plan()
        except ValueError:
            raise ValueError(
                "this model is closed: load it again with Model.from_pretrained"
            ) from None

    def profile(self) -> Profile:
        """What the calls of a block cost: `with model.profile() as p: model.run(...)`, then
        `print(p)`. Counts of dispatches, barriers and submissions; bytes, operations and device
        seconds of every kernel; the host's seconds. See `Profile`.
        """
        from .profile import Profile

        return Profile(self)

    # -- inside ------------------------------------------------------------------------------------

    def _run_cache(
        self, lengths: Sequence[int], double: int
    ) -> tuple[extension.Cache, UInt32Array]:
        """(cache, first slot of every engine row) for rows of these lengths, each of them `double`
        engine rows. Slots of finished rows are used again: the cache is a ring, longer than one
        chunk of tokens and the rows that reach into it.
        """
        from .device import _engine

        longest, total = max(lengths) * double, sum(lengths) * double
        size = min(total, 2 * self._engine.plan()["chunk"] + 3 * longest)
        cache = self._cache  # another thread may replace it meanwhile
        if cache is None or cache[1] < size:
            self._cache = cache = None
            self._cache = cache = (_engine().Cache(self._engine, size), size)
        slots: list[int] = []
        at = 0
        for n in lengths:
            if at + n * double > size:
                at = 0
            slots += [at + i * n for i in range(double)]
            at += n * double
        return cache[0], np.array(slots, np.uint32)

    @cached_property
    def _bias_logits(self) -> Float32Array | None:
        from .finite import bias_logits

        return bias_logits(self)

    @cached_property
    def _layer_inputs(self) -> LayerInputs:
        from .resume import LayerInputs

        return LayerInputs(self)
