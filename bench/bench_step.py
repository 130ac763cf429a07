"""ddim_step and ddpm_step beside eager PyTorch, torch.compile, diffusers and a plain torch.add."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import pointwise
from fastgen.bench.plugin import close_to, drawn_from, tensors
from fastgen.bench.variants import compiled, on_backends

STEPS, AT = 50, 20
T, A_T, A_S = fastgen.NoiseSchedule.linear().pairs(STEPS)[AT]
LARGE = 1 << 22  # elements, from where all that can write into given memory


def diffusers_step(name: str, device: torch.device):
    """A closure over one of diffusers' schedulers, or none where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return {}
    scheduler = getattr(diffusers, name)(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS, device=device)
    return {"diffusers": lambda x, e: scheduler.step(e, T, x)}


def written(shape, device) -> dict[str, torch.Tensor]:
    return {"out": torch.empty(shape, device=device)} if torch.Size(shape).numel() > LARGE else {}


def empty_kernel(device: torch.device):
    """A kernel that ends at once: what any launch takes."""
    return {"empty kernel": lambda x, e: torch.cuda._sleep(0)} if device.type == "cuda" else {}


@pytest.mark.parametrize("case", pointwise("ddim_step", tensors=3, flops=3), ids=str)
def test_ddim_step(case, race, device):
    given, out = written(case.shape, device), torch.empty(case.shape, device=device)

    def ours(backend):
        return lambda x, e: fastgen.ddim_step(x, e, A_T, A_S, backend=backend, **given)

    variants = {
        **on_backends("step", ours, case, device),
        **empty_kernel(device),
        "torch.add": lambda x, e: torch.add(x, e, **given),
        "copy_": lambda x, e: out.copy_(x),
        "eager": lambda x, e: eager.ddim_step(x, e, A_T, A_S),
        **compiled(lambda x, e: eager.ddim_step(x, e, A_T, A_S), device),
        **diffusers_step("DDIMScheduler", device),
    }
    expected = close_to(lambda x, e: eager.ddim_step(x.double(), e.double(), A_T, A_S), 1e-4)
    race(case, variants, tensors(case.shape, 2, device), expected)


@pytest.mark.parametrize("case", pointwise("ddpm_step", tensors=3, flops=5), ids=str)
def test_ddpm_step(case, race, device):
    given, out = written(case.shape, device), torch.empty(case.shape, device=device)

    def ours(backend):
        return lambda x, e: fastgen.ddpm_step(
            x, e, A_T, A_S, seed=0, step=1, backend=backend, **given
        )

    variants = {
        **on_backends("step", ours, case, device),
        "copy_": lambda x, e: out.copy_(x),
        "eager": lambda x, e: eager.ddpm_step(x, e, A_T, A_S),
        **compiled(lambda x, e: eager.ddpm_step(x, e, A_T, A_S), device),
        **diffusers_step("DDPMScheduler", device),
    }
    sigma = ((1 - A_T / A_S) * (1 - A_S) / (1 - A_T)) ** 0.5

    def mean(x, e):
        return fastgen.ddpm_step(x, e, A_T, A_S, noise=torch.zeros_like(x))

    race(case, variants, tensors(case.shape, 2, device), drawn_from(mean, lambda x, e: sigma))
