"""UniPC, a unified predictor-corrector: Zhao, Bai, Rao, Zhou & Lu (2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .dpm import DATA
from .multistep import past
from .rows import Clip, Rows, Weights, combined, first_order, levels_of, noise_of

VARIANTS = ("bh1", "bh2")


def coefficients(h: float, ratios: list[float], variant: str, data: bool) -> tuple[list, float]:
    """(rho of each difference, B(h)): theorem 3.1 and eq. 5. ratios: of each difference r_k =
    (lambda_k - lambda_s) / h, 1 for the estimate at the end of the step."""
    hh = -h if data else h
    first = math.expm1(hh)
    scale = hh if variant == "bh1" else first
    order = len(ratios)
    if order == 1:  # the paper's special case, section 3.1
        return [0.5], scale
    right, value, factorial = [], first / hh - 1.0, 1.0
    for k in range(1, order + 1):
        factorial *= k
        right.append(value * factorial / scale)
        value = value / hh - 1.0 / (factorial * (k + 1))
    left = np.array([[r**k for r in ratios] for k in range(order)])
    return np.linalg.solve(left, np.array(right)).tolist(), scale


def _update(
    start: Point, end: Point, x: Weights, m0: Weights, others: list[tuple[float, Weights]],
    variant: str, data: bool,
) -> dict[str, float]:  # fmt: skip
    """From start to end: the exponential integrator of m0 and the differences (m_k - m_0) / r_k."""
    h = end.log_snr - start.log_snr
    first = -math.expm1(-h) if data else -math.expm1(h)
    of_x = end.sigma / start.sigma if data else end.alpha / start.alpha
    outer = end.alpha if data else end.sigma
    terms: list[tuple[float, Weights]] = [(of_x, x), (outer * first, m0)]
    if others:
        rhos, scale = coefficients(h, [r for r, _ in others], variant, data)
        for rho, (r, m) in zip(rhos, others, strict=True):
            terms += [(-outer * scale * rho / r, m), (outer * scale * rho / r, m0)]
    return combined(*terms)


def unipc(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    variant: str = "bh2",
    data: bool = True,
    corrector: bool = True,
    without_corrector: Sequence[int] = (),
    lower_order_final: bool = True,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """UniPC: Zhao et al. (2023), algorithms 1 to 4; one call a step, whose estimate first corrects
    the sample that it was made at.

    order: 1 to 3. variant: B(h) = h ("bh1") or e^h - 1 ("bh2"). data: the estimate of x_0 is
    integrated, else that of the noise. corrector: whether there is one; without_corrector: the
    steps that have none all the same. lower_order_final: the last
    steps are of lower order. A last step to sigma = 0 is of first order. The rest as for ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 4)
    checks.one_of("variant", variant, VARIANTS)
    rows, points, count = Rows(levels, clip), levels.points, len(levels)
    before = 0  # the order of the last prediction
    # slots 0 to 2: estimates of former steps; 3: the corrected sample of the last one
    for i, (at, end) in enumerate(levels.pairs):
        now: Weights = DATA if data else noise_of(at)

        def estimate(k: int, i: int = i, now: Weights = now) -> Weights:
            return now if k == 0 else {past(i, k, 3): 1.0}

        x: Weights = {"x": 1.0}
        corrects = corrector and i not in without_corrector
        if corrects and i > 0 and points[i - 1].alpha > 0.0:
            start = points[i - 1]
            h = at.log_snr - start.log_snr
            others = [((points[i - 1 - k].log_snr - start.log_snr) / h, estimate(k + 1))
                      for k in range(1, before)]  # fmt: skip
            x = _update(start, at, {"h3": 1.0}, estimate(1), [*others, (1.0, now)], variant, data)
        known = min(order, i + 1, count - i if lower_order_final else order)
        known = max(1, min(known, sum(p.alpha > 0.0 for p in points[: i + 1])))
        if end.sigma == 0.0 or at.alpha == 0.0:
            weights = combined((end.sigma / at.sigma, x),
                               (first_order(at, end)["denoised"], DATA))  # fmt: skip
        else:
            h = end.log_snr - at.log_snr
            others = [((points[i - k].log_snr - at.log_snr) / h, estimate(k))
                      for k in range(1, known)]  # fmt: skip
            weights = _update(at, end, x, now, others, variant, data)
        before = known
        keep = {} if i + 1 == count else {i % 3: now}
        if corrector and i + 1 < count:
            keep[3] = x
        rows.add(at, levels.next(i), weights, keep=keep)
    return rows.plan("unipc")
