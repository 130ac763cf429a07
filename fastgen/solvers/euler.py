"""Euler's method, its stochastic forms and the two-call methods of Karras et al. (2022).

All in y = x / alpha over s = sigma / alpha, where the probability flow is dy/ds = (y - x_0) / s:
Karras et al. (2022), eq. 4, and Song, Meng & Ermon (2021), eq. 14.
"""

from __future__ import annotations

import math

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .rows import Clip, Rows, Weights, cfgpp_step, combined, first_order, levels_of


def slope(at: Point) -> dict[str, float]:
    """dy/ds = (y - x_0) / s."""
    return {"x": 1.0 / at.sigma, "denoised": -1.0 / at.ratio}


def at_level(to: Point, y: Weights) -> dict[str, float]:
    """x = alpha y."""
    return combined((to.alpha, y))


def down_and_up(start: Point, end: Point, eta: float) -> tuple[Point, float]:
    """(the point to step down to, the deviation of the noise that leads up from there): ancestral
    sampling, whose variance at eta = 1 is DDPM's: Song, Meng & Ermon (2021), eq. 16."""
    s, t = start.ratio, end.ratio
    up = min(t, eta * math.sqrt(max(t * t * (1.0 - (t / s) ** 2), 0.0)))
    down = math.sqrt(max(t * t - up * up, 0.0))
    return Point(end.alpha, end.alpha * down), end.alpha * up


def _numbers(**values: float) -> tuple[float, ...]:
    for name, value in values.items():
        if value != math.inf and checks.number(name, value) < 0.0:
            raise ValueError(f"{name}: got {value}, expected at least 0")
    return tuple(float(v) for v in values.values())


def _churned(levels: NoiseLevels, s_churn: float, s_tmin: float, s_tmax: float) -> list[Point]:
    """The points where the network is called: noise is added before each call, algorithm 2."""
    gamma = min(s_churn / len(levels), math.sqrt(2.0) - 1.0)
    return [
        levels.at(p.ratio * (1.0 + gamma))
        if gamma > 0.0 and s_tmin <= p.ratio <= s_tmax and p.alpha > 0.0
        else p
        for p in levels.points
    ]


def _lift(end: Point, to: Point, s_noise: float) -> tuple[float, float]:
    """(factor of x, deviation) from a point up to a noisier one."""
    if to.ratio <= end.ratio:
        return 1.0, 0.0
    return to.alpha / end.alpha, to.alpha * s_noise * math.sqrt(to.ratio**2 - end.ratio**2)


def _first_scale(levels: NoiseLevels, first: Point) -> float:
    """Of a run that begins with noise added to its first sample: one normal of both deviations."""
    start = levels.points[0]
    return levels.initial_scale * (1.0 if first is start else first.sigma / start.sigma)


def euler(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    cfgpp: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Euler's method: Karras et al. (2022), algorithm 2 without its correction. First order.

    levels: ``NoiseLevels``; or a ``NoiseSchedule`` with ``steps``, what the network predicts and
    the spacing of the timesteps. clip: bounds of the estimate of x_0.
    s_churn, s_tmin, s_tmax, s_noise: of the noise added before each call, as in that algorithm
    (s_tmin and s_tmax bound sigma / alpha). Without it this is DDIM.
    cfgpp: as for ``ddim``.

    Raises ValueError or TypeError for what does not fit.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    churn = _numbers(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    seen, rows = _churned(levels, *churn[:3]), Rows(levels, clip)
    step = cfgpp_step if cfgpp else first_order
    for i, (at, (_, end)) in enumerate(zip(seen, levels.pairs, strict=True)):
        to = seen[i + 1] if i + 1 < len(seen) else None
        factor, deviation = (1.0, 0.0) if to is None else _lift(end, to, churn[3])
        rows.add(at, to, combined((factor, step(at, end))), (deviation,))
    return rows.plan("euler", _first_scale(levels, seen[0]))


def euler_ancestral(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    cfgpp: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Euler's method down to a lower level, and noise back up; with eta = 1 DDPM, with 0 DDIM:
    Song, Meng & Ermon (2021), eq. 12 and 16. s_noise scales the noise. The rest as for
    ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    eta, s_noise = _numbers(eta=eta, s_noise=s_noise)
    rows, step = Rows(levels, clip), cfgpp_step if cfgpp else first_order
    for i, (at, end) in enumerate(levels.pairs):
        down, up = down_and_up(at, end, eta)
        rows.add(at, levels.next(i), step(at, down), (s_noise * up,))
    return rows.plan("euler_ancestral")


def heun(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Heun's method: Karras et al. (2022), algorithm 2. Second order; two calls a step, one in a
    last step to sigma = 0. Arguments as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    churn = _numbers(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    seen, rows = _churned(levels, *churn[:3]), Rows(levels, clip)
    for i, (at, (_, end)) in enumerate(zip(seen, levels.pairs, strict=True)):
        to = seen[i + 1] if i + 1 < len(seen) else None
        if end.sigma == 0.0 or at.alpha == 0.0:
            rows.add(at, to, first_order(at, end))
            continue
        factor, deviation = (1.0, 0.0) if to is None else _lift(end, to, churn[3])
        h = end.ratio - at.ratio
        middle = levels.at(end.ratio) if end is levels.end else end
        base = at_level(end, combined((1.0 / at.alpha, {"x": 1.0}), (0.5 * h, slope(at))))
        rows.add(at, middle, first_order(at, end), keep={0: base})
        corrected = combined((1.0, {"h0": 1.0}), (0.5 * h * end.alpha, slope(middle)))
        rows.add(middle, to, combined((factor, corrected)), (deviation,))
    return rows.plan("heun", _first_scale(levels, seen[0]))


def dpm2(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """The midpoint method with the middle at the geometric mean of the levels: DPM-Solver-2, Lu et
    al. (2022), algorithm 1, on Karras et al.'s (2022) variables. Second order; two calls a step,
    one in a last step to sigma = 0. eta: 0 is deterministic, 1 ancestral ("DPM2 a"). The rest as
    for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    eta, *churn = _numbers(eta=eta, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    if eta > 0.0 and s_churn > 0.0:
        raise ValueError("eta, s_churn: got both, which are two ways to add the same noise")
    seen, rows = _churned(levels, *churn[:3]), Rows(levels, clip)
    for i, (at, (_, end)) in enumerate(zip(seen, levels.pairs, strict=True)):
        to = seen[i + 1] if i + 1 < len(seen) else None
        factor, deviation = (1.0, 0.0) if to is None else _lift(end, to, churn[3])
        down, up = down_and_up(at, end, eta)
        noise = (deviation or churn[3] * up,)
        if down.sigma == 0.0 or at.alpha == 0.0:
            rows.add(at, to, first_order(at, down), noise)
            continue
        middle = levels.at(math.sqrt(at.ratio * down.ratio))
        rows.add(at, middle, first_order(at, middle), keep={0: {"x": end.alpha / at.alpha}})
        h = down.ratio - at.ratio
        weights = combined((1.0, {"h0": 1.0}), (h * end.alpha, slope(middle)))
        rows.add(middle, to, combined((factor, weights)), noise)
    name = "dpm2" if eta == 0.0 else "dpm2_ancestral"
    return rows.plan(name, _first_scale(levels, seen[0]))


def gradient_estimation(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    gamma: float = 2.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Euler's method along gamma times this slope and 1 - gamma times the last one: Permenter &
    Yuan (2024), algorithm 2. The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    gamma = checks.number("gamma", gamma)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        h = end.alpha * (end.ratio - at.ratio)
        weights = first_order(at, end)
        if i > 0:
            weights = combined((1.0, weights), (h * (gamma - 1.0), slope(at)),
                               (h * (1.0 - gamma), {f"h{(i - 1) % 2}": 1.0}))  # fmt: skip
        rows.add(at, levels.next(i), weights, keep={i % 2: slope(at)})
    return rows.plan("gradient_estimation")
