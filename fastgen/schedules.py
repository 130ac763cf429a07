"""Noise schedules: how much signal is left at each timestep. float64, on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import checks
from .levels import NoiseLevels, Point, estimate_of, numbers

SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = ("epsilon", "sample", "v")


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """The signal level alpha_bar of a variance-preserving forward process at timesteps 0 ... N-1.

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

    alpha_bars: (N,), in [0, 1], not increasing; kept as a read-only float64 array.
    Raises ValueError for values out of range, increasing or not finite.
    """

    alpha_bars: np.ndarray

    def __post_init__(self) -> None:
        values = _floats("alpha_bars", self.alpha_bars)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"alpha_bars: got shape {values.shape}, expected (N,) with N >= 1")
        if not np.all((values >= 0) & (values <= 1)):  # NaN fails as well
            raise ValueError("alpha_bars: expected finite numbers in [0, 1]")
        if np.any(np.diff(values) > 0):
            raise ValueError("alpha_bars: expected a sequence that never increases")
        values.flags.writeable = False
        object.__setattr__(self, "alpha_bars", values)

    def __len__(self) -> int:
        return len(self.alpha_bars)

    def __repr__(self) -> str:
        first, last = self.alpha_bars[0], self.alpha_bars[-1]
        return f"NoiseSchedule({len(self)} timesteps, alpha_bar from {first:.6g} to {last:.6g})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return np.array_equal(self.alpha_bars, other.alpha_bars)

    def __hash__(self) -> int:
        return hash(self.alpha_bars.tobytes())

    def __reduce__(self):  # the copy's array is read-only as well
        return NoiseSchedule, (self.alpha_bars,)

    @classmethod
    def from_alpha_bars(cls, alpha_bars: Sequence[float] | np.ndarray) -> NoiseSchedule:
        """From the signal levels themselves, (N,): ``NoiseSchedule(alpha_bars)``."""
        return cls(alpha_bars)  # type: ignore[arg-type]

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> NoiseSchedule:
        """From the variances added at each timestep: alpha_bar_t = prod_{i <= t} (1 - beta_i).

        betas: (N,) in [0, 1]. Raises TypeError or ValueError for anything else.
        """
        betas = _floats("betas", betas)
        if betas.ndim != 1 or not np.all((betas >= 0) & (betas <= 1)):
            raise ValueError("betas: expected a sequence of finite numbers in [0, 1]")
        return cls(np.cumprod(1.0 - betas))

    @classmethod
    def linear(
        cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas evenly spaced: Ho, Jain & Abbeel (2020), section 4."""
        timesteps = checks.integer("timesteps", timesteps, 1)
        low, high = _betas(beta_start, beta_end)
        return cls.from_betas(np.linspace(low, high, timesteps))

    @classmethod
    def scaled_linear(
        cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of the betas evenly spaced: Rombach et al. (2022), latent diffusion."""
        timesteps = checks.integer("timesteps", timesteps, 1)
        low, high = _betas(beta_start, beta_end)
        return cls.from_betas(np.linspace(low**0.5, high**0.5, timesteps) ** 2)

    @classmethod
    def cosine(
        cls, timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """alpha_bar(t) = cos^2((t + s) / (1 + s) pi / 2): Nichol & Dhariwal (2021), eq. 17."""
        timesteps = checks.integer("timesteps", timesteps, 1)
        offset, max_beta = checks.number("offset", offset), checks.number("max_beta", max_beta)
        t = np.arange(timesteps + 1) / timesteps
        level = np.cos((t + offset) / (1.0 + offset) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1.0 - level[1:] / level[:-1], max_beta))

    @classmethod
    def sigmoid(
        cls,
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        limit: float = 6.0,
    ) -> NoiseSchedule:
        """Betas along a sigmoid over [-limit, limit]: Xu et al., GeoDiff (2022), appendix."""
        timesteps = checks.integer("timesteps", timesteps, 1)
        low, high = _betas(beta_start, beta_end)
        limit = checks.number("limit", limit)
        rise = 1.0 / (1.0 + np.exp(-np.linspace(-limit, limit, timesteps)))
        return cls.from_betas(low + (high - low) * rise)

    def rescaled_to_zero_terminal_snr(self) -> NoiseSchedule:
        """The last level moved to zero, the first kept: Lin et al. (2024), algorithm 1."""
        root = np.sqrt(self.alpha_bars)
        if root[0] == root[-1]:
            raise ValueError("alpha_bars: a constant schedule cannot be rescaled")
        level = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return NoiseSchedule(np.minimum.accumulate(level))

    def timesteps(self, steps: int, spacing: str = "trailing") -> np.ndarray:
        """``steps`` timesteps, from the noisiest down, int64.

        spacing: "trailing" ends on the last timestep, "leading" on the first, "linspace" on both
        (Lin et al. 2024, table 2). Raises ValueError for more steps than timesteps.
        """
        steps = checks.integer("steps", steps, 1)
        total = len(self)
        if steps > total:
            raise ValueError(f"steps: got {steps}, expected at most {total}, the schedule's length")
        checks.one_of("spacing", spacing, SPACINGS)
        if spacing == "trailing":
            chosen = np.round(total - np.arange(steps) * (total / steps)) - 1
        elif spacing == "leading":
            chosen = (np.arange(steps) * (total // steps))[::-1]
        else:
            chosen = np.round(np.linspace(0, total - 1, steps))[::-1]
        return chosen.astype(np.int64)

    def pairs(self, steps: int, spacing: str = "trailing") -> list[tuple[int, float, float]]:
        """(timestep t, alpha_bar at t, alpha_bar at the next timestep): one a step, ending at 1.

        Arguments and what is raised as for ``timesteps``.
        """
        chosen = self.timesteps(steps, spacing)
        levels = [*self.alpha_bars[chosen].tolist(), 1.0]
        return list(zip(chosen.tolist(), levels[:-1], levels[1:], strict=True))

    def levels(
        self, steps: int, *, prediction: str = "epsilon", spacing: str = "trailing"
    ) -> NoiseLevels:
        """The points of ``pairs`` for a solver. prediction: what the network predicts: "epsilon",
        "sample" or "v"."""
        pairs = self.pairs(steps, spacing)
        points = [self._point(a_t, float(t), prediction) for t, a_t, _ in pairs]
        end = Point(math.sqrt(pairs[-1][2]), math.sqrt(1.0 - pairs[-1][2]))
        return NoiseLevels(tuple(points), end, self._between(prediction), True)

    def levels_at(
        self, sigmas: Sequence[float] | np.ndarray, *, prediction: str = "epsilon"
    ) -> NoiseLevels:
        """Points at given sigma / alpha, (n + 1,), falling, as ``fastgen.sigmas`` makes them; what
        lies between two timesteps has a time between them, linear in log(sigma / alpha)."""
        at = self._between(prediction)
        *levels, last = numbers(sigmas)
        alpha = 1.0 / math.sqrt(1.0 + last * last)
        return NoiseLevels(tuple(map(at, levels)), Point(alpha, alpha * last), at)

    @property
    def sigmas(self) -> np.ndarray:
        """(N,) sigma / alpha at every timestep."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1.0 - self.alpha_bars) / self.alpha_bars)

    def _point(self, alpha_bar: float, time: float, prediction: str) -> Point:
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        checks.one_of("prediction", prediction, PREDICTIONS)
        return Point(alpha, sigma, time, 1.0, estimate_of(prediction, alpha, sigma))

    def _between(self, prediction: str) -> Callable[[float], Point]:
        """The point of a ratio sigma / alpha."""
        ratios = self.sigmas
        known = np.flatnonzero(np.isfinite(ratios) & (ratios > 0.0))
        logs = np.log(ratios[known])

        def at(ratio: float) -> Point:
            if not 0.0 < ratio < math.inf:
                raise ValueError(f"sigmas: got {ratio}, expected a finite number above 0")
            time = float(np.interp(math.log(ratio), logs, known))
            return self._point(1.0 / (1.0 + ratio * ratio), time, prediction)

        return at


def _floats(name: str, values: Any) -> np.ndarray:
    """A copy as float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: got {type(values).__name__}, expected a sequence of floats"
        ) from None


def _betas(start: Any, end: Any) -> tuple[float, float]:
    low, high = checks.number("beta_start", start), checks.number("beta_end", end)
    for name, beta in (("beta_start", low), ("beta_end", high)):
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"{name}: got {beta}, expected a number in [0, 1]")
    return low, high
