"""Names for the kinds of arrays that the package passes around."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

#: An array whose dtype and shape the docstring states.
Array: TypeAlias = npt.NDArray[Any]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Int32Array: TypeAlias = npt.NDArray[np.int32]
UInt32Array: TypeAlias = npt.NDArray[np.uint32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

#: What names a file or a folder.
PathLike: TypeAlias = "str | os.PathLike[str]"

#: `progress` of a long call: False, True (a bar on stderr), or callable(done, total).
ProgressLike: TypeAlias = bool | Callable[[int, int], object]

#: Prompts of a call: texts, or lists of token ids.
Prompts: TypeAlias = Sequence[str | Sequence[int]]

#: One prompt: a text, or token ids.
Prompt: TypeAlias = "str | Sequence[int] | npt.NDArray[np.integer[Any]]"

#: One prompt or several, as `Model.run` takes them.
OneOrMorePrompts: TypeAlias = "Prompt | Sequence[Prompt]"
