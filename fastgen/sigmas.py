"""Noise levels sigma for a run of n steps: (n + 1,) float64, falling, the last one zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from . import checks
from .levels import _above_zero, numbers
from .schedules import NoiseSchedule


def _ends(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = checks.number("sigma_min", sigma_min), checks.number("sigma_max", sigma_max)
    if not 0.0 < low < high:
        raise ValueError(f"sigma_min, sigma_max: got {low} and {high}, expected 0 < min < max")
    return low, high


def _grid(steps: int) -> np.ndarray:
    """0 ... 1 in ``steps`` points."""
    steps = checks.integer("steps", steps, 1)
    return np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)


def _ended(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0)


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
    """Karras et al. (2022), eq. 5."""
    low, high = _ends(sigma_min, sigma_max)
    inverse = 1.0 / _above_zero("rho", rho)
    return _ended((high**inverse + _grid(steps) * (low**inverse - high**inverse)) ** rho)


def exponential(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0):
    """Logarithms evenly spaced: Song et al. (2021), the variance-exploding SDE."""
    return polyexponential(steps, sigma_min, sigma_max, 1.0)


def polyexponential(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 1.0
):
    """Logarithms along a power: ramp^rho, Crowson's k-diffusion (2022)."""
    low, high = _ends(sigma_min, sigma_max)
    ramp = (1.0 - _grid(steps)) ** _above_zero("rho", rho)
    return _ended(np.exp(ramp * (math.log(high) - math.log(low)) + math.log(low)))


def lu(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0):
    """Half log-SNRs evenly spaced on a variance-preserving path: Lu et al. (2022), section 3.4."""
    low, high = _ends(sigma_min, sigma_max)
    log_snr = np.linspace(-math.log(high), -math.log(low), checks.integer("steps", steps, 1))
    return _ended(np.exp(-log_snr))


def vp(steps: int, beta_d: float = 19.9, beta_min: float = 0.1, epsilon: float = 1e-3):
    """The continuous variance-preserving SDE at times evenly spaced from 1 down to epsilon: Song
    et al. (2021), in the notation of Karras et al. (2022), table 1."""
    beta_d, beta_min = _above_zero("beta_d", beta_d), _above_zero("beta_min", beta_min)
    if not 0.0 < checks.number("epsilon", epsilon) < 1.0:
        raise ValueError(f"epsilon: got {epsilon}, expected a number between 0 and 1")
    if beta_d + beta_min > 1000.0:
        raise ValueError(f"beta_d, beta_min: got {beta_d} and {beta_min}, beyond float64's range")
    t = 1.0 + _grid(steps) * (epsilon - 1.0)
    return _ended(np.sqrt(np.expm1(0.5 * beta_d * t * t + beta_min * t)))


def beta(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    alpha: float = 0.6,
    beta: float = 0.6,
):
    """Quantiles of a beta distribution between the ends, dense at both: Lee et al. (2024), in sigma
    where theirs is in timesteps (which ``beta_times`` has)."""
    low, high = _ends(sigma_min, sigma_max)
    return _ended(low + (high - low) * beta_quantiles(1.0 - _grid(steps), alpha, beta))


def ending_at(sigmas: Sequence[float] | np.ndarray, last: float) -> np.ndarray:
    """The same levels, but the run ends at ``last``, as in a table's smallest sigma, instead of
    zero. Raises ValueError for what is not below the level before."""
    levels = numbers(sigmas)
    if not 0.0 <= checks.number("last", last) < levels[-2]:
        raise ValueError(f"last: got {last}, expected a number from 0 up to {levels[-2]}")
    return np.append(levels[:-1], last)


# ---- from a table of levels, one a timestep ------------------------------------------------------


def uniform(steps: int, table: NoiseSchedule | Sequence[float] | np.ndarray):
    """From the last timestep evenly down to the first, both ends met, the logarithm interpolated:
    the grid of Crowson's k-diffusion (2022), "normal" in web interfaces.

    table: a NoiseSchedule, or its levels (N,), finite, above zero and rising, as in
    ``np.linspace(1e-3, 1.0, 1000)`` for straight paths.
    """
    logs = np.log(_table(table))
    return _ended(_at(logs, (len(logs) - 1) * (1.0 - _grid(steps))))


def sgm_uniform(steps: int, table: NoiseSchedule | Sequence[float] | np.ndarray):
    """From the last timestep evenly down, as if the zero behind the run were the first one:
    Stability AI's generative-models (2023). table: as for ``uniform``."""
    logs = np.log(_table(table))
    return _ended(
        _at(logs, np.linspace(len(logs) - 1, 0.0, checks.integer("steps", steps, 1) + 1)[:-1])
    )


def beta_times(
    steps: int,
    table: NoiseSchedule | Sequence[float] | np.ndarray,
    alpha: float = 0.6,
    beta: float = 0.6,
):
    """Timesteps at the quantiles 1, 1 - 1 / n, ... 1 / n of a beta distribution, dense at both
    ends: Lee et al. (2024), section 3. table: as for ``uniform``."""
    logs = np.log(_table(table))
    quantiles = beta_quantiles(
        np.linspace(1.0, 0.0, checks.integer("steps", steps, 1) + 1)[:-1], alpha, beta
    )
    return _ended(_at(logs, (len(logs) - 1) * quantiles))


def simple(steps: int, table: NoiseSchedule | Sequence[float] | np.ndarray):
    """The levels of whole timesteps, every N / n-th of them from the last down. table: as for
    ``uniform``; more steps than it has are a ValueError."""
    levels = _table(table, checks.integer("steps", steps, 1))
    return _ended(levels[len(levels) - 1 - np.arange(steps) * len(levels) // steps])


def ddim_uniform(steps: int, table: NoiseSchedule | Sequence[float] | np.ndarray):
    """The levels of whole timesteps, every floor(N / n)-th from the second up: those of DDIM's
    authors with Rombach et al.'s (2022) offset of one, which begin below the last level. table: as
    for ``uniform``, with more levels than steps, or it is a ValueError."""
    levels = _table(table, checks.integer("steps", steps, 1) + 1)
    return _ended(levels[np.arange(steps)[::-1] * (len(levels) // steps) + 1])


def _table(table: NoiseSchedule | Sequence[float] | np.ndarray, least: int = 1) -> np.ndarray:
    """(N,) levels, at least so many."""
    given = table.sigmas if isinstance(table, NoiseSchedule) else table
    levels = np.array(given, dtype=np.float64)
    if levels.ndim != 1 or not levels.size or not np.isfinite(levels).all() or levels[0] <= 0.0:
        raise ValueError("table: expected finite levels above zero, (N,)")
    if (np.diff(levels) <= 0.0).any():
        raise ValueError("table: expected levels that rise")
    if least > len(levels):
        raise ValueError(f"steps: got too many for a table of {len(levels)} levels")
    return levels


def _at(logs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Levels between timesteps."""
    return np.exp(np.interp(times, np.arange(len(logs)), logs))


# ---- for straight paths --------------------------------------------------------------------------


def flow(
    steps: int, shift: float = 1.0, *, power: float = 1.0, terminal: float | None = None
) -> np.ndarray:
    """1 ... 0 for straight paths, shifted towards noise: Esser et al. (2024), eq. 23.

        sigma' = shift / (shift + (1 / sigma - 1)^power)

    shift: 1 leaves the levels even; ``dynamic_shift`` has that of an image's size. terminal: the
    last level above zero, to which 1 - sigma is stretched (LTX-Video, HaCohen et al. 2024).
    """
    shift, power = _above_zero("shift", shift), _above_zero("power", power)
    sigma = np.linspace(1.0, 0.0, checks.integer("steps", steps, 1) + 1)
    high, low = shift * sigma**power, (1.0 - sigma) ** power
    sigma = high / (high + low)
    if terminal is None:
        return sigma
    if not 0.0 < checks.number("terminal", terminal) < 1.0:
        raise ValueError(f"terminal: got {terminal}, expected a number between 0 and 1")
    if steps > 1:
        sigma[:-1] = 1.0 - (1.0 - sigma[:-1]) * ((1.0 - terminal) / (1.0 - sigma[-2]))
    return sigma


def dynamic_shift(
    tokens: int,
    *,
    first: tuple[int, float] = (256, 0.5),
    last: tuple[int, float] = (4096, 1.15),
    kind: str = "exponential",
) -> float:
    """The shift of ``flow`` by the length of a sequence, as Black Forest Labs' Flux (2024) has it:
    mu on the line through first and last, each (tokens, mu), and also beyond them.

    kind: "exponential", e^mu, or "linear", mu itself. Raises ValueError for a shift that is not
    above zero.
    """
    tokens = checks.integer("tokens", tokens, 1)
    checks.one_of("kind", kind, ("exponential", "linear"))
    (low, below), (high, above) = first, last
    if low == high:
        raise ValueError(f"first, last: got {low} tokens in both")
    mu = below + (tokens - low) * (above - below) / (high - low)
    return math.exp(mu) if kind == "exponential" else _above_zero("shift", mu)


def linear_quadratic(steps: int, threshold: float = 0.025) -> np.ndarray:
    """For straight paths, evenly from 1 down to 1 - threshold in the first half of the steps, and
    on to 0 along a parabola of the same slope: Polyak et al. (2024), Movie Gen, section 3.4.2, with
    Mochi's (Genmo 2024) threshold."""
    steps = checks.integer("steps", steps, 1)
    if not 0.0 < checks.number("threshold", threshold) < 1.0:
        raise ValueError(f"threshold: got {threshold}, expected a number between 0 and 1")
    first = steps // 2
    if first == 0:
        return np.array([1.0, 0.0])
    slope = threshold / first
    k, rest = np.arange(steps + 1.0), steps - first
    curve = (1.0 - threshold - slope * rest) / rest**2
    return 1.0 - slope * k - curve * np.maximum(k - first, 0.0) ** 2


# ---- the beta distribution -----------------------------------------------------------------------


def beta_quantiles(shares: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """x with I_x(alpha, beta) = share, the regularized incomplete beta function: (n,) in [0, 1]."""
    alpha, beta = _above_zero("alpha", alpha), _above_zero("beta", beta)
    half = _incomplete_beta(np.array([0.5]), alpha, beta)[0]
    low = (shares <= half) & (shares < 1.0)
    x = np.empty_like(shares)
    x[low] = _lower_quantiles(shares[low], alpha, beta)
    x[~low] = 1.0 - _lower_quantiles(1.0 - shares[~low], beta, alpha)
    return x


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _incomplete_beta(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """I_x(a, b) for x in (0, 1/2], by the series of NIST's DLMF (8.17.8), whose terms are above
    zero: x^a (1 - x)^b / (a B(a, b)) (1 + (a + b) / (a + 1) x + ...)."""
    term = total = np.exp(a * np.log(x) + b * np.log1p(-x) - math.log(a) - _log_beta(a, b))
    n = 0
    while (term > 2.0**-54 * total).any():
        term = term * x * ((a + b + n) / (a + 1.0 + n))
        total, n = total + term, n + 1
    return total


def _lower_quantiles(shares: np.ndarray, a: float, b: float) -> np.ndarray:
    """Those of at most 1/2, by Newton's method in log x on log I, which begins with the first term
    of the series for x: on the side from which it cannot step over the root."""
    x = np.zeros_like(shares)
    above = shares > 0.0
    wanted = np.log(shares[above])
    log_x = np.minimum((wanted + math.log(a) + _log_beta(a, b)) / a, -math.log(2.0))
    for _ in range(100):
        at = np.exp(log_x)
        value = _incomplete_beta(at, a, b)
        rise = np.exp(a * log_x + (b - 1.0) * np.log1p(-at) - _log_beta(a, b)) / value
        change = (np.log(value) - wanted) / rise
        log_x = np.minimum(log_x - change, -math.log(2.0))
        if (np.abs(change) <= 2.0**-50).all():
            break
    x[above] = np.exp(log_x)
    return x
