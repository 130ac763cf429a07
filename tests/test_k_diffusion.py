"""k-diffusion's samplers under its names: signatures, noise and its order, callbacks, numbers."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import fastgen
from fastgen import sigmas, solvers
from fastgen.integrations import k_diffusion as sampling
from fastgen.levels import denoiser_levels
from fastgen.testing import assert_bitwise

SIGMAS = torch.tensor(sigmas.karras(6, 0.05, 14.0), dtype=torch.float32)
X = 14.0 * fastgen.randn((3, 2, 5), seed=1)
ANCESTRAL = [n for n in sampling.__all__ if "ancestral" in n or "sde" in n]
CHURN = ["sample_euler", "sample_heun", "sample_dpm_2"]


def model(x, sigma, scale=1.0):
    s = sigma.view(-1, 1, 1)
    return 0.8 * torch.tanh(scale * x / (s * s + 1.0).sqrt()) + 0.1 * torch.sin(x / (1.0 + s))


@pytest.mark.parametrize("name", sampling.__all__)
def test_a_sampler_is_its_solver_on_the_sigmas(name):
    torch.manual_seed(3)
    actual = getattr(sampling, name)(model, X, SIGMAS, {"scale": 1.1}, None, True)
    solver = {
        "dpm_2": solvers.dpm2, "dpm_2_ancestral": lambda at: solvers.dpm2(at, eta=1.0),
        "dpmpp_3m_sde": lambda at: solvers.dpmpp_3m_sde(at, published=True),
    }.get(name[7:]) or getattr(solvers, name[7:])  # fmt: skip
    loop = fastgen.Loop(solver(denoiser_levels(SIGMAS.tolist())), X)
    torch.manual_seed(3)
    while not loop.done:
        denoised = model(loop.x, loop.time, 1.1)
        loop.step(denoised, noise=torch.randn_like(X) if loop.row.noises else None)
    assert_bitwise(actual, loop.x)


@pytest.mark.parametrize("name", ANCESTRAL)
def test_a_noise_sampler_is_asked_for_every_interval(name):
    asked = []

    def sampler(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros_like(X)

    getattr(sampling, name)(model, X, SIGMAS, disable=True, noise_sampler=sampler)
    steps = list(zip(SIGMAS[:-2].tolist(), SIGMAS[1:-1].tolist(), strict=True))
    if name == "sample_dpmpp_sde":
        middles = [(a, pytest.approx(math.sqrt(a * b))) for a, b in steps]
        steps = [pair for both in zip(middles, steps, strict=True) for pair in both]
    assert asked == steps


@pytest.mark.parametrize("name", [*ANCESTRAL, *CHURN])
def test_with_a_seed_a_sample_is_its_own(name):
    options = {"s_churn": 2.0} if name in CHURN else {}
    sampler = getattr(sampling, name)
    whole = sampler(model, X, SIGMAS, disable=True, seed=[4, 5, 6], **options)
    alone = sampler(model, X[1:2], SIGMAS, disable=True, seed=[5], **options)
    assert_bitwise(alone, whole[1:2])
    torch.manual_seed(0)
    assert_bitwise(sampler(model, X, SIGMAS, disable=True, seed=[4, 5, 6], **options), whole)


@pytest.mark.parametrize("name", sampling.__all__)
def test_the_callback_is_told_of_every_step(name):
    told = []
    getattr(sampling, name)(model, X, SIGMAS, callback=told.append, disable=True)
    assert [info["i"] for info in told] == list(range(6))
    assert [float(info["sigma"]) for info in told] == SIGMAS[:-1].tolist()
    assert_bitwise(told[0]["x"], X)
    for info in told:
        at = info["sigma_hat"] * torch.ones(3)
        assert_bitwise(info["denoised"], model(info["x"], at))
    assert not torch.equal(told[2]["x"], told[4]["x"])  # no buffer that is written again


@pytest.mark.parametrize("name", sampling.__all__)
def test_what_the_user_gave_is_left_alone(name):
    x, levels = X.clone(), SIGMAS.clone()
    getattr(sampling, name)(model, x, levels, disable=True)
    assert_bitwise(x, X)
    assert_bitwise(levels, SIGMAS)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.tensor([3.0, 1.0, 2.0, 0.0]), "levels that fall"),
        (torch.tensor([3.0, float("nan"), 0.0]), "finite"),
        (torch.tensor([3.0]), "at least two"),
        (torch.tensor([3.0, -1.0]), "not negative"),
    ],
)
def test_sigmas_that_do_not_fit_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample_euler(model, X, levels, disable=True)


@pytest.mark.parametrize("name", sampling.__all__)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_the_numbers_are_k_diffusions(name, steps):
    """Of a run in float64: at most twice k-diffusion's own error, or a few roundings."""
    theirs = pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed")
    assert (
        list(inspect.signature(getattr(theirs, name)).parameters)
        == list(inspect.signature(getattr(sampling, name)).parameters)[
            : len(inspect.signature(getattr(theirs, name)).parameters)
        ]
    )
    levels = torch.tensor(sigmas.karras(steps, 0.05, 14.0), dtype=torch.float32)

    def sampler(sigma, sigma_next):
        generator = torch.Generator().manual_seed(int(1e4 * float(sigma) + 10 * float(sigma_next)))
        return torch.randn(X.shape, generator=generator)

    options = {"noise_sampler": sampler} if name in ANCESTRAL else {}
    exact = {"noise_sampler": lambda a, b: sampler(a, b).double()} if options else {}
    truth = getattr(theirs, name)(model, X.double(), levels.double(), None, None, True, **exact)
    other = getattr(theirs, name)(model, X, levels, None, None, True, **options)
    ours = getattr(sampling, name)(model, X, levels, None, None, True, **options)
    bound = max(2 * float((other - truth).abs().max()), 4e-7 * float(truth.abs().max()))
    assert float((ours - truth).abs().max()) <= bound
