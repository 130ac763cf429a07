"""Noise levels sigma for a run of n steps: (n + 1,) float64, falling, the last one zero."""

from __future__ import annotations

import math

import numpy as np

from . import checks
from .levels import _above_zero


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


def flow(steps: int, shift: float = 1.0) -> np.ndarray:
    """1 ... 0 for straight paths, shifted towards noise: Esser et al. (2024), eq. 23.

    sigma' = shift sigma / (1 + (shift - 1) sigma)
    """
    shift = _above_zero("shift", shift)
    sigma = np.linspace(1.0, 0.0, checks.integer("steps", steps, 1) + 1)
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)
