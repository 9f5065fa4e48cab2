"""Where the engine's tensors are in a GGUF file: in which tensor, which rows, in which order."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import ModelError
from .config import Config
from .gguf_file import GGUFFile, GGUFTensor
from .gguf_layouts import LAYOUTS, gguf_name
from .tensor_names import engine_tensors


class Piece(NamedTuple):
    """A tensor of the engine as a part of a file's tensor."""

    shape: tuple[int, ...]  # as the engine has it
    tensor: GGUFTensor | None  # None: the gains of a norm without parameters, which are 1
    first: int = 0  # of the rows of a matrix, or of the elements of a vector
    heads: int = 0  # heads whose rows are interleaved for rotation; 0: rows as they are


#: Tensors beside those of the layers that a model may have without our reading them.
_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_STRAY = re.compile(r"(blk|output|output_norm|token_embd|position_embd|rope_\w+)\.")


def match(file: GGUFFile, config: Config) -> tuple[dict[str, Piece], tuple[str, ...]]:
    """({engine name: its place}, names of tensors that are not needed), in the forward pass's
    order. Raises ModelError naming the tensor that is missing, has another shape, or belongs to no
    part of the model.
    """
    return _Matcher(file, config).run()


class _Matcher:
    def __init__(self, file: GGUFFile, config: Config) -> None:
        self.file, self.config, self.tensors = file, config, file.tensors
        self.arch = str(file.metadata["general.architecture"])
        self.layout = LAYOUTS[self.arch]
        self.used: set[str] = set()

    def run(self) -> tuple[dict[str, Piece], tuple[str, ...]]:
        pieces = {name: self.piece(name, shape) for name, shape in engine_tensors(self.config)}
        extra = tuple(n for n in self.tensors if n not in self.used and n != _ROPE[0])
        if self.layout.model_type == "phi3":
            extra = tuple(n for n in extra if n not in _ROPE)
        for name in extra:
            if _STRAY.match(name) and not name.endswith(".attn_rot_embd"):
                raise ModelError(
                    f"{self.file.path}: tensor {name[:200]!r} belongs to no part of a"
                    f" {self.config.architecture} with these metadata; ignoring it would change the"
                    " numbers"
                )
        return pieces, extra

    def piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        part = name.rpartition(".")[2]
        if part in ("ln1", "ln2", "ln_final") and self.layout.model_type == "olmo":
            return Piece(shape, None)
        fused = self.fused(name, part)
        if fused is not None:
            return fused
        stored = gguf_name(name, self.arch)
        if stored is None:
            raise ModelError(
                f"{self.file.path}: GGUF files of architecture {self.arch!r} have no tensor for"
                f" {name!r}, which these metadata ask for"
            )
        if part in ("ln2", "bln2") and self.config.parallel and self.layout.shared_norm:
            stored = stored.replace("ffn_norm", "attn_norm")
        tensor = self.need(stored, shape, flat=part in ("q_norm", "k_norm"))
        return Piece(shape, tensor, heads=self.heads(part))

    def fused(self, name: str, part: str) -> Piece | None:
        """The place in a tensor that holds several parts; None where each has its own."""
        c = self.config
        layer, kind = name.rpartition(".")[0].replace("l.", "blk.", 1), "weight"
        q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
        if part in ("bq", "bk", "bv", "bgate", "bup"):
            kind = "bias"
        if part[0] in "wb" and part[1:] in ("q", "k", "v") and self.layout.fused_qkv:
            stored, rows = f"{layer}.attn_qkv.{kind}", {"q": q, "k": kv, "v": kv}
            apart = [f"{layer}.attn_{x}.{kind}" for x in rows]
        elif part[0] in "wb" and part[1:] in ("gate", "up") and self.layout.fused_gate:
            stored, rows = f"{layer}.ffn_up.{kind}", {"gate": c.d_mlp, "up": c.d_mlp}
            apart = [f"{layer}.ffn_gate.{kind}"]
        else:
            return None
        if any(x in self.tensors for x in apart):
            return None
        shape = (c.d_model,) if kind == "weight" else ()
        tensor = self.need(stored, (sum(rows.values()), *shape))
        first = sum(list(rows.values())[: list(rows).index(part[1:])])
        return Piece((rows[part[1:]], *shape), tensor, first, self.heads(part))

    def need(self, name: str, shape: tuple[int, ...], flat: bool = False) -> GGUFTensor:
        """The file's tensor. flat: one for all heads may have a row for each."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.file.path}: tensor {name!r} is missing")
        heads = tensor.shape[0] if flat and len(tensor.shape) == 2 else 0
        per_head = heads in (self.config.n_heads, self.config.n_kv_heads) and shape == (
            heads * tensor.shape[-1],
        )
        if tensor.shape != shape and not (per_head and tensor.shape[-1] == self.config.d_head):
            raise ModelError(
                f"{self.file.path}: tensor {tensor.name!r}: shape {list(tensor.shape)} contradicts"
                f" the metadata, which ask for {list(shape)}"
            )
        self.used.add(name)
        return tensor

    def heads(self, part: str) -> int:
        if not self.layout.permuted:
            return 0
        c = self.config
        return {"wq": c.n_heads, "bq": c.n_heads, "wk": c.n_kv_heads, "bk": c.n_kv_heads}.get(
            part, 0
        )
