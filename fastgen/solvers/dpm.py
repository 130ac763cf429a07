"""DPM-Solver and DPM-Solver++: Lu, Zhou, Bao, Chen, Li & Zhu (2022a, 2022b), and their SDE forms.

lambda = log(alpha / sigma), h = lambda_t - lambda_s. "data": the estimate of x_0 is integrated
(DPM-Solver++); "noise": the estimate of eps (DPM-Solver).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .euler import _numbers
from .multistep import past
from .rows import Clip, Rows, Weights, combined, first_order, levels_of, noise_of

SAMPLE: Weights = {"x": 1.0}
DATA: Weights = {"denoised": 1.0}


def phi(h: float) -> tuple[float, float, float]:
    """(1 - e^-h, phi_2, phi_3): phi_2 = (e^-h - 1) / h + 1 and phi_3 = (e^-h - 1 + h) / h^2 - 1/2,
    the integrals of e^(s - h) with 1, s / h and s^2 / (2 h^2), each times h."""
    fall = math.expm1(-h)
    if abs(h) < 0.02:  # the series, where the differences cancel
        second = h / 2 - h**2 / 6 + h**3 / 24 - h**4 / 120
        third = -h / 6 + h**2 / 24 - h**3 / 120 + h**4 / 720
    else:
        second = fall / h + 1.0
        third = (fall + h) / h**2 - 0.5
    return -fall, second, third


def differences(
    now: Weights, before: Weights, earlier: Weights | None, r0: float, r1: float
) -> tuple[dict[str, float], dict[str, float]]:
    """First and second derivatives of the estimates by their divided differences, in units of h:
    Lu et al. (2022b), appendix; r0 = h_before / h, r1 = h_earlier / h."""
    first = combined((1.0 / r0, now), (-1.0 / r0, before))
    if earlier is None:
        return first, {}
    other = combined((1.0 / r1, before), (-1.0 / r1, earlier))
    change = combined((1.0, first), (-1.0, other))
    return (
        combined((1.0, first), (r0 / (r0 + r1), change)),
        combined((2.0 / (r0 + r1), change)),
    )


def data_step(
    start: Point,
    end: Point,
    m0: Weights,
    d1: Weights,
    d2: Weights,
    eta: float,
    kind: str,
    x: Weights = SAMPLE,
) -> dict[str, float]:
    """x_t from the estimate of x_0 and its differences, with noise of e^(-2 eta h) to follow: Lu et
    al. (2022b), eq. 8, and for eta = 1 eq. 14 (Gonzalez et al. 2023 for what lies between)."""
    h = end.log_snr - start.log_snr
    one, two, three = phi(h * (1.0 + eta))
    of_x = end.sigma / start.sigma * math.exp(-eta * h)
    halved = kind == "midpoint" and not d2
    return combined(
        (of_x, x), (end.alpha * one, m0),
        (end.alpha * (0.5 * one if halved else two), d1), (-end.alpha * three, d2),
    )  # fmt: skip


def noise_step(
    start: Point,
    end: Point,
    m0: Weights,
    d1: Weights,
    d2: Weights,
    sde: bool,
    kind: str,
    x: Weights = SAMPLE,
) -> dict[str, float]:
    """x_t from the estimate of eps and its differences: Lu et al. (2022a), eq. 3.3 to 3.5."""
    h = end.log_snr - start.log_snr
    one, two, three = phi(-h)  # 1 - e^h, ...
    twice = 2.0 if sde else 1.0
    halved = kind == "midpoint" and not d2
    half = twice * (0.5 * one if halved else two)
    return combined(
        (end.alpha / start.alpha, x), (twice * end.sigma * one, m0),
        (end.sigma * half, d1), (-twice * end.sigma * three, d2),
    )  # fmt: skip


def _multistep(
    levels: NoiseLevels, clip: Clip, solver: str, *, order: int, noise: bool = False,
    eta: float = 0.0, s_noise: float = 1.0, kind: str = "midpoint", lower_final: bool = False,
    published: bool = False, orders: Sequence[int] | None = None,
) -> Plan:  # fmt: skip
    """orders: of each step, where they are not those that order and lower_final give."""
    rows, count = Rows(levels, clip), len(levels)
    for i, (at, end) in enumerate(levels.pairs):
        known = min(order, i + 1)
        if lower_final:
            known = min(known, count - i)
        if orders is not None:
            known = orders[i]
        if end.sigma == 0.0 or at.alpha == 0.0:
            known = 1
        h = end.log_snr - at.log_snr
        m0 = noise_of(at) if noise else DATA
        d1: Weights = {}
        d2: Weights = {}
        if known > 1:
            former = [levels.points[i - k].log_snr for k in range(known)]
            steps = [(a - b) / h for a, b in itertools.pairwise(former)]
            earlier = {past(i, 2, 2): 1.0} if known > 2 else None
            d1, d2 = differences(m0, {past(i, 1, 2): 1.0}, earlier, *[*steps, 1.0][:2])
            if published:
                d2 = combined((0.5, d2))
        deviation = 0.0
        if end.sigma == 0.0 or at.alpha == 0.0:
            weights = first_order(at, end)
            if eta > 0.0 and at.alpha == 0.0:  # all of x is noise, of which none is kept
                weights, deviation = {"denoised": end.alpha}, end.sigma
        elif noise:
            weights = noise_step(at, end, m0, d1, d2, eta > 0.0, kind)
            deviation = end.sigma * math.sqrt(math.expm1(2.0 * h)) if eta > 0.0 else 0.0
        else:
            weights = data_step(at, end, m0, d1, d2, eta, kind)
            deviation = end.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))
        keep = {i % 2: m0} if order > 1 and i + 1 < count else {}
        rows.add(at, levels.next(i), weights, (s_noise * deviation,), keep)
    return rows.plan(solver)


KINDS = ("midpoint", "heun")


def dpm_multistep(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    kind: str = "midpoint",
    sde: bool = False,
    lower_order_final: bool = False,
    published: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver, multistep: Lu et al. (2022a), section 3, with the differences of (2022b).

    order: 1 to 3. kind: "midpoint" or "heun", the two forms of the second order. sde: the
    stochastic form, of orders 1 and 2. lower_order_final: the last steps are of lower order, as the
    first are (for few steps). published: with half of the second derivative, as the authors' code
    and libraries after it have it, which makes the third order a second one. A last step to
    sigma = 0 is of first order. The rest as for ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 3 if sde else 4)
    checks.one_of("kind", kind, KINDS)
    name = "sde_dpm_multistep" if sde else "dpm_multistep"
    return _multistep(levels, clip, name, order=order, noise=True, eta=float(sde), kind=kind,
                      lower_final=lower_order_final, published=published)  # fmt: skip


def dpmpp_multistep(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    kind: str = "midpoint",
    lower_order_final: bool = False,
    published: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver++, multistep: Lu et al. (2022b), algorithm 2 and its third order. Arguments as for
    ``dpm_multistep``."""
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 4)
    checks.one_of("kind", kind, KINDS)
    return _multistep(levels, clip, f"dpmpp_{order}m", order=order, kind=kind,
                      lower_final=lower_order_final, published=published)  # fmt: skip


def dpmpp_2m(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver++(2M), multistep, second order: Lu et al. (2022b), algorithm 2.

    The first step, and the last where it goes to noise level zero, are of first order. The rest as
    for ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    return _multistep(levels, clip, "dpmpp_2m", order=2)


def res_multistep(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Refined exponential solver, multistep, second order: Zhang et al. (2023). Its weights phi_1
    and phi_2 / c meet the order conditions exactly, with c = -h_before / h, and are those of
    ``dpmpp_multistep``'s kind "heun". The rest as for ``dpmpp_2m``."""
    levels = levels_of(levels, steps, prediction, spacing)
    return _multistep(levels, clip, "res_multistep", order=2, kind="heun")


def dpmpp_2m_sde(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    kind: str = "midpoint",
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """SDE-DPM-Solver++(2M): Lu et al. (2022b), appendix; eta between 0 (the ODE) and 1, and s_noise
    scales the noise. kind: "midpoint" or "heun". The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    eta, s_noise = _numbers(eta=eta, s_noise=s_noise)
    checks.one_of("kind", kind, KINDS)
    return _multistep(levels, clip, "dpmpp_2m_sde", order=2, eta=eta, s_noise=s_noise, kind=kind)


def dpmpp_3m_sde(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    published: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """SDE-DPM-Solver++ of third order, multistep: Lu et al. (2022b), Gonzalez et al. (2023, SEEDS).
    published: as for ``dpm_multistep``; the rest as for ``dpmpp_2m_sde``."""
    levels = levels_of(levels, steps, prediction, spacing)
    eta, s_noise = _numbers(eta=eta, s_noise=s_noise)
    return _multistep(levels, clip, "dpmpp_3m_sde", order=3, eta=eta, s_noise=s_noise, kind="heun",
                      published=published)  # fmt: skip
