"""Whole loops around a network that costs next to nothing, beside those of diffusers and
k-diffusion: what a sampler itself takes. Times are of the loop, not of a step."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench.cases import SHAPES, pointwise
from fastgen.bench.plugin import close_to, drawn_from, tensors

SMALL = {shape: reason for shape, reason in SHAPES.items() if torch.Size(shape).numel() < 1 << 20}
STEPS = 20
SCHEDULE = fastgen.NoiseSchedule.linear()
PLANS = {
    "ddim": fastgen.solvers.ddim(SCHEDULE, STEPS),
    "ddpm": fastgen.solvers.ddpm(SCHEDULE, STEPS),
    "dpmpp_2m": fastgen.solvers.dpmpp_2m(SCHEDULE, STEPS),
}
CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def network(x, t=None, cond=None):
    """Its prediction of the noise: a tensor that is already there."""
    return x


def diffusers_loop(solver: str, device):
    try:
        import diffusers
    except ImportError:
        return {}
    more = {"clip_sample": False} if solver != "dpmpp_2m" else {"final_sigmas_type": "zero"}
    scheduler = getattr(diffusers, CLASSES[solver])(timestep_spacing="trailing", **more)

    def loop(x):
        scheduler.set_timesteps(STEPS, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return x

    return {"diffusers": loop}


def k_diffusion_loop(solver: str, device):
    """sample_dpmpp_2m, on x / sqrt(alpha_bar), in which the same solver has these noise levels."""
    if solver != "dpmpp_2m":
        return {}
    try:
        from k_diffusion import sampling
    except ImportError:
        return {}
    levels = [a for _, a, _ in SCHEDULE.pairs(STEPS)]
    sigmas = torch.tensor([((1 - a) / a) ** 0.5 for a in levels] + [0.0], device=device)
    scale = levels[0] ** -0.5

    def denoiser(x, sigma):  # of x_0, from the same epsilon: x / sqrt(1 + sigma^2)
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        return x - s * network(x / (1 + s * s).sqrt())

    return {
        "k-diffusion": lambda x: sampling.sample_dpmpp_2m(denoiser, x * scale, sigmas, disable=True)
    }


def moments(solver: str) -> tuple[float, float]:
    """(factor of x, deviation of the noise) of the whole loop, by the papers' formulas."""
    factor, variance, steps = 1.0, 0.0, SCHEDULE.pairs(STEPS)
    for _, a_t, a_s in steps:
        if solver == "ddim":
            m, s = (a_s / a_t) ** 0.5 * (1 - (1 - a_t) ** 0.5) + (1 - a_s) ** 0.5, 0.0
        else:
            beta = 1 - a_t / a_s
            m = (1 - beta / (1 - a_t) ** 0.5) / (1 - beta) ** 0.5
            s = beta * (1 - a_s) / (1 - a_t)
        factor, variance = m * factor, m * m * variance + s
    return factor, variance**0.5


@pytest.mark.parametrize(
    "case",
    [c for solver in PLANS
     for c in pointwise(f"{solver} loop", tensors=3 * STEPS, flops=3 * STEPS, shapes=SMALL)],
    ids=lambda case: f"{case.op} {case}",
)  # fmt: skip
def test_loop(case, race, device):
    solver = case.op.split()[0]
    plan = PLANS[solver]
    if solver == "ddpm":
        factor, deviation = moments(solver)
        check = drawn_from(lambda x: factor * x, lambda x: deviation)
    elif solver == "ddim":
        check = close_to(lambda x: moments(solver)[0] * x.double(), 1e-4)
    else:  # the plan in float64, by the reference
        check = close_to(lambda x: fastgen.sample(network, plan, x=x.double()), 1e-4)
    variants = {
        "fastgen": lambda x: fastgen.sample(network, plan, x=x, seed=0),
        **diffusers_loop(solver, device),
        **k_diffusion_loop(solver, device),
    }
    race(case, variants, tensors(case.shape, 1, device), check)
