"""Denoising diffusion implicit models: Song, Meng & Ermon (2021)."""

from __future__ import annotations

import math

from .. import checks
from ..cache import cached_constant
from ..plan import Clip, Output, Plan, Row, clip_bounds
from ..schedules import NoiseSchedule
from .prediction import denoised, epsilon, folded
from .rows import check_schedule


@cached_constant
def ddim_row(
    alpha_bar: float,
    alpha_bar_prev: float,
    prediction: str = "epsilon",
    clip: Clip = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    model_time: float = 0.0,
    cfgpp: bool = False,
) -> Row:
    """From noise level t to s, eq. 12: predicted x_0, direction pointing to x_t, random noise."""
    if cfgpp and use_clipped_model_output:
        raise ValueError("cfgpp, use_clipped_model_output: got both, of which each says where the "
                         "noise is taken from")  # fmt: skip
    a_t = checks.alpha_bar("alpha_bar", alpha_bar)
    a_s = checks.alpha_bar("alpha_bar_prev", alpha_bar_prev)
    eta = checks.number("eta", eta)
    bounds = clip_bounds(clip)
    estimate = denoised(prediction, a_t)
    noise = direction = 0.0
    if a_s < 1.0:
        # sigma^2 = eta^2 (1 - a_s) / (1 - a_t) (1 - a_t / a_s), eq. 16; what is left of 1 - a_s
        share = 0.0
        if eta != 0.0:
            if not a_t < a_s:
                raise ValueError(f"eta: got {eta}, expected 0 where alpha_bar_prev <= alpha_bar")
            share = eta**2 * (1.0 - a_t / a_s) / (1.0 - a_t)
        if eta < 0.0 or share > 1.0 + 1e-12:
            raise ValueError(f"eta: got {eta}, beyond the noise that this step can hold")
        noise = math.sqrt((1.0 - a_s) * min(share, 1.0))
        direction = math.sqrt((1.0 - a_s) * max(1.0 - share, 0.0))
    weights = {"denoised": math.sqrt(a_s)}
    if direction != 0.0:
        if bounds is not None and use_clipped_model_output:  # (x - sqrt(a_t) d) / sqrt(1 - a_t)
            sigma_t = math.sqrt(1.0 - a_t)
            if sigma_t == 0.0:
                raise ValueError(
                    "alpha_bar: got 1, where the clipped x_0 says nothing of the noise"
                )
            weights["x"] = direction / sigma_t
            weights["denoised"] -= direction * math.sqrt(a_t) / sigma_t
        else:
            of_x, of_e = epsilon(prediction, a_t)
            weights |= {"x": direction * of_x, "u" if cfgpp else "e": direction * of_e}
    level = (math.sqrt(a_t), math.sqrt(1.0 - a_t))
    if bounds is None:
        output = Output(folded(weights, estimate), (noise,))
        return Row((output,), model_time=model_time, level=level)
    output = Output(weights, (noise,))
    return Row((output,), denoised=estimate, clip=bounds, model_time=model_time, level=level)


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    use_clipped_model_output: bool = False,
    cfgpp: bool = False,
    spacing: str = "trailing",
) -> Plan:
    """Denoising diffusion implicit models: Song, Meng & Ermon (2021), eq. 12.

    eta: 0 is deterministic, 1 has DDPM's variance. use_clipped_model_output: epsilon is derived
    again from the clipped estimate of x_0. cfgpp: CFG++, Chung et al. (2024), algorithm 2: x_0 from
    the guided output, for a guidance_scale between 0 and 1, and epsilon from the unconditional one
    alone, which every step must then be given. The rest as for ``ddpm``.
    """
    check_schedule(schedule, "ddim", "euler, or euler_ancestral for eta > 0,")
    rows = [
        ddim_row(a_t, a_s, prediction, clip, eta, use_clipped_model_output, float(t), cfgpp)
        for t, a_t, a_s in schedule.pairs(steps, spacing)
    ]
    return Plan(tuple(rows), solver="ddim")
