"""Comparisons whose failure names the worst index and both values."""

from __future__ import annotations

import numpy as np

#: Largest error allowed for logits and every site, as a share of the largest value of the array.
#: Largest errors met on lavapipe: 5.1e-6 (every site of every family), 1.4e-6 (frozen runs).
BOUND = 2e-4


def numpy(x):
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)


def share(got, want, name=""):
    """(largest error as a share of the largest absolute value of `want`, its index). Infinities
    must be in the same places.
    """
    got, want = numpy(got).astype(np.float64), numpy(want).astype(np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return 0.0, None
    bad = (np.isinf(got) | np.isinf(want)) & (got != want) | np.isnan(got) | np.isnan(want)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{name}: at {at}: got {got[at]}, expected {want[at]} ({int(bad.sum())} such places of"
            f" {bad.size})"
        )
    finite = np.isfinite(want)
    error = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, want, 0)), 0.0)
    largest = np.abs(want[finite]).max() if finite.any() else 0.0
    at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
    return (error[at] / largest if largest > 0 else error[at]), at


def assert_close(name, got, want, bound=BOUND):
    value, at = share(got, want, name)
    if value > bound:
        raise AssertionError(
            f"{name}: largest error is {value:.3g} of the largest value (bound {bound:.3g}); worst"
            f" at {at}: got {numpy(got)[at]!r}, expected {numpy(want)[at]!r}"
        )
    return value


def real(name, array, row, length):
    """One row of a left-padded array without its padding: the last `length` positions (of queries
    and of keys for scores and patterns).
    """
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        return array[row][:, -length:, -length:]
    return array[row][-length:]


def padding(name, array, row, length):
    """The padding of one row of a left-padded array."""
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        part = array[row].copy()
        part[:, -length:, -length:] = 0
        return part
    return array[row][:-length] if length < array.shape[1] else array[row][:0]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and np.array_equal(
            np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)
        )
    )


def assert_same_bits(name, a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype, (
        f"{name}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
    )
    if not same_bits(a, b):
        differ = np.ascontiguousarray(a).view(np.uint32) != np.ascontiguousarray(b).view(np.uint32)
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.size} values differ in their bits, first at"
            f" {at}: {a[at]!r} and {b[at]!r}"
        )
