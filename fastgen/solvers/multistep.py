"""Linear multistep methods: one call a step, former estimates of the noise are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .rows import Clip, Rows, combined, first_order, levels_of, noise_of

ADAMS_BASHFORTH = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24))  # fmt: skip
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


def past(i: int, back: int, slots: int) -> str:
    """The history slot of the estimate made ``back`` steps before step i."""
    return f"h{(i - back) % slots}"


def by_noise(start: Point, end: Point, factors: list[float], names: list[dict]) -> dict[str, float]:
    """x_t = (alpha_t / alpha) x + sum_j factors_j eps_j, in units of x."""
    terms = [(end.alpha / start.alpha, {"x": 1.0})]
    terms += [(factor, name) for factor, name in zip(factors, names, strict=True)]
    return combined(*terms)


def log_level(ratio: float) -> float:
    """log(sigma / alpha), DEIS's variable."""
    return math.log(ratio) if ratio > 0.0 else -math.inf


def _quadrature(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of Gauss-Legendre on an interval."""
    return 0.5 * (high - low) * _NODES + 0.5 * (high + low), 0.5 * (high - low) * _WEIGHTS


def integral(low: float, high: float, of: Callable[[float], float]) -> float:
    """int_low^high of(s) ds for a smooth function."""
    points, scale = _quadrature(low, high)
    return float((scale * np.array([of(p) for p in points])).sum())


def lagrange_integrals(
    low: float, high: float, nodes: list[float], of: Callable[[float], float]
) -> list[float]:
    """int_low^high l_j(of(s)) ds for the Lagrange polynomials l_j on the nodes."""
    points, scale = _quadrature(low, high)
    values = np.array([of(p) for p in points])
    integrals = []
    for j, node in enumerate(nodes):
        basis = np.ones_like(values)
        for k, other in enumerate(nodes):
            if k != j:
                basis *= (values - other) / (node - other)
        integrals.append(float((scale * basis).sum()))
    return integrals


def _adams(
    levels: NoiseLevels,
    order: int,
    clip: Clip,
    solver: str,
    variable: Callable[[float], float],
    orders: Sequence[int] | None = None,
) -> Plan:
    """dy = eps ds with eps as the polynomial through its last values in a variable of s; orders: of
    each step, where they do not rise to ``order`` alone."""
    rows, slots = Rows(levels, clip), max(order, 2)
    for i, (at, end) in enumerate(levels.pairs):
        known = min(order, i + 1) if orders is None else orders[i]
        known = min(known, max(1, sum(p.alpha > 0.0 for p in levels.points[: i + 1])))
        if at.alpha == 0.0 or (end.sigma == 0.0 and not math.isfinite(variable(0.0))):
            known = 1  # the polynomial has no value where the run begins, or ends
        former = [levels.points[i - k] for k in range(known)]
        nodes = [variable(p.ratio) for p in former]
        weights = first_order(at, end)
        if known > 1:
            factors = lagrange_integrals(at.ratio, end.ratio, nodes, variable)
            names = [noise_of(at), *({past(i, k, slots): 1.0} for k in range(1, known))]
            weights = by_noise(at, end, [end.alpha * f for f in factors], names)
        keep = {i % slots: noise_of(at)} if i + 1 < len(levels) and order > 1 else {}
        rows.add(at, levels.next(i), weights, keep=keep)
    return rows.plan(solver)


def lms(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 4,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Adams-Bashforth on uneven steps: the integral over sigma / alpha of the polynomial through
    the last estimates of the noise (Hairer, Norsett & Wanner 1993, III.5). order: 1 to 4. The rest
    as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 5)
    return _adams(levels, order, clip, "lms", lambda s: s)


def deis(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 3,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Exponential integrator: Zhang & Chen (2023), eq. 15, the polynomial in log(sigma / alpha); a
    last step to sigma = 0 is of first order. order: 1 to 4. The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 5)
    return _adams(levels, order, clip, "deis", log_level)


def ipndm(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 4,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """The pseudo linear multistep method with the coefficients of even steps, of lower order in the
    first steps: Liu et al. (2022), eq. 12, and Zhang & Chen (2023), appendix. order: 1 to 4. The
    rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 5)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        factors = ADAMS_BASHFORTH[min(order, i + 1) - 1]
        names = [noise_of(at), *({past(i, k, 4): 1.0} for k in range(1, len(factors)))]
        weights = _transferred(at, end, combined(*zip(factors, names, strict=True)))
        keep = {i % 4: noise_of(at)} if i + 1 < len(levels) and order > 1 else {}
        rows.add(at, levels.next(i), weights, keep=keep)
    return rows.plan("ipndm")


def _transferred(at: Point, end: Point, noise: dict[str, float]) -> dict[str, float]:
    """The transfer of Liu et al. (2022), eq. 11: DDIM's step along an estimate of the noise."""
    if at.alpha == 0.0:  # of which all of x is
        return first_order(at, end)
    return combined(
        (end.alpha / at.alpha, {"x": 1.0}), (end.sigma - end.alpha * at.sigma / at.alpha, noise)
    )


def pndm(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """F-PNDM: three steps of the pseudo Runge-Kutta method (four calls each), then the pseudo
    linear multistep method: Liu et al. (2022), algorithm 2. The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        if i < 3 and end.sigma > 0.0 and at.alpha > 0.0:
            _runge_kutta(rows, levels, i, at, end)
            continue
        factors = ADAMS_BASHFORTH[min(3, i)]
        names = [noise_of(at), *({past(i, k, 4): 1.0} for k in range(1, len(factors)))]
        weights = _transferred(at, end, combined(*zip(factors, names, strict=True)))
        rows.add(at, levels.next(i), weights, keep={i % 4: noise_of(at)})
    return rows.plan("pndm")


def _runge_kutta(rows: Rows, levels: NoiseLevels, i: int, at: Point, end: Point) -> None:
    """e' = (e_1 + 2 e_2 + 2 e_3 + e_4) / 6: slot i keeps e_1, 5 the sum behind it, 6 the sample."""
    middle = levels.at(math.sqrt(at.ratio * end.ratio))
    last = levels.at(end.ratio) if end is levels.end else end
    e, x, total = noise_of, {"h6": 1.0}, {"h5": 1.0}
    rows.add(at, middle, _transferred(at, middle, e(at)),
             keep={i: e(at), 6: {"x": 1.0}})  # fmt: skip

    def moved(to: Point, noise: dict[str, float]) -> dict[str, float]:
        return combined(
            (to.alpha / at.alpha, x), (to.sigma - to.alpha * at.sigma / at.alpha, noise)
        )

    first = {5: combined((1.0, {f"h{i}": 1.0}), (2.0, e(middle)))}
    rows.add(middle, middle, moved(middle, e(middle)), keep=first)
    both = {5: combined((1.0, total), (2.0, e(middle)))}
    rows.add(middle, last, moved(end, e(middle)), keep=both)
    mean = combined((1.0 / 6.0, total), (1.0 / 6.0, e(last)))
    rows.add(last, levels.next(i), moved(end, mean))
