"""The points that a run visits, from noise to data, and what a network's output means at each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from . import checks

PREDICTIONS = ("epsilon", "sample", "v", "flow", "edm")


@dataclass(frozen=True)
class Point:
    """A point of a run: x = alpha x_0 + sigma eps.

    time: what the network is told there. input_scale: c_in, what x is multiplied by for it.
    estimate: (a_x, a_e), the estimate of x_0 as a_x x + a_e e, e the network's output.
    """

    alpha: float
    sigma: float
    time: float = 0.0
    input_scale: float = 1.0
    estimate: tuple[float, float] = (0.0, 1.0)

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise level of x / alpha, as Karras et al. (2022) count it."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma): Lu et al. (2022)."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


def estimate_of(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5):
    """(a_x, a_e) of a prediction: epsilon and v by Ho et al. (2020), eq. 15, and Salimans & Ho
    (2022), appendix D, on whatever scale of x; flow: Lipman et al. (2023); edm: Karras et al.
    (2022), table 1, with c_skip and c_out."""
    checks.one_of("prediction", prediction, PREDICTIONS)
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow":  # e = eps - x_0, with alpha + sigma = 1
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "edm":
        total = sigma * sigma + sigma_data * sigma_data
        return sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)
    if prediction == "v":  # on the scale where alpha^2 + sigma^2 = 1
        total = alpha * alpha + sigma * sigma
        return alpha / total, -sigma / math.sqrt(total)
    if alpha == 0.0:
        raise ValueError(
            "alpha_bar: got 0, where epsilon prediction says nothing of x_0; use 'v' or 'sample'"
        )
    return 1.0 / alpha, -sigma / alpha


@dataclass(frozen=True)
class NoiseLevels:
    """The points of a run: what every solver takes.

    points: where the network is called, sigma / alpha falling. end: where the run ends; its sigma
    is 0 for data. at: the point of a ratio sigma / alpha between them, for solvers that look there.
    discrete: whether times are integer timesteps. initial_scale: deviation of the first sample.

    Made by ``NoiseSchedule.levels``, ``edm_levels``, ``denoiser_levels`` and ``flow_levels``.
    Raises ValueError for ratios that do not fall, or are not finite but for the first.
    """

    points: tuple[Point, ...]
    end: Point
    at: Callable[[float], Point] = field(repr=False, compare=False)
    discrete: bool = False
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        ratios = [p.ratio for p in (*self.points, self.end)]
        if len(ratios) < 2:
            raise ValueError("points: got none, expected at least one")
        if any(math.isnan(r) or r < 0.0 for r in ratios) or math.inf in ratios[1:]:
            raise ValueError(f"sigmas: expected finite numbers that are not negative, got {ratios}")
        _falling("sigma / alpha", ratios)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, steps: slice) -> NoiseLevels:
        """The levels of a part of the run: ``levels[k:]`` is what is left of it behind k steps."""
        if not isinstance(steps, slice) or steps.step not in (None, 1):
            raise TypeError(f"levels: got [{steps}], expected a slice without a step; see .points")
        first, last, _ = steps.indices(len(self))
        if first >= last:
            raise ValueError(f"levels: got [{_or(steps.start)}:{_or(steps.stop)}], which leaves no "
                             f"step of {len(self)}")  # fmt: skip
        end = self.end if last == len(self) else self.points[last]
        scale = self.points[first].sigma if 0 < first < last else self.initial_scale
        return replace(self, points=self.points[first:last], end=end, initial_scale=scale)

    def next(self, i: int) -> Point | None:
        """The point behind the i-th where the network is called, or None."""
        return self.points[i + 1] if i + 1 < len(self.points) else None

    @property
    def pairs(self) -> list[tuple[Point, Point]]:
        """(from, to) of every step."""
        return list(zip(self.points, (*self.points[1:], self.end), strict=True))


def _or(bound: int | None) -> int | str:
    return "" if bound is None else bound


def _falling(name: str, values: list[float]) -> None:
    for i, (one, next_) in enumerate(itertools.pairwise(values)):
        if not one > next_:
            raise ValueError(f"{name}: expected noise levels that fall, got {one:g} "
                             f"at {i} and {next_:g} at {i + 1}")  # fmt: skip


def numbers(values: Any) -> list[float]:
    """sigmas, (n + 1,), falling, as floats. Raises TypeError or ValueError for anything else."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"sigmas: got {type(values).__name__}, expected a sequence of floats"
        ) from None
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError("sigmas: expected at least two finite numbers, (n + 1,)")
    if (array < 0.0).any() or (array[:-1] == 0.0).any():
        raise ValueError("sigmas: expected numbers that are not negative, zero only at the end")
    levels = array.tolist()
    _falling("sigmas", levels)
    return levels


def _above_zero(name: str, value: float) -> float:
    if checks.number(name, value) <= 0.0:
        raise ValueError(f"{name}: got {value}, expected more than 0")
    return float(value)


def denoiser_levels(
    sigmas: Sequence[float] | np.ndarray, prediction: str = "sample"
) -> NoiseLevels:
    """Levels of a denoiser D(x, sigma), x = x_0 + sigma eps, as k-diffusion's models are.

    sigmas: (n + 1,), falling; the last is where the run ends. The network is told sigma.
    """

    def at(sigma: float) -> Point:
        return Point(1.0, sigma, sigma, 1.0, estimate_of(prediction, 1.0, sigma))

    *levels, last = numbers(sigmas)
    return NoiseLevels(tuple(map(at, levels)), Point(1.0, last), at, initial_scale=levels[0])


def edm_levels(sigmas: Sequence[float] | np.ndarray, sigma_data: float = 0.5) -> NoiseLevels:
    """Levels of a network F with the preconditioning of Karras et al. (2022), table 1.

        D(x, sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4)

    sigmas: (n + 1,), falling; see ``fastgen.sigmas``. sigma_data: of the data.
    """
    sigma_data = _above_zero("sigma_data", sigma_data)

    def at(sigma: float) -> Point:
        scale = 1.0 / math.sqrt(sigma * sigma + sigma_data * sigma_data)
        estimate = estimate_of("edm", 1.0, sigma, sigma_data)
        return Point(1.0, sigma, math.log(sigma) / 4.0, scale, estimate)

    *levels, last = numbers(sigmas)
    return NoiseLevels(tuple(map(at, levels)), Point(1.0, last), at, initial_scale=levels[0])


def flow_levels(sigmas: Sequence[float] | np.ndarray, scale: float = 1.0) -> NoiseLevels:
    """Levels of a velocity e = eps - x_0 on straight paths x = (1 - sigma) x_0 + sigma eps:
    Lipman et al. (2023), Liu et al. (2023), Esser et al. (2024).

    sigmas: (n + 1,), falling from 1; see ``fastgen.sigmas.flow``. The network is told scale sigma.
    """
    scale = _above_zero("scale", scale)

    def at(ratio: float) -> Point:
        return point(ratio / (1.0 + ratio) if ratio < math.inf else 1.0)

    def point(sigma: float) -> Point:
        estimate = estimate_of("flow", 1.0 - sigma, sigma)
        return Point(1.0 - sigma, sigma, scale * sigma, 1.0, estimate)

    levels = numbers(sigmas)
    if not all(0.0 <= sigma <= 1.0 for sigma in levels):
        raise ValueError(f"sigmas: expected numbers in [0, 1], got {levels}")
    return NoiseLevels(tuple(map(point, levels[:-1])), point(levels[-1]), at)
