"""The reparameterization trick and its KL term: Kingma & Welling (2014), 2.4, appendix B."""

from __future__ import annotations

from torch import Tensor

from .arithmetic import exp, per_sample_rows, sum_by_halves, working_dtype
from .step import clip


def deviation(logvar: Tensor, clamp: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(clamped log-variance, sigma = exp(logvar / 2))."""
    low, high = logvar.new_full((), clamp[0]), logvar.new_full((), clamp[1])
    clamped = clip(logvar, low, high)
    return clamped, exp(0.5 * clamped)


def reparameterize(
    mean: Tensor, logvar: Tensor, noise: Tensor, clamp: tuple[float, float]
) -> Tensor:
    """z = mean + exp(logvar / 2) eps, in float32 (float64 where an input has it)."""
    dtype = working_dtype(mean, logvar, noise)
    _, sigma = deviation(logvar.to(dtype), clamp)
    return mean.to(dtype) + sigma * noise.to(dtype)


def gaussian_kl(mean: Tensor, logvar: Tensor, clamp: tuple[float, float]) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) = sum (mean^2 + sigma^2 - 1 - log sigma^2) / 2 per sample."""
    dtype = working_dtype(mean, logvar)
    mean = mean.to(dtype)
    clamped, sigma = deviation(logvar.to(dtype), clamp)
    divergence = ((mean * mean + sigma * sigma) - 1.0) - clamped
    return 0.5 * sum_by_halves(per_sample_rows(divergence))
