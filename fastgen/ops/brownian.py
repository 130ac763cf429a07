"""Brownian motion as a function of (seed, sample id, time, element): a tree without memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from .. import backends, checks
from ..plan import INPUTS, MAX_OUTPUTS, ROW_FLOATS, Plan
from . import kernel

BROWNIAN = 7  # its stream in the noise contract
DEPTH = 23  # of the tree: times are multiples of 2^-DEPTH
_TICKS = 1 << DEPTH
_NOISE = 8 + MAX_OUTPUTS * len(INPUTS)


def brownian(
    shape: Sequence[int],
    start: float,
    end: float,
    *,
    seed: int | Sequence[int] | Tensor,
    sample_ids: Sequence[int] | Tensor | None = None,
    normalized: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """W(end) - W(start) of a standard Brownian motion W on [0, 1], one an element.

    The same W for the same seed and sample id, however the time between is cut into steps: Levy's
    construction, W(t) = t z_0 + sum of the tent functions of dyadic intervals, each times a normal
    of its own (stream 7 of the noise contract, the interval's number as step). At most 47 normals
    an element are drawn, and none is kept.

    start, end: in [0, 1], rounded to multiples of 2^-23. normalized: divided by
    sqrt(|end - start|), a standard normal. The rest as for ``randn``.

    Returns (B, ...). Raises TypeError or ValueError for what does not fit, and for normalized where
    the times are the same multiple.
    """
    first, last = _ticks("start", start), _ticks("end", end)
    shape = checks.shape(shape)
    device = torch.empty(0, device=device).device
    key = checks.seed(seed, shape[0], device)
    ids = checks.sample_ids(sample_ids, shape[0], device)
    if normalized and first == last:
        raise ValueError(f"start, end: {start} and {end} are less than 2^-{DEPTH} apart")
    name = backends.choose("step", backend, device, torch.float32)
    made = motion(shape, first, last, normalized, key, ids, device, name)
    return made if dtype is None else made.to(dtype)


def _ticks(name: str, time: float) -> int:
    if not 0.0 <= checks.number(name, time) <= 1.0:
        raise ValueError(f"{name}: got {time}, expected a number in [0, 1]")
    return round(time * _TICKS)


def ticks_of(plan: Plan, seed: object) -> list[int]:
    """The times of a plan's levels on its Brownian path, sigma / (alpha + sigma), in ticks."""
    if seed is None:
        raise ValueError("seed: got None, but the Brownian path is drawn from it")
    levels = [plan.level(index) for index in range(len(plan) + 1)]
    times = [round(sigma / (alpha + sigma) * _TICKS) for alpha, sigma in levels]
    solver = plan.solver or "the plan"
    for index, row in enumerate(plan.rows):
        if row.noises > 1:
            raise ValueError(f"brownian: {solver} takes {row.noises} normals an element at rows"
                             f"[{index}], where a path gives one")  # fmt: skip
        if row.noises and times[index] <= times[index + 1]:
            raise ValueError(f"brownian: {solver} adds noise at rows[{index}] without a fall of "
                             "the noise level (churn, a return, a stage below its step's end), "
                             "which no path has")  # fmt: skip
    return times


def motion(
    shape: Sequence[int],
    start: int,
    end: int,
    normalized: bool,
    key: kernel.Seed,
    ids: int | Tensor,
    device: torch.device,
    backend: str,
) -> Tensor:
    """``brownian`` of checked arguments, with times in ticks."""
    scale = (abs(end - start) / _TICKS) ** -0.5 if normalized else 1.0
    total = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
    nodes = _increment(start, end)
    rows = _rows([scale * factor for _, factor in nodes], device)
    for row, (node, _) in zip(rows.split(1), nodes, strict=True):
        kernel.run(shape, row, backend=backend, dtypes=(torch.float32,), device=device, x=total,
                   seed=key, sample_ids=ids, step=node, streams=(BROWNIAN,),
                   out=[total])  # fmt: skip
    return total


def _increment(start: int, end: int) -> list[tuple[int, float]]:
    """(node, factor) of W(end) - W(start), times in ticks. Node 0 is W(1); 2^l + k the k-th
    interval, of 2^-l, whose tent has the height sqrt(2^-l) / 2."""
    parts = [(0, (end - start) / _TICKS)]
    for time, sign in ((end, 1.0), (start, -1.0)):
        for level in range(DEPTH):
            width = _TICKS >> level
            k, rest = divmod(time, width)
            if rest:
                tent = min(rest, width - rest) / width
                parts.append(((1 << level) + k, sign * tent * 2.0 ** (-0.5 * level)))
    parts.sort(key=itemgetter(0))
    summed = [(node, sum(f for _, f in same)) for node, same in groupby(parts, itemgetter(0))]
    return [(node, factor) for node, factor in summed if factor != 0.0]


def _rows(factors: list[float], device: torch.device) -> Tensor:
    """(n, 72): each adds its normal, times its factor, to x."""
    rows = np.zeros((len(factors), ROW_FLOATS), dtype=np.float32)
    rows[:, 2], rows[:, 3] = -np.inf, np.inf
    rows[:, 8] = 1.0
    rows[:, _NOISE] = factors
    return torch.from_numpy(rows).to(device)
