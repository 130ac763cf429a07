"""What a network predicts, as linear forms of the sample x and its output e."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .. import checks
from ..levels import estimate_of
from ..schedules import PREDICTIONS

Pair = tuple[float, float]  # weights of x and e


def denoised(prediction: str, alpha_bar: float) -> Pair:
    """The estimate of x_0: Ho et al. (2020), eq. 15; for v Salimans & Ho (2022), appendix D.

    Raises ValueError for epsilon prediction without signal (alpha_bar = 0), where x_0 is lost.
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    return estimate_of(prediction, math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))


def epsilon(prediction: str, alpha_bar: float) -> Pair:
    """The estimate of the noise, from the same prediction."""
    signal, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v":
        return sigma, signal
    if sigma == 0.0:
        raise ValueError("alpha_bar: got 1, where sample prediction says nothing of the noise")
    return 1.0 / sigma, -signal / sigma


def _sum(a: float, b: float) -> float:
    return a + b if abs(a + b) > 4e-15 * (abs(a) + abs(b)) else 0.0


def folded(weights: Mapping[str, float], estimate: Pair) -> dict[str, float]:
    """Weights of x, e and the denoised sample as weights of x and e: where nothing is clipped. What
    the denoised sample cancels is zero, and no rounding of it is left for a kernel to read."""
    d = weights.get("denoised", 0.0)
    x = _sum(weights.get("x", 0.0), d * estimate[0])
    e = _sum(weights.get("e", 0.0), d * estimate[1])
    rest = {name: w for name, w in weights.items() if name not in ("x", "e", "denoised")}
    return {"x": x, "e": e} | rest
