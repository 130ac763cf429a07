"""k-diffusion's samplers by their own names and signatures, a kernel a step.

    from fastgen.integrations import k_diffusion as sampling
    x = sampling.sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": cond})

For everything written against ``k_diffusion.sampling``: model(x, sigma, **extra_args) returns the
denoised sample. k-diffusion itself is not needed.

Noise comes from torch's global generator, one ``randn_like`` a draw, in the same order as there:
the same seed gives the same sample. (There the SDE samplers draw from a Brownian tree of another
package instead; give its ``noise_sampler`` for the same noise.) With ``seed=`` it is made in the
kernel, a function of (seed, sample, step, element), and no noise tensor is made; a list has a seed
for each sample, whose noise does not depend on its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, solvers
from ..cache import cached_constant
from ..levels import NoiseLevels, denoiser_levels
from ..loop import Loop
from ..ops.noise import STEP_NOISE, randn
from ..plan import Plan

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Seed = int | Sequence[int] | Tensor | None

__all__ = [
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]


@cached_constant
def _plan(solver: Callable[..., Plan], sigmas: tuple[float, ...], **options: Any) -> Plan:
    return solver(_levels(sigmas), **options)


def _levels(sigmas: tuple[float, ...]) -> NoiseLevels:
    return denoiser_levels(sigmas)


@torch.no_grad()
def _run(
    solver: Callable[..., Plan],
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None,
    callback: Callable[[dict[str, Any]], None] | None,
    disable: bool | None,
    *,
    calls: int = 1,
    noise_sampler: NoiseSampler | None = None,
    seed: Seed = None,
    **options: Any,
) -> Tensor:
    """The plan's rows around the model; calls: how many a step takes, but for a last one to 0."""
    checks.tensor("x", x)
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas: got {type(sigmas).__name__}, expected a torch.Tensor")
    sigmas = sigmas if sigmas.is_floating_point() else sigmas.float()
    levels = tuple(sigmas.tolist())
    plan = _plan(solver, levels, **options)
    several = seed is not None and not isinstance(seed, int)
    ids = [0] * x.shape[0] if several else None  # a seed of its own makes a sample its own
    loop = Loop(plan, x, seed=seed, sample_ids=ids)
    churns = options.get("s_churn", 0.0) > 0.0
    if churns:  # there a normal is drawn before every step, used or not
        z, first = _initial(x, seed, ids), plan.rows[0].model_time
        up = options["s_noise"] * max(first**2 - levels[0] ** 2, 0.0) ** 0.5
        loop.x = x + up * z if up > 0.0 else x
    for step in _bar(len(levels) - 1, disable):
        rows = min(calls, len(plan) - loop.index)
        for call in range(rows):
            row = loop.row
            denoised = model(loop.x, loop.time.to(x.dtype), **(extra_args or {}))
            if callback is not None and call == 0:
                callback({"x": loop.x.clone(), "i": step, "sigma": sigmas[step],
                          "sigma_hat": sigmas.new_tensor(row.model_time),
                          "denoised": denoised})  # fmt: skip
            between = churns and call + 1 == rows and loop.index + 1 < len(plan)
            noise = None
            if seed is None and (row.noises or between):
                if noise_sampler is None:
                    noise = torch.randn_like(x)
                else:
                    inner = call == 0 and rows == 2
                    until = plan.rows[loop.index + 1].model_time if inner else levels[step + 1]
                    noise = noise_sampler(sigmas[step], sigmas.new_tensor(until))
            loop.step(denoised, noise=noise if row.noises else None)
    return loop.x


def _initial(x: Tensor, seed: Seed, ids: list[int] | None) -> Tensor:
    """Normals of what is added before the first call, at a step that no row takes."""
    if seed is None:
        return torch.randn_like(x)
    step = checks.MAX_STEPS - 1
    return randn(x.shape, seed=seed, sample_ids=ids, step=step, stream=STEP_NOISE,
                 device=x.device, dtype=x.dtype)  # fmt: skip


def _bar(count: int, disable: bool | None):
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(count)
    return trange(count, disable=disable)


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0,
                 s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, *,
                 seed: Seed = None) -> Tensor:  # fmt: skip
    """Euler's method, with churn: Karras et al. (2022), algorithm 2."""
    return _run(solvers.euler, model, x, sigmas, extra_args, callback, disable, seed=seed,
                s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)  # fmt: skip


def sample_euler_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0,
                           s_noise=1.0, noise_sampler=None, *,
                           seed: Seed = None) -> Tensor:  # fmt: skip
    """Euler's method down, and noise back up."""
    return _run(solvers.euler_ancestral, model, x, sigmas, extra_args, callback, disable,
                noise_sampler=noise_sampler, seed=seed, eta=eta, s_noise=s_noise)  # fmt: skip


def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0,
                s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, *,
                 seed: Seed = None) -> Tensor:  # fmt: skip
    """Heun's method: Karras et al. (2022), algorithm 2."""
    return _run(solvers.heun, model, x, sigmas, extra_args, callback, disable, calls=2, seed=seed,
                s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)  # fmt: skip


def sample_dpm_2(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0,
                 s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, *,
                 seed: Seed = None) -> Tensor:  # fmt: skip
    """DPM-Solver-2 with churn."""
    return _run(solvers.dpm2, model, x, sigmas, extra_args, callback, disable, calls=2, seed=seed,
                s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)  # fmt: skip


def sample_dpm_2_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0,
                           s_noise=1.0, noise_sampler=None, *,
                           seed: Seed = None) -> Tensor:  # fmt: skip
    """DPM-Solver-2 down, and noise back up."""
    return _run(solvers.dpm2, model, x, sigmas, extra_args, callback, disable, calls=2,
                noise_sampler=noise_sampler, seed=seed, eta=eta, s_noise=s_noise)  # fmt: skip


def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4) -> Tensor:
    """Linear multistep (Adams-Bashforth) on uneven levels."""
    return _run(solvers.lms, model, x, sigmas, extra_args, callback, disable, order=order)


def sample_dpmpp_2s_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None,
                              eta=1.0, s_noise=1.0, noise_sampler=None, *,
                              seed: Seed = None) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) down, and noise back up."""
    return _run(solvers.dpmpp_2s_ancestral, model, x, sigmas, extra_args, callback, disable,
                calls=2, noise_sampler=noise_sampler, seed=seed, eta=eta,
                s_noise=s_noise)  # fmt: skip


def sample_dpmpp_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0,
                     s_noise=1.0, noise_sampler=None, r=1 / 2, *,
                     seed: Seed = None) -> Tensor:  # fmt: skip
    """DPM-Solver++ (stochastic)."""
    return _run(solvers.dpmpp_sde, model, x, sigmas, extra_args, callback, disable, calls=2,
                noise_sampler=noise_sampler, seed=seed, eta=eta, s_noise=s_noise, r=r,
                correlated=noise_sampler is None)  # fmt: skip


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None) -> Tensor:
    """DPM-Solver++(2M)."""
    return _run(solvers.dpmpp_2m, model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2m_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0,
                        s_noise=1.0, noise_sampler=None, solver_type="midpoint", *,
                        seed: Seed = None) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++(2M)."""
    return _run(solvers.dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable,
                noise_sampler=noise_sampler, seed=seed, eta=eta, s_noise=s_noise,
                kind=solver_type)  # fmt: skip


def sample_dpmpp_3m_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0,
                        s_noise=1.0, noise_sampler=None, *,
                        seed: Seed = None) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++(3M), with k-diffusion's coefficients."""
    return _run(solvers.dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable,
                noise_sampler=noise_sampler, seed=seed, eta=eta, s_noise=s_noise,
                published=True)  # fmt: skip
