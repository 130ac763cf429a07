"""DPM-Solver++: Lu, Zhou, Bao, Chen, Li & Zhu (2022)."""

from __future__ import annotations

import math

from .. import checks
from ..plan import Output, Plan, Row
from ..schedules import NoiseSchedule
from .ddpm import Clip
from .prediction import denoised


def log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    if alpha_bar in (0.0, 1.0):
        return math.inf if alpha_bar else -math.inf
    return 0.5 * math.log(alpha_bar / (1.0 - alpha_bar))


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """DPM-Solver++(2M), multistep, second order: Lu et al. (2022), algorithm 2.

    The first step, and the last where it goes to noise level zero, are of first order. Arguments as
    for ``ddpm``; ValueError too where the schedule gives two steps the same noise level.
    """
    checks.instance("schedule", schedule, NoiseSchedule)
    bounds = None if clip is None else checks.interval("clip", clip)
    rows = []
    step_before = math.nan  # h_{i-1}
    for i, (t, a_t, a_s) in enumerate(schedule.pairs(steps, spacing)):
        if a_s == a_t:
            raise ValueError(
                f"schedule: two steps in a row at alpha_bar = {a_t}, expected it to fall"
            )
        lambda_t, lambda_s = log_snr(a_t), log_snr(a_s)
        h = lambda_s - lambda_t
        shrink = math.exp(-h)
        of_denoised = math.sqrt(a_s) * (1.0 - shrink)
        weights = {"x": math.sqrt((1.0 - a_s) / (1.0 - a_t)), "denoised": of_denoised}
        if i > 0 and a_s < 1.0:
            correction = h / (2.0 * step_before)  # 1 / (2 r), with r = h_{i-1} / h_i
            weights["denoised"] = of_denoised * (1.0 + correction)
            weights[f"h{(i - 1) % 2}"] = -of_denoised * correction
        outputs = [Output(weights)]
        if i + 1 < steps:
            outputs.append(Output({"denoised": 1.0}, target=i % 2))
        rows.append(
            Row(
                tuple(outputs), denoised=denoised(prediction, a_t), clip=bounds, model_time=float(t)
            )
        )
        step_before = h
    return Plan(tuple(rows), solver="dpmpp_2m")
