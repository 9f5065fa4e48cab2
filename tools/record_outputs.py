"""Record the exact bits that the public calls return, and compare another tree with the recording.

    tools/record_outputs.py write FILE.json     # run every call and write the recording
    tools/record_outputs.py compare FILE.json   # run again; print each difference; exit 1 if any

A change that only moves or renames code must leave every bit as it is. Write a recording on the
tree before the change, then compare on the tree after it. Only the public interface is called, so
the same file runs on both; PYTHONPATH says which tree is meant:

    PYTHONPATH=OLD/python .venv/bin/python tools/record_outputs.py write before.json
    PYTHONPATH=NEW/python .venv/bin/python tools/record_outputs.py compare before.json

The calls are in tools/recorded_calls.py and tools/recorded_circuits.py. A recording maps
"model/call/result" to the SHA-256 of the result's bytes, its dtype, its shape and its first values.
A call that raises is recorded as the error, and then `write` exits with 1 too.

The models are the two bundled ones and, where .models/ beside this folder holds it, the SmolLM2
file that `make models` fetches. `--models NAME,...` runs fewer of them. All seeds are fixed.

Bits may rightly differ between devices, drivers, vector widths of lavapipe and kernel families. The
recording carries all of these, and `compare` says which of them differ. The kernel family is pinned
to `texels` unless VKSTEER_KERNELS is set, so that no measured speed can choose another one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("VKSTEER_KERNELS", "texels")

import numpy as np
import recorded_calls  # noqa: F401  registers its calls
import recorded_circuits  # noqa: F401  registers its calls
from recorded_case import CALLS, GGUF, MODELS, Case

FORMAT = 1
FIRST = 4  # values of each result that the recording shows


# -- digests -----------------------------------------------------------------------------------


def described(value) -> dict:
    """The digest of one result: an array's bytes, or the exact JSON of anything else."""
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        data, dtype, shape = value.tobytes(), str(value.dtype), list(value.shape)
        first = value.ravel()[:FIRST].tolist()
    else:
        text = json.dumps(value, sort_keys=True, default=jsonable)
        data, dtype, shape, first = text.encode(), "json", [len(text)], text[:80]
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "dtype": dtype,
        "shape": shape,
        "first": first,
    }


def jsonable(value):
    """What json.dumps calls for values that it does not know."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no exact text: return its parts")


# -- the recording -----------------------------------------------------------------------------


def setting_of(model) -> dict:
    """What bits may rightly depend on, read from an open model."""
    d = model.device
    return {
        "device": d.name,
        "driver": d.driver,
        "uuid": d.uuid,
        "kernels": ", ".join(model.kernels),
        "LP_NATIVE_VECTOR_WIDTH": os.environ.get("LP_NATIVE_VECTOR_WIDTH", ""),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def recorded(names, say) -> dict:
    """Run every call on every model: {"setting": ..., "outputs": {name: digest}}."""
    outputs, setting = {}, {}
    for name in names:
        case = Case(name)
        setting |= setting_of(case.model) | {"models": list(names)}
        for function in CALLS:
            start = time.perf_counter()
            key = f"{name}/{function.__name__}"
            try:
                found = function(case)
            except Exception as error:  # recorded, so that one failure hides no other difference
                found = {"raised": f"{type(error).__name__}: {error}"}
                print(f"{key}: raised {found['raised']}", file=sys.stderr)
            outputs |= {f"{key}/{what}": described(value) for what, value in found.items()}
            say(f"{key}: {len(found)} results, {time.perf_counter() - start:.1f} s")
        case.model.close()
    return {"format": FORMAT, "setting": setting, "outputs": outputs}


def differences(before: dict, after: dict) -> list[str]:
    """One line for each result that is missing, new or different."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'not in the recording' if old is None else 'missing now'}")
        elif any(old[key] != new[key] for key in ("sha256", "dtype", "shape")):
            was, now = ([d["dtype"], d["shape"], d["first"]] for d in (old, new))
            lines.append(f"{name}:\n    recorded {was}\n    now      {now}")
    return lines


def compare(path: Path, now: dict) -> int:
    then = json.loads(path.read_text())
    if then.get("format") != FORMAT:
        raise SystemExit(f"{path} is no recording of this version: write it anew")
    before, models = then["outputs"], now["setting"]["models"]
    chosen = {k: d for k, d in before.items() if k.split("/")[0] in models}
    lines = differences(chosen, now["outputs"])
    print("\n".join(lines))
    changed = {
        k: (v, now["setting"].get(k))
        for k, v in then["setting"].items()
        if k != "models" and v != now["setting"].get(k)
    }
    for key, (was, is_now) in changed.items():
        print(f"{key}: recorded with {was!r}, now {is_now!r}; bits may differ rightly")
    print(f"{len(lines)} of {len(now['outputs'])} results differ from {path}")
    return 1 if lines else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", help="some of " + ", ".join(MODELS) + ", joined by commas")
    parser.add_argument("--verbose", action="store_true", help="print each call and its time")
    arguments = parser.parse_args()
    default = [n for n in MODELS if n != "SmolLM2" or GGUF.exists()]
    names = arguments.models.split(",") if arguments.models else default
    if unknown := set(names) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore", UserWarning)  # of the software device, and of few samples
    now = recorded(names, print if arguments.verbose else lambda text: None)
    if arguments.action == "compare":
        return compare(arguments.file, now)
    arguments.file.write_text(json.dumps(now, indent=1) + "\n")
    print(f"{len(now['outputs'])} results of {len(CALLS)} calls on {', '.join(names)}")
    return 1 if any(name.endswith("/raised") for name in now["outputs"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
