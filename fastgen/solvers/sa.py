"""SA-Solver, stochastic Adams methods: Xue, Yi, Luo, Zhang, Sun, Li & Ma (2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .dpm import DATA
from .multistep import past
from .rows import Clip, Rows, Weights, combined, first_order, levels_of, noise_of

Tau = float | Callable[[Point], float]
BASE = 3  # the slot of what the correction of a step has from its start; 0 to 2: former estimates


def moments(v: float, count: int) -> list[float]:
    """v int_0^1 e^(-v (1 - r)) r^k dr for k = 0 ... count - 1."""
    if abs(v) > 1.0:
        values = [-math.expm1(-v)]
        for k in range(1, count):
            values.append(1.0 - k / v * values[-1])
        return values
    values = []
    for k in range(count):  # the series, where the differences above cancel
        term = total = v / (k + 1)
        for j in range(1, 20):
            term *= -v / (k + j + 1)
            total += term
        values.append(total)
    return values


def coefficients(
    h: float, tau: float, ratios: list[float], data: bool, published: bool = False
) -> list[float]:
    """Of each estimate, in units of alpha (data) or -sigma (noise) at the end: the integral of its
    Lagrange polynomial with (1 + tau^2) e^(-(1 + tau^2) (1 - r) h), or e^((1 - r) h), sections 5.1
    and 5.2. ratios: r = (lambda - lambda_s) / h of each estimate, 1 for one at the step's end."""
    rate = 1.0 + tau * tau
    values = moments(rate * h if data else -h, len(ratios))
    if published and data and len(ratios) == 2:
        values[1] = 0.5 * rate * h
    powers = np.array([[r**k for r in ratios] for k in range(len(ratios))])
    scale = 1.0 if data else rate
    return [scale * b for b in np.linalg.solve(powers, np.array(values)).tolist()]


def _step(
    start: Point, end: Point, x: Weights, tau: float, nodes: list[tuple[Point, Weights]],
    data: bool, published: bool,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """(x_t, the deviation of its noise) from the estimates at the nodes."""
    h = end.log_snr - start.log_snr
    if data:
        of_x, outer = end.sigma / start.sigma * math.exp(-tau * tau * h), end.alpha
        deviation = end.sigma * math.sqrt(-math.expm1(-2.0 * tau * tau * h))
    else:
        of_x, outer = end.alpha / start.alpha, end.sigma
        deviation = tau * end.sigma * math.sqrt(math.expm1(2.0 * h))
    ratios = [(point.log_snr - start.log_snr) / h for point, _ in nodes]
    factors = coefficients(h, tau, ratios, data, published)
    terms = [(outer * f, m) for f, (_, m) in zip(factors, nodes, strict=True)]
    return combined((of_x, x), *terms), deviation


def _sa(
    levels: NoiseLevels, clip: Clip, predictor_order: int, corrector_order: int,
    taus: Sequence[float], data: bool, lower_order_final: bool, correct_end: bool, published: bool,
) -> Plan:  # fmt: skip
    """taus: of each step."""
    points = [*levels.points]
    if correct_end:
        points.append(levels.at(levels.end.ratio))
    rows, calls = Rows(levels, clip), len(points)
    closing: float | None = None  # of the estimate at the end of the step before, in its correction
    for i, at in enumerate(points):
        now: Weights = DATA if data else noise_of(at)
        x: Weights = {"x": 1.0}
        if closing is not None:
            x = combined((1.0, {f"h{BASE}": 1.0}), (closing, now))
        if i == len(levels):
            rows.add(at, None, x)
            break
        end = levels.end if i + 1 == len(levels) else points[i + 1]
        former: list[tuple[Point, Weights]] = [(at, now)]
        former += [(points[i - k], {past(i, k, 3): 1.0}) for k in range(1, min(i, 3) + 1)]
        former = [(point, m) for point, m in former if point.alpha > 0.0]
        left = calls - i if lower_order_final else 4
        kept = i + 1 < calls and max(predictor_order, corrector_order - 1) > 1
        keep: dict[int, Weights] = {i % 3: now} if kept else {}
        kept_noise: dict[int, tuple[float, ...]] = {}
        closing = None
        if end.sigma == 0.0 or at.alpha == 0.0:
            share = first_order(at, end)
            weights, deviation = combined((share["x"], x), (share["denoised"], DATA)), 0.0
            if taus[i] > 0.0 and at.alpha == 0.0:  # all of x is noise, of which none is kept
                weights, deviation = {"denoised": end.alpha}, end.sigma
        else:
            nodes = former[: min(predictor_order, left)]
            weights, deviation = _step(at, end, x, taus[i], nodes, data, published)
            if corrector_order and i + 1 < calls:
                there: tuple[Point, Weights] = (end, {"there": 1.0})
                nodes = [there, *former[: min(corrector_order, left + 1) - 1]]
                base, _ = _step(at, end, x, taus[i], nodes, data, published)
                closing = base.pop("there")
                keep[BASE], kept_noise[BASE] = base, (deviation,)
        rows.add(at, points[i + 1] if i + 1 < calls else None, weights, (deviation,), keep,
                 kept_noise)  # fmt: skip
    return rows.plan("sa_solver")


def sa_solver(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: Tau = 1.0,
    data: bool = True,
    lower_order_final: bool = True,
    correct_end: bool = False,
    published: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """SA-Solver: Xue et al. (2023), algorithm 1; one call a step, whose estimate first corrects the
    sample that it was made at, with the same noise.

    predictor_order: 1 to 4, the estimates that a step is made from. corrector_order: 1 to 4, those
    that it is corrected from, its end's among them; 0 for no correction. tau: how much noise,
    section 4: 0 is the ODE, 1 the SDE of the forward process's noise; or a function of the point
    where a step begins. data: the estimate of x_0 is integrated, else that of the noise.
    lower_order_final: the last steps are of lower order. correct_end: one more call at the end,
    which corrects the result. published: the second order with data as the authors' code and
    diffusers have it, for few steps: the term of the slope without its exponential weight, which
    leaves the order as it is. A last step to sigma = 0 is of first order. The rest as for
    ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    predictor_order = checks.integer("predictor_order", predictor_order, 1, 5)
    corrector_order = checks.integer("corrector_order", corrector_order, 0, 5)
    taus = [checks.number("tau", tau(p) if callable(tau) else tau) for p in levels.points]
    if any(t < 0.0 for t in taus):
        raise ValueError(f"tau: got {min(taus)}, expected at least 0")
    if correct_end and levels.end.sigma == 0.0:
        raise ValueError("correct_end: got True, but the run ends at sigma = 0, on the data")
    return _sa(levels, clip, predictor_order, corrector_order, taus, data, lower_order_final,
               correct_end, published)  # fmt: skip
