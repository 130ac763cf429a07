"""Denoising diffusion probabilistic models: Ho, Jain & Abbeel (2020)."""

from __future__ import annotations

import math

from .. import checks
from ..cache import cached_constant
from ..plan import Clip, Output, Plan, Row, clip_bounds
from ..schedules import NoiseSchedule
from .prediction import denoised, folded
from .rows import check_schedule

VARIANCES = ("fixed_small", "fixed_large", "learned")


@cached_constant
def ddpm_row(
    alpha_bar: float,
    alpha_bar_prev: float,
    prediction: str = "epsilon",
    clip: Clip = None,
    variance: str = "fixed_small",
    model_time: float = 0.0,
) -> Row:
    """From noise level t down to s: the posterior q(x_s | x_t, x_0), eq. 6 and 7.

    variance: "fixed_small" is the posterior's own (beta tilde), "fixed_large" beta, "learned" comes
    with the step as a log-variance. No noise is drawn where alpha_bar_prev = 1.
    """
    a_t = checks.alpha_bar("alpha_bar", alpha_bar)
    a_s = checks.alpha_bar("alpha_bar_prev", alpha_bar_prev)
    if a_s < a_t:
        raise ValueError(f"alpha_bar_prev: got {a_s}, expected at least alpha_bar ({a_t})")
    checks.one_of("variance", variance, VARIANCES)
    bounds = clip_bounds(clip)
    estimate = denoised(prediction, a_t)
    if a_s == a_t:  # no time passes
        beta, of_x, of_denoised, posterior = 0.0, 1.0, 0.0, 0.0
    else:
        beta = 1.0 - a_t / a_s
        of_x = math.sqrt(a_t / a_s) * (1.0 - a_s) / (1.0 - a_t)
        of_denoised = math.sqrt(a_s) * beta / (1.0 - a_t)
        posterior = beta * (1.0 - a_s) / (1.0 - a_t)
    noise = {"fixed_small": math.sqrt(posterior), "fixed_large": math.sqrt(beta), "learned": 1.0}
    scale = noise[variance] if a_s < 1.0 else 0.0
    weights = {"x": of_x, "denoised": of_denoised}
    level = (math.sqrt(a_t), math.sqrt(1.0 - a_t))
    if bounds is None:
        output = Output(folded(weights, estimate), (scale,))
        return Row((output,), model_time=model_time, level=level)
    return Row((Output(weights, (scale,)),), denoised=estimate, clip=bounds, model_time=model_time,
               level=level)  # fmt: skip


def ddpm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    variance: str = "fixed_small",
    spacing: str = "trailing",
) -> Plan:
    """Ancestral sampling: Ho, Jain & Abbeel (2020), algorithm 2, on a grid of ``steps`` timesteps.

    prediction: what the network predicts: "epsilon", "sample" or "v". clip: bounds of the estimate
    of x_0, a float or (low, high). variance: "fixed_small" or "fixed_large" (section 3.2).
    spacing: of the timesteps, see ``NoiseSchedule.timesteps``.

    Raises ValueError or TypeError for what does not fit.
    """
    checks.one_of("variance", variance, VARIANCES[:2])
    check_schedule(schedule, "ddpm", "euler_ancestral")
    rows = [
        ddpm_row(a_t, a_s, prediction, clip, variance, float(t))
        for t, a_t, a_s in schedule.pairs(steps, spacing)
    ]
    return Plan(tuple(rows), solver="ddpm")
