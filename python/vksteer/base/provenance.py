"""Provenance of a result: hashes of what went into it, and the versions that made it."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import numpy as np

from .._version import __version__


def digest(*parts: Any) -> str:
    """SHA-256 (hex) of texts, numbers, lists and arrays, as JSON: the same on every machine."""

    def plain(x: Any) -> Any:
        return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else str(x)

    return hashlib.sha256(json.dumps(parts, default=plain, sort_keys=True).encode()).hexdigest()


def fingerprint(model: object) -> str | None:
    """The model's hash over weights and config; None for a Config, which has no weights."""
    return getattr(model, "fingerprint", None)


def identity(model: object) -> str:
    """A hash (hex) of all of a model that results depend on, for the keys of stored work: the
    contents of its weight files, its config and ends of text, the tokenizer with its chat template
    and variables, how matrices are held, and how it was loaded.

    The fingerprint alone is a sample of the weights: models that differ in other matrices share it.
    """
    return digest(
        fingerprint(model),
        getattr(model, "weights_hash", None),
        getattr(model, "dtype", None),
        getattr(model, "eos_ids", None),
        fingerprint(getattr(model, "tokenizer", None)),
        loaded_with(model),
    )


def identity_for(out: object, model: object) -> str:
    """`identity` where work is stored (out is not None), else "": weight files are read for it."""
    return "" if out is None else identity(model)


def kernel_names(model: object) -> str | None:
    """The kernel families in use, with commas; None for a Config, which runs nothing."""
    names: Any = getattr(model, "kernels", None)
    return names if names is None or isinstance(names, str) else ", ".join(names)


def loaded_with(model: object) -> dict[str, Any]:
    """{"config_overrides": {...}, "template_options": {...}, "precision": "fast"}, each where the
    model was loaded with it (`Model.from_pretrained`).
    """
    names = ("config_overrides", "template_options")
    loaded: dict[str, Any] = {
        name: dict(value) for name in names if (value := getattr(model, name, None))
    }
    fast = getattr(model, "precision", None) == "fast"
    return loaded | {"precision": "fast"} if fast else loaded


def provenance(model: Any, **more: Any) -> dict[str, Any]:
    """Metadata of a result: hashes of model and tokenizer, architecture, versions, what of the
    model's files was overridden (`loaded_with`), and `more`.
    """
    tokenizer = getattr(model, "tokenizer", None)
    return {
        "model": str(getattr(model, "name", "") or ""),
        "model_hash": fingerprint(model),
        "tokenizer_hash": getattr(tokenizer, "fingerprint", None),
        "architecture": getattr(model.config, "model_type", None),
        "versions": {
            "vksteer": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        **loaded_with(model),
        **more,
    }
