"""Steering target atoms: of the difference between chosen and rejected answers, only the features
of a sparse autoencoder that differ much and often (docs/target-atoms.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.checks import is_number
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import BoolArray, Float32Array, Float64Array, ProgressLike
from ..inputs.dosing import captured_rows
from ..inputs.prompts import as_list, as_tokens
from ..inputs.vectors import SteeringVector
from .autoencoder import SAE
from .encoding import MAX_MEMORY, Encoder, grouped

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Tokens whose activations wait for the encoder.
GROUP_TOKENS = 4096
TIES, BY = ("strict", "authors"), ("both", "amplitude", "frequency")


@dataclass(frozen=True, eq=False)
class Selection:
    """Which features are kept: kept bool [F]; score float64 [F], the signed frequency score; t_f
    and t_a, what |score| and the amplitude must reach; n_nonzero, how many scores are not 0.
    """

    kept: BoolArray
    score: Float64Array
    t_f: float
    t_a: float
    n_nonzero: int


def select(
    amplitude: npt.ArrayLike,
    frequency: npt.ArrayLike,
    keep: float = 0.35,
    ties: str = "strict",
    by: str = "both",
) -> Selection:
    """The features that differ enough in amplitude and in frequency (Wang et al., "Beyond Prompt
    Engineering: Robust Behavior Control in LLMs via Steering Target Atoms", 2025).

    amplitude: the mean activation on chosen answers minus that on rejected ones [F]. frequency: the
    number of chosen answers in which a feature is active minus that of rejected ones [F]. Both are
    scaled to -1 ... 1, sign(x) (|x| - min|x|) / (max|x| - min|x|), 0 where all |x| are equal. The
    score of a feature is its scaled frequency where both have the same sign, else 0. A feature is
    kept where |score| and |amplitude| reach the values at rank floor(keep F) of all F, from the
    largest on.

    keep: the share of ranks, above 0; 1 keeps all. ties: "strict" (a score or amplitude of 0 never
    passes) or "authors" (the published code: where the threshold is 0, all pass). by: "both",
    "amplitude" or "frequency", which of the two decides.

    Returns a Selection. Raises ValueError for arrays of different lengths, values that are not
    finite, and arguments out of range.
    """
    a, f = (np.asarray(x, dtype=np.float64) for x in (amplitude, frequency))
    if a.ndim != 1 or a.shape != f.shape or not a.size:
        raise ValueError(f"amplitude and frequency must be [F], not {a.shape} and {f.shape}")
    if not (np.isfinite(a).all() and np.isfinite(f).all()):
        raise ValueError("amplitude or frequency holds values that are not finite")
    check_choice(keep, ties, by)
    scaled_a, scaled_f = _scaled(a), _scaled(f)
    score = np.where(np.sign(scaled_a) * np.sign(scaled_f) > 0, scaled_f, 0.0)
    n_nonzero = int(np.count_nonzero(score))
    rank = int(keep * a.size)
    if rank >= a.size:
        return Selection(np.ones(a.size, bool), score, 0.0, 0.0, n_nonzero)
    t_f, t_a = (float(np.sort(np.abs(x))[::-1][rank]) for x in (score, a))
    often, much = (
        (np.abs(x) >= t) & ((x != 0) | (ties == "authors")) for x, t in ((score, t_f), (a, t_a))
    )
    kept = often & much if by == "both" else much if by == "amplitude" else often
    return Selection(kept, score, t_f, t_a, n_nonzero)


def check_choice(keep: Any, ties: Any, by: Any) -> None:
    """Raises ValueError for arguments of `select` that are out of range."""
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"keep must be a share of the ranks, above 0 and at most 1, not {keep!r}")
    if ties not in TIES:
        raise ValueError(f"ties={ties!r}: use 'strict' or 'authors'")
    if by not in BY:
        raise ValueError(f"by={by!r}: use 'both', 'amplitude' or 'frequency'")


def _scaled(x: Float64Array) -> Float64Array:
    size = np.abs(x)
    low, high = size.min(), size.max()
    out: Float64Array = np.sign(x) * (size - low) / (high - low) if high > low else np.zeros(x.size)
    return out


def target_atoms(
    model: Model,
    sae: SAE,
    pairs: Sequence[tuple[Any, Any, Any]],
    *,
    keep: float = 0.35,
    ties: str = "strict",
    by: str = "both",
    residual: bool = False,
    max_memory: int = MAX_MEMORY,
    progress: ProgressLike = True,
) -> SteeringVector:
    """A steering vector of those features of an SAE that tell chosen from rejected answers
    (docs/target-atoms.md; `select` says which are kept).

    pairs: (prompt, chosen, rejected), texts or token lists; prompts that are texts go through the
    chat template, answers follow them as they are. Only answer tokens count: of each answer the
    mean of its tokens' features, active where that mean is above 0. The vector is the sum over kept
    features of amplitude difference times decoder row, with the norm of the plain difference of
    mean activations, the mean over pairs of (chosen - rejected), at the same site. keep, ties, by:
    as in `select`.
    residual: add what the dictionary does not hold of the plain difference, that difference minus
    the decoded difference of all features. max_memory: bytes that encoding may take beside the
    encoder's weights; [tokens, F] is never held. progress: True, False or callable(done, total), in
    answers.

    Returns a SteeringVector of the layer whose resid_pre the SAE's site is (resid_post of block l
    is layer l + 1); meta["atoms"] has the kept features and their coefficients, n_kept, t_f, t_a,
    n_nonzero, the norms before scaling, and the SAE's hash. Raises ValueError before any work for
    pairs that are none, empty answers, an SAE of another width or layer, and arguments out of
    range; and where no feature passes or the plain difference is zero.
    """
    check_choice(keep, ties, by)
    site, layer = sae.check(model), sae.layer
    rows, lengths = _rows(model, pairs)
    encoder = Encoder(model, sae, max_memory)
    with Progress(progress, len(rows), "atoms") as bar:
        sums = _Sums(sae)
        for answers in grouped(_answers(model, rows, lengths, site, sae.width), GROUP_TOKENS):
            sums.add(answers, encoder.sums(answers))
            bar.step(len(answers))
    amplitude, frequency, plain = sums.differences()
    chosen = select(amplitude, frequency, keep, ties, by)
    asked: dict[str, Any] = dict(keep=float(keep), ties=ties, by=by, residual=bool(residual))
    direction, atoms = _made(sae, amplitude, chosen, plain, residual)
    meta = provenance(
        model, pairs_hash=digest(rows, lengths), n_pairs=len(rows) // 2, atoms=asked | atoms
    )
    return SteeringVector(direction, layer, method="sta", meta=meta)


def _made(
    sae: SAE, amplitude: Float64Array, chosen: Selection, plain: Float64Array, residual: bool
) -> tuple[Float32Array, dict[str, Any]]:
    """(the vector with the norm of the plain difference, what meta["atoms"] says of it)."""
    kept = np.flatnonzero(chosen.kept)
    direction: Float64Array = amplitude[kept] @ sae.W_dec[kept].astype(np.float64)
    if residual:
        direction = direction + plain - amplitude @ sae.W_dec.astype(np.float64)
    norm, plain_norm = float(np.linalg.norm(direction)), float(np.linalg.norm(plain))
    if plain_norm == 0:
        raise ValueError(
            f"chosen and rejected answers have the same mean activation at {sae.site}: nothing to"
            " steer"
        )
    if norm == 0:
        raise ValueError(
            f"no feature passed: {len(kept)} kept of {sae.n_features},"
            f" {chosen.n_nonzero} scores are not 0, t_f={chosen.t_f:.4g}, t_a={chosen.t_a:.4g}."
            " Give more pairs or a larger keep"
        )
    atoms = {
        "n_features": sae.n_features,
        "n_kept": len(kept),
        "t_f": chosen.t_f,
        "t_a": chosen.t_a,
        "n_nonzero": chosen.n_nonzero,
        "norm": norm,
        "plain_norm": plain_norm,
        "sae_hash": sae.fingerprint,
        "site": sae.site,
        "features": kept.tolist(),
        "coefficients": amplitude[kept].tolist(),
    }
    return (direction * (plain_norm / norm)).astype(np.float32), atoms


class _Sums:
    """Means over pairs, added up in float64 in the order of the answers, so that they do not
    depend on groups: chosen and rejected in turn.
    """

    def __init__(self, sae: SAE) -> None:
        self.n = 0
        self.means: Float64Array = np.zeros((2, sae.n_features))
        self.active: Float64Array = np.zeros((2, sae.n_features))
        self.plain: Float64Array = np.zeros((2, sae.width))

    def add(self, answers: list[Float32Array], sums: Float64Array) -> None:
        for h, total in zip(answers, sums, strict=True):
            side = self.n % 2
            mean = total / len(h)
            self.means[side] += mean
            self.active[side] += mean > 0
            self.plain[side] += h.mean(axis=0, dtype=np.float64)
            self.n += 1

    def differences(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """(amplitude [F], frequency [F], plain difference [D]), chosen minus rejected."""
        pairs = self.n // 2
        return (
            (self.means[0] - self.means[1]) / pairs,
            self.active[0] - self.active[1],
            (self.plain[0] - self.plain[1]) / pairs,
        )


def _rows(model: Model, pairs: Sequence[tuple[Any, Any, Any]]) -> tuple[list[list[int]], list[int]]:
    """(prompt and answer, chosen and rejected of each pair in turn; tokens of their prompts)."""
    given = list(pairs)
    if not given:
        raise ValueError("pairs is empty: give at least one (prompt, chosen, rejected)")
    for i, pair in enumerate(given):
        if not isinstance(pair, (tuple, list)) or len(pair) != 3:
            raise ValueError(f"pairs[{i}] must be (prompt, chosen, rejected), not {pair!r}")
    prompts = as_tokens(model, [pair[0] for pair in given], "prompts of pairs")
    rows, lengths = [], []
    for i, (prompt, pair) in enumerate(zip(prompts, given, strict=True)):
        for name, answer in (("chosen", pair[1]), ("rejected", pair[2])):
            row = prompt + _tokens(model, answer, f"pairs[{i}] {name}")
            if len(row) > model.config.n_ctx:
                raise ValueError(
                    f"pairs[{i}] {name}: prompt and answer have {len(row)} tokens, the model's"
                    f" context holds {model.config.n_ctx}"
                )
            rows.append(row)
            lengths.append(len(prompt))
    return rows, lengths


def _tokens(model: Model, answer: Any, what: str) -> list[int]:
    (given,) = as_list([answer], what)
    if not isinstance(given, str):
        return given
    if model.tokenizer is None:
        raise ValueError(f"{what} is a text, and this model has no tokenizer: give token ids")
    found = [int(t) for t in model.tokenizer.encode(given, add_bos=False)]
    if not found:
        raise ValueError(f"{what} is {given!r}, which makes no token")
    return found


def _answers(
    model: Model, rows: list[list[int]], lengths: list[int], site: str, width: int
) -> Iterator[Float32Array]:
    """Activations of the answer tokens of each row: the prompt's are left out by their number."""
    captured = captured_rows(model, rows, site, width)
    for h, n in zip(captured, lengths, strict=True):
        yield h[n:]
