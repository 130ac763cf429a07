"""Few-step samplers of distilled models: an estimate of x_0, and noise again."""

from __future__ import annotations

import math

from .. import checks
from ..levels import NoiseLevels
from ..plan import Plan
from ..schedules import NoiseSchedule
from .euler import _numbers
from .rows import Clip, Rows, check_schedule, levels_of


def lcm(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    sigma_data: float = 0.5,
    time_scale: float = 10.0,
    boundary: bool = True,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Multistep sampling of a consistency model: Song et al. (2023), algorithm 1, on a latent
    consistency model's levels: Luo et al. (2023), algorithm 3.

        x_0 = c_skip x + c_out d,  x_s = alpha_s x_0 + sigma_s z

    boundary: whether c_skip = s^2 / (t'^2 + s^2) and c_out = t' / sqrt(t'^2 + s^2) are used, of
    s = sigma_data and t' = time_scale t (Luo et al., appendix C); else x_0 = d, as flow models have
    it. The rest as for ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    sigma_data, time_scale = _numbers(sigma_data=sigma_data, time_scale=time_scale)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        skip, out = 0.0, 1.0
        if boundary:
            t = time_scale * at.time
            total = t * t + sigma_data * sigma_data
            skip, out = sigma_data**2 / total, t / math.sqrt(total)
        weights = {"x": end.alpha * skip, "denoised": end.alpha * out}
        rows.add(at, levels.next(i), weights, (end.sigma,))
    return rows.plan("lcm")


def consistency(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    sigma_min: float = 0.002,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Multistep sampling of a consistency model on noise levels: Song et al. (2023), algorithm 1,
    whose noise has the variance sigma^2 - sigma_min^2. The rest as for ``euler``."""
    levels = levels_of(levels, steps, prediction, spacing)
    sigma_min, s_noise = _numbers(sigma_min=sigma_min, s_noise=s_noise)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        deviation = math.sqrt(max(end.ratio**2 - sigma_min**2, 0.0))
        rows.add(at, levels.next(i), {"denoised": end.alpha}, (end.alpha * s_noise * deviation,))
    return rows.plan("consistency")


def tcd(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.3,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Strategic stochastic sampling of a trajectory consistency model: Zheng et al. (2024),
    algorithm 4.

        x_u = sqrt(a_u) x_0 + sqrt(1 - a_u) eps at u = floor((1 - eta) s), and noise up to s

    eta: gamma, 0 deterministic, 1 all noise. The rest as for ``ddpm``.
    """
    check_schedule(schedule, "tcd", "lcm or euler_ancestral")
    if not 0.0 <= checks.number("eta", eta) <= 1.0:
        raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
    levels = schedule.levels(steps, prediction=prediction, spacing=spacing)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        last = i + 1 == len(levels)
        s = 0 if last else int(levels.points[i + 1].time)
        a_u = float(schedule.alpha_bars[int((1.0 - eta) * s)])
        a_s = 1.0 if last else end.alpha**2
        scale = 1.0 if last else math.sqrt(a_s / a_u)
        sigma_u = math.sqrt(1.0 - a_u)
        weights = {
            "x": scale * sigma_u / at.sigma,
            "denoised": scale * (math.sqrt(a_u) - sigma_u * at.alpha / at.sigma),
        }
        noise = 0.0 if last or eta == 0.0 else math.sqrt(1.0 - a_s / a_u)
        rows.add(at, levels.next(i), weights, (noise,))
    return rows.plan("tcd")
