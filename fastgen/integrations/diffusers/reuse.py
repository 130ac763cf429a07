"""The rows of the last run, and whether a new one is the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...plan import Row


class Run(NamedTuple):
    """The step where a run began, what its rows were made from, the rows (None where the run is
    diffusers' own), and what else was made with them."""

    start: int
    state: dict[str, Any]
    rows: list[Row] | None
    made: dict[str, Any]


class Last:
    """Holds the last run: new timesteps are often the same."""

    run: Run | None = None


def own(value: Any) -> Any:
    """A container of its own with the same contents."""
    return type(value)(value) if type(value) in (list, dict) else value


def copied(value: Any) -> Any:
    """Of what changes in place, a copy; not of images."""
    small = isinstance(value, Tensor) and value.is_cpu and value.numel() <= 1 << 12
    return value.clone() if small else own(value)


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same, as far as that is known without a wait."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        both = one.is_cpu and other.is_cpu and one.dtype == other.dtype
        if not both or one.shape != other.shape:
            return False
        return torch.equal(one, other) or bool(
            ((one == other) | (one.isnan() & other.isnan())).all()
        )
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)
