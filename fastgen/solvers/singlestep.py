"""Exponential integrators with several calls a step: DPM-Solver and DPM-Solver++ (Lu, Zhou, Bao,
Chen, Li & Zhu 2022a, 2022b), RES (Zhang, Song & Chen 2023) and SEEDS (Gonzalez et al. 2023).

A step's stages are written over "x", the sample at its start, and "m0", "m1", ..., the estimates of
its calls; what a later stage has of earlier calls waits in a history slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .dpm import DATA, SAMPLE, data_step, noise_step
from .euler import _numbers, down_and_up
from .rows import Clip, Rows, Weights, combined, first_order, levels_of, noise_of


def dpmpp_2s_ancestral(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver++(2S), Lu et al. (2022b), algorithm 1 with r = 1/2, down to a lower level, and
    noise back up; eta = 0 is the solver itself. Second order; two calls a step, one in a last step
    to sigma = 0. The rest as for ``euler_ancestral``."""
    levels = levels_of(levels, steps, prediction, spacing)
    eta, s_noise = _numbers(eta=eta, s_noise=s_noise)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        down, up = down_and_up(at, end, eta)
        if down.sigma == 0.0 or at.alpha == 0.0:
            rows.add(at, levels.next(i), first_order(at, down), (s_noise * up,))
            continue
        middle = levels.at(math.sqrt(at.ratio * down.ratio))
        rows.add(at, middle, first_order(at, middle), keep={0: {"x": 1.0}})
        whole = first_order(at, down)
        weights = {"h0": whole["x"], "denoised": whole["denoised"]}
        rows.add(middle, levels.next(i), weights, (s_noise * up,))
    return rows.plan("dpmpp_2s_ancestral" if eta else "dpmpp_2s")


def dpmpp_sde(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    correlated: bool = True,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver++ (stochastic), two calls a step: Lu et al. (2022b), algorithm 1, each part going
    down and back up. r: where in log-SNR the middle lies. correlated: the noise of a whole step
    holds that of its first part, as Brownian motion's does. The rest as for
    ``euler_ancestral``."""
    levels = levels_of(levels, steps, prediction, spacing)
    eta, s_noise = _numbers(eta=eta, s_noise=s_noise)
    if not 0.0 < checks.number("r", r) < 1.0:
        raise ValueError(f"r: got {r}, expected a number between 0 and 1")
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        if end.sigma == 0.0 or at.alpha == 0.0:
            down, up = down_and_up(at, end, eta)
            rows.add(at, levels.next(i), first_order(at, down), (s_noise * up,))
            continue
        middle = levels.at(at.ratio ** (1.0 - r) * end.ratio**r)
        half, up_half = down_and_up(at, middle, eta)
        down, up = down_and_up(at, end, eta)
        whole, share = first_order(at, down), 0.5 / r
        # slot 0: what the step has of its start; slot 1: the first part's normal
        rest = {"x": whole["x"], "denoised": (1.0 - share) * whole["denoised"]}
        kept: dict[int, Weights] = {0: rest}
        weights = {"h0": 1.0, "denoised": share * whole["denoised"]}
        of_second = 1.0
        if correlated and up > 0.0:
            kept[1] = {}
            of_first = math.sqrt((at.ratio - middle.ratio) / (at.ratio - end.ratio))
            weights["h1"] = s_noise * up * of_first
            of_second = math.sqrt(1.0 - of_first**2)
        rows.add(at, middle, first_order(at, half), (s_noise * up_half,), kept, {1: (1.0,)})
        rows.add(middle, levels.next(i), weights, (s_noise * up * of_second,))
    return rows.plan("dpmpp_sde")


def dpm_singlestep(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 3,
    data: bool = True,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver++ (data) and DPM-Solver (not data), singlestep: Lu et al. (2022b), algorithm 1,
    and (2022a), algorithms 1 and 2. order: 2 or 3, and as many calls a step; one in a last step to
    sigma = 0. The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 2, 4)
    return _singlestep(levels, clip, f"dpm{'pp' if data else ''}_{order}s", order, data)


def res_singlestep(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    c2: float = 0.5,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Refined exponential solver, singlestep with two stages: Zhang et al. (2023). Its weights
    b_2 = phi_2 / c_2 and b_1 = phi_1 - b_2 meet the order conditions exactly, where
    DPM-Solver++(2S) has phi_1 / (2 c_2) for b_2. c2: where in log-SNR the second stage lies, as a
    share of the step, at most 1. Second order; two calls a step, one in a last step to sigma = 0.
    The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    if not 0.0 < checks.number("c2", c2) <= 1.0:
        raise ValueError(f"c2: got {c2}, expected a number above 0 and at most 1")
    return _singlestep(levels, clip, "res_singlestep", 2, True, kind="heun", nodes=(c2,))


def seeds_2(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    data: bool = True,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """SEEDS-2, of the reverse SDE: Gonzalez et al. (2023), algorithm 2. Two calls a step, one in a
    last step to sigma = 0; its stages share the noise of one Brownian path.

    data: the estimate of x_0 is integrated, which stays bounded in long steps; else that of eps.
    s_noise scales the noise. The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    (s_noise,) = _numbers(s_noise=s_noise)
    return _singlestep(levels, clip, "seeds_2", 2, data, sde=True, s_noise=s_noise)


def seeds_3(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    data: bool = True,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """SEEDS-3: Gonzalez et al. (2023), algorithm 3. Three calls a step; the rest as for
    ``seeds_2``."""
    levels = levels_of(levels, steps, prediction, spacing)
    (s_noise,) = _numbers(s_noise=s_noise)
    return _singlestep(levels, clip, "seeds_3", 3, data, sde=True, s_noise=s_noise)


def _singlestep(
    levels: NoiseLevels, clip: Clip, solver: str, order: int, data: bool, *, sde: bool = False,
    s_noise: float = 1.0, kind: str = "midpoint", nodes: tuple[float, ...] = (),
) -> Plan:  # fmt: skip
    """kind: of the second order. nodes: where the later calls are in log-SNR, as shares of the
    step."""
    rows = Rows(levels, clip)
    nodes = nodes or ((0.5,) if order == 2 else (1.0 / 3.0, 2.0 / 3.0))
    for i, (at, end) in enumerate(levels.pairs):
        if end.sigma == 0.0 or at.alpha == 0.0:
            weights, deviation = first_order(at, end), 0.0
            if sde and at.alpha == 0.0:  # all of x is noise, of which none is kept
                weights, deviation = {"denoised": end.alpha}, s_noise * end.sigma
            rows.add(at, levels.next(i), weights, (deviation,))
            continue
        calls = [at, *(levels.at(at.ratio ** (1.0 - c) * end.ratio**c) for c in nodes)]
        _add(rows, i, calls, _stages(calls, end, nodes, data, sde, kind), data,
             _noise_shares([*calls, end], data, s_noise if sde else 0.0))  # fmt: skip
    return rows.plan(solver)


def _stages(
    calls: list[Point], end: Point, nodes: tuple[float, ...], data: bool, sde: bool, kind: str
) -> list[dict[str, float]]:
    """The sample behind each call."""

    def moved(to: Point, d1: Weights, kind: str) -> dict[str, float]:
        if data:
            return data_step(calls[0], to, {"m0": 1.0}, d1, {}, float(sde), kind, SAMPLE)
        return noise_step(calls[0], to, {"m0": 1.0}, d1, {}, sde, kind, SAMPLE)

    def change(m: str, share: float) -> dict[str, float]:
        """The slope by a later estimate, in units of the step that it serves."""
        return {m: 1.0 / share, "m0": -1.0 / share}

    first = moved(calls[1], {}, "midpoint")
    if len(nodes) == 1:
        return [first, moved(end, change("m1", nodes[0]), kind)]
    second = moved(calls[2], change("m1", nodes[0] / nodes[1]), "heun")
    return [first, second, moved(end, change("m2", nodes[1]), "heun")]


def _noise_shares(points: list[Point], data: bool, s_noise: float) -> Callable[[int, int], float]:
    """(j, k) -> what the noise between the k-th and the next point comes to behind stage j, by the
    integral of the reverse SDE's noise with e^(lambda) (data) or e^(-lambda)."""

    def share(j: int, k: int) -> float:
        to, a, b = points[j + 1], points[k], points[k + 1]
        if s_noise == 0.0:
            return 0.0
        if data:
            gain = (to.ratio / b.ratio) ** 2 - (to.ratio / a.ratio) ** 2
            return s_noise * to.sigma * math.sqrt(gain)
        return s_noise * to.alpha * math.sqrt(a.ratio**2 - b.ratio**2)

    return share


def _add(
    rows: Rows,
    i: int,
    calls: list[Point],
    stages: list[dict[str, float]],
    data: bool,
    share: Callable[[int, int], float],
) -> None:
    """A step's rows. share: the factor in stage j of the normal that call k draws. Slot j - 1 keeps
    what stage j has so far."""
    for k, at in enumerate(calls):
        estimate = DATA if data else noise_of(at)
        so_far = {
            j: combined((1.0, {f"h{j - 1}": 1.0} if k else {"x": stages[j]["x"]}),
                        (stages[j].get(f"m{k}", 0.0), estimate))
            for j in range(k, len(stages))
        }  # fmt: skip
        keep = {j - 1: weights for j, weights in so_far.items() if j > k}
        noise = {j: (share(j + 1, k),) for j in keep}
        to = calls[k + 1] if k + 1 < len(calls) else rows.levels.next(i)
        rows.add(at, to, so_far[k], (share(k, k),), keep, noise)
